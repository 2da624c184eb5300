"""priors/from_sb3.py: policy files say what models of Stable-Baselines3, sb3-contrib and SBX do, without their code.

The models are written here as those packages write them, opcode by opcode. Real ones are tried, too, where the packages
are installed.
"""

import base64
import errno
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, read_policy

import enjoy

sys.path.insert(0, str(ROOT / "priors"))
import from_sb3  # noqa: E402

SCRIPT = ROOT / "priors" / "from_sb3.py"
ENV_ID = "InvertedPendulum-v4"  # 4 observed numbers, 1 action in [-3, 3]
pytestmark = pytest.mark.filterwarnings("ignore")


# ---------------------------------------------------------------------- models, as others save them


class Named:
    """A class or function of that qualified name."""

    def __init__(self, name):
        self.name = name


class Object(Named):
    """What is made by calling it: with arguments, a state and, of a dict, its entries."""

    def __init__(self, name, state=None, args=(), items=None):
        self.name, self.state, self.args, self.items = name, state, args, items


class Tensor:
    """A tensor of PyTorch, with its strides."""

    def __init__(self, array):
        self.array = np.asarray(array)


def emit(x, storages):
    """The opcodes of a pickle that describe x; the numbers of tensors are appended to storages."""
    match x:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[x]
        case int():
            return b"J" + struct.pack("<i", x)
        case float():
            return b"G" + struct.pack(">d", x)
        case str():
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        case bytes():
            return b"B" + struct.pack("<I", len(x)) + x
        case tuple() | list():
            return b"(" + b"".join(emit(y, storages) for y in x) + (b"t" if isinstance(x, tuple) else b"l")
        case dict():
            return b"}(" + b"".join(emit(y, storages) for pair in x.items() for y in pair) + b"u"
        case Object():
            text = emit(Named(x.name), storages) + emit(x.args, storages) + b"R"
            if x.items is not None:
                text += b"(" + b"".join(emit(y, storages) for pair in x.items.items() for y in pair) + b"u"
            return text if x.state is None else text + emit(x.state, storages) + b"b"
        case Named():
            module, _, name = x.name.rpartition(".")
            return f"c{module}\n{name}\n".encode()
        case Tensor():
            owner = x.array if x.array.base is None else x.array.base
            storages.append(owner.tobytes())
            kind = {"f4": "FloatStorage", "f8": "DoubleStorage", "i8": "LongStorage"}[x.array.dtype.str[1:]]
            storage = emit(("storage", Named(f"torch.{kind}"), str(len(storages) - 1), "cpu", owner.size), storages)
            rest = (0, x.array.shape, tuple(stride // x.array.itemsize for stride in x.array.strides), False, {})
            args = b"(" + storage + b"Q" + emit(rest, storages)[1:]
            return emit(Named("torch._utils._rebuild_tensor_v2"), storages) + args + b"R"
        case np.ndarray():
            dtype = Object("numpy.dtype", (3, "<", None, None, None, -1, -1, 0), (x.dtype.str[1:], False, True))
            args = (Named("numpy.ndarray"), (0,), b"b")
            state = (1, x.shape, dtype, False, x.tobytes())
            return emit(Object("numpy.core.multiarray._reconstruct", state, args), storages)
    raise TypeError(type(x))


def dumps(x):
    """A pickle of x, which holds no tensors."""
    return b"\x80\x03" + emit(x, []) + b"."


def pth(tensors):
    """A state_dict, as torch.save writes it."""
    storages, file = [], io.BytesIO()
    items = {name: Tensor(array) for name, array in tensors.items()}
    content = b"\x80\x02" + emit(Object("collections.OrderedDict", {"_metadata": {}}, items=items), storages) + b"."
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage)
    return file.getvalue()


def as_json(x):
    """An attribute of a model in its JSON, as Stable-Baselines3 writes what JSON cannot say."""
    return {":type:": "<class 'type'>", ":serialized:": base64.b64encode(dumps(x)).decode()}


def box(*shape, bound=np.inf):
    bounds = {"low": np.full(shape, -bound, np.float32), "high": np.full(shape, bound, np.float32)}
    return Object("gymnasium.spaces.box.Box", {"dtype": None, **bounds, "_shape": shape})


RNG = np.random.default_rng(5)


def linear(n_out, n_in):
    return RNG.normal(size=(n_out, n_in)).astype(np.float32) / 2, RNG.normal(size=n_out).astype(np.float32) / 2


def layers_of(widths):
    return [linear(after, before) for before, after in zip(widths, widths[1:], strict=False)]


POLICY = {
    "PPO": "stable_baselines3.common.policies.ActorCriticPolicy",
    "A2C": "stable_baselines3.common.policies.ActorCriticPolicy",
    "TRPO": "stable_baselines3.common.policies.ActorCriticPolicy",
    "SAC": "stable_baselines3.sac.policies.SACPolicy",
    "TQC": "sb3_contrib.tqc.policies.TQCPolicy",
    "SBX PPO": "sbx.ppo.policies.PPOPolicy",
    "SBX SAC": "sbx.sac.policies.SACPolicy",
}
SQUASHED = ("SAC", "TQC", "SBX SAC")


class Saved:
    """A model of 4 observed numbers and 1 action, in a zip; its network is known."""

    def __init__(self, algorithm="PPO", activation=None, hidden=(6, 5), shared=0, obs_dim=4, bound=3.0, **data):
        self.algorithm, self.squash, self.shared = algorithm, algorithm in SQUASHED, shared
        self.layers = layers_of([obs_dim, *hidden, 1])
        self.head = linear(1, [obs_dim, *hidden][-1]) if self.squash else (RNG.normal(size=1).astype(np.float32),)
        self.activation = activation or ("ReLU" if self.squash else "Tanh")
        self.data = {
            "policy_class": as_json(Named(POLICY[algorithm])),
            "observation_space": as_json(box(obs_dim)),
            "action_space": as_json(box(1, bound=bound)),
            "policy_kwargs": {},
            "use_sde": False,
            "gamma": 0.97,
            "num_timesteps": 4096,
        }
        if self.squash:
            self.data |= {"ent_coef": "auto", "_last_original_obs": as_json(np.zeros(4))}
        else:
            self.data |= {"PPO": {"clip_range": 0.2}, "TRPO": {"cg_max_steps": 15}}.get(algorithm, {})
        if activation and not algorithm.startswith("SBX"):
            self.data["policy_kwargs"] = as_json({"activation_fn": Named(f"torch.nn.modules.activation.{activation}")})
        self.files = self.sbx() if algorithm.startswith("SBX") else self.torch()
        self.data |= data

    def torch(self):
        body = "actor.latent_pi" if self.squash else "mlp_extractor.policy_net"
        names = [f"mlp_extractor.shared_net.{2 * i}" for i in range(self.shared)]
        names += [f"{body}.{2 * i}" for i in range(len(self.layers) - 1 - self.shared)]
        names.append("actor.mu" if self.squash else "action_net")
        tensors = {}
        for name, (weight, bias) in zip(names, self.layers, strict=True):
            tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
        if self.squash:
            tensors |= {"actor.log_std.weight": self.head[0], "actor.log_std.bias": self.head[1]}
            tensors["critic.qf0.0.weight"] = np.zeros((3, 5))
        else:
            tensors |= {"log_std": self.head[0], "value_net.bias": np.zeros(1), "value_net.weight": np.zeros((1, 2))}
        self.tensors = tensors
        variables = {"log_ent_coef": np.float32([-1.5])} if self.squash else {}
        return {"policy.pth": lambda: pth(self.tensors), "pytorch_variables.pth": lambda: pth(variables)}

    def sbx(self):
        layers = [*self.layers, self.head] if self.squash else self.layers
        params = {f"Dense_{i}": {"kernel": w.T.copy(), "bias": b} for i, (w, b) in enumerate(layers)}
        params |= {} if self.squash else {"log_std": self.head[0]}
        state = Object("flax.training.train_state.TrainState", {"params": {"params": params}})
        function = Object("jaxlib._jax.PjitFunction", {"function_name": self.activation.lower()})
        policy = {"actor_state": state, "activation_fn": function}
        self.data["policy"] = as_json(Object(POLICY[self.algorithm], policy))
        if self.squash:
            params = {"log_ent_coef": np.array(-1.5, np.float32)}
            self.data["ent_coef_state"] = as_json(Object("flax.training.train_state.TrainState", {"params": params}))
        return {}

    def save(self, path, **files):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data", json.dumps(self.data))
            for name, content in ({name: make() for name, make in self.files.items()} | files).items():
                archive.writestr(name, content)
            archive.writestr("_stable_baselines3_version", "1.3.0")
        return path

    def distribution(self, x):
        """Mean and deviation before squashing or clipping, in float64, given what the network sees."""
        functions = {
            "Tanh": np.tanh,
            "ReLU": lambda x: np.where(x > 0, x, 0),
            "ELU": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
            "SiLU": lambda x: x / (1 + np.exp(-x)),
        }
        *body, (weight, bias) = self.layers
        for w, b in body:
            x = functions[self.activation](x @ w.T.astype(np.float64) + b)
        log_std = np.clip(x @ self.head[0].T + self.head[1], -20, 2) if self.squash else self.head[0]
        mean = x @ weight.T.astype(np.float64) + bias
        return mean, np.broadcast_to(np.exp(log_std.astype(np.float64)), mean.shape)


def vecnormalize(path, mean, var, **more):
    """A file as VecNormalize.save writes it."""
    rms = [Object("stable_baselines3.common.running_mean_std.RunningMeanStd", {"mean": m, "var": v, "count": 9.0})
           for m, v in ((mean, var), (np.asarray(0.1), np.asarray(4.0)))]  # fmt: skip
    state = {"obs_rms": rms[0], "ret_rms": rms[1], "clip_obs": 10.0, "epsilon": 1e-8} | more
    state = {"norm_obs": True, "norm_reward": True} | state
    path.write_bytes(dumps(Object("stable_baselines3.common.vec_env.vec_normalize.VecNormalize", state)))
    return path


def convert(*flags):
    return from_sb3.main([str(flag) for flag in flags])


def distribution(path, obs):
    """Mean and deviation of a policy file, as the reference reader has them."""
    mean, log_std = enjoy.mean_and_log_std(enjoy.read_policy(path), obs.astype(np.float32))
    return mean, np.broadcast_to(np.exp(log_std), mean.shape)


# ---------------------------------------------------------------------- what a file then says


KINDS = {
    "PPO": {"algorithm": "PPO"},
    "PPO of 1.x, layers shared with the critic": {"algorithm": "PPO", "shared": 1, "activation": "ReLU"},
    "PPO, linear": {"algorithm": "PPO", "hidden": ()},
    "A2C": {"algorithm": "A2C", "hidden": (3, 4, 5), "activation": "ELU"},
    "TRPO": {"algorithm": "TRPO"},
    "SAC": {"algorithm": "SAC"},
    "SAC, SiLU": {"algorithm": "SAC", "activation": "SiLU"},
    "TQC": {"algorithm": "TQC", "hidden": (7,)},
    "SBX PPO": {"algorithm": "SBX PPO"},
    "SBX PPO, ELU": {"algorithm": "SBX PPO", "activation": "ELU", "hidden": (5,)},
    "SBX SAC": {"algorithm": "SBX SAC"},
    "SBX SAC, linear": {"algorithm": "SBX SAC", "hidden": ()},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalised", [False, True])
def test_file_has_the_models_distribution(tmp_path, kind, normalised):
    model = Saved(**KINDS[kind])
    obs = 3 * np.random.default_rng(0).normal(size=(200, 4))
    flags, seen = [], obs
    if normalised:
        mean, var = np.array([0.5, -1, 0, 2]), np.array([0.1, 4, 1, 0.01])
        flags = ["--vecnormalize", vecnormalize(tmp_path / "vec.pkl", mean, var, clip_obs=1.5, epsilon=1e-2)]
        seen = np.clip((obs - mean) / np.sqrt(var + 1e-2), -1.5, 1.5)
    path = tmp_path / "new" / "prior.safetensors"
    assert convert(model.save(tmp_path / "m.zip"), "--env-id", ENV_ID, "--export", path, *flags) == 0
    for ours, theirs in zip(distribution(path, obs), model.distribution(seen), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    tensors, info = read_policy(path)
    assert info["squash"] == str(model.squash).lower()
    assert float(info["gamma"]) == 0.97
    assert json.loads(info["hidden_sizes"]) == [len(bias) for _, bias in model.layers[:-1]]
    training = json.loads(info["training"])
    assert training["num_timesteps"] == 4096
    assert training["vecnormalize"] is normalised
    assert {"PPO", "A2C", "TRPO", "SAC", "TQC"} & {*training["source"].split()} == {model.algorithm.split()[-1]}
    assert "1.3.0" in training["source"]
    assert enjoy.policy_digest(tensors, info) == info["sha256"]
    if model.squash:  # the entropy coefficient is in units of the reward that it saw: divided by sqrt(4)
        assert float(info["alpha"]) == pytest.approx(
            np.exp(-1.5) * (2 if normalised else 1), rel=1e-2 * normalised + 1e-6
        )
    else:
        assert "alpha" not in info


def test_tensors_may_be_transposed_views(tmp_path):
    model = Saved()
    weight = model.tensors["mlp_extractor.policy_net.0.weight"]
    model.tensors["mlp_extractor.policy_net.0.weight"] = np.ascontiguousarray(weight.T).T
    path = tmp_path / "prior.safetensors"
    assert convert(model.save(tmp_path / "m.zip"), "--env-id", ENV_ID, "--export", path) == 0
    np.testing.assert_array_equal(read_policy(path)[0]["actor_mean.0.weight"], weight)


def test_a_set_entropy_coefficient_is_the_temperature_unless_another_is_given(tmp_path):
    for i, (flags, alpha) in enumerate([([], "0.3"), (["--alpha", "0.05"], "0.05")]):
        model = Saved("SAC", ent_coef=0.3)
        model.files["pytorch_variables.pth"] = lambda: pth({"ent_coef_tensor": np.float32(0.3)})
        path = tmp_path / f"{i}.safetensors"
        assert convert(model.save(tmp_path / "m.zip"), "--env-id", ENV_ID, "--export", path, *flags) == 0
        assert read_policy(path)[1]["alpha"] == alpha


def test_statistics_may_not_normalise_observations(tmp_path):
    path, vec = tmp_path / "prior.safetensors", tmp_path / "vec.pkl"
    vecnormalize(vec, np.zeros(4), np.full(4, 9.0), norm_obs=False)
    model = Saved(_last_original_obs=as_json(np.zeros(4)))
    assert convert(model.save(tmp_path / "m.zip"), "--env-id", ENV_ID, "--export", path, "--vecnormalize", vec) == 0
    tensors, info = read_policy(path)
    assert (tensors["obs_var"] == 1).all() and info["obs_clip"] == "inf"


def test_dropped_inputs_count_as_constants(tmp_path):
    """The file's network is the model's where the dropped inputs are what they are held at."""
    model = Saved(obs_dim=7)
    mean, var = np.arange(7.0), np.array([1, 0, 2, 3, 4, 0.5, 6.0])
    flags = ["--env-id", ENV_ID, "--vecnormalize", vecnormalize(tmp_path / "v.pkl", mean, var, clip_obs=3.0)]
    obs = np.random.default_rng(0).normal(size=(50, 4))
    # input 1 never changed in training and is clipped; 4 stays at its mean
    full = np.insert(obs, [1, 3, 3], [5.0, mean[4], 2.0], axis=1)
    assert (full[:, [1, 4, 5]] == [5, 4, 2]).all()
    path = tmp_path / "prior.safetensors"
    drops = ["--drop-inputs", "1=5", "4:5", "5:6=2e0"]
    assert convert(model.save(tmp_path / "m.zip"), *flags, "--export", path, *drops) == 0
    expected = model.distribution(np.clip((full - mean) / np.sqrt(var + 1e-8), -3, 3))[0]
    np.testing.assert_allclose(distribution(path, obs)[0], expected, rtol=1e-4, atol=1e-5)
    assert json.loads(read_policy(path)[1]["training"])["drop_inputs"] == drops[1:]


@pytest.mark.parametrize("algorithm", ["PPO", "SAC"])
def test_rescaled_actions_are_those_of_the_wrapper(tmp_path, algorithm):
    """gymnasium.wrappers.RescaleAction, around an environment of bounds [-3, 3]."""
    model, path = Saved(algorithm, bound=1.0), tmp_path / "prior.safetensors"
    flags = [model.save(tmp_path / "m.zip"), "--env-id", ENV_ID, "--export", path, "--rescaled-actions"]
    assert convert(*flags) == 0
    obs, noise = (np.random.default_rng(i).normal(size=(50, n)).astype(np.float32) for i, n in ((0, 4), (1, 1)))
    mean, std = model.distribution(obs.astype(np.float64))
    u = mean + std * noise
    expected = 3 * (np.tanh(u) if model.squash else np.clip(u, -1, 1))
    ours = enjoy.act(enjoy.read_policy(path), obs, noise, np.float32([-3]), np.float32([3]))
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_are_read_as_numpy_and_jax_pickle_them(protocol):
    integers = np.arange(6, dtype=np.int64).reshape(2, 3)
    arrays = [np.arange(6.0).reshape(2, 3), integers, np.asfortranarray(integers), np.array(2.5, ">f8"), np.float32(3)]
    arrays += [np.array([True, False]), 1.5, 7, jnp.arange(4.0), jnp.float32(2)]
    for array in arrays:
        read = from_sb3.as_array(from_sb3.read_pickle(pickle.dumps(array, protocol)))
        np.testing.assert_array_equal(read, np.asarray(array))
    plain = {"a": [1, (2, "x"), None], "b": {"c": (1, 2, 3, 4)}, "e": -1.25, "f": 2**70}
    plain |= {"d": b"bytes"} if protocol > 2 else {}
    assert from_sb3.read_pickle(pickle.dumps(plain, protocol)) == plain


# ---------------------------------------------------------------------- refusals


@pytest.fixture
def refused(tmp_path, capsys):
    """Assert that the script refuses flags in one line that matches a pattern, and writes nothing."""

    def files():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def check(pattern, *flags, env_id=ENV_ID, export=tmp_path / "out" / "prior.safetensors", code=2):
        before = files()
        assert convert(*flags, "--env-id", env_id, "--export", export) == code
        out, err = capsys.readouterr()
        assert re.fullmatch(rf"from_sb3\.py: [^\n]*{pattern}[^\n]*\n", err), err
        assert out == ""
        assert len(err) < 700
        assert files() == before

    return check


class Attack:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_file_is_executed(tmp_path, refused):
    mark, attack = tmp_path / "mark", pickle.dumps(Attack(tmp_path / "mark"))
    pickle.loads(attack).close()
    assert mark.exists()  # so it would
    mark.unlink()
    encoded = {":type:": "", ":serialized:": base64.b64encode(attack).decode()}
    for name in ("policy_class", "observation_space", "action_space", "policy_kwargs"):
        refused("m.zip", Saved(**{name: encoded}).save(tmp_path / "m.zip"))
    refused("m.zip", Saved("SBX SAC", policy=encoded).save(tmp_path / "m.zip"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", attack)
    refused("m.zip", Saved().save(tmp_path / "m.zip", **{"policy.pth": archive.getvalue()}))
    refused("m.zip", Saved().save(tmp_path / "m.zip", **{"policy.pth": attack}))
    (tmp_path / "v.pkl").write_bytes(attack)
    refused("vecnormalize.*cannot be used", Saved().save(tmp_path / "m.zip"), "--vecnormalize", tmp_path / "v.pkl")
    assert (
        convert(Saved(lr_schedule=encoded).save(tmp_path / "m.zip"), "--env-id", ENV_ID, "--export", tmp_path / "p")
        == 0
    )
    assert not mark.exists()


def policy_class(name):
    return {"policy_class": as_json(Named(name))}


DISCRETE = as_json(Object("gym.spaces.discrete.Discrete", {"n": 4}))
UNFIT = {
    "gSDE": ({"use_sde": True}, "gSDE"),
    "squashed gSDE": ({"policy_kwargs": as_json({"squash_output": True})}, "gSDE"),
    "discrete actions": ({"action_space": DISCRETE}, "actions are Discrete"),
    "discrete observations": ({"observation_space": DISCRETE}, "observations are Discrete"),
    "images": (policy_class("stable_baselines3.common.policies.ActorCriticCnnPolicy"), "CNN"),
    "dictionary": (policy_class("stable_baselines3.sac.policies.MultiInputPolicy"), "dictionary"),
    "TD3": (policy_class("stable_baselines3.td3.policies.TD3Policy"), "TD3's and DDPG's actor is deterministic"),
    "DQN": (policy_class("stable_baselines3.dqn.policies.DQNPolicy"), "DQN's actions are discrete"),
    "CrossQ": (policy_class("sbx.crossq.policies.CrossQPolicy"), "CrossQ's actor has batch norms"),
    "Simba": (policy_class("sbx.sac.policies.SimbaSACPolicy"), "Simba's actor has layer norms"),
    "recurrent": (policy_class("sb3_contrib.common.recurrent.policies.RecurrentActorCriticPolicy"), "recurrent"),
    "own class": (policy_class("__main__.Mine"), "a policy class of someone's own"),
    "activation": ({"activation": "LeakyReLU"}, "LeakyReLU; only tanh, ReLU, ELU and SiLU"),
    "features": (
        {"policy_kwargs": as_json({"features_extractor_class": Named("mine.Doubling")})},
        "feature extractor mine.Doubling",
    ),
    "two axes": ({"observation_space": as_json(box(2, 2))}, r"observations are \(2, 2\)"),
    "VecNormalize": ({"_last_original_obs": as_json(np.zeros(4))}, "trained with VecNormalize; .*--vecnormalize"),
    "other observations": ({"obs_dim": 11}, "sees 11 numbers, .* has 4; .*--drop-inputs 4:11"),
    "fewer observations": ({"obs_dim": 3}, "sees 3 numbers, .* has 4; name the model's own --env-id"),
    "other bounds": ({"bound": 1.0}, r"in \[-1, 1\], .* in \[-3, 3\]; .*--rescaled-actions"),
    "other actions": ({"action_space": as_json(box(2, bound=3.0))}, "2 actions, and InvertedPendulum-v4 1"),
    "gamma": ({"gamma": 7.0}, "no sound prior: one of its .*gamma"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_models_that_cannot_be_priors_are_refused_by_name(refused, tmp_path, what):
    changes, pattern = UNFIT[what]
    refused(pattern, Saved(**changes).save(tmp_path / "model.zip"))


def test_networks_of_other_layers_are_refused(refused, tmp_path):
    path = tmp_path / "model.zip"
    for name in ("features_extractor.cnn.0.weight", "lstm_actor.weight_ih_l0", "mlp_extractor.policy_net.1.0.weight"):
        model = Saved()
        model.tensors[name] = np.zeros((3, 3))
        refused("only plain MLPs", model.save(path))
    for name in ("action_net.bias", "log_std"):
        model = Saved()
        del model.tensors[name]
        refused(name, model.save(path))
    for name, value, pattern in (
        ("log_std", np.float32([np.nan]), "actor_logstd has impossible entries"),
        ("log_std", np.float32([-12]), "actor_logstd has entries beyond"),
        ("action_net.bias", np.array([1e300]), "actor_mean.4.bias has impossible entries"),
        ("action_net.bias", np.zeros(3), "actor_mean.4"),
    ):
        model = Saved()
        model.tensors[name] = value
        refused(pattern, model.save(path))


def test_files_that_are_no_models_are_refused(refused, tmp_path):
    refused("there is no model", tmp_path / "missing.zip")
    refused("there is no model", tmp_path)
    model = Saved().save(tmp_path / "model.zip")
    (tmp_path / "text.zip").write_text("text")
    (tmp_path / "half.zip").write_bytes(model.read_bytes()[:2000])
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    for name in ("text", "half", "empty"):
        refused("is no model that can be read", tmp_path / f"{name}.zip")
    refused("PyTorch before 1.6", Saved().save(model, **{"policy.pth": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."}))


@pytest.mark.parametrize(("old", "new"), [((6, 4), (600, 400)), ((4, 1), (4000, 1)), ((4, 1), (-4, 1))])
def test_tensors_larger_than_their_storage_are_refused(refused, tmp_path, monkeypatch, old, new):
    """Strides and shapes are the file's; what they point to must lie within it."""
    original = emit

    def changed(x, storages):
        return original(new if isinstance(x, tuple) and x == old else x, storages)

    monkeypatch.setattr(sys.modules[__name__], "emit", changed)
    refused("is no model that can be read", Saved().save(tmp_path / "model.zip"))


def test_flags_that_cannot_work_are_refused(refused, tmp_path):
    model = Saved().save(tmp_path / "model.zip")
    refused("--env-id Nothing-v4 cannot be made", model, env_id="Nothing-v4")
    refused("CartPole-v1 has the actions Discrete", model, env_id="CartPole-v1")
    for old in ("InvertedPendulum-v2", "Hopper-v3"):
        name = old.partition("-")[0]
        refused(f"{old} is no longer in Gymnasium; give {name}-v4 or {name}-v5", model, env_id=old)
    for alpha in ("-0.1", "nan", "inf"):
        refused(f"--alpha is {alpha}", model, f"--alpha={alpha}")
    for drop in ("x", "3:2", "2:9", "9", "1=inf", "1=1e999", "1=--", "-1", "1:2:3", "٣"):
        refused("--drop-inputs .* is no range", model, f"--drop-inputs={drop}")
    (tmp_path / "taken").write_text("mine")
    refused("taken exists; .*--export", model, export=tmp_path / "taken")
    refused("taken/prior.*--export", model, export=tmp_path / "taken" / "prior")
    (tmp_path / "link").symlink_to("nowhere")
    refused("link exists; .*--export", model, export=tmp_path / "link")


def test_statistics_that_do_not_fit_are_refused(refused, tmp_path):
    model, path = Saved().save(tmp_path / "model.zip"), tmp_path / "vec.pkl"
    refused("vec.pkl cannot be used .FileNotFoundError", model, "--vecnormalize", path)
    path.write_text("text")
    refused("vec.pkl cannot be used", model, "--vecnormalize", path)
    path.write_bytes(pickle.dumps({"mean": 0}))
    refused("it is a dict, no VecNormalize", model, "--vecnormalize", path)
    refused("for 11 observed numbers, and the model sees 4", model, "--vecnormalize",
            vecnormalize(path, np.zeros(11), np.ones(11)))  # fmt: skip
    refused("vec.pkl cannot be used", model, "--vecnormalize",
            vecnormalize(path, {"a": np.zeros(4)}, np.ones(4)))  # fmt: skip
    # with such an epsilon, no variance of a policy file says the same
    vecnormalize(path, np.zeros(4), np.zeros(4), epsilon=1e-9)
    refused("obs_var .* negative", model, "--vecnormalize", path)


# ---------------------------------------------------------------------- damage, and the world around


def mutated(data, rng):
    """The bytes with a few of them changed, cut, doubled or swapped."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        a, b = sorted(rng.integers(0, len(data), 2))
        match rng.integers(5):
            case 0:
                data[a] = rng.integers(256)
            case 1:
                del data[a : min(b, a + rng.integers(1, 50))]
            case 2:
                data[a:a] = data[a : min(b, a + 20)]
            case 3:
                data[a : a + 4] = rng.integers(256, size=4, dtype=np.uint8).tobytes()
            case 4:
                data[a : a + 8] = data[b : b + 8]
    return bytes(data)


def damaged(path, rng):
    """A model's file with a member mutated, or mutated as a whole; sometimes inside its base64."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([*members, "data", "inner", "whole"])
    if name == "whole":
        return mutated(path.read_bytes(), rng)
    if name == "inner":
        data = json.loads(members["data"])
        pickled = [key for key, value in data.items() if isinstance(value, dict) and ":serialized:" in value]
        entry = data[rng.choice(pickled)]
        entry[":serialized:"] = base64.b64encode(mutated(base64.b64decode(entry[":serialized:"]), rng)).decode()
        members["data"] = json.dumps(data).encode()
    else:
        members[name] = mutated(members[name], rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("algorithm", ["PPO", "SBX SAC"])
def test_damaged_models_end_in_one_line_or_a_sound_file(tmp_path, capsys, algorithm):
    model, bad, out = Saved(algorithm).save(tmp_path / "m.zip"), tmp_path / "bad.zip", tmp_path / "prior"
    vec, rng = vecnormalize(tmp_path / "v.pkl", np.zeros(4), np.ones(4)), np.random.default_rng(0)
    content, codes = vec.read_bytes(), []
    for _ in range(150):
        bad.write_bytes(damaged(model, rng))
        vec.write_bytes(mutated(content, rng) if rng.random() < 0.3 else content)
        codes.append(convert(bad, "--env-id", ENV_ID, "--export", out, "--vecnormalize", vec))
        printed = "".join(capsys.readouterr())
        assert printed.count("\n") == 1 and printed.endswith("\n")
        assert out.exists() == (codes[-1] == 0)
        if codes[-1] == 0:
            enjoy.read_policy(out)
            out.unlink()
    assert {*codes} == {0, 2}
    assert codes.count(2) > 50


def test_a_file_that_appears_meanwhile_is_kept(refused, tmp_path, monkeypatch):
    model, path = Saved().save(tmp_path / "model.zip"), tmp_path / "prior.safetensors"
    original = enjoy.check_policy
    path.write_text("mine")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    monkeypatch.setattr(enjoy, "check_policy", lambda *args: original(*args))
    refused("File exists", model, export=path)


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(refused, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused("No space left on device", Saved().save(tmp_path / "m.zip"), export=tmp_path / "prior", code=1)


def test_as_a_command_without_any_package_of_theirs_and_in_ascii(tmp_path):
    """With the names of torch, gym and the like blocked, and a terminal that knows only ASCII."""
    path, model = tmp_path / "prior-±.safetensors", Saved("SAC").save(tmp_path / "model.zip")
    code = """
import runpy, sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "stable_baselines3", "sb3_contrib", "sbx", "gym", "shimmy", "jax"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, SCRIPT, model, "--env-id", ENV_ID, "--export", path]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert (process.returncode, process.stderr) == (0, "")
    assert "prior-" in process.stdout
    content = path.read_bytes()
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert process.returncode == 2
    assert re.fullmatch(r"from_sb3\.py: .*exists.*--export\n", process.stderr)
    assert path.read_bytes() == content


# ---------------------------------------------------------------------- real models


def torch_reference(model, obs):
    """Mean and deviation before squashing or clipping, by Stable-Baselines3 itself."""
    import torch

    with torch.no_grad():
        obs = torch.as_tensor(obs)
        if hasattr(model.policy, "actor"):
            mean, log_std, _ = model.actor.get_action_dist_params(obs)
            return mean.numpy(), log_std.exp().numpy()
        theirs = model.policy.get_distribution(obs).distribution
        return theirs.mean.numpy(), theirs.stddev.numpy()


def jax_reference(model, obs):
    """The same, by SBX itself."""
    theirs = model.policy.actor_state.apply_fn(model.policy.actor_state.params, obs)
    theirs = theirs.distribution if model.policy.squash_output else theirs
    return np.asarray(theirs.mean()), np.asarray(theirs.stddev())


@pytest.mark.parametrize("package", ["stable_baselines3", "sb3_contrib", "sbx"])
@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "SAC", "TRPO", "TQC"])
def test_real_models_are_converted(tmp_path, package, algorithm):
    """After some hundred steps of training with VecNormalize."""
    kind = getattr(pytest.importorskip(package), algorithm, None)
    if kind is None:
        pytest.skip(f"{package} has no {algorithm}")
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = VecNormalize(DummyVecEnv([lambda: gymnasium.make(ENV_ID)]), clip_obs=1.5)
    options = {"n_steps": 64, "batch_size": 32} if algorithm in ("PPO", "TRPO") else {}
    options |= {"learning_starts": 50, "train_freq": 16, "buffer_size": 500} if algorithm in ("SAC", "TQC") else {}
    model = kind("MlpPolicy", env, policy_kwargs={"net_arch": [16, 8]}, seed=1, **options)
    model.learn(256)
    model.save(tmp_path / "model.zip")
    env.save(tmp_path / "vec.pkl")
    path = tmp_path / "prior.safetensors"
    flags = [tmp_path / "model.zip", "--env-id", ENV_ID, "--vecnormalize", tmp_path / "vec.pkl", "--export", path]
    assert convert(*flags) == 0
    raw = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    reference = jax_reference if package == "sbx" else torch_reference
    obs = env.normalize_obs(raw).astype(np.float32)
    for ours, theirs in zip(distribution(path, raw), reference(model, obs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    action = enjoy.act(enjoy.read_policy(path), raw, 0, env.action_space.low, env.action_space.high)
    np.testing.assert_allclose(action, model.predict(obs, deterministic=True)[0], rtol=1e-4, atol=1e-5)
