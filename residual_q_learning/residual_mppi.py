# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "numpy>=2.0", "gymnasium>=1.1", "mujoco>=3.3", "imageio[ffmpeg]>=2.36",
#   "tyro>=0.9", "rich>=13.9", "safetensors>=0.5",
# ]
# ///
"""Residual-MPPI: customise a prior by planning, without training, with MuJoCo's own dynamics as the model.

In every step, --num-samples rollouts of the prior's mean actions start from the present state.  Their first H actions
(--horizon) are disturbed, with the prior's deviation times --noise-scale k; then --tail more steps are not:

    a_t = tanh(u_t),  u_t = mean(s_t) + k sigma(s_t) eps_t,  eps_t ~ N(0, 1) for t < H, else 0.

With g(a) the density that the H actions are drawn from, a rollout has the score and the weight

    S = sum_{t < H + tail} gamma^t r_R  +  omega' sum_{t < H} gamma^t log pi(a_t|s_t),      w = exp(S / lambda) / g(a),

and the next action is that of the weighted mean of u_0: of the distribution q of H actions that maximises
E_q[S] + lambda H(q).  So the objective is Residual Policy Gradient's, r_R + omega' log pi - alpha_hat log q, with
alpha_hat = lambda (--temperature), over H steps.  Three remarks:

Samples near the prior carry log pi in their density.  Without the division by g (--no-importance, as MPPI is mostly
written) q maximises E_q[S] - lambda KL(q || g), which for k = 1 is the same with omega' + lambda instead of omega'.
Greedy planning, omega' = 0, then still pays lambda for its KL to the prior; only the division makes it forget that.
At omega' = lambda, k = 1, gamma = 1 the division cancels log pi: w = exp(sum r_R / lambda).

What is the value at the end of the horizon?  alpha log pi = r + gamma V(s') - V(s) is shaped: its sum has the basic
task's value in it, so H may be small.  The add-on reward has no such term.  The tail estimates its value, that of going
on as the prior; there, no step differs from the prior's, so that no log pi counts.

A Gaussian's log pi knows nothing of falls.  As in residual_ppo.py, an end costs omega gamma c / (1 - gamma), with the
survival reward c of the prior's file.

Residual-MPPI: arXiv 2407.00898; the residual objective: arXiv 2306.09526, 2503.11019.

    python residual_mppi.py --env-id Hopper-v4 --video hopper.mp4
"""

import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import mujoco.rollout
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
    env_id: str | None = None
    """HalfCheetah, Hopper, Walker2d, Ant or Swimmer, v4 or v5; if not given, the prior's, else HalfCheetah-v4"""
    prior: Path | None = None
    """a policy file, or a run folder, which holds one; if not given, priors/<env-id>.safetensors"""

    # episodes
    episodes: int = 1
    """how many to play, each by the prior, by greedy and by residual planning"""
    seed: int = 1
    """seed of the first episode, of its environment and its noise; the next one's is 1 higher"""
    max_steps: int | None = None
    """end each episode after so many steps"""
    addon: str | None = None
    """add-on task; if not given, the environment's own"""
    addon_coef: float = 1.0
    """factor on the add-on reward"""

    # objective
    omega: float = 1.0
    """weight of the basic task: sets omega' = omega alpha, and scales the survival reward"""
    omega_prime: float | None = None
    """weight of log pi, in reward per nat, instead of --omega's; greedy planning has 0"""
    temperature: float | None = None
    """lambda, in reward per nat; if not given, alpha"""
    survival_reward: float | None = None
    """c, in reward per step, that an end forgoes; if not given, that of the prior's file"""
    gamma: float | None = None
    """discount; if not given, that of the prior's file, up to 0.99"""

    # planning
    horizon: int = 1
    """H, how many actions differ from the prior's mean"""
    tail: int | None = None
    """steps of the prior's mean actions after them; if not given, see TAILS"""
    num_samples: int = 32
    """rollouts in every step"""
    noise_scale: float = 1.0
    """deviation of the samples, as a multiple of the prior's"""
    importance: bool = True
    """divide the weights by the density of the samples"""
    threads: int | None = None
    """of the physics; if not given, one for each core that this process may use"""

    # output
    json: Path | None = None
    """write every episode to this new .json file"""
    video: Path | None = None
    """record the first episode, prior, greedy and residual side by side, to this new .mp4 or .gif file"""
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


