"""soft_sac.py and residual_sac.py run, resume and repeat themselves on real MuJoCo, and end bad input in one line."""

import json
import re
import shutil

import flax.serialization
import numpy as np
import pytest
import tyro
from conftest import ROOT, SAC_PENDULUM, SAC_SCRIPTS, read_metrics, read_policy, run_main
from test_failures import files, stop_message
from test_runs import without_clock

import enjoy
import residual_ppo
import residual_sac
import soft_sac


@pytest.mark.parametrize("name", SAC_SCRIPTS)
def test_run_is_complete(sac_runs, name):
    """One row per iteration, finite; learning begins when the buffer holds enough; nothing unexpected left behind."""
    process, folder = sac_runs[name]
    rows = read_metrics(folder)
    assert [row["global_step"] for row in rows] == [str(128 * i) for i in range(1, 9)]
    assert process.stderr == ""
    assert all(np.isfinite(float(row[x])) for row in rows for x in ("entropy", "policy_loss", "value_loss"))
    learning = [float(row["value_loss"]) > 0 for row in rows]
    assert not learning[0] and all(learning[4:])
    assert len({row["param_norm"] for row in rows}) == 1 + sum(learning)
    expected = {"args.json", "metrics.csv", "checkpoint.msgpack", "policy.safetensors", "eval.json"}
    expected |= {"learning_curve.png"} | ({"prior.safetensors"} if name == "residual_sac" else set())
    left = {path.name for path in folder.iterdir()}
    assert {path for path in left if not path.startswith("events.out.tfevents.")} == expected
    assert (folder / "checkpoint.msgpack").stat().st_size < 1e6  # the buffer is not in it
    assert {path.name for path in folder.parents[1].iterdir()} == {"runs"}


