"""The policy file: its forms in both readers, the snippets of priors/README.md that write it, and priors/measure.py."""

import errno
import itertools
import json
import os
import re
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, read_policy, run_script, write_policy
from scipy.special import expit, log_softmax, logsumexp

import enjoy
import residual_ppo

sys.path.insert(0, str(ROOT / "priors"))
import measure  # noqa: E402

NUM_STATES, NUM_ACTIONS, GAMMA, ALPHA = 7, 3, 0.9, 0.4


def deterministic_world(seed):
    """Next states (the last is terminal), rewards, and the soft-optimal log pi, each (states, actions)."""
    rng = np.random.default_rng(seed)
    next_state = rng.integers(NUM_STATES + 1, size=(NUM_STATES, NUM_ACTIONS))
    next_state[0, 0] = NUM_STATES  # at least one way to end an episode
    reward, value = rng.normal(-1, 1, (NUM_STATES, NUM_ACTIONS)), np.zeros(NUM_STATES + 1)
    for _ in range(500):
        q = reward + GAMMA * value[next_state]
        value[:-1] = ALPHA * logsumexp(q / ALPHA, axis=-1)
    return next_state, reward, log_softmax(q / ALPHA, axis=-1)


def episodes(world, behaviour, seed, num_steps=300, num_envs=40):
    """Reward, log pi of the soft-optimal policy, and ends, when behaviour (states, actions) is played."""
    next_state, reward, log_prob = world
    rng = np.random.default_rng(seed)
    state = np.arange(num_envs) % NUM_STATES
    columns = np.zeros((3, num_steps, num_envs))
    for t in range(num_steps):
        action = (behaviour[state].cumsum(-1) < rng.random((num_envs, 1))).sum(-1)
        after = next_state[state, action]
        columns[:, t] = reward[state, action], log_prob[state, action], after == NUM_STATES
        state = np.where(after == NUM_STATES, rng.integers(NUM_STATES, size=num_envs), after)
    return columns[0], columns[1], columns[2] == 1


@pytest.mark.parametrize("seed", range(4))
def test_measured_temperature_of_a_soft_optimal_policy_is_its_temperature(seed):
    """Whatever is played: along every episode, ends included, the shaping telescopes to V of its start."""
    world = deterministic_world(seed)
    other = np.random.default_rng(seed).dirichlet(np.ones(NUM_ACTIONS), NUM_STATES)
    plays = [episodes(world, np.exp(world[2]), 1), episodes(world, other, 2)]
    assert plays[0][2].any() and plays[1][2].any()
    assert measure.measured_temperature(plays, GAMMA) == pytest.approx(ALPHA, rel=1e-6)


def test_measured_temperature_is_in_the_unit_of_the_reward():
    """A policy that is soft-optimal for r is so for 3 r at three times the temperature."""
    world = deterministic_world(0)
    other = np.full((NUM_STATES, NUM_ACTIONS), 1 / NUM_ACTIONS)
    plays = [episodes(world, np.exp(world[2]), 1), episodes(world, other, 2)]
    scaled = [(3 * reward, log_prob, done) for reward, log_prob, done in plays]
    assert measure.measured_temperature(scaled, GAMMA) == pytest.approx(3 * ALPHA, rel=1e-6)


@pytest.fixture
def prior(pendulum_prior, tmp_path):
    """A copy of the pendulum's policy file."""
    path = tmp_path / "prior.safetensors"
    path.write_bytes(pendulum_prior.read_bytes())
    return path


@pytest.fixture
def refused(capsys):
    """Assert that measure.py ends with one line that matches a pattern, and changes no file."""

    def check(pattern, path, code=2, **flags):
        before = {x: x.read_bytes() for x in path.parent.iterdir()}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            measure.main(measure.Args(path=path, **{"num_envs": 2} | flags))
        assert stop.value.code == code
        out, err = capsys.readouterr()
        assert re.fullmatch(rf"measure\.py: [^\n]*{pattern}[^\n]*\n", err), err
        assert out == ""
        assert {x: x.read_bytes() for x in path.parent.iterdir()} == before

    return check


