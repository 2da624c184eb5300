"""The scripts run, learn and reproduce themselves on real MuJoCo, and EnvPool does what they rely on."""

import dataclasses
import itertools
import json
import re
import struct
from types import SimpleNamespace

import envpool
import flax.serialization
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, SCRIPTS, read_metrics, read_policy
from tensorboardX.proto.event_pb2 import Event

import residual_ppo
import soft_ppo

V4_AND_V5 = ("v4", "v5")
QLEARNING = ("mountain-car-right", "parking-lines")  # tasks whose environments are not of MuJoCo: see test_tasks.py
ROBOTS = [task.env for name, task in residual_ppo.ADDON_TASKS.items() if name not in (*QLEARNING, "none")]
ENVS = [f"{robot}-{version}" for robot in ROBOTS for version in V4_AND_V5]
NO_ADDON = residual_ppo.ADDON_TASKS["none"]


def numpy_mean(tensors, obs):
    """The mean action of a policy file, in float64."""
    x = np.clip((obs - tensors["obs_mean"]) / np.sqrt(tensors["obs_var"] + 1e-8), -10, 10)
    layers = sum(name.endswith(".weight") for name in tensors)
    for i in range(layers):
        x = x @ tensors[f"actor_mean.{2 * i}.weight"].T + tensors[f"actor_mean.{2 * i}.bias"]
        x = np.tanh(x) if i < layers - 1 else x
    return x


def saved_args(run_dir):
    """The arguments in args.json."""
    return json.loads((run_dir / "args.json").read_text())["args"]


def without_clock(rows):
    """Rows of metrics.csv without the columns that tell the time."""
    return [{name: value for name, value in row.items() if name not in ("elapsed_s", "steps_per_s")} for row in rows]


def random_policy(env_id, scale=1.0, **form):
    """A two-layer policy that is anything but neutral, with a deviation of about 0.3; form: options of Actor."""
    spec = envpool.make_spec(env_id)
    obs_dim, action_dim = *spec.observation_space.shape, *spec.action_space.shape
    actor = residual_ppo.Actor(action_dim, (16,), **form)
    params = actor.init(jax.random.PRNGKey(0), jnp.zeros(obs_dim))["params"]
    kernel = scale * jax.random.normal(jax.random.PRNGKey(1), params["actor_mean.2"]["kernel"].shape)
    log_std = jnp.full(action_dim, jnp.log(0.3))
    if actor.state_dependent_std:
        log_std = params["actor_logstd"] | {"bias": log_std}
    params = params | {"actor_logstd": log_std, "actor_mean.2": params["actor_mean.2"] | {"kernel": kernel}}
    stats = residual_ppo.RunningStats(jnp.zeros(obs_dim), jnp.ones(obs_dim), jnp.float32(1))
    return residual_ppo.Policy({"params": params}, stats, actor)


def play(env, actions):
    """Step with actions (num_steps, num_envs, action_dim): transitions, observations returned, and states."""
    step, state, states, transitions = jax.jit(env.step), env.reset(), [], []
    for action in actions:
        state, transition = step(state, jax.device_put(np.float32(action), jax.devices("cpu")[0]))
        states.append(jax.tree.map(np.array, state))
        transitions.append(jax.tree.map(np.array, transition))
    return jax.tree.map(lambda *x: np.stack(x), *transitions), np.stack([s.obs for s in states]), states


def seeds(seed, num_envs):
    """Seeds of environments to train in."""
    return residual_ppo.env_seeds(seed, residual_ppo.TRAINING, num_envs)


def make_env(env_id, task, squash, env_seeds):
    """EnvPool's environments with a task."""
    return residual_ppo.make_env(residual_ppo.make_simulator(env_id, "{}", env_seeds), task, squash)


def default_task(env_id, coef=1.0):
    """The default add-on task of an environment."""
    args = residual_ppo.choose_addon(residual_ppo.Args(env_id=env_id))
    return residual_ppo.ADDON_TASKS[args.addon]._replace(coef=coef)


def bounded_action(monkeypatch, env_id, squash, raw):
    """What EnvPool is given for actions raw (num_envs, action_dim) before squashing or clipping."""
    spec, received = envpool.make_spec(env_id), []

    def xla_step(handle, action):
        received.append(action)
        zeros = jnp.zeros(len(raw))
        return handle, (jnp.zeros((len(raw), 1), jnp.float64), zeros, zeros > 1, zeros > 1, {})

    pool = SimpleNamespace(action_space=spec.action_space, observation_space=spec.observation_space)
    pool.xla, pool.reset = lambda: (jnp.zeros(()), None, None, xla_step), lambda: (np.zeros((len(raw), 1)), {})
    with monkeypatch.context() as patch:
        patch.setattr(residual_ppo.envpool, "make", lambda *args, **kwargs: pool)
        env = make_env(env_id, NO_ADDON, squash, np.arange(len(raw)))
    env.step(env.reset(), jnp.asarray(raw))
    assert received[0].dtype == np.float64
    return np.asarray(received[0])


# ------------------------------------------------------------------------------------- short runs