def test_policy_of_soft_sac_is_a_prior_for_every_script(sac_runs, tmp_path):
    """With a deviation that depends on the state, its temperature, discount and survival reward; enjoy.py plays it."""
    path = sac_runs["soft_sac"].folder / "policy.safetensors"
    tensors, metadata = read_policy(path)
    assert tensors["actor_logstd.weight"].shape == (1, 32)
    assert {"alpha": "0.1", "gamma": "0.99", "squash": "true", "activation": "relu"}.items() <= metadata.items()
    episodes = json.loads((path.parent / "eval.json").read_text())["policy"]["episodes"]["stochastic"]
    steps = np.sum(episodes["length"])
    log_prob = np.dot(episodes["log_prob"], episodes["length"])
    survival_reward = (np.sum(episodes["basic"]) - 0.1 * log_prob) / steps
    assert float(metadata["survival_reward"]) == pytest.approx(survival_reward)
    for script, scales in ((residual_ppo, residual_ppo.PPO_SCALES), (residual_sac, residual_sac.SAC_SCALES)):
        policy, info = script.load_policy(path)
        args = script.resolve_args(script.Args(env_id="InvertedPendulum-v4", omega=0.5), policy, info, scales)
        alpha_hat = 0.1 / 3 if script is residual_ppo else 0.1
        assert (args.omega_prime, args.alpha_hat) == pytest.approx((3 * 0.5 * 0.1, alpha_hat))
    obs = np.float32([[0.1, -0.2, 0.3, 0.4]])
    ours = residual_ppo.action_distribution(policy, obs)
    for a, b in zip(ours, enjoy.mean_and_log_std(enjoy.read_policy(path), obs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_customised_policy_has_the_prior_s_form_and_normaliser_and_starts_as_it(sac_runs):
    folder = sac_runs["residual_sac"].folder
    assert (folder / "prior.safetensors").read_bytes() == (ROOT / "priors" / "Hopper-v4.safetensors").read_bytes()
    before, after = (read_policy(folder / f"{name}.safetensors")[0] for name in ("prior", "policy"))
    np.testing.assert_array_equal(after["obs_mean"], before["obs_mean"])
    assert {name: x.shape for name, x in after.items()} == {name: x.shape for name, x in before.items()}
    assert (after["actor_mean.0.weight"] != before["actor_mean.0.weight"]).any()
    divergences = [float(row["kl_to_prior"]) for row in read_metrics(folder)]
    assert abs(divergences[0]) < 1e-6 < 1e-4 < abs(divergences[-1])
    assert json.loads((folder / "eval.json").read_text()).keys() == {"prior", "customised"}


def test_same_seed_gives_the_same_run_which_can_be_interrupted_and_resumed(sac_runs, tmp_path, monkeypatch):
    """Bit by bit until it is interrupted after 5 iterations; resumed, it refills its buffer and learns at once."""
    train, states = soft_sac.train_off_policy, []

    def train_and_stop(*inputs):
        *inputs, log = inputs

        def log_and_stop(iteration, state, metrics):
            log(iteration, state, metrics)
            states.append(state)
            if len(states) == 5:
                raise KeyboardInterrupt

        return train(*inputs, log_and_stop)

    with monkeypatch.context() as patch:
        patch.setattr(soft_sac, "train_off_policy", train_and_stop)
        args = tyro.cli(soft_sac.Args, args=[*map(str, SAC_PENDULUM), "--runs-dir", str(tmp_path / "runs")])
        with pytest.raises(KeyboardInterrupt):
            run_main(soft_sac, args)
    (interrupted,) = (tmp_path / "runs").iterdir()
    rows = read_metrics(sac_runs["soft_sac"].folder)
    assert without_clock(read_metrics(interrupted)) == without_clock(rows[:5])
    saved = flax.serialization.msgpack_restore((interrupted / "checkpoint.msgpack").read_bytes())
    assert (saved["iteration"], saved["num_updates"]) == (5, int(states[-1].num_updates))

    run_dir = shutil.copytree(interrupted, tmp_path / "run")  # this process keeps the lock of the other
    run_main(soft_sac, soft_sac.Args(resume=run_dir))
    assert [row["global_step"] for row in read_metrics(run_dir)] == [row["global_step"] for row in rows]
    assert all(float(row["value_loss"]) > 0 for row in read_metrics(run_dir)[4:])
    assert (run_dir / "eval.json").exists()
    assert "complete" in stop_message("soft_sac", "--resume", run_dir)
    assert "residual_sac.py" in stop_message("residual_sac", "--resume", run_dir)


BAD_INPUT = {
    "unknown env": ("soft_sac", ("--env-id", "Unicorn-v5"), "Unicorn-v5.*list_all_envs"),
    "no whole gradient step": ("soft_sac", ("--updates-per-step", 0.001), "--updates-per-step"),
    "half a gradient step": ("soft_sac", ("--updates-per-step", 0.25 + 1 / 512), "--updates-per-step"),
    "buffer below an iteration": ("soft_sac", ("--buffer-size", 255, "--learning-starts", 0), "--buffer-size"),
    "learning starts beyond the buffer": ("soft_sac", ("--buffer-size", 300, "--learning-starts", 301), "--buffer"),
    "learning starts beyond the end": ("residual_sac", ("--total-timesteps", 4000), "--learning-starts"),
    "budget below an iteration": ("residual_sac", ("--total-timesteps", 100), "--total-timesteps"),
    "empty batch": ("soft_sac", ("--batch-size", 0), "--batch-size"),
    "tau above 1": ("soft_sac", ("--tau", 1.1), "--tau"),
    "policy never updated": ("residual_sac", ("--policy-frequency", 0), "--policy-frequency"),
    "targets never updated": ("soft_sac", ("--target-network-frequency", 0), "--target-network-frequency"),
    "learning rate 0": ("residual_sac", ("--q-lr", 0), "--q-lr"),
    "learning rate NaN": ("soft_sac", ("--policy-lr", "nan"), "--policy-lr"),
    "critic of no width": ("soft_sac", ("--critic-hidden-sizes", 64, 0), "--critic-hidden-sizes"),
    "auto-alpha from 0": ("soft_sac", ("--auto-alpha", "--alpha", 0), "--auto-alpha.*--alpha"),
    "prior missing": ("residual_sac", ("--prior", "gone.safetensors"), "gone.safetensors"),
    "prior of another env": (
        "residual_sac", ("--env-id", "Walker2d-v4", "--prior", ROOT / "priors" / "Ant-v4.safetensors"), "Ant-v4",
    ),
    "add-on of another env": ("residual_sac", ("--addon", "ant-right"), "ant-right.*HalfCheetah-v4"),
    "gamma 1": ("residual_sac", ("--gamma", 1), "--survival-reward 0"),
    "resume what is not there": ("soft_sac", ("--resume", "gone"), "gone"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_to_sac_ends_with_one_line_and_leaves_nothing(what, tmp_path, monkeypatch):
    script, flags, pattern = BAD_INPUT[what]
    monkeypatch.chdir(tmp_path)
    message = stop_message(script, *flags)
    assert re.search(pattern, message), message
    assert files(tmp_path) == {}