def test_measure_records_what_the_training_script_recorded(pendulum_prior, prior, capsys):
    """The survival reward of the pendulum, 1 - alpha mean log pi, from other episodes; and the file stays whole."""
    measure.main(measure.Args(path=prior, num_envs=8))
    (before, old), (after, new) = read_policy(pendulum_prior), read_policy(prior)
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert float(new["survival_reward"]) == pytest.approx(float(old["survival_reward"]), abs=0.05)
    assert np.isfinite(float(new["measured_alpha"]))
    changed = {"survival_reward", "measured_alpha", "sha256"}
    assert {k: v for k, v in new.items() if k not in changed} == {k: v for k, v in old.items() if k not in changed}
    residual_ppo.check_policy_file(prior, "InvertedPendulum-v4")
    shown, advice = capsys.readouterr().out.splitlines()
    assert f"survival_reward {new['survival_reward']}" in shown
    assert re.search("residual_ppo.py takes|does not price", advice)


def test_a_temperature_that_nobody_knows_is_not_written(pendulum_prior, prior, capsys):
    write_policy(prior, pendulum_prior, alpha=None, survival_reward=None, training=None)
    measure.main(measure.Args(path=prior, num_envs=2))
    info = read_policy(prior)[1]
    assert "alpha" not in info and "survival_reward" not in info
    assert np.isfinite(float(info["measured_alpha"]))
    assert re.search("--alpha|does not price", capsys.readouterr().out)
    measure.main(measure.Args(path=prior, num_envs=2, alpha=0.25, gamma=0.9))
    info = read_policy(prior)[1]
    assert (info["alpha"], info["gamma"]) == ("0.25", "0.9")
    assert np.isfinite(float(info["survival_reward"]))


def test_a_file_of_another_version_is_measured_where_it_can_be(pendulum_prior, prior, refused):
    write_policy(prior, pendulum_prior, env_id="InvertedPendulum-v1")
    refused("EnvPool has no InvertedPendulum-v1; give --env-id .*InvertedPendulum-v4", prior)
    refused("is for InvertedPendulum-v1, not Hopper-v4", prior, env_id="Hopper-v4")
    measure.main(measure.Args(path=prior, num_envs=2, env_id="InvertedPendulum-v4"))
    assert read_policy(prior)[1]["env_id"] == "InvertedPendulum-v1"
    write_policy(prior, pendulum_prior, env_id="Mine-v0")
    refused("EnvPool has no Mine-v0; it can only be measured in one of EnvPool's", prior)


def test_measuring_what_is_no_policy_changes_nothing(tmp_path, refused):
    path = tmp_path / "prior.safetensors"
    path.write_bytes(b"no policy")
    refused("prior.safetensors is no policy file", path)
    refused("missing is no policy file .*there is no policy", tmp_path / "missing")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("alpha", np.nan), ("alpha", np.inf), ("alpha", -1.0), ("gamma", 1.5), ("gamma", np.nan), ("num_envs", 0),
     ("seed", -1)],
)  # fmt: skip
def test_flags_that_cannot_work_change_nothing(prior, refused, flag, value):
    refused(f"--{flag.replace('_', '-')} is {value}; it must be finite", prior, **{flag: value})


@pytest.mark.parametrize("args", [{"addon": "hopper-height"}, {"omega": 2.0}, {"addon": None, "prior": "x"}])
def test_a_policy_of_an_addon_task_keeps_its_survival_reward(pendulum_prior, prior, refused, args):
    write_policy(prior, pendulum_prior, training=json.dumps({"args": args}), survival_reward="8.08")
    refused("trained on an add-on task .*8.08", prior)


