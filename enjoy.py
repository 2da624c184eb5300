# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "numpy>=2.0", "gymnasium>=1.1", "mujoco>=3.3", "imageio[ffmpeg]>=2.36",
#   "tyro>=0.9", "rich>=13.9", "safetensors>=0.5",
# ]
# ///
"""Watch, record and evaluate a policy in Gymnasium's own environment, in NumPy alone.

This file is also the reference reader of the policy file: read_policy and act are all that a robot needs of it.

    python enjoy.py priors/Ant-v4.safetensors --video ant.mp4
    python enjoy.py runs/<run> --against priors/Ant-v4.safetensors --deterministic
"""

import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
import safetensors.numpy
import tyro

xp = np  # what the line of a task calls it, as in the training scripts, where it is jax.numpy


@dataclass(frozen=True)
class Args:
    path: tyro.conf.Positional[Path]
    """a policy file, or a run folder, which holds one"""
    against: Path | None = None
    """another policy, to play from the same seeds; beside the first one in the table, right of it in the video"""

    # episodes
    episodes: int = 10
    """how many to play"""
    seed: int = 1
    """seed of the first episode, of its environment and its noise; the next one's is 1 higher"""
    deterministic: bool = False
    """take mean actions instead of sampled ones"""
    env_id: str | None = None
    """another version of the environment, as Hopper-v5; if not given, the one that the policy file names"""
    env_kwargs: str | None = None
    """keyword arguments of the environment, in JSON; if not given, those of the training"""
    addon: str | None = None
    """add-on task, "none" for a zero reward, "default" for the environment's own; if not given, that of the training"""
    addon_coef: float | None = None
    """factor on the add-on reward; if not given, that of the training"""

    # output
    json: Path | None = None
    """write every episode to this new .json file"""
    record: Path | None = None
    """write every step to this new .npz file, or, with a name like hopper-v0, as a Minari dataset to this new folder"""
    window: bool = False
    """watch in Gymnasium's viewer"""
    video: Path | None = None
    """record the first episode to this new .mp4 or .gif file"""
    video_steps: int | None = None
    """record no more than so many steps"""
    video_size: tuple[int, int] = (480, 360)
    """width and height of the picture of one policy, in pixels"""
    video_fps: float = 20.0
    """about so many frames per second; a video plays at the robot's speed and leaves out steps between frames"""


class StopRun(Exception):
    """Ends the program with one line for the user; exit code 2: bad input, 1: a fault on the way, 128 + n: signal n."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


# -------------------------------------------------------------------------------- add-on tasks


class AddonTask(NamedTuple):
    """An add-on reward, and the quantity of which it is a function.

    The quantity is a function of what a step knows: the observation s (..., obs_dim), the action a (..., action_dim) in
    the environment's units, and the observation t that the step returned. What needs two actions (smoothness) or the
    elapsed time is none, as the observation lacks it: the value of a state would not be defined. Use indices as in
    t[..., 3], operators, abs, and functions of xp, as xp.minimum: jax.numpy in training, NumPy in enjoy.py.
    """

    env: str  # the environment it is for, without the version
    label: str  # the quantity's name and unit
    quantity: Callable  # s, a, t -> (...)
    reward: Callable  # quantity (...) -> (...)
    coef: float = 1.0


def line_met(s, a, t):
    """1 where parking's car, 5 m by 2 m, meets a line, 8 m by 0.1 m, 2 m left or right of the goal, else 0; (...,)."""
    x, y, cos, sin = 100 * (t[..., 0] - t[..., 6]), 100 * (t[..., 1] - t[..., 7]), t[..., 4], t[..., 5]
    x = xp.stack([x - 2, x + 2])  # the car seen from either line, m; they meet unless an axis of one separates them
    met = (abs(x) < 0.05 + 2.5 * abs(cos) + abs(sin)) & (abs(y) < 4 + 2.5 * abs(sin) + abs(cos))
    met &= abs(x * cos + y * sin) < 2.5 + 0.05 * abs(cos) + 4 * abs(sin)
    met &= abs(y * cos - x * sin) < 1 + 0.05 * abs(sin) + 4 * abs(cos)
    return 1.0 * met.any(0)