# A task of your own is a line here. An environment's first task is its default.
ADDON_TASKS = {
    "half-cheetah-front-foot": AddonTask("HalfCheetah", "|θ| (rad)", lambda s, a, t: abs(t[..., 7]), lambda x: -10 * x),
    "half-cheetah-energy": AddonTask("HalfCheetah", "|a|²", lambda s, a, t: (a**2).sum(-1), lambda x: -0.1 * x),
    "hopper-height": AddonTask("Hopper", "z (m)", lambda s, a, t: t[..., 0], lambda z: 10 * (z - 1)),
    "ant-right": AddonTask("Ant", "-v_y (m/s)", lambda s, a, t: -t[..., 14], lambda v: v),
    "ant-energy": AddonTask("Ant", "|a|²", lambda s, a, t: (a**2).sum(-1), lambda x: -0.1 * x),
    "swimmer-straight": AddonTask("Swimmer", "|θ| (rad)", lambda s, a, t: abs(t[..., 1]), lambda x: -0.5 * x),
    "walker-upright": AddonTask("Walker2d", "|θ| (rad)", lambda s, a, t: abs(t[..., 1]), lambda x: -10 * x),
    "humanoid-right": AddonTask("Humanoid", "-v_y (m/s)", lambda s, a, t: -t[..., 23], lambda v: v),
    "none": AddonTask("", "–", lambda s, a, t: 0 * t[..., 0], lambda x: x),
}


def named_task(env_id: str, name: str | None, coef: float) -> tuple[str, AddonTask]:
    """An add-on task and its name; None: the environment's default. StopRun if the environment has no such task."""
    env = env_id.rpartition("-v")[0]
    choices = [key for key, task in ADDON_TASKS.items() if task.env in (env, "")]
    name = {None: choices[0], "default": choices[0], "None": "none"}.get(name, name)
    if name not in choices:
        hint = f"give --addon one of {', '.join(choices)}, or add its line to ADDON_TASKS"
        raise StopRun(f"{name} is no add-on task that is known here for {env_id}; {hint}")
    return name, ADDON_TASKS[name]._replace(coef=coef)


# -------------------------------------------------------------------------------- policy files


class NumpyPolicy(NamedTuple):
    """What a policy file holds."""

    env_id: str
    squash: bool  # the action is tanh(u), stretched to the bounds; else u, clipped to them
    activation: Callable  # after every layer but the last
    obs_clip: float  # bound of normalised observations
    layers: list[tuple[np.ndarray, np.ndarray]]  # weight (out, in) and bias (out,) of each
    tensors: dict[str, np.ndarray]  # all, float32, as named in the file


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
    required = {"env_id", "squash", "hidden_sizes", "activation"}
    optional = {"obs_clip", "alpha", "gamma", "survival_reward", "measured_alpha", "returns", "training"}
    if wrong := (required - metadata.keys()) | (metadata.keys() - required - optional - {"sha256", "format"}):
        raise ValueError(f"the metadata {sorted(wrong)} are missing or unknown")
    if metadata.get("sha256", digest := policy_digest(tensors, metadata)) != digest:
        raise ValueError("it is damaged (its sha256 does not match); copy or export it anew")
    if metadata["squash"] not in ("true", "false"):
        raise ValueError(f"its squash is {metadata['squash']}, neither true nor false")
    activations = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}
    if metadata["activation"] not in activations:
        raise ValueError(f"its activation is {metadata['activation']}, neither tanh nor relu")
    if not (obs_clip := float(metadata.get("obs_clip", 10))) > 0:
        raise ValueError(f"its obs_clip is {metadata['obs_clip']}, and must be above 0")
    hidden_sizes = json.loads(metadata["hidden_sizes"])
    if type(hidden_sizes) is not list or not all(type(size) is int and size > 0 for size in hidden_sizes):
        raise ValueError(f"its hidden_sizes are {metadata['hidden_sizes']}, not a list of widths")
    check_tensors(tensors, hidden_sizes)
    names = [f"actor_mean.{2 * i}" for i in range(len(hidden_sizes) + 1)]
    layers = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names]
    activation, squash = activations[metadata["activation"]], metadata["squash"] == "true"
    return NumpyPolicy(metadata["env_id"], squash, activation, obs_clip, layers, tensors)


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
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != np.float32:
            raise ValueError(f"{name} is {tensors[name].dtype} {tensors[name].shape}, not float32 {shape}")
        if not np.isfinite(tensors[name]).all() or (name == "obs_var" and (tensors[name] < 0).any()):
            raise ValueError(f"{name} has impossible entries (NaN, infinite, or a negative variance)")


