"""Turn a saved Stable-Baselines3 PPO, A2C or SAC model into a policy file that residual_ppo.py takes as a prior.

python priors/from_sb3.py model.zip --env-id Hopper-v4 --export hopper.safetensors --vecnormalize vecnormalize.pkl

Needs Stable-Baselines3 (pip install stable-baselines3). Its files hold pickles, and loading one runs whatever code is
in it: only load models that you trust.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np
import safetensors.numpy
import tyro

try:
    import stable_baselines3 as sb3
    import torch
    from stable_baselines3.common.distributions import DiagGaussianDistribution, SquashedDiagGaussianDistribution
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.running_mean_std import RunningMeanStd
    from stable_baselines3.common.torch_layers import FlattenExtractor
    from stable_baselines3.common.vec_env import VecNormalize
    from stable_baselines3.sac.policies import SACPolicy

    MISSING = None
except ImportError as error:
    MISSING = error

# what a model's file holds and a policy file does not need; not to unpickle it lets more models load
UNUSED = ("lr_schedule", "_last_obs", "_last_original_obs", "_last_episode_starts", "ep_info_buffer",
          "ep_success_buffer")  # fmt: skip


@dataclass(frozen=True)
class Args:
    model: Annotated[Path, tyro.conf.Positional]
    """the model, as model.save wrote it (.zip)"""
    env_id: str
    """the Gymnasium environment that the model was trained in"""
    export: Path
    """the policy file to write"""
    vecnormalize: Path | None = None
    """the statistics of VecNormalize, if the model was trained with it (.pkl)"""
    alpha: float | None = None
    """temperature to record; default: SAC's entropy coefficient, and none for PPO and A2C, whose entropy bonus is in
    units of normalised advantages"""


class Stop(Exception):
    """Ends the program with one line for the user."""


def policy_digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over all that a policy file says, to find damage."""
    digest = hashlib.sha256(json.dumps({**metadata, "sha256": ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()


def in_short(error: Exception) -> str:
    """An error's kind and message, cut to a line's length."""
    return re.sub(r"\x1b\[\d*m", "", f"{type(error).__name__}: {error}")[:200]  # without colours


def load_model(path: Path, with_vecnormalize: bool) -> tuple[str, str, Any]:
    """Load a model once its file, of which nothing is unpickled before, shows that it can be converted.

    Returns: the algorithm's name, the version of Stable-Baselines3 that saved the model, and the model.
    """
    if not path.is_file():
        raise Stop(f"there is no model {path}; name a file that model.save wrote, with its .zip")
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("data"))
            version = "_stable_baselines3_version"
            version = archive.read(version).decode().strip() if version in archive.namelist() else "of unknown version"
        policy = data["policy_class"]["__module__"]
        spaces = {what: re.findall(r"\w+", data[f"{what}_space"][":type:"])[-1] for what in ("observation", "action")}
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, IndexError) as error:
        raise Stop(f"{path} is no Stable-Baselines3 model ({in_short(error)}); name a file of model.save") from None
    if policy == "stable_baselines3.sac.policies":
        algorithm = "SAC"
    elif policy == "stable_baselines3.common.policies" and "normalize_advantage" in data and "cg_max_steps" not in data:
        algorithm = "PPO" if "clip_range" in data else "A2C"
    else:
        raise Stop(f"{path} is no PPO, A2C or SAC model with an MlpPolicy (its policy: {policy}); train such a one")
    for what, kind in spaces.items():
        if kind != "Box":
            raise Stop(f"the {what}s of {path} are {kind}; only a model with vectors (Box) for them can be a prior")
    if data.get("use_sde"):
        raise Stop(f"{path} explores with gSDE, which is no diagonal Gaussian; train a model with use_sde=False")
    # SAC sets this without VecNormalize, too
    if algorithm != "SAC" and data.get("_last_original_obs") is not None and not with_vecnormalize:
        raise Stop(f"{path} was trained with VecNormalize; name the file that VecNormalize.save wrote, --vecnormalize")
    try:
        custom = {**dict.fromkeys(UNUSED), "learning_rate": 0.0, "clip_range": 0.2, "clip_range_vf": None}
        kwargs = {"buffer_size": 1} if algorithm == "SAC" else {}
        return algorithm, version, getattr(sb3, algorithm).load(path, device="cpu", custom_objects=custom, **kwargs)
    except Exception as error:  # a pickle can raise anything
        raise Stop(f"{path} cannot be loaded ({in_short(error)}); save it anew with today's versions") from None


def network(path: Path, algorithm: str, policy: Any) -> tuple[dict, list[int], str]:
    """Take a policy's network apart.

    Returns: the tensors of the mean and the deviation, the hidden layers' widths and the activation.
    """
    squash = algorithm == "SAC"
    kind, distribution = ActorCriticPolicy, DiagGaussianDistribution
    if squash:
        kind, distribution = SACPolicy, SquashedDiagGaussianDistribution
    actor = policy.actor if squash else policy
    extractor = actor.features_extractor if squash else policy.pi_features_extractor
    if type(extractor) is not FlattenExtractor or type(policy) is not kind:
        found = f"a {type(policy).__name__} with {type(extractor).__name__}"
        raise Stop(f"the policy of {path} is {found}; only SB3's own MlpPolicy can be read: train with that")
    if type(actor.action_dist) is not distribution or actor.squash_output != squash:
        raise Stop(f"the policy of {path} is no diagonal Gaussian; train one without squash_output")
    body = [*(actor.latent_pi if squash else actor.mlp_extractor.policy_net)]
    linears = [*body[::2], actor.mu if squash else actor.action_net]
    known = {torch.nn.Tanh: "tanh", torch.nn.ReLU: "relu"}
    activations = {known.get(type(module)) for module in body[1::2]} or {"tanh"}
    if len(activations) > 1 or None in activations or {type(module) for module in linears} != {torch.nn.Linear}:
        found = ", ".join(dict.fromkeys(type(module).__name__ for module in body))
        raise Stop(f"{path} has the layers {found}; only linear ones with tanh or ReLU between can be read: train such")
    tensors = {}
    for i, linear in enumerate(linears):
        tensors |= {f"actor_mean.{2 * i}.weight": linear.weight, f"actor_mean.{2 * i}.bias": linear.bias}
    if squash:
        tensors |= {"actor_logstd.weight": actor.log_std.weight, "actor_logstd.bias": actor.log_std.bias}
    else:
        tensors["actor_logstd"] = actor.log_std
    tensors = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return tensors, [linear.out_features for linear in linears[:-1]], activations.pop()


def check_spaces(path: Path, env_id: str, model: Any) -> None:
    """Stop unless the environment has the model's observations and actions, in these bounds."""
    try:
        env = gymnasium.make(env_id)
    except Exception as error:  # an environment can raise anything
        raise Stop(f"--env-id {env_id} cannot be made ({in_short(error)}); name one of Gymnasium's") from None
    ours, theirs = (model.observation_space, model.action_space), (env.observation_space, env.action_space)
    env.close()
    for what, one, other in zip(("observation", "action"), ours, theirs, strict=True):
        if not isinstance(other, gymnasium.spaces.Box) or len(other.shape) != 1 or one.shape != other.shape:
            raise Stop(f"{path} has {what}s {one.shape}, and {env_id} {other}; name the model's own --env-id")
    if not (np.array_equal(ours[1].low, theirs[1].low) and np.array_equal(ours[1].high, theirs[1].high)):
        raise Stop(f"{path} acts in {ours[1]}, and {env_id} in {theirs[1]}; train without rescaling actions")


def load_statistics(path: Path, obs_dim: int) -> Any:
    """Load VecNormalize's statistics."""
    try:
        with open(path, "rb") as file:
            statistics = pickle.load(file)
    except Exception as error:  # a pickle can raise anything
        raise Stop(f"--vecnormalize {path} cannot be loaded: {in_short(error)}; name another file") from None
    if not isinstance(statistics, VecNormalize):
        raise Stop(f"--vecnormalize {path} is a {type(statistics).__name__}; name a file that VecNormalize.save wrote")
    rms = statistics.obs_rms if statistics.norm_obs else RunningMeanStd(shape=(obs_dim,))
    if not isinstance(rms, RunningMeanStd) or rms.mean.shape != (obs_dim,) or not statistics.clip_obs > 0:
        raise Stop(f"--vecnormalize {path} does not fit a model of {obs_dim} observed numbers; name the model's own")
    return statistics


def write_new(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and never over another one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, fails if there is such a file by now
    except OSError as error:
        raise Stop(f"cannot write {path} ({error.strerror}); choose another file with --export") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def convert(args: Args) -> str:
    """Write the policy file. Returns: what it is, for the user."""
    if MISSING:
        raise Stop(f"Stable-Baselines3 is needed ({MISSING}); pip install stable-baselines3")
    if os.path.lexists(args.export):
        raise Stop(f"{args.export} exists; move it away, or choose another file with --export")
    if args.alpha is not None and not 0 <= args.alpha < np.inf:
        raise Stop(f"--alpha is {args.alpha}; it must be a finite number and not negative")
    algorithm, version, model = load_model(args.model, args.vecnormalize is not None)
    tensors, hidden_sizes, activation = network(args.model, algorithm, model.policy)
    check_spaces(args.model, args.env_id, model)
    obs_dim, alpha = model.observation_space.shape[0], args.alpha
    if algorithm == "SAC" and alpha is None:
        alpha = float(model.ent_coef if model.log_ent_coef is None else model.log_ent_coef.exp())
    mean, variance, obs_clip = np.zeros(obs_dim), np.ones(obs_dim), np.inf  # which normalise nothing, to float32
    if args.vecnormalize:
        statistics = load_statistics(args.vecnormalize, obs_dim)
        if statistics.norm_obs:
            mean, variance = statistics.obs_rms.mean, statistics.obs_rms.var + (statistics.epsilon - 1e-8)
            obs_clip = float(statistics.clip_obs)
        if algorithm == "SAC" and args.alpha is None and statistics.norm_reward:
            alpha *= float(np.sqrt(statistics.ret_rms.var + statistics.epsilon))  # in units of the environment's reward
    tensors |= {"obs_mean": mean, "obs_var": variance}
    tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all() or (name == "obs_var" and (tensor < 0).any()):
            raise Stop(f"{name} of {args.model} has NaN, infinite or negative entries; take a model from before them")
    source = f"stable-baselines3 {version} {algorithm}"
    training = {"source": source, "num_timesteps": model.num_timesteps, "vecnormalize": bool(args.vecnormalize)}
    metadata = {
        "format": "pt",
        "env_id": args.env_id,
        "squash": str(algorithm == "SAC").lower(),
        "hidden_sizes": json.dumps(hidden_sizes),
        "activation": activation,
        "obs_clip": str(obs_clip),
        "gamma": str(float(model.gamma)),
        "training": json.dumps(training),
    }
    if alpha is not None:
        metadata["alpha"] = str(alpha)
    metadata["sha256"] = policy_digest(tensors, metadata)
    write_new(args.export, safetensors.numpy.save(tensors, metadata))
    shown = ("squash", "hidden_sizes", "activation", "obs_clip", "alpha", "gamma")
    return f"{source} for {args.env_id}; " + ", ".join(f"{name} {metadata.get(name, 'unknown')}" for name in shown)


def main(argv: list[str] | None = None) -> int:
    """Convert. Returns: the exit code."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(f"the prior is {args.export}: {convert(args)}")
    except Stop as error:
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