# A task of your own is a line here. An environment's first task is its default.
ADDON_TASKS = {
    "half-cheetah-front-foot": AddonTask("HalfCheetah", "|θ| (rad)", lambda s, a, t: abs(t[..., 7]), lambda x: -10 * x),
    "half-cheetah-energy": AddonTask("HalfCheetah", "|a|²", lambda s, a, t: (a**2).sum(-1), lambda x: -0.1 * x),
    "hopper-height": AddonTask("Hopper", "z (m)", lambda s, a, t: t[..., 0], lambda z: 10 * (z - 1)),
    "hopper-upright": AddonTask("Hopper", "|θ| (rad)", lambda s, a, t: abs(t[..., 1]), lambda x: -10 * x),
    "ant-right": AddonTask("Ant", "-v_y (m/s)", lambda s, a, t: -t[..., 14], lambda v: v),
    "ant-left": AddonTask("Ant", "v_y (m/s)", lambda s, a, t: t[..., 14], lambda v: v),
    "ant-energy": AddonTask("Ant", "|a|²", lambda s, a, t: (a**2).sum(-1), lambda x: -0.1 * x),
    "swimmer-straight": AddonTask("Swimmer", "|θ| (rad)", lambda s, a, t: abs(t[..., 1]), lambda x: -0.5 * x),
    "walker-upright": AddonTask("Walker2d", "|θ| (rad)", lambda s, a, t: abs(t[..., 1]), lambda x: -10 * x),
    "walker-height": AddonTask("Walker2d", "z (m)", lambda s, a, t: t[..., 0], lambda z: 10 * (z - 1)),
    "humanoid-right": AddonTask("Humanoid", "-v_y (m/s)", lambda s, a, t: -t[..., 23], lambda v: v),
    "mountain-car-right": AddonTask("MountainCarContinuous", "left", lambda s, a, t: a[..., 0] < 0, lambda x: -0.1 * x),
    "parking-lines": AddonTask("parking", "line met", line_met, lambda x: -x),
    "none": AddonTask("", "–", lambda s, a, t: 0 * t[..., 0], lambda x: x),
}

# A task of your own is a line here. An environment's first task is its default. Actions are one-hot: a[..., 2] is 1 if
# it was the third one.
DISCRETE_TASKS = {
    "cart-pole-centre": AddonTask("CartPole", "|x| (m)", lambda s, a, t: abs(t[..., 0]), lambda x: -x / 2.4),
    "lunar-lander-engine": AddonTask("LunarLander", "main engine on", lambda s, a, t: a[..., 2], lambda x: -0.5 * x),
    "highway-right": AddonTask("highway-fast", "lane", lambda s, a, t: xp.round(3 * t[..., 2]), lambda x: 0.25 * x),
    "highway-slow": AddonTask("highway-fast", "v (m/s)", lambda s, a, t: 80 * t[..., 3], lambda v: 0.05 * (20 - v)),
    "none": AddonTask("", "–", lambda s, a, t: 0 * t[..., 0], lambda x: x),
}
BASIC_TASKS = {  # that stand for the environment's own reward
    "cart-pole-upright": AddonTask(
        "CartPole", "|θ| (rad)", lambda s, a, t: abs(t[..., 2]), lambda x: 1 - 10 * x / 0.2095
    ),
}


def recorded_args(path: Path) -> dict[str, Any]:
    """The arguments that a run, by its args.json, or a policy, by its file, was trained with; {} if that is not said.

    Raises: StopRun if args.json is missing or damaged.
    """
    try:
        if path.is_dir():
            return json.loads((path / "args.json").read_text())["args"] | {}
        with safetensors.safe_open(path, "numpy") as file:
            return json.loads(file.metadata().get("training", "{}")).get("args", {}) | {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        what = path / "args.json" if path.is_dir() else f"what {path} says of its training"
        raise StopRun(f"{what} cannot be used: {error}; or give the policy file itself") from None


def find_task(env_id: str, recorded: dict[str, Any], args: Args) -> tuple[str, AddonTask]:
    """An add-on task and its name: as named, else as recorded, else the environment's default, else "none".

    Raises: StopRun if the environment has no such task.
    """
    env = env_id.rpartition("-v")[0]
    tasks = ADDON_TASKS | DISCRETE_TASKS
    choices = [key for key, task in tasks.items() if task.env == env] + ["none"]
    name, known = recorded.get("addon"), not args.path.is_dir() and recorded.get("addon") == "none"
    name = choices[0] if args.addon == "default" or name is None or known else name  # a prior knows of no add-on
    name = {None: name, "None": "none", "default": choices[0]}.get(args.addon, args.addon)
    if name not in choices:
        hint = f"give --addon one of {', '.join(choices)}, or add its line to ADDON_TASKS"
        raise StopRun(f"{name} is no add-on task that is known here for {env_id}; {hint}")
    coef = args.addon_coef if args.addon_coef is not None else recorded.get("addon_coef", 1.0)
    return name, tasks[name]._replace(coef=coef)


def find_basic(recorded: dict[str, Any]) -> tuple[str, AddonTask | None]:
    """The basic reward of the training: its name, and its task unless it is the environment's own.

    Raises: StopRun if there is no such task.
    """
    name = recorded.get("basic", "own")
    if name not in (*BASIC_TASKS, "own"):
        raise StopRun(f"{name} is no basic reward that is known here; add its line to BASIC_TASKS")
    return name, BASIC_TASKS.get(name)


def check_task(name: str, task: AddonTask, obs: np.ndarray, action: np.ndarray) -> None:
    """StopRun unless a task gives a finite number for an observation (obs_dim,) and an action (action_dim,)."""
    obs, action = (np.tile(np.float32(x), (2, 3, 1)) for x in (obs, action))  # so that t[7] is no t[..., 7]
    try:
        with np.errstate(all="ignore"):
            reward = task.reward(task.quantity(obs, action, obs))
        if np.shape(reward) != (2, 3):
            raise ValueError(f"it has shape {np.shape(reward)} for observations of shape {obs.shape}")
        if np.iscomplexobj(reward) or not np.isfinite(reward).all():
            raise ValueError(f"it is {np.ravel(reward)[0]} for the first observation")
    except Exception as error:  # a task is code of the user's
        how = (
            "use indices as in t[..., 3], operators, abs, and functions of xp, as xp.minimum; no if, min, float or jnp"
        )
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise StopRun(f"the add-on task {name} cannot be computed: {what}; {how}") from None


# -------------------------------------------------------------------------------- policy files


class NumpyPolicy(NamedTuple):
    """What a policy file holds."""

    env_id: str
    squash: bool  # the action is tanh(u), stretched to the bounds; else u, clipped to them
    activation: Callable  # after every layer but the last
    obs_clip: float  # bound of normalised observations
    log_std: Callable  # makes the log standard deviation of what the network gives, if that is where it comes from
    layers: list[tuple[np.ndarray, np.ndarray]]  # weight (out, in) and bias (out,) of each
    tensors: dict[str, np.ndarray]  # all, float32, as named in the file
    discrete: bool = False  # the network gives the logits of actions, and there is no normaliser nor deviation


ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "silu": lambda x: x * (1 + np.tanh(x / 2)) / 2,  # x sigmoid(x), without overflow
}