@pytest.mark.parametrize("args", [{"addon": "none", "omega": 1.0}, {"addon": None}, {}])
def test_a_policy_of_the_basic_reward_is_measured(args):
    measure.check_training({"training": json.dumps({"args": args})})
    measure.check_training({"training": "by hand"})
    measure.check_training({"training": "[1]"})


def test_the_old_file_stays_if_the_new_one_cannot_be_written_or_read(prior, refused, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused("as it was, .*No space left", prior, code=1)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure", lambda *_: {"measured_alpha": "1", "survival_reward": "nan"})
        refused("as it was, .*survival_reward", prior, code=1)


def test_measure_as_a_command(prior):
    process = run_script("priors/measure", prior, "--alpha", "nan")
    assert process.returncode == 2
    assert re.fullmatch(r"measure\.py: --alpha is nan; [^\n]*\n", process.stderr)


FORMS = {
    "clip -10 1.5": lambda x: np.exp(np.clip(x, -10, 1.5)),
    "tanh -5 2": lambda x: np.exp(-5 + 0.5 * (2 + 5) * (np.tanh(x) + 1)),
    "softplus 0.001": lambda x: np.log1p(np.exp(x)) + 0.001,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_wider_policy_has_twice_the_deviation(tmp_path, form):
    """Of the form softplus, at least a larger one."""
    policy = residual_ppo.load_policy(policy_file(tmp_path, "silu", form)[0])[0]
    obs = np.random.default_rng(1).normal(size=(50, 5)).astype(np.float32)
    (mean, log_std), (same, wide) = (residual_ppo.action_distribution(x, obs) for x in (policy, measure.wider(policy)))
    np.testing.assert_array_equal(mean, same)
    if form.startswith("softplus"):
        assert (wide >= log_std).all() and (wide - log_std).mean() > 0.3
    else:
        np.testing.assert_allclose(wide - log_std, np.log(2), atol=1e-4)


# ---------------------------------------------------------------------------------- the format


ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.where(x > 0, x, 0),
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
    "silu": lambda x: x * expit(x),
}


def policy_file(folder, activation, form, **more):
    """A policy file of 5 observed numbers and 3 actions, its tensors in float64, and its metadata."""
    rng, widths, tensors = np.random.default_rng(3), [5, 8, 7, 3], {}
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        tensors[f"actor_mean.{2 * i}.weight"] = rng.normal(size=(after, before))
        tensors[f"actor_mean.{2 * i}.bias"] = rng.normal(size=after)
    if form is None:
        tensors["actor_logstd"] = rng.normal(size=3)
    else:
        tensors |= {"actor_logstd.weight": rng.normal(size=(3, 7)), "actor_logstd.bias": rng.normal(size=3)}
    tensors |= {"obs_mean": rng.normal(size=5), "obs_var": rng.uniform(0.1, 2, 5)}
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    metadata = {"env_id": "Some-v4", "squash": "true", "hidden_sizes": "[8, 7]", "activation": activation}
    metadata |= ({} if form in (None, "clip -20 2") else {"log_std": form}) | more
    path = folder / "policy.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata)
    return path, {name: x.astype(np.float64) for name, x in tensors.items()}, metadata


def both_readers(path, obs):
    """Mean and deviation by enjoy.py and by residual_ppo.py."""
    mean, log_std = enjoy.mean_and_log_std(enjoy.read_policy(path), obs)
    theirs, their_log_std = residual_ppo.action_distribution(residual_ppo.load_policy(path)[0], obs)
    return (mean, np.exp(log_std)), (theirs, np.exp(their_log_std))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", [None, "clip -20 2", *FORMS])
def test_both_readers_have_the_forms_as_written_in_float64(tmp_path, activation, form):
    path, t, _ = policy_file(tmp_path, activation, form)
    obs = 3 * np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    x = np.clip((obs - t["obs_mean"]) / np.sqrt(t["obs_var"] + 1e-8), -10, 10)
    for i in (0, 2):
        x = ACTIVATIONS[activation](x @ t[f"actor_mean.{i}.weight"].T + t[f"actor_mean.{i}.bias"])
    mean = x @ t["actor_mean.4.weight"].T + t["actor_mean.4.bias"]
    if form is None:
        std = np.broadcast_to(np.exp(t["actor_logstd"]), mean.shape)
    else:
        head = x @ t["actor_logstd.weight"].T + t["actor_logstd.bias"]
        std = FORMS.get(form, lambda x: np.exp(np.clip(x, -20, 2)))(head)
    residual_ppo.check_policy_file(path, "Some-v4")
    for ours in both_readers(path, obs):
        np.testing.assert_allclose(ours[0], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(np.broadcast_to(ours[1], std.shape), std, rtol=1e-3, atol=1e-9)


NO_FORMS = [
    "clip 2 -20",
    "clip -21 2",
    "clip -5 nan",
    "tanh 1 1",
    "softplus 0",
    "softplus -1",
    "softplus inf",
]
NO_FORMS += ["", "exp", "clip a b"]


@pytest.mark.parametrize("form", NO_FORMS)
def test_no_reader_takes_another_form(tmp_path, form):
    path = policy_file(tmp_path, "tanh", form)[0]
    with pytest.raises(enjoy.StopRun, match="policy.safetensors cannot be used"):
        enjoy.read_policy(path)
    with pytest.raises(residual_ppo.StopRun, match="policy.safetensors cannot be used"):
        residual_ppo.check_policy_file(path, "Some-v4")


@pytest.mark.parametrize("form", ["clip -5", "tanh -5", "clip -5 2 3", "softplus 0.001 5", "softplus 1e-12"])
def test_the_reference_reader_says_what_a_form_can_be(tmp_path, form):
    with pytest.raises(enjoy.StopRun, match="log_std is .*; it can be clip LOW HIGH .* 1e-8 <= MIN <= 1"):
        enjoy.read_policy(policy_file(tmp_path, "tanh", form)[0])


BAD = {
    "log_std without a head": (None, {"log_std": "clip -20 2"}, {}),
    "activation": (None, {"activation": "gelu"}, {}),
    "narrow": (None, {}, {"actor_logstd": np.full(3, -10.5)}),
    "wide": (None, {}, {"actor_logstd": np.full(3, 10.5)}),
    "alpha": (None, {"alpha": "nan"}, {}),
    "gamma": (None, {"gamma": "1.5"}, {}),
    "survival": (None, {"survival_reward": "inf"}, {}),
    "variance": ("tanh -5 2", {}, {"obs_var": np.full(5, -1.0)}),
    "key": ("tanh -5 2", {"logstd": "tanh -5 2"}, {}),
}


@pytest.mark.parametrize("what", BAD)
def test_no_reader_takes_a_bad_file(tmp_path, what):
    form, metadata, changes = BAD[what]
    path, tensors, info = policy_file(tmp_path, "tanh", form)
    changes = {name: x.astype(np.float32) for name, x in (tensors | changes).items()}
    safetensors.numpy.save_file(changes, path, info | metadata)
    with pytest.raises(enjoy.StopRun):
        enjoy.read_policy(path)
    with pytest.raises(residual_ppo.StopRun):
        residual_ppo.check_policy_file(path, "Some-v4")


@pytest.mark.parametrize("log_std", [-10.0, 10.0, -10.01, 10.01])
def test_both_readers_take_a_log_std_up_to_10_and_name_one_beyond(tmp_path, log_std):
    path, tensors, metadata = policy_file(tmp_path, "tanh", None)
    tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
    tensors["actor_logstd"][1] = log_std
    safetensors.numpy.save_file(tensors, path, metadata)
    readers = (enjoy, enjoy.read_policy), (residual_ppo, lambda path: residual_ppo.check_policy_file(path, "Some-v4"))
    for module, read in readers:
        if abs(log_std) > 10:
            with pytest.raises(module.StopRun, match="actor_logstd .* beyond ±10"):
                read(path)
        else:
            read(path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_policy_files_end_in_one_line(tmp_path):
    """400 files, each with some bytes changed, cut or doubled, are read or refused in both readers."""
    path, _, _ = policy_file(tmp_path, "silu", "tanh -5 2")
    content, rng, refusals = path.read_bytes(), np.random.default_rng(0), 0
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(400):
        data = bytearray(content)
        at = int(rng.integers(0, header if rng.random() < 0.8 else len(data)))
        match rng.integers(3):
            case 0:
                data[at] = rng.integers(256)
            case 1:
                del data[at : at + int(rng.integers(1, 30))]
            case 2:
                data[at:at] = data[at : at + 5]
        path.write_bytes(data)
        try:
            enjoy.read_policy(path)
        except enjoy.StopRun as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 200


# ---------------------------------------------------------------------------------- README's snippets


class TorchTensor(np.ndarray):
    """An array with the methods of a tensor that the snippets call."""

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)


def tensor(*shape, seed=[0]):  # noqa: B006
    seed[0] += 1
    return np.random.default_rng(seed[0]).normal(size=shape).astype(np.float32).view(TorchTensor)


def run_snippet(name, monkeypatch, folder, **names):
    """Run the snippet; returns the file that it writes, which both readers take."""
    text = (ROOT / "priors" / "README.md").read_text()
    (code,) = re.findall(rf"<!-- test: {name} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 15
    monkeypatch.chdir(folder)
    exec(code, names)
    (path,) = folder.glob("*.safetensors")
    residual_ppo.check_policy_file(path, names["metadata"]["env_id"])
    return path


def mlp(layers, x, activation):
    """Layers of weight (out, in) and bias, the activation between them, in float64."""
    for i, (weight, bias) in enumerate(layers):
        x = (activation(x) if i else x) @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
    return x


def assert_same(path, obs, mean, std):
    for ours in both_readers(path, obs):
        np.testing.assert_allclose(ours[0], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(*np.broadcast_arrays(ours[1], std), rtol=1e-3, atol=1e-9)


OBS = 3 * np.random.default_rng(8).normal(size=(64, 11)).astype(np.float32)
MEAN, VAR = np.linspace(-1, 1, 11), np.linspace(0.01, 4, 11)


def test_snippet_of_cleanrl_ppo(monkeypatch, tmp_path):
    """NormalizeObservation, then a clip at 10, two layers of 64 with tanh, and one log standard deviation."""
    layers = [(tensor(64, 11) / 3, tensor(64)), (tensor(64, 64) / 8, tensor(64)), (tensor(3, 64) / 8, tensor(3))]
    state = {f"actor_mean.{2 * i}.{k}": x for i, pair in enumerate(layers) for k, x in zip(("weight", "bias"), pair)}  # noqa: B905
    state |= {"actor_logstd": tensor(1, 3), "critic.0.weight": tensor(64, 11)}
    env = types.SimpleNamespace(get_wrapper_attr=lambda _: types.SimpleNamespace(mean=MEAN, var=VAR))
    agent = types.SimpleNamespace(state_dict=lambda: state)
    path = run_snippet("cleanrl-ppo", monkeypatch, tmp_path, envs=types.SimpleNamespace(envs=[env]), agent=agent)
    x = np.clip((OBS - MEAN) / np.sqrt(VAR + 1e-8), -10, 10)
    assert_same(path, OBS, mlp(layers, x, np.tanh), np.exp(np.asarray(state["actor_logstd"])))
    assert read_policy(path)[1]["squash"] == "false"


def test_snippet_of_cleanrl_sac(monkeypatch, tmp_path):
    """log_std = tanh(x), then LOW + 0.5 (HIGH - LOW) (log_std + 1), from -5 to 2."""
    sizes = {"fc1": (256, 11), "fc2": (256, 256), "fc_mean": (3, 256), "fc_logstd": (3, 256)}
    pairs = {k: (tensor(*s) / s[1] ** 0.5, tensor(s[0])) for k, s in sizes.items()}
    state = {f"{k}.{part}": x for k, pair in pairs.items() for part, x in zip(("weight", "bias"), pair)}  # noqa: B905
    state |= {"action_scale": tensor(3), "action_bias": tensor(3)}
    actor = types.SimpleNamespace(state_dict=lambda: state)
    path = run_snippet("cleanrl-sac", monkeypatch, tmp_path, actor=actor, alpha=0.17)
    body = [pairs["fc1"], pairs["fc2"]]
    relu = ACTIVATIONS["relu"]
    log_std = np.tanh(mlp([*body, pairs["fc_logstd"]], OBS, relu))
    assert_same(path, OBS, mlp([*body, pairs["fc_mean"]], OBS, relu), np.exp(-5 + 0.5 * 7 * (log_std + 1)))
    assert float(read_policy(path)[1]["alpha"]) == 0.17


@pytest.mark.parametrize("key", [None, "state"])
def test_snippet_of_brax_and_playground(monkeypatch, tmp_path, key):
    """NormalTanhDistribution: loc, scale = split(logits); std = softplus(scale) + 0.001; obs by (x - mean) / std."""
    widths = [11, 32, 16, 8, 6]
    layers = [(tensor(after, before) / before**0.5, tensor(after)) for before, after in itertools.pairwise(widths)]
    params = {f"hidden_{i}": {"kernel": np.asarray(w).T, "bias": np.asarray(b)} for i, (w, b) in enumerate(layers)}
    std = np.sqrt(VAR)
    mean_and_std = (MEAN, std) if key is None else ({key: MEAN}, {key: std})
    normaliser = types.SimpleNamespace(mean=mean_and_std[0], std=mean_and_std[1])
    path = run_snippet("brax", monkeypatch, tmp_path, params=(normaliser, {"params": params}))
    loc, scale = np.split(mlp(layers, (OBS - MEAN) / std, ACTIVATIONS["silu"]), 2, axis=-1)
    assert_same(path, OBS, loc, np.log1p(np.exp(scale)) + 0.001)
    assert read_policy(path)[1]["squash"] == "true"


@pytest.mark.parametrize("version", ["2", "3", "3 log", "none"])
def test_snippet_of_rsl_rl(monkeypatch, tmp_path, version):
    """EmpiricalNormalization: (x - mean) / (std + 0.01), kept beside the model or in it; a Normal."""
    widths = [11, 24, 16, 3]
    layers = [(tensor(after, before) / before**0.5, tensor(after)) for before, after in itertools.pairwise(widths)]
    state = {f"actor.{2 * i}.{k}": x for i, pair in enumerate(layers) for k, x in zip(("weight", "bias"), pair)}  # noqa: B905
    deviation = np.float32([0.2, 0.5, 1.5])
    name, value = ("log_std", np.log(deviation)) if version == "3 log" else ("std", deviation)
    state |= {name: value.view(TorchTensor), "critic.0.weight": tensor(3, 3)}
    saved, std = {"model_state_dict": state}, np.sqrt(VAR)
    norm = {"_mean": MEAN[None], "_var": VAR[None], "_std": std[None], "count": np.array(7)}
    norm = {k: v.view(TorchTensor) for k, v in norm.items()}
    if version == "2":
        saved["obs_norm_state_dict"] = norm
    elif version != "none":
        state |= {f"actor_obs_normalizer.{k}": v for k, v in norm.items()}
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=lambda *_, **__: saved))
    path = run_snippet("rsl_rl", monkeypatch, tmp_path)
    x = OBS if version == "none" else (OBS - MEAN) / (std + 0.01)
    assert_same(path, OBS, mlp(layers, x, ACTIVATIONS["elu"]), deviation)