def default_prior(env_id: str) -> Path:
    """priors/<env-id>.safetensors in the working directory, beside this script or one folder up: the first there is."""
    name, here = Path("priors") / f"{env_id}.safetensors", Path(__file__).resolve().parent
    places = (name, here / name, here.parent / name)
    return next((path for path in places if path.exists()), name)


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
    return mean, np.clip(x @ tensors["actor_logstd.weight"].T + tensors["actor_logstd.bias"], -20, 2)


def bounded(policy: NumpyPolicy, u: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The action in the environment's units, of one before squashing or clipping, u (..., action_dim)."""
    return low + (np.tanh(u) + 1) / 2 * (high - low) if policy.squash else np.clip(u, low, high)


# --------------------------------------------------------------------------------- mathematics


OMEGA_PRIME, TEMPERATURE = 1.0, 1.0  # defaults of omega' and lambda, at omega = 1, in units of the prior's alpha
TAILS = {"HalfCheetah": 1, "Hopper": 29, "Walker2d": 9, "Ant": 3}  # default of --tail, in steps; else 4


class Imagined(NamedTuple):
    """What K rollouts in the model have come to; after an end there are zeros."""

    u: np.ndarray  # (K, H, action_dim), the disturbed actions before squashing
    addon: np.ndarray  # (K, H + tail), add-on reward of each step
    ended: np.ndarray  # (K, H + tail), 1 where the episode terminates in this step
    log_prob: np.ndarray  # (K, H), log pi of the prior
    log_proposal: np.ndarray  # (K, H), log g of the distribution that the actions are drawn from


class Objective(NamedTuple):
    """What planning maximises."""

    omega_prime: float  # reward per nat
    temperature: float  # lambda, reward per nat
    survival_reward: float  # omega c, reward per step
    gamma: float
    importance: bool  # divide by the density of the samples


def log_density(u: np.ndarray, mean: np.ndarray, log_std: np.ndarray, squash: bool) -> np.ndarray:
    """log pi of the action that is made of u (..., action_dim), with the Jacobian of tanh, in float64; (...).

    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), exact where tanh(u) is 1.  What stretches tanh(u) to the
    environment's bounds is left out, as in the training scripts.
    """
    u, mean, log_std = (np.asarray(x, np.float64) for x in (u, mean, log_std))
    log_prob = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    if squash:
        log_prob = log_prob - 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
    return log_prob.sum(-1)


def scores(imagined: Imagined, objective: Objective) -> np.ndarray:
    """S of each rollout, (K,): sum gamma^t (r_R + omega' log pi), less gamma c / (1 - gamma) where it ends."""
    gamma, (steps, horizon) = objective.gamma, (imagined.addon.shape[1], imagined.log_prob.shape[1])
    discount = gamma ** np.arange(steps)
    end = gamma * objective.survival_reward / ((1 - gamma) or 1)  # with gamma = 1, c is 0
    score = (discount * (imagined.addon - end * imagined.ended)).sum(1)
    return score + objective.omega_prime * (discount[:horizon] * imagined.log_prob).sum(1)


def sample_weights(score: np.ndarray, log_proposal: np.ndarray, temperature: float) -> np.ndarray:
    """w = exp(S / lambda) / g, normalised, of samples from g: those of the maximiser of E_q[S] + lambda H(q).

    Args: score (K,); log_proposal (K,), log g, or zeros for the maximiser of E_q[S] - lambda KL(q || g). Returns: (K,).
    """
    logits = score / temperature - log_proposal
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def noise_pairs(rng: np.random.Generator, num_samples: int, horizon: int, action_dim: int) -> np.ndarray:
    """Standard normal noise (K, H, action_dim), float32, in pairs of opposite signs.

    Where all weights are equal the pairs cancel: the plan is the prior's own, not that plus noise.
    """
    half = rng.standard_normal(((num_samples + 1) // 2, horizon, action_dim), np.float32)
    return np.concatenate((half, -half))[:num_samples]


# --------------------------------------------------------------------------------------- model


class Robot(NamedTuple):
    """How Gymnasium makes observation and end of a MuJoCo state."""

    hidden: int  # leading positions, those in the world, that the observation leaves out
    max_speed: float  # bound of the observed velocities
    height: int | None = None  # index among the positions of what must stay in the healthy z range
    angle: int | None = None  # and in the healthy angle range


# An environment with other observations is refused; check_model compares with Gymnasium's own.
ROBOTS = {
    "HalfCheetah": Robot(1, np.inf),
    "Hopper": Robot(1, 10, 1, 2),
    "Walker2d": Robot(1, 10, 1, 2),
    "Ant": Robot(2, np.inf, 2),
    "Swimmer": Robot(2, np.inf),
}


class Model(NamedTuple):
    """MuJoCo's dynamics of an environment, for many states at a time."""

    env: Any  # Gymnasium's environment, unwrapped
    robot: Robot
    pool: mujoco.rollout.Rollout
    data: list[mujoco.MjData]  # one for each thread


def make_model(env: Any, env_id: str, threads: int) -> Model:
    """The model of an environment; StopRun if it is none whose state can be set and observed here."""
    robot, env = ROBOTS.get(env_id.rpartition("-v")[0]), env.unwrapped
    if robot is None or not hasattr(env, "set_state"):
        known = ", ".join(ROBOTS)
        raise StopRun(f"{env_id} cannot be planned: its state cannot be set, or not be observed, here; choose {known}")
    if not env._exclude_current_positions_from_observation:
        robot = robot._replace(hidden=0)
    pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)  # 0: in this thread
    return Model(env, robot, pool, [mujoco.MjData(env.model) for _ in range(threads)])


def present_state(model: Model) -> np.ndarray:
    """The environment's state, (state_dim,): time, positions, velocities."""
    kind = mujoco.mjtState.mjSTATE_FULLPHYSICS
    state = np.empty(mujoco.mj_stateSize(model.env.model, kind))
    mujoco.mj_getState(model.env.model, model.env.data, state, kind)
    return state


def simulate(model: Model, state: np.ndarray, action: np.ndarray, warmstart: np.ndarray | None = None) -> np.ndarray:
    """The states after one step of the environment each, (K, state_dim).

    Args: state (K, state_dim); action (K, action_dim), in the environment's units; warmstart (nv,), the accelerations
    from which the contact solver starts, which decide the last digits.
    """
    control = np.repeat(action[:, None].astype(np.float64), model.env.frame_skip, axis=1)
    warmstart = None if warmstart is None else np.tile(warmstart, (len(state), 1))
    return model.pool.rollout(model.env.model, model.data, state, control, initial_warmstart=warmstart)[0][:, -1]


def observations(model: Model, state: np.ndarray) -> np.ndarray:
    """Gymnasium's observations of states (..., state_dim): (..., obs_dim), float32."""
    robot, nq, nv = model.robot, model.env.model.nq, model.env.model.nv
    position, velocity = state[..., 1 + robot.hidden : 1 + nq], state[..., 1 + nq : 1 + nq + nv]
    velocity = np.clip(velocity, -robot.max_speed, robot.max_speed)
    return np.concatenate((position, velocity), -1).astype(np.float32)


def terminated(model: Model, state: np.ndarray) -> np.ndarray:
    """Whether Gymnasium ends an episode in states (..., state_dim): by the environment's own healthy ranges; (...)."""
    env, robot, position = model.env, model.robot, state[..., 1 : 1 + model.env.model.nq]
    healthy = np.isfinite(state).all(-1)  # also where nothing else ends an episode: the physics has diverged
    if not getattr(env, "_terminate_when_unhealthy", False):
        return ~healthy
    ranges = [("_healthy_z_range", robot.height), ("_healthy_angle_range", robot.angle)]
    for low, high, x in [(*getattr(env, name), position[..., i]) for name, i in ranges if i is not None]:
        healthy &= (low < x) & (x < high)
    if hasattr(env, "_healthy_state_range"):
        low, high = env._healthy_state_range
        healthy &= ((low < state[..., 3:]) & (state[..., 3:] < high)).all(-1)
    return ~healthy


def check_model(model: Model, env: Any, env_id: str) -> None:
    """StopRun unless the model foresees what the environment does in ten random steps."""
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(10):
        action = env.action_space.sample()
        state = simulate(model, present_state(model)[None], action[None], model.env.data.qacc_warmstart)
        obs, _, ended, _, _ = env.step(action)
        foreseen = observations(model, state)[0]
        same = foreseen.shape == obs.shape and np.allclose(foreseen, obs, atol=1e-5)
        if not same or ended != terminated(model, state)[0]:
            raise StopRun(f"{env_id} cannot be planned: MuJoCo's state does not tell its observations or its ends")
        if ended:
            env.reset()


# ------------------------------------------------------------------------------------ planning


class Planner(NamedTuple):
    """How to sample, and what for."""

    horizon: int
    tail: int
    num_samples: int
    noise_scale: float
    objective: Objective


def imagine(model: Model, policy: NumpyPolicy, addon: AddonTask, noise: np.ndarray, planner: Planner) -> Imagined:
    """Roll out the prior from the environment's present state, with noise (K, H, action_dim) in its first actions."""
    horizon, scale, space = planner.horizon, planner.noise_scale, model.env.action_space
    state = np.tile(present_state(model), (len(noise), 1))
    obs, alive, warmstart, steps = observations(model, state), np.ones(len(noise)), model.env.data.qacc_warmstart, []
    for t in range(horizon + planner.tail):
        mean, log_std = mean_and_log_std(policy, obs)
        u = mean + scale * np.exp(log_std) * noise[:, t] if t < horizon else mean
        action = bounded(policy, u, space.low, space.high)
        state = simulate(model, state, action, warmstart if t == 0 else None)
        before, obs = obs, observations(model, state)
        with np.errstate(all="ignore"):
            reward = addon.coef * addon.reward(addon.quantity(before, action, obs))
        ended = terminated(model, state)
        step = [u, np.where(np.isfinite(reward), reward, 0) * alive, ended * alive]
        if t < horizon:
            step += [alive * log_density(u, mean, log_std, policy.squash)]
            step += [alive * log_density(u, mean, log_std + np.log(scale or 1), policy.squash)]
        steps.append(step)
        alive = alive * ~ended
    columns = itertools.zip_longest(*steps)
    u, reward, ended, log_prob, log_proposal = (np.stack([x for x in column if x is not None], 1) for column in columns)
    return Imagined(u[:, :horizon], reward, ended, log_prob, log_proposal)


def plan(model: Model, policy: NumpyPolicy, addon: AddonTask, planner: Planner, rng: np.random.Generator) -> np.ndarray:
    """The next action before squashing, (action_dim,), float32: the weighted mean over the samples."""
    noise = noise_pairs(rng, planner.num_samples, planner.horizon, model.env.action_space.shape[0])
    imagined, objective = imagine(model, policy, addon, noise, planner), planner.objective
    log_proposal = imagined.log_proposal.sum(1) * objective.importance
    weights = sample_weights(scores(imagined, objective), log_proposal, objective.temperature)
    return (weights @ imagined.u[:, 0]).astype(np.float32)


class Episode(NamedTuple):
    """What an episode has come to."""

    seed: int
    basic: float  # sum of the environment's own reward
    addon: float  # sum of the add-on reward
    total: float
    quantity: float  # of the add-on task, mean over the steps
    length: int  # steps


def play_planned(
    env: Any, policy: NumpyPolicy, addon: AddonTask, seed: int, planner: Planner | None, model: Model, max_steps: int
) -> Iterator[Episode]:
    """Play an episode, yielding what it has come to after the reset and after each step; planner None: the prior.

    Environment and noise follow from the seed, so all that play with one seed start in the same state.
    """
    rng, space = np.random.default_rng(seed), env.action_space
    obs, _ = env.reset(seed=seed)
    basic, bonus, quantity, length, done = 0.0, 0.0, 0.0, 0, False
    yield Episode(seed, basic, bonus, basic + bonus, quantity, length)
    while not done and length < max_steps:
        before = obs.astype(np.float32)
        u = plan(model, policy, addon, planner, rng) if planner else mean_and_log_std(policy, before)[0]
        action = bounded(policy, u, space.low, space.high)
        obs, reward, ended, truncated, _ = env.step(action)
        measured = addon.quantity(before[None], action[None], obs.astype(np.float32)[None])
        addon_reward = float(addon.reward(measured)[0])
        if not math.isfinite(addon_reward):
            raise StopRun(f"the add-on reward on {addon.label} is {addon_reward}; mend the task", 1)
        basic, bonus = basic + float(reward), bonus + addon.coef * addon_reward
        quantity, length, done = quantity + float(measured[0]), length + 1, ended or truncated
        yield Episode(seed, basic, bonus, basic + bonus, quantity / length, length)


# ---------------------------------------------------------------------- environment and video


NEEDS_EGL = "without a display, install EGL: apt-get install libegl1, and set MUJOCO_GL=egl"


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


class Player(NamedTuple):
    """Who plays, in an environment of its own."""

    name: str
    planner: Planner | None  # None: the prior's mean actions
    env: Any
    model: Model


def open_players(env_id: str, policy: NumpyPolicy, planner: Planner, args: Args) -> list[Player]:
    """The prior, greedy and residual planning; StopRun unless the environment fits the policy and can be planned."""
    if args.video and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
    if policy.env_id.rpartition("-v")[0] != env_id.rpartition("-v")[0]:
        raise StopRun(f"a policy for {policy.env_id} cannot play in {env_id}; change --env-id or --prior")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    greedy = planner._replace(objective=planner.objective._replace(omega_prime=0.0))
    players = []
    for name, who in (("prior", None), ("greedy", greedy), ("residual", planner)):
        env = open_gymnasium(env_id, {}, False, args.video is not None)
        players.append(Player(name, who, env, make_model(env, env_id, args.threads or cores)))
    shapes = policy.tensors["obs_mean"].shape, policy.layers[-1][1].shape
    if shapes != (theirs := (env.observation_space.shape, env.action_space.shape)):
        what = f"observations and actions have shapes {theirs[0]} and {theirs[1]}"
        raise StopRun(f"{env_id}'s {what}, the prior's {shapes[0]} and {shapes[1]}; change --env-id or --prior")
    check_model(players[-1].model, env, env_id)
    return players


def play_all_planned(
    players: list[Player], policy: NumpyPolicy, addon: AddonTask, args: Args
) -> tuple[list[list[Episode]], list[float]]:
    """All episodes of each player, and the seconds that it took."""
    limit = min(args.max_steps or math.inf, players[0].env.spec.max_episode_steps or math.inf)
    total = None if limit == math.inf else args.episodes * len(players) * limit
    results, seconds = [[] for _ in players], [0.0 for _ in players]
    with rich.progress.Progress(console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as progress:
        bar = progress.add_task("steps", total=total)
        for seed in range(args.seed, args.seed + args.episodes):
            for i, (name, planner, env, model) in enumerate(players):
                start = time.perf_counter()
                for episode in play_planned(env, policy, addon, seed, planner, model, limit):
                    progress.update(bar, advance=min(episode.length, 1), description=f"seed {seed}, {name}")
                seconds[i] += time.perf_counter() - start
                results[i].append(episode)
                progress.update(bar, advance=0 if total is None else limit - episode.length)
    return results, seconds


def record_players(players: list[Player], policy: NumpyPolicy, addon: AddonTask, renderer: Any, args: Args) -> None:
    """Record the first episode of each player, side by side."""
    import imageio

    limit, envs = args.max_steps or math.inf, [player.env for player in players]
    games = [play_planned(x.env, policy, addon, args.seed, x.planner, x.model, limit) for x in players]
    if args.video_steps is not None:
        games = [itertools.islice(game, args.video_steps + 1) for game in games]  # and the reset
    every = max(1, round(1 / (args.video_fps * envs[0].unwrapped.dt)))
    options = {"fps": 1 / (every * envs[0].unwrapped.dt), "macro_block_size": 1, "ffmpeg_log_level": "error"}
    if args.video.suffix == ".gif":
        palette = "split[a][b];[a]palettegen=max_colors=64[p];[b][p]paletteuse=dither=none:diff_mode=rectangle"
        gif = ["-filter_complex", palette, "-loop", "0", "-f", "gif"]
        options |= {"codec": "gif", "pixelformat": "pal8", "output_params": gif}
    temporary = args.video.with_name(args.video.name + ".tmp.mp4")  # imageio gives ffmpeg no other names
    try:
        with imageio.get_writer(temporary, format="FFMPEG", **options) as video:
            for frame in video_frames(games, envs, renderer, every):
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


def comparison_table(names: list[str], results: list[list[Episode]], label: str) -> rich.table.Table:
    """Mean ± standard deviation over the episodes of each player; label names the add-on task's quantity."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    rows = {"basic": "return (basic)", "addon": "add-on", "total": "total", "quantity": label, "length": "length"}
    for name, title in rows.items():
        columns = [np.array([getattr(episode, name) for episode in episodes]) for episodes in results]
        digits = 3 if name == "quantity" else 1
        table.add_row(title, *[f"{x.mean():.{digits}f} ± {x.std():.{digits}f}" for x in columns])
    return table


def check_numbers(args: Args) -> None:
    """StopRun if a flag cannot work, or would overwrite a file."""
    positive = ("episodes", "max_steps", "temperature", "horizon", "num_samples", "threads", "video_steps", "video_fps")
    for name in (*positive, "noise_scale", "tail", "seed", "omega", "omega_prime", "survival_reward"):
        value = getattr(args, name)
        if value is not None and not (value > 0 or (name not in positive and value == 0)) or value == math.inf:
            bound = "above 0" if name in positive else "0 or above"
            raise StopRun(f"--{name.replace('_', '-')} is {value}; it must be finite and {bound}")
    if args.gamma is not None and not 0 <= args.gamma <= 1:
        raise StopRun(f"--gamma is {args.gamma}; it must be from 0 to 1")
    if not math.isfinite(args.addon_coef):
        raise StopRun(f"--addon-coef is {args.addon_coef}; it must be a finite number")
    if min(args.video_size) < 2 or any(size % 2 for size in args.video_size):
        raise StopRun(f"--video-size is {args.video_size}; width and height must be even and above 0")
    for flag, path, suffixes in (("--video", args.video, (".mp4", ".gif")), ("--json", args.json, (".json",))):
        if path is None:
            continue
        if path.suffix not in suffixes:
            raise StopRun(f"{flag} is {path}; its name must end in {' or '.join(suffixes)}")
        if path.exists():
            raise StopRun(f"{flag} {path} exists; name a new file, or remove it")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise StopRun(f"{flag} cannot write to the folder {path.parent}; create it, or name another")


def make_planner(path: Path, env_id: str, args: Args) -> Planner:
    """What the flags say, and for what they leave open the prior's file; StopRun if that does not know it, either."""
    file = path / "policy.safetensors" if path.is_dir() else path
    with safetensors.safe_open(file, "numpy") as content:
        info = content.metadata()
    alpha, scale = float(info.get("alpha", 0)), OMEGA_PRIME * args.omega
    omega_prime = args.omega_prime if args.omega_prime is not None else scale * alpha
    temperature = args.temperature or TEMPERATURE * alpha
    if temperature == 0 or (args.omega_prime is None and alpha == 0):
        raise StopRun(f"{file} names no temperature alpha above 0; give --omega-prime and --temperature")
    gamma = args.gamma if args.gamma is not None else min(float(info.get("gamma", 0.99)), 0.99)
    c = args.omega * float(info.get("survival_reward", 0)) if args.survival_reward is None else args.survival_reward
    objective = Objective(omega_prime, temperature, c, gamma, args.importance)
    tail = args.tail if args.tail is not None else TAILS.get(env_id.rpartition("-v")[0], 4)
    return Planner(args.horizon, tail, args.num_samples, args.noise_scale, objective)


def main(args: Args) -> None:
    """Play, show and record."""
    check_numbers(args)
    path = args.prior or default_prior(args.env_id or "HalfCheetah-v4")
    policy = read_policy(path)
    env_id = args.env_id or policy.env_id
    task, addon = named_task(env_id, args.addon, args.addon_coef)
    planner = make_planner(path, env_id, args)
    players = open_players(env_id, policy, planner, args)
    env, objective = players[0].env, planner.objective
    renderer = open_renderer(env, args.video_size) if args.video else None

    CONSOLE.print(
        f"[bold]{env_id}[/bold], episodes: {args.episodes}, seed: {args.seed}, add-on: {addon.coef:g} x {task}\n"
        f"prior {path}; horizon {planner.horizon} + {planner.tail} steps, {planner.num_samples} samples, "
        f"omega' {objective.omega_prime:g}, temperature {objective.temperature:g}, c {objective.survival_reward:g}"
    )
    results, seconds = play_all_planned(players, policy, addon, args)
    CONSOLE.print(comparison_table([player.name for player in players], results, addon.label))
    steps = sum(episode.length for episode in results[2])
    physics = steps * planner.num_samples * (planner.horizon + planner.tail) * env.unwrapped.frame_skip
    CONSOLE.print(
        f"residual: {1000 * seconds[2] / steps:.1f} s per 1000 steps, which are {1000 * env.unwrapped.dt:.0f} s of the "
        f"robot's time; {physics / seconds[2]:,.0f} physics steps/s"
    )
    if args.json:
        settings = vars(args) | {"env_id": env_id, "addon": task, "prior": path, "objective": objective._asdict()}
        rows = zip(players, seconds, results, strict=True)
        played = [{"name": x.name, "seconds": s, "episodes": [e._asdict() for e in es]} for x, s, es in rows]
        content = {"settings": settings | {"tail": planner.tail}, "quantity": addon.label, "players": played}
        write_atomic(args.json, json.dumps(content, indent=1, default=str).encode())
        CONSOLE.print(f"every episode is in {shlex.quote(str(args.json))}")
    if args.video:
        CONSOLE.print("recording ...")  # which plays once more, and takes minutes without a GPU
        record_players(players, policy, addon, renderer, args)
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