def log_std_form(text: str) -> Callable:
    """The function that the metadata key log_std names (see priors/README.md); ValueError if it names none."""
    kind, *numbers = text.split() or [""]
    bounds = [float(number) for number in numbers]
    if kind in ("clip", "tanh") and len(bounds) == 2 and -20 <= bounds[0] < bounds[1] <= 20:
        low, high = bounds
        if kind == "clip":
            return lambda x: np.clip(x, low, high)
        return lambda x: low + (high - low) / 2 * (np.tanh(x) + 1)
    if kind == "softplus" and len(bounds) == 1 and 1e-8 <= bounds[0] <= 1:
        return lambda x: np.log(np.logaddexp(0, x) + bounds[0])
    raise ValueError(
        f"its log_std is {text!r}; it can be clip LOW HIGH or tanh LOW HIGH, -20 <= LOW < HIGH <= 20, "
        "or softplus MIN, 1e-8 <= MIN <= 1"
    )


def policy_digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over all that a policy file says, to find damage."""
    digest = hashlib.sha256(json.dumps({**metadata, "sha256": ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()


def read_policy(path: Path) -> NumpyPolicy:
    """Read a policy file, or the one in a run folder; StopRun if it is missing, damaged or of an unknown kind."""
    file = path / "policy.safetensors" if path.is_dir() else path
    try:
        data = file.read_bytes()
        tensors = safetensors.numpy.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        return check_policy(tensors, metadata)
    except FileNotFoundError:
        hint = "the run is not complete" if path.is_dir() else "name a policy file or a run folder"
        raise StopRun(f"there is no policy {file}; {hint}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise StopRun(f"the policy {file} cannot be used: {error}") from None


def check_policy(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> NumpyPolicy:
    """Make a policy of a file's contents; ValueError says what is wrong with them."""
    tensors = {name: array for name, array in tensors.items() if not name.startswith("critic.")}
    if "kind" in metadata:
        return check_categorical(tensors, metadata)
    required, numbers = {"env_id", "squash", "hidden_sizes", "activation"}, {"alpha", "gamma", "survival_reward"}
    known = required | numbers | {"obs_clip", "log_std", "measured_alpha", "format", "returns", "training", "sha256"}
    if wrong := (required - metadata.keys()) | (metadata.keys() - known):
        raise ValueError(f"the metadata {sorted(wrong)} are missing or unknown")
    if metadata.get("sha256", digest := policy_digest(tensors, metadata)) != digest:
        raise ValueError("it is damaged (its sha256 does not match); copy or export it anew")
    if metadata["squash"] not in ("true", "false"):
        raise ValueError(f"its squash is {metadata['squash']}, neither true nor false")
    if metadata["activation"] not in ACTIVATIONS:
        raise ValueError(f"its activation is {metadata['activation']}, none of {', '.join(ACTIVATIONS)}")
    if "log_std" in metadata and "actor_logstd" in tensors:
        raise ValueError("it has log_std, which is for a deviation that depends on the state; leave that key out")
    alpha, gamma, survival_reward, obs_clip = (float(metadata.get(x, 1)) for x in (*sorted(numbers), "obs_clip"))
    if not (0 <= alpha < math.inf and 0 <= gamma <= 1 and math.isfinite(survival_reward) and obs_clip > 0):
        numbers = f"{alpha=}, {gamma=}, {survival_reward=}, {obs_clip=}"
        raise ValueError(f"one of its numbers is impossible: {numbers}")
    hidden_sizes = parse_widths(metadata["hidden_sizes"])
    check_tensors(tensors, hidden_sizes)
    names = [f"actor_mean.{2 * i}" for i in range(len(hidden_sizes) + 1)]
    return NumpyPolicy(
        env_id=metadata["env_id"],
        squash=metadata["squash"] == "true",
        activation=ACTIVATIONS[metadata["activation"]],
        obs_clip=float(metadata.get("obs_clip", 10)),
        log_std=log_std_form(metadata.get("log_std", "clip -20 2")),
        layers=[(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names],
        tensors=tensors,
    )


def check_categorical(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> NumpyPolicy:
    """Make a policy over discrete actions of a file's contents; ValueError says what is wrong with them."""
    required = {"kind", "env_id", "hidden_sizes", "activation"}
    known = required | {"alpha", "gamma", "format", "returns", "training", "sha256"}
    if metadata["kind"] != "categorical":
        raise ValueError(f"its kind is {metadata['kind']!r}; it can be categorical, or be left out for a Gaussian")
    if wrong := (required - metadata.keys()) | (metadata.keys() - known):
        raise ValueError(f"the metadata {sorted(wrong)} are missing or unknown")
    if metadata.get("sha256", digest := policy_digest(tensors, metadata)) != digest:
        raise ValueError("it is damaged (its sha256 does not match); copy or export it anew")
    if metadata["activation"] not in ACTIVATIONS:
        raise ValueError(f"its activation is {metadata['activation']}, none of {', '.join(ACTIVATIONS)}")
    if not (0 <= float(metadata.get("alpha", 1)) < math.inf and 0 <= float(metadata.get("gamma", 1)) <= 1):
        raise ValueError("its alpha or its gamma is impossible")
    hidden_sizes = parse_widths(metadata["hidden_sizes"])
    names = [f"actor.{2 * i}" for i in range(len(hidden_sizes) + 1)]
    if wrong := {f"{name}.{part}" for name in names for part in ("weight", "bias")} ^ tensors.keys():
        raise ValueError(f"the tensors {sorted(wrong)} are missing or unknown")
    num_inputs = tensors["actor.0.weight"].size // max(1, tensors["actor.0.bias"].size)
    widths = [num_inputs, *hidden_sizes, tensors[f"{names[-1]}.bias"].size]
    shapes = {}
    for name, (width_in, width_out) in zip(names, itertools.pairwise(widths), strict=True):
        shapes |= {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}
    check_shapes(tensors, shapes)
    layers = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names]
    return NumpyPolicy(
        metadata["env_id"], False, ACTIVATIONS[metadata["activation"]], math.inf, np.exp, layers, tensors, discrete=True
    )


def parse_widths(text: str) -> list[int]:
    """The metadata key hidden_sizes; ValueError if it is no list of widths."""
    hidden_sizes = json.loads(text)
    if type(hidden_sizes) is not list or not all(type(size) is int and size > 0 for size in hidden_sizes):
        raise ValueError(f"its hidden_sizes are {text}, not a list of widths")
    return hidden_sizes


def check_shapes(tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless the tensors have these shapes, and are sound."""
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != np.float32:
            raise ValueError(f"{name} is {tensors[name].dtype} {tensors[name].shape}, not float32 {shape}")
        if not np.isfinite(tensors[name]).all() or (name == "obs_var" and (tensors[name] < 0).any()):
            raise ValueError(f"{name} has impossible entries (NaN, infinite, or a negative variance)")


def check_tensors(tensors: dict[str, np.ndarray], hidden_sizes: list[int]) -> None:
    """ValueError unless these are the tensors of a policy with such hidden layers, and sound."""
    last = 2 * len(hidden_sizes)
    if missing := {"obs_mean", f"actor_mean.{last}.bias"} - tensors.keys():
        raise ValueError(f"the tensors {sorted(missing)} are missing")
    widths = [tensors["obs_mean"].size, *hidden_sizes, tensors[f"actor_mean.{last}.bias"].size]
    shapes = {"obs_mean": (widths[0],), "obs_var": (widths[0],)}
    for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        shapes |= {f"actor_mean.{2 * i}.weight": (width_out, width_in), f"actor_mean.{2 * i}.bias": (width_out,)}
    if "actor_logstd" in tensors:
        shapes["actor_logstd"] = (widths[-1],)
    else:
        shapes |= {"actor_logstd.weight": (widths[-1], widths[-2]), "actor_logstd.bias": (widths[-1],)}
    if wrong := shapes.keys() ^ tensors.keys():
        raise ValueError(f"the tensors {sorted(wrong)} are missing or unknown")
    check_shapes(tensors, shapes)
    if np.abs(tensors.get("actor_logstd", 0)).max() > 10:
        raise ValueError("actor_logstd has entries beyond ±10, with which float32 cannot train")


# -------------------------------------------------------------------------------------- acting


def mean_and_log_std(policy: NumpyPolicy, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Gaussian over actions before squashing or clipping.

    Args: obs (..., obs_dim), float32. Returns: mean (..., action_dim); log_std (action_dim,) or (..., action_dim).
    """
    tensors = policy.tensors
    x = (obs - tensors["obs_mean"]) / np.sqrt(tensors["obs_var"] + 1e-8)
    x = np.clip(x, -policy.obs_clip, policy.obs_clip)
    for weight, bias in policy.layers[:-1]:
        x = policy.activation(x @ weight.T + bias)
    weight, bias = policy.layers[-1]
    mean = x @ weight.T + bias
    if "actor_logstd" in tensors:
        return mean, tensors["actor_logstd"]
    return mean, policy.log_std(x @ tensors["actor_logstd.weight"].T + tensors["actor_logstd.bias"])


def act(policy: NumpyPolicy, obs: np.ndarray, noise: Any, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The action in the environment's units, within its bounds low and high (action_dim,).

    Args: obs (..., obs_dim), float32; noise (..., action_dim), standard normal, or 0 for the mean action.
    Returns: (..., action_dim), float32.
    """
    mean, log_std = mean_and_log_std(policy, obs)
    action = mean + np.exp(log_std) * noise
    return low + (np.tanh(action) + 1) / 2 * (high - low) if policy.squash else np.clip(action, low, high)


def act_discrete(policy: NumpyPolicy, obs: np.ndarray, noise: Any) -> np.ndarray:
    """The action as a one-hot vector: its index is that of the environment's action.

    Args: obs (..., obs_dim), float32; noise (..., actions), standard Gumbel, or 0 for the most probable action.
    Returns: (..., actions), float32.
    """
    x = obs
    for weight, bias in policy.layers[:-1]:
        x = policy.activation(x @ weight.T + bias)
    weight, bias = policy.layers[-1]
    return np.eye(len(bias), dtype=np.float32)[(x @ weight.T + bias + noise).argmax(-1)]


class Episode(NamedTuple):
    """What an episode has come to."""

    seed: int
    basic: float  # sum of the environment's own reward
    addon: float  # sum of the add-on reward
    total: float
    quantity: float  # of the add-on task, mean over the steps
    length: int  # steps


def choose(
    env: Any, policy: NumpyPolicy, obs: np.ndarray, rng: np.random.Generator, deterministic: bool
) -> tuple[Any, np.ndarray]:
    """The environment's action, and the vector that tasks know: the same, or one-hot where actions are discrete."""
    if policy.discrete:
        noise = 0 if deterministic else rng.gumbel(size=len(policy.layers[-1][1])).astype(np.float32)
        action = act_discrete(policy, obs, noise)
        return int(action.argmax()) + int(env.action_space.start), action
    low, high = env.action_space.low, env.action_space.high
    noise = 0 if deterministic else rng.standard_normal(low.shape, np.float32)
    action = act(policy, obs, noise, low, high)
    return action, action


def play(
    env: Any, policy: NumpyPolicy, addon: AddonTask, seed: int, deterministic: bool, basic: AddonTask | None = None
) -> Iterator[Episode]:
    """Play an episode, yielding what it has come to after the reset and after each step.

    Environment and noise follow from the seed, so two policies with the same seed meet the same luck. basic stands for
    the environment's own reward, if given.
    """
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    returns, bonus, quantity, length, done = 0.0, 0.0, 0.0, 0, False
    yield Episode(seed, returns, bonus, returns + bonus, quantity, length)
    while not done:
        before = np.float32(obs).reshape(-1 if policy.discrete else obs.shape)
        taken, action = choose(env, policy, before, rng, deterministic)
        obs, reward, terminated, truncated, _ = env.step(taken)
        seen = before[None], action[None], np.float32(obs).reshape(before.shape)[None]
        measured = addon.quantity(*seen)
        addon_reward = float(addon.reward(measured)[0])
        if not math.isfinite(addon_reward):
            raise StopRun(
                f"the add-on reward on {addon.label} is {addon_reward} in step {length + 1}; mend the task", 1
            )
        reward = reward if basic is None else basic.reward(basic.quantity(*seen))[0]
        returns, bonus = returns + float(reward), bonus + addon.coef * addon_reward
        quantity, length, done = quantity + float(measured[0]), length + 1, terminated or truncated
        yield Episode(seed, returns, bonus, returns + bonus, quantity / length, length)


def play_all(
    env: Any, policies: list[NumpyPolicy], addon: AddonTask, args: Args, basic: AddonTask | None = None
) -> list[list[Episode]]:
    """All episodes of each policy."""
    results = [[] for _ in policies]
    with rich.progress.Progress(console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as progress:
        for seed in progress.track(range(args.seed, args.seed + args.episodes), description="episodes"):
            for policy, episodes in zip(policies, results, strict=True):
                *_, episode = play(env, policy, addon, seed, args.deterministic, basic)
                episodes.append(episode)
    return results


# ---------------------------------------------------------------------- environments and video


NEEDS_EGL = "without a display, install EGL: apt-get install libegl1, and set MUJOCO_GL=egl"


class EnvPoolEnv:
    """One environment of EnvPool's, for what Gymnasium does not have, with Gymnasium's reset and step."""

    def __init__(self, env_id: str, kwargs: dict[str, Any]):
        """Raises: ImportError without envpool, and what envpool.make raises."""
        import envpool
        import gymnasium

        self.make = lambda seed: envpool.make(env_id, env_type="gymnasium", num_envs=1, seed=seed, **kwargs)
        self.pool = self.make(0)
        space, self.action_space = self.pool.observation_space, self.pool.action_space
        self.observation_space = gymnasium.spaces.flatten_space(space) if hasattr(space, "spaces") else space

    def vector(self, obs: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
        """The environment's observation; of a Dict the entries, in the order of their names, as the scripts train."""
        return np.concatenate([obs[name] for name in sorted(obs)], -1)[0] if isinstance(obs, dict) else obs[0]

    def reset(self, seed: int = 0) -> tuple[np.ndarray, dict]:
        """EnvPool takes a seed only when it makes an environment."""
        self.pool = self.make(seed % 2**31)
        return self.vector(self.pool.reset()[0]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Step."""
        discrete = not hasattr(self.action_space, "low")  # its space says int64, where it takes int32
        action = np.asarray(action, np.int32 if discrete else self.action_space.dtype)
        obs, reward, terminated, truncated, _ = self.pool.step(action[None])
        return self.vector(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def close(self) -> None:
        """Nothing is to be closed."""


class Recorder:
    """An environment that keeps what passes through it: lists of arrays, by what they are."""

    def __init__(self, env: Any):
        """Keep the steps of an environment with Gymnasium's reset and step."""
        names = ("observations", "actions", "rewards", "terminations", "truncations")
        self.env, self.obs, self.last_obs, self.steps = env, None, [], {name: [] for name in names}

    def __getattr__(self, name: str) -> Any:
        """All else is the environment's."""
        return getattr(self.env, name)

    def reset(self, seed: int) -> tuple[np.ndarray, dict]:
        """Reset."""
        self.obs, info = self.env.reset(seed=seed)
        return self.obs, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Step; the observation that is kept is the one before it."""
        before = self.obs
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        kept = (np.float32(before), action, float(reward), terminated, truncated)
        for x, column in zip(kept, self.steps.values(), strict=True):
            column.append(x)
        if terminated or truncated:
            self.last_obs.append(np.float32(self.obs))
        return self.obs, reward, terminated, truncated, info

    def npz(self) -> bytes:
        """An .npz file with the columns (steps, ...), and the bounds of the actions if they have any."""
        columns, space, file = {name: np.stack(x) for name, x in self.steps.items()}, self.action_space, io.BytesIO()
        if hasattr(space, "low"):
            columns |= {"action_low": space.low, "action_high": space.high}
        np.savez_compressed(file, **columns)
        return file.getvalue()

    def write_minari(self, folder: Path) -> None:
        """A Minari dataset, which needs the package minari: every episode with its last observation, too."""
        import minari
        from minari.data_collector import EpisodeBuffer

        columns, space = {name: np.stack(x) for name, x in self.steps.items()}, self.observation_space
        ends = np.flatnonzero(columns["terminations"] | columns["truncations"])[:-1] + 1
        parts = zip(*(np.split(x, ends) for x in columns.values()), strict=True)
        episodes = [EpisodeBuffer(i, **dict(zip(columns, part, strict=True))) for i, part in enumerate(parts)]
        for i, last in enumerate(self.last_obs):
            episodes[i] = replace(episodes[i], observations=np.concatenate([episodes[i].observations, last[None]]))
        spaces = {"observation_space": type(space)(np.float32(space.low), np.float32(space.high), dtype=np.float32)}
        spaces |= {"action_space": self.action_space, "env": self.env if hasattr(self.env, "spec") else None}
        warnings.filterwarnings("ignore", module="minari")  # of an author and the like, which are the user's to name
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as root:
            os.environ["MINARI_DATASETS_PATH"] = root
            minari.create_dataset_from_buffers(folder.name, episodes, **spaces)
            os.replace(Path(root) / folder.name, folder)


def make_gymnasium(
    env_id: str, policies: list[NumpyPolicy], kwargs: dict[str, Any], window: bool = False, video: bool = False
) -> Any:
    """Gymnasium's environment, or else EnvPool's; StopRun unless it exists, all policies fit, and its window opens.

    The first one made decides how MuJoCo draws in this process: for a video, without a display if there is none.
    """
    if video and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
    for policy in policies:
        if policy.env_id.rpartition("-v")[0] != env_id.rpartition("-v")[0]:
            raise StopRun(f"a policy for {policy.env_id} cannot play in {env_id}; change --env-id or the policy")
    try:
        env = open_gymnasium(env_id, kwargs, window, video)
    except StopRun as reason:
        if window or video:
            raise
        try:
            env = EnvPoolEnv(env_id, kwargs)
        except Exception as error:  # each of its environments fails in its own way
            raise StopRun(f"{reason}; nor can EnvPool ({type(error).__name__}: {error}); see --env-id") from None
    for policy in policies:
        shapes = policy.layers[0][0].shape[1:], policy.layers[-1][1].shape
        theirs = env.observation_space.shape, env.action_space.shape
        if policy.discrete:
            shapes = (*shapes, "discrete")
            theirs = (math.prod(theirs[0]),), (getattr(env.action_space, "n", 0),), "discrete"
        if shapes != theirs:
            what = f"observations and actions have shapes {theirs[0]} and {theirs[1]}"
            raise StopRun(f"{env_id}'s {what}, the policy's {shapes[0]} and {shapes[1]}; change --env-id or the policy")
    return env


def open_gymnasium(env_id: str, kwargs: dict[str, Any], window: bool, video: bool) -> Any:
    """Gymnasium's environment, reset once; StopRun if it or its window does not open."""
    import gymnasium

    warnings.filterwarnings("ignore", message=".*is out of date")  # who plays v4 knows
    warnings.filterwarnings("ignore", module="glfw")  # what it warns of ends in a StopRun
    try:
        if window:
            from mujoco.glfw import glfw

            if not glfw.init():  # Gymnasium would crash the process
                raise RuntimeError("--window needs a display, and there is none; --video FILE.mp4 needs none")
        env = gymnasium.make(env_id, render_mode="human" if window else None, disable_env_checker=True, **kwargs)
        env.reset()  # opens the window
    except Exception as error:  # every drawing library fails in its own way
        raise StopRun(f"Gymnasium cannot open {env_id} ({error}){f'; {NEEDS_EGL}' if video else ''}") from None
    return env


def open_renderer(env: Any, size: tuple[int, int]) -> Any:
    """MuJoCo's renderer, of pictures with size (width, height); StopRun if nothing can be drawn on this machine."""
    import mujoco

    try:
        model = env.unwrapped.model
        model.vis.global_.offwidth, model.vis.global_.offheight = size
        renderer = mujoco.Renderer(model, *size[::-1])
        renderer.update_scene(env.unwrapped.data)
        renderer.render()
    except Exception as error:  # every drawing library fails in its own way
        what = f"--video cannot draw pictures of --video-size {size[0]} {size[1]} ({error})"
        raise StopRun(f"{what}; try a smaller size; {NEEDS_EGL}") from None
    return renderer


def video_frames(players: list[Iterator], envs: list[Any], renderer: Any, every: int) -> Iterator[np.ndarray]:
    """A frame (height, width, 3) for each every-th step of players, which play in envs, side by side.

    Who has ended stays still on the last picture.
    """
    camera = 0 if renderer.model.ncam else -1  # the model's own, which follows the robot, else a free one
    for step, _ in enumerate(itertools.zip_longest(*players)):
        if step % every == 0:
            pictures = []
            for env in envs:
                renderer.update_scene(env.unwrapped.data, camera)
                pictures.append(renderer.render())
            yield np.hstack(pictures)


def record_video(policies: list[NumpyPolicy], addon: AddonTask, envs: list[Any], renderer: Any, args: Args) -> None:
    """Record the first episode of each policy, each in an environment of its own, side by side."""
    import imageio

    pairs = zip(envs, policies, strict=True)
    players = [play(env, policy, addon, args.seed, args.deterministic) for env, policy in pairs]
    if args.video_steps is not None:
        players = [itertools.islice(player, args.video_steps + 1) for player in players]  # and the reset
    every = max(1, round(1 / (args.video_fps * envs[0].unwrapped.dt)))
    options = {"fps": 1 / (every * envs[0].unwrapped.dt), "macro_block_size": 1, "ffmpeg_log_level": "error"}
    if args.video.suffix == ".gif":
        palette = "split[a][b];[a]palettegen=max_colors=64[p];[b][p]paletteuse=dither=none:diff_mode=rectangle"
        gif = ["-filter_complex", palette, "-loop", "0", "-f", "gif"]
        options |= {"codec": "gif", "pixelformat": "pal8", "output_params": gif}
    temporary = args.video.with_name(args.video.name + ".tmp.mp4")  # imageio gives ffmpeg no other names
    try:
        with imageio.get_writer(temporary, format="FFMPEG", **options) as video:
            for frame in video_frames(players, envs, renderer, every):
                video.append_data(frame)
        os.replace(temporary, args.video)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------- main


class Console(rich.console.Console):
    """A terminal whose reader may go away: the run goes on."""

    def on_broken_pipe(self) -> None:
        """Say it once, where it can still be read."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("standard output is closed; going on without it", file=sys.stderr, flush=True)


CONSOLE = Console(highlight=False, soft_wrap=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file such that a crash leaves the old one or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def episodes_table(results: list[list[Episode]], label: str, actions: str) -> rich.table.Table:
    """Mean ± standard deviation over the episodes of each policy; label names the add-on task's quantity."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    for header in ("policy", "against")[: len(results)]:
        table.add_column(f"{header}\n{actions}", justify="right", no_wrap=True)
    rows = {"basic": "return (basic)", "addon": "add-on", "total": "total", "quantity": label, "length": "length"}
    for name, title in rows.items():
        columns = [np.array([getattr(episode, name) for episode in episodes]) for episodes in results]
        digits = 3 if name == "quantity" else 1
        table.add_row(title, *[f"{x.mean():.{digits}f} ± {x.std():.{digits}f}" for x in columns])
    return table


def check_output_flags(args: Args) -> None:
    """StopRun if a flag cannot work, or would overwrite a file."""
    for name in ("episodes", "video_steps", "video_fps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise StopRun(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if args.seed < 0:
        raise StopRun(f"--seed is {args.seed}; it must not be negative")
    if args.addon_coef is not None and not math.isfinite(args.addon_coef):
        raise StopRun(f"--addon-coef is {args.addon_coef}; it must be a finite number")
    if min(args.video_size) < 2 or any(size % 2 for size in args.video_size):
        raise StopRun(f"--video-size is {args.video_size}; width and height must be even and above 0")
    if args.record and args.against:
        raise StopRun("--record is of one policy; leave --against out")
    files = {"--video": (args.video, (".mp4", ".gif")), "--json": (args.json, (".json",))}
    files["--record"] = (args.record, (".npz", ""))
    for flag, (path, suffixes) in files.items():
        if path is None:
            continue
        if path.suffix not in suffixes:
            else_folder = ", or have no dot" if "" in suffixes else ""
            raise StopRun(f"{flag} is {path}; its name must end in {' or '.join(filter(None, suffixes))}{else_folder}")
        if path.exists():
            raise StopRun(f"{flag} {path} exists; name a new file, or remove it")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise StopRun(f"{flag} cannot write to the folder {path.parent}; create it, or name another")
    if args.record and not args.record.suffix:
        if not re.fullmatch(r"[a-zA-Z0-9][-\w]*-v[0-9]+", args.record.name, re.ASCII):
            raise StopRun(f"--record {args.record} is no name for a Minari dataset; choose one like hopper-expert-v0")
        if not all(map(importlib.util.find_spec, ("minari", "h5py", "PIL"))):
            raise StopRun('--record needs Minari for its datasets: pip install "minari[hdf5]"; or name an .npz file')


def parse_kwargs(text: str) -> dict[str, Any]:
    """The environment's keyword arguments; StopRun if the text is no JSON object."""
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError):
        raise StopRun(f"--env-kwargs is {text}, which is no JSON object; write it as '{{\"name\": 1}}'") from None


def main(args: Args) -> None:
    """Play, show and record."""
    check_output_flags(args)
    paths = [path for path in (args.path, args.against) if path]
    policies = [read_policy(path) for path in paths]
    env_id, recorded = args.env_id or policies[0].env_id, recorded_args(args.path)
    (task, addon), (basic_name, basic) = find_task(env_id, recorded, args), find_basic(recorded)
    kwargs = parse_kwargs(args.env_kwargs or recorded.get("env_kwargs", "{}"))
    env = make_gymnasium(env_id, policies, kwargs, args.window, args.video is not None)
    action = np.zeros(len(policies[0].layers[-1][1]), np.float32)
    for name, each in [(task, addon), *([(basic_name, basic)] if basic else [])]:
        check_task(name, each, env.reset(seed=args.seed)[0].ravel(), action)
    renderer = open_renderer(env, args.video_size) if args.video else None

    CONSOLE.print(
        f"[bold]{env_id}[/bold], episodes: {args.episodes}, seed: {args.seed}, add-on: {addon.coef:g} x {task}"
    )
    for label, path in zip(("policy", "against"), paths, strict=False):
        CONSOLE.print(f"{label:8} {path}")
    recorder = Recorder(env)
    results = play_all(recorder if args.record else env, policies, addon, args, basic)
    env.close()
    CONSOLE.print(episodes_table(results, addon.label, "deterministic" if args.deterministic else "sampled"))
    if args.json:
        settings = vars(args) | {"env_id": env_id, "basic": basic_name, "addon": task, "addon_coef": addon.coef}
        pairs = zip(paths, results, strict=True)
        played = [{"path": path, "episodes": [x._asdict() for x in episodes]} for path, episodes in pairs]
        content = {"settings": settings, "quantity": addon.label, "policies": played}
        write_atomic(args.json, json.dumps(content, indent=1, default=str).encode())
        CONSOLE.print(f"every episode is in {shlex.quote(str(args.json))}")
    if args.record:
        if args.record.suffix:
            write_atomic(args.record, recorder.npz())
        else:
            recorder.write_minari(args.record)
        CONSOLE.print(f"every step is in {shlex.quote(str(args.record))}")
    if args.video:
        CONSOLE.print("recording ...")  # which takes minutes without a GPU
        envs = [make_gymnasium(env_id, policies, kwargs) for _ in policies]
        record_video(policies, addon, envs, renderer, args)
        CONSOLE.print(f"the first episode is in {shlex.quote(str(args.video))}")


def end(message: str, exit_code: int) -> None:
    """End this process with one line."""
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks ± or θ shows ?
    signal.signal(signal.SIGTERM, lambda *_: end("SIGTERM", 128 + signal.SIGTERM))
    try:
        main(tyro.cli(Args, description=__doc__))
    except StopRun as error:
        end(str(error), error.exit_code)
    except OSError as error:  # as of a full disk
        end(str(error), 1)
    except KeyboardInterrupt:
        end("interrupted", 130)