@pytest.mark.parametrize("name", SCRIPTS)
def test_args_json_tells_what_the_run_depends_on(runs, name):
    content = json.loads((runs[name].folder / "args.json").read_text())
    assert content["args"]["num_envs"] == 8
    assert content["args"]["total_timesteps"] == 1024
    assert {"python", "jax", "flax", "optax", "numpy"} <= content["packages"].keys()
    assert re.fullmatch(r"envpool \d+\.\d+\.\d+", content["simulator"])
    assert "git_commit" in content
    assert runs[name].folder.name.startswith(f"{content['args']['env_id']}__{name}__1__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_metrics_csv_has_one_row_per_iteration(runs, name):
    rows = read_metrics(runs[name].folder)
    assert list(rows[0])[:3] == ["global_step", "elapsed_s", "steps_per_s"]
    assert [row["global_step"] for row in rows] == [str(128 * i) for i in range(1, 9)]
    elapsed = [float(row["elapsed_s"]) for row in rows]
    assert elapsed == sorted(elapsed)
    assert all(np.isfinite(float(row[column])) for row in rows for column in ("entropy", "policy_loss", "value_loss"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_tensorboard_holds_the_metrics_of_metrics_csv(runs, name):
    (path,) = runs[name].folder.glob("events.out.tfevents.*")
    data, logged = path.read_bytes(), {}
    while data:  # records of length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        logged |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert logged["entropy", 1024] == pytest.approx(float(read_metrics(runs[name].folder)[-1]["entropy"]), rel=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_learning_curve_is_a_picture(runs, name):
    data = (runs[name].folder / "learning_curve.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5000


@pytest.mark.parametrize(
    ("name", "policies"),
    [("train_prior_ppo", {"prior"}), ("soft_ppo", {"policy"}), ("residual_ppo", {"prior", "customised"})],
)
def test_eval_json_holds_every_episode_of_each_policy(runs, name, policies):
    content = json.loads((runs[name].folder / "eval.json").read_text())
    assert content.keys() == policies
    for policy in policies:
        for actions in ("stochastic", "deterministic"):
            episodes = content[policy]["episodes"][actions]
            assert {len(column) for column in episodes.values()} == {2}
            assert np.isfinite(list(episodes.values())).all()
            assert episodes.keys() == {
                "objective", "total", "basic", "addon", "quantity", "length", "log_prob",
            }  # fmt: skip
            for name, column in episodes.items():
                assert content[policy]["mean"][actions][name] == pytest.approx(np.mean(column))
                assert content[policy]["std"][actions][name] == pytest.approx(np.std(column))


@pytest.mark.parametrize("name", SCRIPTS)
def test_output_without_a_terminal_is_plain_lines(runs, name):
    process = runs[name].process
    assert process.stderr == ""
    assert "Traceback" not in process.stdout
    assert not {"\x1b", "\r"} & set(process.stdout)
    assert any(line.startswith("100%") for line in process.stdout.splitlines())
    assert runs[name].folder.name in process.stdout.replace("\n", "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_unexpected_is_left_behind(runs, name):
    expected = {"args.json", "metrics.csv", "checkpoint.msgpack"}
    expected |= {"policy.safetensors", "eval.json", "learning_curve.png"}
    expected |= {"prior.safetensors"} if name == "residual_ppo" else set()
    left = {path.name for path in runs[name].folder.iterdir()}
    assert {path for path in left if not path.startswith("events.out.tfevents.")} == expected
    outside = {path.name for path in runs[name].folder.parents[1].iterdir()}
    assert outside == ({"runs", "prior.safetensors"} if name == "train_prior_ppo" else {"runs"})


@pytest.mark.parametrize("name", ["soft_ppo", "residual_ppo"])
def test_policy_file_holds_the_parameters_of_the_last_checkpoint(runs, name):
    folder = runs[name].folder
    state = flax.serialization.msgpack_restore((folder / "checkpoint.msgpack").read_bytes())
    tensors = safetensors.numpy.load_file(folder / "policy.safetensors")
    params = state["params"]["actor"]["params"]
    assert state["iteration"] == 8
    np.testing.assert_array_equal(tensors["actor_logstd"], params["actor_logstd"])
    np.testing.assert_array_equal(tensors["obs_mean"], state["obs_stats"]["mean"])
    np.testing.assert_array_equal(tensors["obs_var"], state["obs_stats"]["var"])
    for i in range(3):
        np.testing.assert_array_equal(tensors[f"actor_mean.{2 * i}.weight"], params[f"actor_mean.{2 * i}"]["kernel"].T)
        np.testing.assert_array_equal(tensors[f"actor_mean.{2 * i}.bias"], params[f"actor_mean.{2 * i}"]["bias"])


def test_exported_prior_is_the_run_s_policy(runs, prior):
    assert prior.read_bytes() == (runs["train_prior_ppo"].folder / "policy.safetensors").read_bytes()


def test_same_seed_gives_the_same_run_bit_by_bit(runs):
    first, again = runs["soft_ppo"].folder, runs["soft_ppo again"].folder
    assert without_clock(read_metrics(first)) == without_clock(read_metrics(again))
    assert (first / "checkpoint.msgpack").read_bytes() == (again / "checkpoint.msgpack").read_bytes()
    assert (first / "eval.json").read_bytes() == (again / "eval.json").read_bytes()


def test_another_seed_gives_another_run(runs):
    ours, theirs = (without_clock(read_metrics(runs[what].folder)) for what in ("soft_ppo", "soft_ppo seed 2"))
    assert all(ours[i]["policy_loss"] != theirs[i]["policy_loss"] for i in range(8))


def test_run_that_starts_from_the_prior_is_the_prior_before_it_learns(runs):
    rows = read_metrics(runs["residual_ppo"].folder)
    assert abs(float(rows[0]["kl_to_prior"])) < 1e-6
    assert abs(float(rows[-1]["kl_to_prior"])) > 1e-4


def test_run_from_scratch_is_not_the_prior(runs):
    assert abs(float(read_metrics(runs["residual_ppo from scratch"].folder)[0]["kl_to_prior"])) > 1e-3


def test_log_has_the_share_of_the_prior_s_basic_return_that_is_kept(runs):
    run_dir = runs["residual_ppo from scratch"].folder
    prior = json.loads((run_dir / "eval.json").read_text())["prior"]["mean"]["stochastic"]["basic"]
    rows = read_metrics(run_dir)
    found, basic = ([float(row[name]) for row in rows] for name in ("kept_return", "basic_return"))
    assert np.isfinite(found[-1])
    np.testing.assert_allclose(found, np.divide(basic, prior), rtol=1e-4)


def test_run_that_starts_from_the_prior_keeps_its_normaliser(runs, prior):
    before = safetensors.numpy.load_file(prior)
    after = safetensors.numpy.load_file(runs["residual_ppo"].folder / "policy.safetensors")
    np.testing.assert_array_equal(after["obs_mean"], before["obs_mean"])
    np.testing.assert_array_equal(after["obs_var"], before["obs_var"])
    assert (after["actor_mean.4.weight"] != before["actor_mean.4.weight"]).any()


# --------------------------------------------------------------------------------------- learning


def test_soft_ppo_learns_to_balance_the_pendulum(learning_runs):
    episodes = json.loads((learning_runs["soft_ppo"].folder / "eval.json").read_text())["policy"]["episodes"]
    assert np.mean(episodes["deterministic"]["basic"]) > 800


def test_residual_ppo_straightens_the_front_foot(learning_runs):
    content = json.loads((learning_runs["residual_ppo"].folder / "eval.json").read_text())
    angles = {policy: np.array(content[policy]["episodes"]["stochastic"]["quantity"]) for policy in content}
    prior, customised = angles["prior"], angles["customised"]
    standard_error = np.sqrt(prior.var(ddof=1) / len(prior) + customised.var(ddof=1) / len(customised))
    assert prior.mean() - customised.mean() > 6 * standard_error
    assert customised.mean() < 0.8 * prior.mean()


def test_learned_policy_balances_as_well_in_gymnasium(learning_runs):
    tensors = safetensors.numpy.load_file(learning_runs["soft_ppo"].folder / "policy.safetensors")
    env = gymnasium.make("InvertedPendulum-v4")
    (obs, _), total, done = env.reset(seed=0), 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(3 * np.tanh(numpy_mean(tensors, obs)))
        total, done = total + reward, terminated or truncated
    assert total > 800


# ----------------------------------------------------------------------------------- policy files


@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("state_dependent_std", [False, True])
@pytest.mark.parametrize("obs_clip", [10.0, 5.0, np.inf])
def test_saved_policy_is_loaded_the_same(tmp_path, squash, activation, state_dependent_std, obs_clip):
    form = {"activation": activation, "state_dependent_std": state_dependent_std, "obs_clip": obs_clip}
    policy = random_policy("Hopper-v4", squash=squash, **form)
    path = tmp_path / "policy.safetensors"
    rng = np.random.default_rng(0)
    names = ("objective", "total", "basic", "addon", "quantity", "length", "log_prob")
    results = {actions: {name: rng.uniform(1, 9, 20) for name in names} for actions in ("stochastic", "deterministic")}
    args = residual_ppo.Args(env_id="Hopper-v4", gamma=0.97)
    path.write_bytes(residual_ppo.policy_bytes(policy, args, 0.25, results, {"seed": 7}))
    residual_ppo.check_policy_file(path, "Hopper-v4")
    loaded, metadata = residual_ppo.load_policy(path)
    assert json.loads(metadata["training"]) == {"seed": 7}
    assert metadata == read_policy(path)[1]
    expected = {"env_id": "Hopper-v4", "squash": str(squash).lower(), "alpha": "0.25", "hidden_sizes": "[16]"}
    expected |= {"activation": activation, "gamma": "0.97", "obs_clip": str(obs_clip)}
    assert expected.items() <= metadata.items()
    sampled = results["stochastic"]
    survival_reward = (sampled["objective"] - 0.25 * sampled["log_prob"] * sampled["length"]).sum()
    assert float(metadata["survival_reward"]) == pytest.approx(survival_reward / sampled["length"].sum())
    for actions in results:
        basic = results[actions]["basic"]
        assert f"{actions} {basic.mean():.0f} ± {basic.std():.0f}" in metadata["returns"]
    assert loaded.actor == policy.actor
    assert jax.tree.structure(loaded.params) == jax.tree.structure(policy.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, policy.params)
    np.testing.assert_array_equal(loaded.obs_stats.mean, policy.obs_stats.mean)
    np.testing.assert_array_equal(loaded.obs_stats.var, policy.obs_stats.var)
    obs, action = jax.random.normal(jax.random.PRNGKey(2), (5, 11)), jax.random.normal(jax.random.PRNGKey(3), (5, 3))
    log_prob = residual_ppo.policy_log_prob(policy, 9 * obs, action)
    np.testing.assert_array_equal(residual_ppo.policy_log_prob(loaded, 9 * obs, action), log_prob)
    other_clip = policy.replace(actor=dataclasses.replace(policy.actor, obs_clip=1.0))
    assert (residual_ppo.policy_log_prob(other_clip, 9 * obs, action) != log_prob).any()


@pytest.mark.parametrize("script", [residual_ppo, soft_ppo], ids=["residual_ppo", "soft_ppo"])
@pytest.mark.parametrize("squash", [True, False])
def test_policy_file_written_with_numpy_has_the_documented_meaning(tmp_path, script, squash):
    rng = np.random.default_rng(0)
    widths, tensors = (17, 64, 64, 6), {}
    for i in range(3):
        tensors[f"actor_mean.{2 * i}.weight"] = rng.normal(0, 0.2, (widths[i + 1], widths[i]))
        tensors[f"actor_mean.{2 * i}.bias"] = rng.normal(0, 0.2, widths[i + 1])
    tensors |= {"obs_mean": rng.normal(0, 1, 17), "obs_var": rng.uniform(0.1, 4, 17)}
    tensors |= {"actor_logstd": rng.normal(-0.5, 0.3, 6)}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    critic = {"critic.0.weight": np.ones((3, 17), np.float32)}
    metadata = {"env_id": "HalfCheetah-v4", "squash": str(squash).lower()}
    metadata |= {"hidden_sizes": "[64, 64]", "activation": "tanh"}
    path = tmp_path / "policy.safetensors"
    safetensors.numpy.save_file(tensors | critic, path, metadata)
    script.check_policy_file(path, "HalfCheetah-v4")
    policy, loaded_metadata = script.load_policy(path)
    assert loaded_metadata == metadata

    obs, action = rng.normal(0, 3, (50, 17)).astype(np.float32), rng.normal(0, 1.5, (50, 6)).astype(np.float32)
    exact = {name: np.float64(array) for name, array in tensors.items()}
    mean, log_std, u = numpy_mean(exact, np.float64(obs)), exact["actor_logstd"], np.float64(action)
    expected = (-0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    if squash:
        expected -= np.log1p(-(np.tanh(u) ** 2)).sum(-1)
    np.testing.assert_allclose(script.policy_log_prob(policy, obs, action), expected, rtol=2e-5, atol=2e-4)


def test_policy_of_soft_ppo_is_a_prior_for_residual_ppo(pendulum_prior, runs):
    args = saved_args(runs["residual_ppo from scratch"].folder)
    assert args["prior"] == str(pendulum_prior)
    content = json.loads((runs["residual_ppo from scratch"].folder / "eval.json").read_text())
    assert np.mean(content["prior"]["episodes"]["deterministic"]["length"]) >= 1


def test_policy_of_another_form_is_continued_in_its_own(runs):
    """Of ReLU layers, with a deviation that is an output of the network."""
    prior, prior_metadata = read_policy(runs["soft_ppo relu"].folder / "policy.safetensors")
    ours, metadata = read_policy(runs["residual_ppo relu"].folder / "policy.safetensors")
    expected = {"activation": "relu", "hidden_sizes": "[32, 16]", "squash": "true", "obs_clip": "10.0", "gamma": "0.95"}
    assert expected.items() <= prior_metadata.items()
    assert expected.items() <= metadata.items()
    assert prior["actor_logstd.weight"].shape == (1, 16)
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in prior.items()}
    assert all((ours[k] != prior[k]).any() for k in ("actor_logstd.weight", "actor_mean.0.weight", "actor_mean.4.bias"))
    np.testing.assert_array_equal(ours["obs_mean"], prior["obs_mean"])
    rows = read_metrics(runs["residual_ppo relu"].folder)
    assert abs(float(rows[0]["kl_to_prior"])) < 1e-6 < abs(float(rows[-1]["kl_to_prior"]))


def test_run_folder_holds_the_prior_that_was_customised(runs, prior):
    assert (runs["residual_ppo"].folder / "prior.safetensors").read_bytes() == prior.read_bytes()


@pytest.mark.parametrize("what", ["train_prior_ppo", "soft_ppo", "soft_ppo relu", "residual_ppo", "residual_ppo relu"])
def test_survival_reward_is_that_of_the_episodes_in_eval_json(runs, what):
    """Mean r - alpha mean log pi over their steps; r is omega r + r_R, as omega is given."""
    folder = runs[what].folder
    metadata, args = read_policy(folder / "policy.safetensors")[1], saved_args(folder)
    *_, results = json.loads((folder / "eval.json").read_text()).values()
    episodes = {name: np.array(column) for name, column in results["episodes"]["stochastic"].items()}
    omega, alpha = args.get("omega", 1.0), float(metadata["alpha"])
    reward, log_prob = omega * episodes["basic"] + episodes["addon"], episodes["log_prob"] * episodes["length"]
    expected = (reward.sum() - alpha * log_prob.sum()) / episodes["length"].sum()
    assert float(metadata["survival_reward"]) == pytest.approx(expected)
    assert log_prob.any()


def test_discount_is_recorded_and_the_prior_s_is_the_default(runs, prior):
    assert read_policy(prior)[1]["gamma"] == "0.99"
    gammas = {"residual_ppo": 0.99, "residual_ppo relu": 0.95, "residual_ppo plain": 0.9}
    for what, gamma in gammas.items():
        folder = runs[what].folder
        assert saved_args(folder)["gamma"] == gamma
        assert read_policy(folder / "policy.safetensors")[1]["gamma"] == str(gamma)
    noted = {what for what in gammas if "note     gamma is not the prior's" in runs[what].process.stdout}
    assert noted == {"residual_ppo plain"}


@pytest.mark.parametrize(("of_prior", "given", "expected"), [("0.9999", None, 0.99), ("0.9999", 0.999, 0.999)])
def test_a_discount_near_1_is_the_default_only_up_to_0_99(prior, of_prior, given, expected):
    """Within a customisation, a fresh critic does not learn values over a horizon of 10000 steps."""
    policy, info = residual_ppo.load_policy(prior)
    args = residual_ppo.resolve_args(
        residual_ppo.Args(gamma=given), policy, info | {"gamma": of_prior}, residual_ppo.PPO_SCALES
    )
    assert args.gamma == expected


def test_prior_of_another_version_of_the_environment_is_noted(runs):
    lines = {what: runs[what].process.stdout.splitlines() for what in ("residual_ppo", "residual_ppo plain")}
    notes = {what: [x for x in lines[what] if x.startswith("note") and "HalfCheetah-v4" in x] for what in lines}
    assert not notes["residual_ppo"]
    (note,) = notes["residual_ppo plain"]
    assert "HalfCheetah-v5" in note


def test_unsquashed_prior_is_customised_as_it_is(runs):
    metadata = read_policy(runs["residual_ppo plain"].folder / "policy.safetensors")[1]
    assert metadata["squash"] == "false"
    rows = read_metrics(runs["residual_ppo plain"].folder)
    assert abs(float(rows[0]["kl_to_prior"])) < 1e-6


def test_objective_is_that_of_omega(runs):
    """Also where omega' is given in its place; the survival reward is then 0 unless it is given, too."""
    folders = {what: runs[f"residual_ppo {what}"].folder for what in ("plain", "relu")}
    contents = {what: json.loads((folder / "eval.json").read_text()) for what, folder in folders.items()}
    tables = {what: runs[f"residual_ppo {what}"].process.stdout for what in folders}
    args = saved_args(folders["plain"])
    weights = {"omega": 1.0, "omega_prime": 0.1, "alpha_hat": 0.05, "survival_reward": 0.0}
    assert weights.items() <= args.items()
    assert (weights | {"omega": 0.5}).items() <= saved_args(folders["relu"]).items()
    assert all("objective" in table and "total" in table for table in tables.values())
    for what, policy in itertools.product(folders, ("prior", "customised")):
        episodes = contents[what][policy]["episodes"]["stochastic"]
        omega = saved_args(folders[what])["omega"]
        np.testing.assert_allclose(
            episodes["objective"], omega * np.array(episodes["basic"]) + np.array(episodes["addon"])
        )


@pytest.mark.parametrize("script", [residual_ppo, soft_ppo], ids=lambda x: x.__name__)
def test_shipped_priors_are_read(script):
    paths = sorted((ROOT / "priors").glob("*-v4*.safetensors"))
    assert len(paths) >= 5
    for path in paths:
        script.check_policy_file(path, path.stem.removesuffix("-sac"))
        policy, metadata = script.load_policy(path)
        assert metadata["env_id"] == path.stem.removesuffix("-sac")
        assert policy.actor.obs_clip == 10
        assert float(metadata["alpha"]) > 0


# -------------------------------------------------------------------------- EnvPool and Gymnasium


def test_seeds_of_different_runs_and_roles_share_none():
    """Nor do those of the evaluations of the prior that is trained, which are of the next seed."""
    drawn = [residual_ppo.env_seeds(seed, role, 512) for seed in (0, 1, 2, 3, 2**30 - 1) for role in range(7)]
    assert len(np.unique(np.concatenate(drawn))) == sum(len(x) for x in drawn)
    for x in drawn:
        assert x.min() >= 0
        assert x.max() < 2**31


def test_environments_of_different_runs_start_from_different_states():
    starts = {
        (seed, i): make_env("HalfCheetah-v4", NO_ADDON, True, seeds(seed, 64)).reset().obs
        for seed in (1, 2)
        for i in range(2)
    }
    np.testing.assert_array_equal(starts[1, 0], starts[1, 1])
    assert len(np.unique(np.concatenate([starts[1, 0], starts[2, 0]]), axis=0)) == 128


def gymnasium_twin(env_id, obs):
    """Gymnasium's environment in the state that an observation of EnvPool's tells of, up to its place in the world."""
    twin = gymnasium.make(env_id).unwrapped
    twin.reset(seed=0)
    hidden = {"Ant": 2, "Humanoid": 2, "Swimmer": 2, "InvertedPendulum": 0}.get(env_id.rpartition("-")[0], 1)
    seen = twin.model.nq - hidden
    twin.set_state(np.concatenate([np.zeros(hidden), obs[:seen]]), obs[seen : seen + twin.model.nv])
    return twin, seen + twin.model.nv


@pytest.mark.parametrize("env_id", [*ENVS, "InvertedPendulum-v4", "InvertedPendulum-v5"])
def test_envpool_steps_as_gymnasium_does_from_the_same_state(env_id):
    pool = envpool.make(env_id, env_type="gymnasium", num_envs=1, seed=3)
    obs = pool.reset()[0][0]
    twin, state_dim = gymnasium_twin(env_id, obs)
    assert obs.shape == twin.observation_space.shape
    # Contacts of the free bodies amplify rounding quickly.
    steps, tolerance = (4, 5e-3) if env_id.startswith(("Ant", "Humanoid")) else (25, 1e-4)
    rng, compared = np.random.default_rng(0), 0
    for _ in range(steps):
        action = rng.uniform(pool.action_space.low, pool.action_space.high)
        obs, reward, terminated, truncated, _ = pool.step(action[None])
        twin_obs, twin_reward, twin_terminated, _, _ = twin.step(action)
        np.testing.assert_allclose(obs[0, :state_dim], twin_obs[:state_dim], atol=tolerance)
        np.testing.assert_allclose(reward[0], twin_reward, atol=tolerance)
        assert (terminated[0], truncated[0]) == (twin_terminated, False)
        compared += 1
        if twin_terminated:
            break
    assert compared >= 4


def energy(data):
    """|a|² of the motors' controls, and -0.1 times it."""
    return (data.ctrl**2).sum(), -0.1 * (data.ctrl**2).sum()


QUANTITIES = {
    "half-cheetah-energy": energy,
    "ant-energy": energy,
    "half-cheetah-front-foot": lambda data: (abs(data.joint("ffoot").qpos[0]), -10 * abs(data.joint("ffoot").qpos[0])),
    "hopper-height": lambda data: (data.qpos[1], 10 * (data.qpos[1] - 1)),
    "hopper-upright": lambda data: (abs(data.joint("rooty").qpos[0]), -10 * abs(data.joint("rooty").qpos[0])),
    "walker-height": lambda data: (data.qpos[1], 10 * (data.qpos[1] - 1)),
    "ant-right": lambda data: (-data.qvel[1], -data.qvel[1]),
    "ant-left": lambda data: (data.qvel[1], data.qvel[1]),
    "swimmer-straight": lambda data: (
        abs(data.joint("motor1_rot").qpos[0]),
        -abs(data.joint("motor1_rot").qpos[0]) / 2,
    ),
    "walker-upright": lambda data: (abs(data.joint("rooty").qpos[0]), -10 * abs(data.joint("rooty").qpos[0])),
    "humanoid-right": lambda data: (-data.qvel[1], -data.qvel[1]),
}


def test_every_addon_task_is_checked_here():
    assert QUANTITIES.keys() == residual_ppo.ADDON_TASKS.keys() - {"none", *QLEARNING}


@pytest.mark.parametrize("version", V4_AND_V5)
@pytest.mark.parametrize("name", QUANTITIES)
def test_addon_task_reads_the_quantity_it_names_from_the_simulation(name, version):
    task = residual_ppo.ADDON_TASKS[name]
    env = gymnasium.make(f"{task.env}-{version}").unwrapped
    env.reset(seed=1)
    env.action_space.seed(1)
    seen = []
    for _ in range(10):
        action = env.action_space.sample()
        obs, *_ = env.step(action)
        quantity, reward = QUANTITIES[name](env.data)
        ours = task.quantity(None, jnp.asarray(action), jnp.asarray(obs))
        np.testing.assert_allclose((task.reward(ours), ours), (reward, quantity), rtol=1e-5, atol=1e-5)
        seen.append(quantity)
    assert np.ptp(seen) > 1e-3
    if task.env == "Hopper":  # the joint's coordinate is the height above the ground
        env.set_state(env.data.qpos, env.data.qvel)
        assert env.data.body("torso").xpos[2] == pytest.approx(float(env.data.qpos[1]))


@pytest.mark.parametrize(("env_id", "squash"), [("Hopper-v4", True), ("Hopper-v5", False), ("Walker2d-v4", False)])
def test_evaluation_agrees_with_episodes_played_in_gymnasium(env_id, squash):
    task, policy = default_task(env_id, 2.0), random_policy(env_id, scale=0.2, squash=squash)
    env = make_env(env_id, task, squash, np.tile(residual_ppo.env_seeds(5, residual_ppo.EVALUATION, 100), 2))
    ours = residual_ppo.evaluate(env, {"policy": policy}, 0.5, 0)["policy"]["deterministic"]
    assert {len(column) for column in ours.values()} == {100}

    @jax.jit
    def act(obs):
        mean, _ = residual_ppo.action_distribution(policy, obs)
        return mean, residual_ppo.policy_log_prob(policy, obs, mean)

    twin, theirs = gymnasium.make(env_id), {"basic": [], "addon": [], "quantity": [], "length": [], "log_prob": []}
    for seed in range(60):
        (obs, _), done, basic, quantities, log_probs = twin.reset(seed=seed), False, [], [], []
        while not done:
            action, log_prob = act(np.float32(obs))
            action = np.tanh(np.float64(action)) if squash else np.clip(np.float64(action), -1, 1)
            before = obs
            obs, reward, terminated, truncated, _ = twin.step(action)
            done = terminated or truncated
            basic.append(reward)
            quantities.append(task.quantity(before, action, obs))
            log_probs.append(log_prob)
        addon = 2 * sum(task.reward(quantity) for quantity in quantities)
        episode = {"basic": sum(basic), "addon": addon, "length": len(basic)}
        episode |= {"quantity": np.mean(quantities), "log_prob": np.mean(log_probs)}
        theirs = {name: [*column, episode[name]] for name, column in theirs.items()}
    for name, column in theirs.items():
        error = np.sqrt(np.var(ours[name]) / len(ours[name]) + np.var(column) / len(column))
        assert abs(ours[name].mean() - np.mean(column)) < 4.5 * error + 1e-3, name
    np.testing.assert_allclose(ours["objective"], 0.5 * ours["basic"] + ours["addon"])
    np.testing.assert_allclose(ours["total"], ours["basic"] + ours["addon"])


@pytest.fixture(scope="module")
def hopper_evaluation():
    """An untrained policy, evaluated against itself and another in Hopper-v4; and the sums over its episodes."""
    task, policy = default_task("Hopper-v4"), random_policy("Hopper-v4")
    env_seeds = np.tile(residual_ppo.env_seeds(1, residual_ppo.EVALUATION, 8), 6)
    policies = {"one": policy, "same": policy, "other": random_policy("Hopper-v4", scale=2.0)}
    env = make_env("Hopper-v4", task, True, env_seeds)
    sums, first_episodes = [], residual_ppo.first_episodes

    def recording_first_episodes(*inputs):
        sums.append(first_episodes(*inputs))
        return sums[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual_ppo, "first_episodes", recording_first_episodes)
        results = residual_ppo.evaluate(env, policies, 1.0, 1)
    return env_seeds, results, jax.tree.map(lambda x: x[:8], sums[0])


def test_policies_are_evaluated_in_pairs(hopper_evaluation):
    """From the same initial states, with the same noise: a policy and itself differ in nothing."""
    env_seeds, results, _ = hopper_evaluation
    starts = make_env("Hopper-v4", NO_ADDON, True, env_seeds).reset().obs.reshape(6, 8, -1)
    np.testing.assert_array_equal(starts, np.broadcast_to(starts[:1], starts.shape))
    assert len(np.unique(starts[0], axis=0)) == 8
    jax.tree.map(np.testing.assert_array_equal, results["one"], results["same"])
    for actions in ("stochastic", "deterministic"):
        assert (results["one"][actions]["basic"] != results["other"][actions]["basic"]).all()
    assert (results["one"]["stochastic"]["basic"] != results["one"]["deterministic"]["basic"]).all()


def test_log_reports_the_means_of_the_evaluation(hopper_evaluation):
    """That of the quantity, too: a mean over episodes of their means, however long they are."""
    _, results, sums = hopper_evaluation
    episodes = results["one"]["stochastic"]
    assert len(np.unique(episodes["length"])) > 1
    metrics = residual_ppo.episode_metrics({name: x for name, x in sums.items() if name != "log_prob"})
    names = {"basic": "basic_return", "addon": "addon_return", "total": "total_return", "length": "episode_length"}
    for column, name in (names | {"quantity": "addon_quantity"}).items():
        assert float(metrics[name]) == pytest.approx(episodes[column].mean(), rel=1e-5), column


@pytest.fixture(scope="module")
def hopper_episodes():
    """Hopper-v4 under random actions: results of Env.step over 150 steps in 6 environments, several episodes each."""
    task = default_task("Hopper-v4", 3.0)
    actions = np.random.default_rng(7).normal(0, 1, (150, 6, 3))
    result = play(make_env("Hopper-v4", task, True, seeds(11, 6)), actions)
    assert result[0].terminated.sum() > 12
    return actions, *result


def test_step_after_an_end_is_marked_and_earns_nothing(hopper_episodes):
    _, transitions, _, _ = hopper_episodes
    done = transitions.terminated | transitions.truncated
    assert transitions.valid[0].all()
    np.testing.assert_array_equal(transitions.valid[1:], ~done[:-1])
    for column in (transitions.basic_reward, transitions.addon_reward, done):
        assert not column[~transitions.valid].any()
    assert (transitions.addon_reward[transitions.valid] != 0).all()


def test_step_after_an_end_ignores_its_action(hopper_episodes):
    actions, transitions, obs, _ = hopper_episodes
    others = np.where(transitions.valid[..., None], actions, -5 * actions)
    task = default_task("Hopper-v4", 3.0)
    _, same_obs, _ = play(make_env("Hopper-v4", task, True, seeds(11, 6)), others)
    assert (others != actions).any()
    np.testing.assert_array_equal(same_obs, obs)
    others[3] = -actions[3]
    _, other_obs, _ = play(make_env("Hopper-v4", task, True, seeds(11, 6)), others[:5])
    assert (other_obs[3] != obs[3]).any()


def test_observation_at_an_end_is_the_terminal_one(hopper_episodes):
    _, transitions, obs, _ = hopper_episodes
    healthy = (obs[..., 0] > 0.7) & (np.abs(obs[..., 1]) < 0.2)
    np.testing.assert_array_equal(~healthy, transitions.terminated)
    start = np.array([1.25] + [0] * 10)
    after_reset = obs[~transitions.valid]
    assert len(after_reset) > 10
    assert np.abs(after_reset - start).max() <= 5.001e-3


def test_observation_before_a_step_is_the_one_the_last_step_returned(hopper_episodes):
    _, transitions, obs, _ = hopper_episodes
    np.testing.assert_array_equal(transitions.obs[1:], obs[:-1])


def test_episode_sums_are_sums_over_valid_steps(hopper_episodes):
    _, transitions, obs, states = hopper_episodes
    height = np.where(transitions.valid, obs[..., 0], 0)
    columns = {"basic": transitions.basic_reward, "addon": transitions.addon_reward}
    columns |= {"quantity": height, "length": transitions.valid}
    assert columns.keys() == states[-1].finished.keys() == states[-1].running.keys()
    for env in range(6):
        ends = np.flatnonzero(transitions.terminated[:, env])
        start, end = ends[-2] + 1, ends[-1] + 1
        for name, column in columns.items():
            finished, running = states[-1].finished[name], states[-1].running[name]
            np.testing.assert_allclose(finished[env], np.float64(column[start:end, env]).sum(), rtol=1e-4)
            np.testing.assert_allclose(running[env], np.float64(column[end:, env]).sum(), rtol=1e-4, atol=1e-5)
        assert not any(column[env] for column in states[ends[0] - 1].finished.values())


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "InvertedPendulum-v4"])
def test_time_limit_of_1000_steps_truncates_and_does_not_terminate(env_id, learning_runs):
    env = make_env(env_id, NO_ADDON, True, seeds(0, 2))
    policy = random_policy(env_id)
    if env_id == "InvertedPendulum-v4":
        policy, _ = residual_ppo.load_policy(learning_runs["soft_ppo"].folder / "policy.safetensors")
        policy.params["params"]["actor_logstd"] -= 10
    state, transitions = residual_ppo.rollout(
        env, 1002, policy, env.reset(), residual_ppo.seed_words(0, residual_ppo.ROLLOUT)
    )
    assert transitions.obs.shape[:2] == (1003, 2)
    np.testing.assert_array_equal(transitions.obs[-1], state.obs)
    truncated = np.zeros((1002, 2), bool)
    truncated[999] = True
    np.testing.assert_array_equal(transitions.truncated, truncated)
    assert not np.any(transitions.terminated)
    np.testing.assert_array_equal(transitions.valid[1:], ~truncated[:-1])
    np.testing.assert_array_equal(state.finished["length"], 1000)


@pytest.mark.parametrize(("env_id", "bound"), [("Humanoid-v4", 0.4), ("InvertedPendulum-v4", 3), ("Pusher-v5", 2)])
@pytest.mark.parametrize("squash", [True, False])
def test_actions_fill_the_bounds_of_the_environment_and_no_more(monkeypatch, env_id, bound, squash):
    space = gymnasium.make(env_id).action_space
    raw = np.random.default_rng(0).normal(0, 5, (1000, *space.shape)).astype(np.float32)
    actions = bounded_action(monkeypatch, env_id, squash, raw)
    assert (actions >= space.low).all()
    assert (actions <= space.high).all()
    np.testing.assert_allclose([actions.min(), actions.max()], [-bound, bound], rtol=1e-3)
    expected = bound * np.tanh(np.float64(raw)) if squash else np.clip(raw, -bound, bound)
    np.testing.assert_allclose(actions, expected, atol=1e-5)


@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize(
    ("env_id", "bound", "tolerance"), [("InvertedPendulum-v4", 3, 1e-6), ("Humanoid-v5", 0.4, 1e-3)]
)
def test_environment_receives_the_action_in_its_own_units(env_id, bound, tolerance, squash):
    env = make_env(env_id, NO_ADDON, squash, seeds(2, 1))
    raw = np.random.default_rng(3).normal(0, 2 * bound, (2, 1, env.action_dim)).astype(np.float32)
    transitions, obs, _ = play(env, raw)
    twin, state_dim = gymnasium_twin(env_id, np.float64(transitions.obs[0, 0]))
    for i in range(2):
        action = bound * np.tanh(raw[i, 0]) if squash else np.clip(raw[i, 0], -bound, bound)
        expected, reward, *_ = twin.step(action)
        np.testing.assert_allclose(obs[i, 0, :state_dim], expected[:state_dim], atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(transitions.basic_reward[i, 0], reward, atol=tolerance)


@pytest.mark.parametrize("squash", [True, False])
def test_pusher_is_charged_for_the_bounded_action(monkeypatch, squash):
    pool = envpool.make("Pusher-v5", env_type="gymnasium", num_envs=1, seed=2)
    pool.reset()
    raw = np.float32([[-9, -1, -0.3, 0, 0.2, 1, 9]])
    *_, info = pool.step(bounded_action(monkeypatch, "Pusher-v5", squash, raw))
    expected = 2 * np.tanh(raw) if squash else np.clip(raw, -2, 2)
    assert info["reward_ctrl"][0] == pytest.approx(-0.1 * (np.float64(expected) ** 2).sum(), rel=1e-4)
