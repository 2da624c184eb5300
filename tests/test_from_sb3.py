"""priors/from_sb3.py: policy files say what Stable-Baselines3's models do, and other models are refused."""

import hashlib
import importlib.util
import json
import pickle
import re
import subprocess
import sys
import warnings
import zipfile

import gymnasium
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT

SCRIPT = ROOT / "priors" / "from_sb3.py"
ENV_ID = "InvertedPendulum-v4"  # actions in [-3, 3]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sb3():
    """Stable-Baselines3, on one thread; skips the tests without it."""
    sb3 = pytest.importorskip("stable_baselines3")
    import torch

    torch.set_num_threads(1)
    return sb3


@pytest.fixture(scope="module")
def convert(sb3):
    """The script's main."""
    spec = importlib.util.spec_from_file_location("from_sb3", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["from_sb3"] = module
    spec.loader.exec_module(module)
    return lambda *flags: module.main([str(flag) for flag in flags])


def vec_env(env_id=ENV_ID, **normalise):
    """An environment of Stable-Baselines3, with VecNormalize if it has options."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = DummyVecEnv([lambda: gymnasium.make(env_id)])
    return VecNormalize(env, **normalise) if normalise else env


class Reader:
    """A policy file, read as its format is described, in float64."""

    def __init__(self, path):
        data = path.read_bytes()
        self.tensors = safetensors.numpy.load(data)
        self.info = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        self.squash = {"true": True, "false": False}[self.info["squash"]]

    def distribution(self, obs):
        """Mean and deviation before squashing or clipping."""
        t = {name: array.astype(np.float64) for name, array in self.tensors.items()}
        clip = float(self.info.get("obs_clip", 10))
        x = np.clip((obs - t["obs_mean"]) / np.sqrt(t["obs_var"] + 1e-8), -clip, clip)
        activation = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}[self.info["activation"]]
        widths = json.loads(self.info["hidden_sizes"])
        for i, width in enumerate(widths):
            x = activation(x @ t[f"actor_mean.{2 * i}.weight"].T + t[f"actor_mean.{2 * i}.bias"])
            assert x.shape[1] == width
        last = f"actor_mean.{2 * len(widths)}"
        mean = x @ t[f"{last}.weight"].T + t[f"{last}.bias"]
        if "actor_logstd" in t:
            return mean, np.broadcast_to(np.exp(t["actor_logstd"]), mean.shape)
        return mean, np.exp(np.clip(x @ t["actor_logstd.weight"].T + t["actor_logstd.bias"], -20, 2))

    def log_prob(self, obs, u):
        """Log-density of u, or of tanh(u)."""
        mean, std = self.distribution(obs)
        terms = -0.5 * ((u - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        return (terms - 2 * (np.log(2) - u - np.logaddexp(0, -2 * u)) * self.squash).sum(1)

    def action(self, u, space):
        """The environment's action."""
        if self.squash:
            return space.low + (np.tanh(u) + 1) / 2 * (space.high - space.low)
        return np.clip(u, space.low, space.high)


def small(net_arch, activation="Tanh", **more):
    """policy_kwargs of a small network."""
    import torch

    return {"net_arch": net_arch, "activation_fn": getattr(torch.nn, activation), **more}


SAC = {"learning_starts": 100, "train_freq": 4, "buffer_size": 5000, "batch_size": 64, "gamma": 0.97}
PPO = {"n_steps": 256, "batch_size": 64, "n_epochs": 4}
MODELS = {  # algorithm, environment, its VecNormalize, options, network, widths that the file has to have
    "PPO": ("PPO", ENV_ID, {"clip_obs": 1.5}, PPO, {"net_arch": [32, 16]}, [32, 16]),
    "PPO relu": ("PPO", "Hopper-v4", {}, PPO, {"net_arch": {"pi": [24], "vf": [8, 8]}, "activation": "ReLU"}, [24]),
    "PPO linear": ("PPO", ENV_ID, {"epsilon": 1e-2}, PPO, {"net_arch": []}, []),
    "PPO two extractors": ("PPO", ENV_ID, {}, PPO, {"net_arch": [8], "share_features_extractor": False}, [8]),
    "A2C": ("A2C", "Hopper-v4", {"norm_obs": False}, {}, {"net_arch": {"vf": [8], "pi": [16, 16, 16]}}, [16] * 3),
    "SAC": ("SAC", ENV_ID, {}, {**SAC, "ent_coef": 0.3}, {"net_arch": [32, 32], "activation": "ReLU"}, [32, 32]),
    "SAC auto": ("SAC", "Hopper-v4", {}, SAC, {"net_arch": {"pi": [24], "qf": [32]}}, [24]),
    "SAC linear": ("SAC", ENV_ID, {"norm_reward": True}, {**SAC, "ent_coef": 0.3}, {"net_arch": []}, []),
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(request, sb3, convert, tmp_path_factory):
    """A model after some thousand steps, its VecNormalize or None, the policy file, and what is expected of it."""
    algorithm, env_id, normalise, options, network, widths = MODELS[request.param]
    folder = tmp_path_factory.mktemp("converted")
    env = vec_env(env_id, **normalise)
    model = getattr(sb3, algorithm)("MlpPolicy", env, policy_kwargs=small(**network), seed=1, device="cpu", **options)
    model.learn(2048)
    model.save(folder / "model.zip")
    flags = [folder / "model.zip", "--env-id", env_id, "--export", folder / "out" / "prior.safetensors"]
    if normalise:
        env.save(folder / "vec.pkl")
        flags += ["--vecnormalize", folder / "vec.pkl"]
    assert convert(*flags) == 0
    (path,) = (folder / "out").iterdir()
    return model, env if normalise else None, Reader(path), widths


@pytest.mark.parametrize("converted", MODELS, indirect=True)
def test_file_has_the_models_distribution(converted):
    import torch

    model, normaliser, reader, widths = converted
    assert json.loads(reader.info["hidden_sizes"]) == widths
    rng = np.random.default_rng(0)
    raw = rng.normal(scale=rng.choice([0.1, 1, 3], (1000, 1)), size=(1000, *model.observation_space.shape))
    raw = raw.astype(np.float32)
    obs = normaliser.normalize_obs(raw) if normaliser else raw
    mean, std = reader.distribution(raw)
    with torch.no_grad():
        if reader.squash:
            their_mean, their_log_std, _ = model.actor.get_action_dist_params(torch.as_tensor(obs))
            theirs = model.actor.action_dist.proba_distribution(their_mean, their_log_std)
        else:
            theirs = model.policy.get_distribution(torch.as_tensor(obs))
        u = np.clip(mean + std * rng.normal(size=mean.shape), -3, 3) if reader.squash else rng.normal(mean, std)
        u = u.astype(np.float32)  # not so large that Stable-Baselines3's log(1 - tanh² + 1e-6) is another number
        point = torch.as_tensor(u)
        log_prob = theirs.log_prob(point.tanh(), point) if reader.squash else theirs.log_prob(point)
        np.testing.assert_allclose(mean, theirs.distribution.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(std, theirs.distribution.stddev, rtol=1e-4)
    assert reader.squash == (np.ptp(std, 0).max() > 0)  # SAC's deviation depends on the state
    np.testing.assert_allclose(reader.log_prob(raw, u), log_prob, rtol=1e-4, atol=5e-4)
    actions, _ = model.predict(obs, deterministic=True)
    np.testing.assert_allclose(reader.action(mean, model.action_space), actions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("converted", MODELS, indirect=True)
def test_file_records_how_to_read_it(sb3, converted):
    model, normaliser, reader, _ = converted
    info = reader.info
    kind = type(model).__name__
    optional = {"alpha"} if kind == "SAC" else set()
    assert info.keys() == optional | {
        "format", "env_id", "squash", "hidden_sizes", "activation", "obs_clip", "gamma", "training", "sha256",
    }  # fmt: skip
    if kind == "SAC":
        scale = np.sqrt(normaliser.ret_rms.var + normaliser.epsilon) if normaliser else 1  # of the reward that it saw
        learned = np.exp(model.log_ent_coef.item()) if model.log_ent_coef is not None else 0.3
        assert float(info["alpha"]) == pytest.approx(scale * learned, rel=1e-6)
    assert info["format"] == "pt"
    assert info["squash"] == str(kind == "SAC").lower()
    assert float(info["gamma"]) == model.gamma
    assert float(info["obs_clip"]) == (normaliser.clip_obs if normaliser and normaliser.norm_obs else np.inf)
    training = json.loads(info["training"])
    assert training["source"] == f"stable-baselines3 {sb3.__version__} {kind}"
    assert training["num_timesteps"] == model.num_timesteps >= 2048
    digest = hashlib.sha256(json.dumps({**info, "sha256": ""}, sort_keys=True).encode())
    for name, tensor in sorted(reader.tensors.items()):
        digest.update(name.encode() + tensor.tobytes())
    assert info["sha256"] == digest.hexdigest()
    assert {tensor.dtype for tensor in reader.tensors.values()} == {np.dtype(np.float32)}


def test_digest_is_the_scripts_own():
    ours, theirs = (
        re.search(r"(?m)^def policy_digest.*\n(?:(?: .*)?\n)+", path.read_text())[0].strip()
        for path in (SCRIPT, ROOT / "residual_ppo.py")
    )
    assert ours == theirs


@pytest.mark.parametrize("algorithm", ["PPO", "SAC"])
def test_alpha_can_be_given(sb3, convert, tmp_path, algorithm):
    getattr(sb3, algorithm)("MlpPolicy", ENV_ID).save(tmp_path / "model")
    path = tmp_path / "prior.safetensors"
    assert convert(tmp_path / "model.zip", "--env-id", ENV_ID, "--export", path, "--alpha", 0.05) == 0
    assert Reader(path).info["alpha"] == "0.05"


# ----------------------------------------------------------------------------------------- refusals


class Space(gymnasium.Env):
    """An environment that has these spaces and nothing else."""

    def __init__(self, observation_space, action_space=None):
        self.observation_space = observation_space
        self.action_space = action_space or gymnasium.spaces.Box(-3, 3, (1,))

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def box(*shape, high=np.inf, dtype=np.float32):
    return gymnasium.spaces.Box(0 if dtype is np.uint8 else -high, high, shape, dtype)


def own_policy(sb3):
    """A policy class that is not Stable-Baselines3's own, though it says that it is."""
    from stable_baselines3.common.policies import ActorCriticPolicy

    return type("Own", (ActorCriticPolicy,), {"__module__": "stable_baselines3.common.policies", "__reduce__": None})


def batch_norm(sb3):
    """An activation with a batch norm in front."""
    import torch

    return lambda: torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Tanh())


def extractor(sb3):
    from stable_baselines3.common.torch_layers import FlattenExtractor

    return type("Doubling", (FlattenExtractor,), {"forward": lambda self, obs: 2 * self.flatten(obs)})


def nan_model(sb3):
    model = sb3.PPO("MlpPolicy", ENV_ID)
    model.policy.log_std.data[:] = float("nan")
    return model


def with_shared_sde(sb3):
    return sb3.PPO("MlpPolicy", ENV_ID, use_sde=True, policy_kwargs={"squash_output": True})


DICT = gymnasium.spaces.Dict({"a": box(4)})
IMAGE = box(40, 40, 3, high=255, dtype=np.uint8)
UNFIT = {
    "discrete actions": (lambda sb3: sb3.PPO("MlpPolicy", "CartPole-v1"), "actions .* are Discrete"),
    "many discrete actions": (
        lambda sb3: sb3.A2C("MlpPolicy", Space(box(4), gymnasium.spaces.MultiDiscrete([2, 2]))),
        "actions .* are MultiDiscrete",
    ),
    "discrete observations": (
        lambda sb3: sb3.PPO("MlpPolicy", Space(gymnasium.spaces.Discrete(4))),
        "observations .* are Discrete",
    ),
    "dictionary": (lambda sb3: sb3.SAC("MultiInputPolicy", Space(DICT), buffer_size=9), "observations .* are Dict"),
    "PPO of images": (lambda sb3: sb3.PPO("CnnPolicy", Space(IMAGE), n_steps=9), "CnnPolicy with NatureCNN"),
    "SAC of images": (
        lambda sb3: sb3.SAC("CnnPolicy", Space(IMAGE), buffer_size=9),
        "CnnPolicy with NatureCNN",
    ),
    "gSDE": (lambda sb3: sb3.PPO("MlpPolicy", ENV_ID, use_sde=True), "use_sde=False"),
    "squashed PPO": (with_shared_sde, "use_sde=False"),
    "SAC with gSDE": (lambda sb3: sb3.SAC("MlpPolicy", ENV_ID, use_sde=True), "use_sde=False"),
    "TD3": (lambda sb3: sb3.TD3("MlpPolicy", ENV_ID), "no PPO, A2C or SAC .*td3"),
    "DDPG": (lambda sb3: sb3.DDPG("MlpPolicy", ENV_ID), "no PPO, A2C or SAC .*td3"),
    "DQN": (lambda sb3: sb3.DQN("MlpPolicy", "CartPole-v1"), "no PPO, A2C or SAC .*dqn"),
    "activation": (
        lambda sb3: sb3.PPO("MlpPolicy", ENV_ID, policy_kwargs=small([8], "ELU")),
        "layers Linear, ELU; .* tanh or ReLU",
    ),
    "SAC's activation": (
        lambda sb3: sb3.SAC("MlpPolicy", ENV_ID, policy_kwargs=small([8], "SiLU")),
        "layers Linear, SiLU; .* tanh or ReLU",
    ),
    "batch norm": (
        lambda sb3: sb3.PPO("MlpPolicy", ENV_ID, policy_kwargs={"ortho_init": False, "activation_fn": batch_norm(sb3)}),
        "layers Linear, Sequential; .* tanh or ReLU",
    ),
    "features": (
        lambda sb3: sb3.PPO("MlpPolicy", ENV_ID, policy_kwargs={"features_extractor_class": extractor(sb3)}),
        "ActorCriticPolicy with Doubling",
    ),
    "policy class": (lambda sb3: sb3.A2C(own_policy(sb3), ENV_ID), "a Own with FlattenExtractor"),
    "other observations": (lambda sb3: sb3.PPO("MlpPolicy", "Hopper-v4"), r"observations \(11,\).*--env-id"),
    "two axes": (lambda sb3: sb3.PPO("MlpPolicy", Space(box(2, 2))), r"observations \(2, 2\).*--env-id"),
    "other actions": (lambda sb3: sb3.PPO("MlpPolicy", Space(box(4), box(2, high=3))), r"actions \(2,\).*--env-id"),
    "rescaled actions": (lambda sb3: sb3.PPO("MlpPolicy", Space(box(4), box(1, high=1))), "without rescaling actions"),
    "NaN": (nan_model, "actor_logstd .* NaN"),
    "VecNormalize": (
        lambda sb3: sb3.A2C("MlpPolicy", vec_env(gamma=0.9)).learn(10),
        "was trained with VecNormalize.*--vecnormalize",
    ),
}


@pytest.fixture
def refused(convert, tmp_path, capsys):
    """Assert that the script refuses flags in one line that matches a pattern, and writes nothing."""

    def files():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def check(pattern, *flags, env_id=ENV_ID, export=tmp_path / "out" / "prior.safetensors"):
        before = files()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # they would be more lines
            assert convert(*flags, "--env-id", env_id, "--export", export) == 2
        out, err = capsys.readouterr()
        assert re.fullmatch(rf"from_sb3\.py: [^\n]*{pattern}[^\n]*\n", err), err
        assert out == ""
        assert len(err) < 600
        assert files() == before

    return check


@pytest.mark.parametrize("what", UNFIT)
def test_models_that_are_no_gaussian_mlp_are_refused(sb3, refused, tmp_path, capsys, what):
    make, pattern = UNFIT[what]
    make(sb3).save(tmp_path / "model.zip")
    capsys.readouterr()
    refused(pattern, tmp_path / "model.zip")


@pytest.fixture
def model(sb3, tmp_path):
    """The file of a model that can be converted."""
    sb3.PPO("MlpPolicy", ENV_ID).save(tmp_path / "model.zip")
    return tmp_path / "model.zip"


def edit(path, change):
    """Rewrite the data of a model's file."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(files["data"])
    files["data"] = json.dumps(change(data) or data)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda d: d["policy_class"].update(__module__="sb3_contrib.common.recurrent.policies"), "recurrent"),
        (lambda d: d["policy_class"].update(__module__="sb3_contrib.crossq.policies"), "crossq"),
        (lambda d: d["policy_class"].update(__module__="sbx.ppo.policies"), "sbx"),
        (lambda d: d.update(cg_max_steps=15), "no PPO, A2C or SAC"),  # TRPO
        (lambda d: d.pop("policy_class") and None, "no Stable-Baselines3 model"),
        (lambda d: d["policy_class"].update({":serialized:": "bm9uZQ=="}), "cannot be loaded"),
        (lambda d: d.update(policy_kwargs={"net_arch": [3]}), "cannot be loaded .*Unexpected key"),
        (lambda d: [d], "no Stable-Baselines3 model"),
    ],
)
def test_other_data_are_refused(refused, model, change, pattern):
    edit(model, change)
    refused(pattern, model)


def test_files_that_are_no_models_are_refused(refused, model, tmp_path):
    refused("there is no model", tmp_path / "missing.zip")
    refused("there is no model", tmp_path)
    (tmp_path / "text.zip").write_text("text")
    refused("no Stable-Baselines3 model", tmp_path / "text.zip")
    (tmp_path / "half.zip").write_bytes(model.read_bytes()[:2000])
    refused("no Stable-Baselines3 model", tmp_path / "half.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    refused("no Stable-Baselines3 model", tmp_path / "empty.zip")


def test_flags_that_cannot_work_are_refused(refused, model, tmp_path):
    refused("--env-id Nothing-v4 cannot be made", model, env_id="Nothing-v4")
    refused(r"actions \(1,\), and CartPole-v1 Discrete", model, env_id="CartPole-v1")
    for alpha in ("-0.1", "nan", "inf"):
        refused(f"--alpha is {alpha}", model, f"--alpha={alpha}")
    (tmp_path / "taken").write_text("mine")
    refused("taken exists; .*--export", model, export=tmp_path / "taken")
    refused("taken/prior.*--export", model, export=tmp_path / "taken" / "prior")
    (tmp_path / "link").symlink_to("nowhere")
    refused("link exists; .*--export", model, export=tmp_path / "link")


def test_statistics_that_do_not_fit_are_refused(refused, model, tmp_path):
    path = tmp_path / "vec.pkl"
    refused("vec.pkl cannot be loaded: FileNotFoundError", model, "--vecnormalize", path)
    path.write_text("text")
    refused("vec.pkl cannot be loaded", model, "--vecnormalize", path)
    path.write_bytes(pickle.dumps({"mean": 0}))
    refused("vec.pkl is a dict", model, "--vecnormalize", path)
    vec_env("Hopper-v4", gamma=0.9).save(path)
    refused("vec.pkl does not fit a model of 4", model, "--vecnormalize", path)
    env = vec_env(epsilon=1e-9)
    env.obs_rms.var[:] = 0  # with such an epsilon, no variance of a policy file says the same
    env.save(path)
    refused("obs_var .* negative", model, "--vecnormalize", path)


def test_a_file_that_appears_meanwhile_is_kept(convert, model, tmp_path, monkeypatch, capsys):
    module = sys.modules["from_sb3"]
    original = module.policy_digest
    path = tmp_path / "prior.safetensors"
    monkeypatch.setattr(module, "policy_digest", lambda *args: path.write_text("mine") and original(*args))
    assert convert(model, "--env-id", ENV_ID, "--export", path) == 2
    assert "File exists" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model.zip", "prior.safetensors"]


def test_as_a_command(model, tmp_path):
    path = tmp_path / "prior.safetensors"
    command = [sys.executable, str(SCRIPT), str(model), "--env-id", ENV_ID, "--export", str(path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert str(path) in process.stdout
    content = path.read_bytes()
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert re.fullmatch(r"from_sb3\.py: .*exists.*--export\n", process.stderr)
    assert path.read_bytes() == content


def test_without_stable_baselines3_it_says_so(tmp_path):
    code = (
        "import runpy, sys; sys.modules['stable_baselines3'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = ("model.zip", "--env-id", ENV_ID, "--export", "prior.safetensors")
    process = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT), *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 2
    assert re.fullmatch(r"from_sb3\.py: Stable-Baselines3 is needed.*pip install stable-baselines3\n", process.stderr)
    assert not any(tmp_path.iterdir())
