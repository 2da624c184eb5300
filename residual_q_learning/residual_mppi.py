# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "numpy>=2.0", "gymnasium>=1.1", "mujoco>=3.3", "imageio[ffmpeg]>=2.36",
#   "tyro>=0.9", "rich>=13.9", "safetensors>=0.5",
# ]
# ///
"""Residual-MPPI: customise a prior by planning, without training, with MuJoCo's own dynamics as the model.

The prior's plan is what it would do from the present state: mean actions, in states s_t that the model foresees.  In
every step, --num-samples rollouts start from the present state.  Their first H actions (--horizon) are the plan's,
disturbed with the prior's deviation times k (--noise-scale); then the prior goes on, undisturbed, for --tail steps.

    a_t = tanh(u_t),  u_t = mean(s_t) + k sigma(s_t) eps_t,  eps_t ~ N(0, 1),  for t < H.

With g(a) the density that the H actions are drawn from, and pi(a_t|s_t) the prior's in the states of its plan, a
rollout has the score and the weight

    S = sum_{t < H + tail} gamma^t r_R  +  omega' sum_{t < H} gamma^t log pi(a_t|s_t),      w = exp(S / lambda) / g(a),

and the next action is that of the weighted mean of u_0: of the distribution q of H actions that maximises
E_q[S] + lambda H(q).  So the objective is Residual Policy Gradient's, r_R + omega' log pi - alpha_hat log q, with
alpha_hat = lambda (--temperature), over H steps.  Remarks:

Samples near the prior carry log pi in their density.  Without the division by g (--no-importance, as MPPI is mostly
written) q maximises E_q[S] - lambda KL(q || g), which for k = 1 is the same with omega' + lambda instead of omega' (up
to gamma).  Greedy planning, omega' = 0, then still pays lambda for its KL to the prior; only the division makes it
forget that.  At omega' = lambda and k = 1, the defaults, both cancel: w = exp(sum gamma^t r_R / lambda).

Residual-MPPI takes log pi in the states that a rollout reaches, as --reached does.  For H = 1 that is the same.  For
more, the prior would mend there what the disturbance did, and the samples are charged for not doing so.

What is the value at the end of the horizon?  alpha log pi = r + gamma V(s') - V(s) is shaped: its sum has the basic
task's value in it, so H may be small.  The add-on reward has no such term.  The tail estimates its value, that of going
on as the prior; there, no step differs from the prior's, so that no log pi counts.

A Gaussian's log pi knows nothing of falls.  As in residual_ppo.py, an end costs gamma c / (1 - gamma), with the
survival reward c of the prior's file.  That sees no fall beyond the horizon: so the planned action is taken only if the
prior, going on from it, lives for --backup-steps; else, of the prior's own action, those of the samples and the planned
one, that after which it lives longest.

Residual-MPPI: arXiv 2407.00898; the residual objective: arXiv 2306.09526, 2503.11019.

    python residual_mppi.py --env-id Hopper-v4 --video hopper.mp4
"""

import contextlib
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
    env_id: str | None = None
    """HalfCheetah, Hopper, Walker2d, Ant or Swimmer, v4 or v5; if not given, the prior's, else HalfCheetah-v4"""
    prior: Path | None = None
    """a policy file, or a run folder, which holds one; if not given, priors/<env-id>.safetensors"""

    # episodes
    episodes: int = 1
    """how many to play, each by the prior, by greedy and by residual planning"""
    seed: int = 1
    """seed of the first episode, of its environment and its noise; the next one's is 1 higher"""
    max_steps: int = 1000
    """an episode ends after so many"""
    addon: str | None = None
    """add-on task; if not given, the environment's own"""
    addon_coef: float = 1.0
    """factor on the add-on reward"""

    # objective
    omega_prime: float | None = None
    """weight of log pi, in reward per nat; if not given, the prior's alpha; greedy planning has 0"""
    temperature: float | None = None
    """lambda, in reward per nat; if not given, the prior's alpha"""
    survival_reward: float | None = None
    """c, in reward per step, that an end forgoes; if not given, that of the prior's file, or 0"""
    gamma: float = 0.99
    """discount"""

    # planning
    horizon: int | None = None
    """H, how many actions differ from the prior's plan; if not given, see ROBOTS"""
    tail: int | None = None
    """steps of the prior's mean actions after them; if not given, see ROBOTS"""
    num_samples: int | None = None
    """K, rollouts in every step; if not given, see ROBOTS"""
    noise_scale: float = 1.0
    """k, deviation of the samples, as a multiple of the prior's"""
    importance: bool = True
    """divide the weights by the density of the samples"""
    backup_steps: int | None = None
    """steps that the prior must live after the planned action, or another one is taken; if not given, see ROBOTS"""
    reached: bool = False
    """take log pi in the states that a rollout reaches, not in those of the prior's plan"""
    threads: int | None = None
    """of the physics; if not given, one for each core that this process may use"""

    # output
    json: Path | None = None
    """write every episode to this new .json file"""
    video: Path | None = None
    """record the first episode, prior, greedy and residual side by side, to this new .mp4 or .gif file"""
    video_size: tuple[int, int] = (480, 360)
    """width and height of the picture of one of them, in pixels"""


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


def named_task(env_id: str, name: str | None, coef: float) -> tuple[str, AddonTask]:
    """An add-on task and its name; None: the environment's default. StopRun if the environment has no such task."""
    choices = [key for key, task in ADDON_TASKS.items() if task.env in (env_id.rpartition("-v")[0], "")]
    name = {None: choices[0], "default": choices[0], "None": "none"}.get(name, name)
    if name not in choices:
        hint = f"give --addon one of {', '.join(choices)}, or add its line to ADDON_TASKS"
        raise StopRun(f"{name} is no add-on task that is known here for {env_id}; {hint}")
    return name, ADDON_TASKS[name]._replace(coef=coef)


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


def read_prior(path: Path) -> tuple[NumpyPolicy, dict[str, str]]:
    """A Gaussian policy, of a file or a run folder, and the metadata; StopRun if it is missing, damaged or of no use.

    enjoy.py is the reference reader, and says more of what is wrong with a file.
    """
    required = {"env_id", "squash", "hidden_sizes", "activation"}
    known = required | {"alpha", "gamma", "survival_reward", "obs_clip", "log_std", "measured_alpha"}
    known |= {"format", "returns", "training", "sha256"}
    file = path / "policy.safetensors" if path.is_dir() else path
    try:
        tensors = safetensors.numpy.load_file(file)
        tensors = {name: x for name, x in tensors.items() if not name.startswith("critic.")}
        with safetensors.safe_open(file, "numpy") as content:
            info = content.metadata() or {}
        if wrong := (required - info.keys()) | (info.keys() - known):
            raise ValueError(f"the metadata {sorted(wrong)} are missing or unknown")
        if info.get("sha256", digest := policy_digest(tensors, info)) != digest:
            raise ValueError("it is damaged (its sha256 does not match); copy or export it anew")
        if not (0 <= float(info.get("alpha", 0)) < np.inf and np.isfinite(float(info.get("survival_reward", 0)))):
            raise ValueError("its alpha or its survival_reward is impossible")
        hidden_sizes = json.loads(info["hidden_sizes"])
        names = [f"actor_mean.{2 * i}" for i in range(len(hidden_sizes) + 1)]
        policy = NumpyPolicy(
            env_id=info["env_id"],
            squash={"true": True, "false": False}[info["squash"]],
            activation=ACTIVATIONS[info["activation"]],
            obs_clip=float(info.get("obs_clip", 10)),
            log_std=log_std_form(info.get("log_std", "clip -20 2")),
            layers=[(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names],
            tensors=tensors,
        )
        if hidden_sizes != [len(bias) for _, bias in policy.layers[:-1]]:
            raise ValueError(f"its layers are not as its hidden_sizes say, {hidden_sizes}")
        if not np.isfinite(mean_and_log_std(policy, tensors["obs_mean"])).all():
            raise ValueError("it has entries that are NaN or infinite, or a negative variance")
    except FileNotFoundError:
        raise StopRun(f"there is no policy {path}; name a policy file, or the folder of a complete run") from None
    except Exception as error:  # a damaged file can fail in any way
        raise StopRun(f"the policy {path} cannot be used: {type(error).__name__}: {error}") from None
    return policy, info


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
    return mean, policy.log_std(x @ tensors["actor_logstd.weight"].T + tensors["actor_logstd.bias"])


def bounded(policy: NumpyPolicy, u: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The action in the environment's units, of one before squashing or clipping, u (..., action_dim)."""
    return low + (np.tanh(u) + 1) / 2 * (high - low) if policy.squash else np.clip(u, low, high)


# --------------------------------------------------------------------------------- mathematics


class Imagined(NamedTuple):
    """What K rollouts in the model have come to; after an end there are zeros."""

    u: np.ndarray  # (K, H, action_dim), the disturbed actions before squashing
    addon: np.ndarray  # (K, H + tail), add-on reward of each step
    ended: np.ndarray  # (K, H + tail), whether the episode terminates in this step
    log_prob: np.ndarray  # (K, H + tail), log pi of the prior; in the tail 0
    log_proposal: np.ndarray  # (K, H + tail), log g of the distribution that the actions are drawn from; in the tail 0


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


def rollout_scores(imagined: Imagined, omega_prime: float, survival_reward: float, gamma: float) -> np.ndarray:
    """S of each rollout, (K,): sum gamma^t (r_R + omega' log pi), less gamma c / (1 - gamma) where it ends."""
    end = gamma * survival_reward / (1 - gamma)
    reward = imagined.addon + omega_prime * imagined.log_prob - end * imagined.ended
    return reward @ gamma ** np.arange(reward.shape[1])


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
    """How Gymnasium observes a robot's state, which is time, positions, velocities; and how much planning it needs."""

    hidden: int  # positions in the world, the first ones, which the observation leaves out
    max_speed: float  # bound of the observed velocities
    height: int  # index, in the state, of what must stay in the healthy z range, if there is one
    num_samples: int  # from here on, defaults
    horizon: int
    tail: int
    backup_steps: int


ROBOTS = {
    "HalfCheetah": Robot(1, np.inf, 2, num_samples=128, horizon=2, tail=0, backup_steps=0),
    "Hopper": Robot(1, 10, 2, num_samples=16, horizon=1, tail=19, backup_steps=200),
    "Walker2d": Robot(1, 10, 2, num_samples=16, horizon=1, tail=9, backup_steps=200),
    "Ant": Robot(2, np.inf, 3, num_samples=128, horizon=3, tail=0, backup_steps=20),
    "Swimmer": Robot(2, np.inf, 3, num_samples=32, horizon=1, tail=4, backup_steps=0),
}


class Model(NamedTuple):
    """MuJoCo's dynamics of an environment, for many states at a time."""

    env: Any  # Gymnasium's environment, unwrapped
    robot: Robot
    pool: Any  # mujoco.rollout.Rollout
    data: list[Any]  # an mujoco.MjData for each thread
    healthy: tuple[np.ndarray, np.ndarray]  # bounds of the state, from its height on, outside which an episode ends


def make_model(env_id: str, threads: int) -> Model:
    """An environment and its model; StopRun if it does not open, or its state cannot be set and observed here."""
    robot = ROBOTS.get(env_id.rpartition("-v")[0])
    try:
        import gymnasium
        import mujoco.rollout

        warnings.filterwarnings("ignore", message=".*is out of date")  # who plays v4 knows
        mujoco.set_mju_user_warning(lambda message: None)  # which would go to a file in the working folder
        env = gymnasium.make(env_id, disable_env_checker=True).unwrapped
        obs, _ = env.reset(seed=0)
    except Exception as error:  # each environment fails in its own way
        raise StopRun(f"Gymnasium cannot open {env_id} ({error})") from None
    if robot is not None:
        pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)  # 0: in this thread
        data = [mujoco.MjData(env.model) for _ in range(threads)]
        model = Model(env, robot, pool, data, healthy_bounds(env, robot))
        if np.array_equal(observations(model, present_state(model)), obs.astype(np.float32)):
            return model
    raise StopRun(
        f"{env_id} cannot be planned: its observation is not known to be positions and velocities; choose one of "
        f"{', '.join(ROBOTS)}, v4 or v5, but of Ant only v4"
    )


def present_state(model: Model) -> np.ndarray:
    """The environment's state, (state_dim,): time, positions, velocities."""
    data = model.env.data
    return np.concatenate(([data.time], data.qpos, data.qvel))


def healthy_bounds(env: Any, robot: Robot) -> tuple[np.ndarray, np.ndarray]:
    """The environment's own healthy ranges, as bounds of the state from robot.height on: (state_dim - height,) each."""
    low, high = np.tile([[-np.inf], [np.inf]], 1 + env.model.nq + env.model.nv)
    for name, part in (("state", slice(3, None)), ("z", robot.height), ("angle", 3)):
        least, most = getattr(env, f"_healthy_{name}_range", (-np.inf, np.inf))
        low[part], high[part] = np.maximum(low[part], least), np.minimum(high[part], most)
    return low[robot.height :], high[robot.height :]


def simulate_rollouts(model: Model, state: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The states after one step of the environment each, (K, state_dim).

    Args: state (K, state_dim); action (K, action_dim), in the environment's units.
    """
    physics, steps = [model.env.model] * len(state), model.env.frame_skip
    control = np.repeat(action[:, None].astype(np.float64), steps, axis=1)
    states = np.empty((len(state), steps, state.shape[1]))
    # Unless skipped, checks take longer than all else that is done here beside the physics.
    model.pool.rollout(physics, model.data, state, control, skip_checks=True, nstep=steps, state=states)
    return states[:, -1].copy()


def observations(model: Model, state: np.ndarray) -> np.ndarray:
    """Gymnasium's observations of states (..., state_dim): (..., obs_dim), float32."""
    obs, speed = state[..., 1 + model.robot.hidden :].astype(np.float32), model.robot.max_speed
    if speed < np.inf:
        velocity = obs[..., model.env.model.nq - model.robot.hidden :]
        np.maximum(np.minimum(velocity, speed), -speed, out=velocity)
    return obs


def terminated(model: Model, state: np.ndarray) -> np.ndarray:
    """Whether Gymnasium ends an episode in states (..., state_dim): outside its healthy ranges; (...)."""
    (low, high), x = model.healthy, state[..., model.robot.height :]
    return ~((low < x) & (x < high)).all(-1)


# ------------------------------------------------------------------------------------ planning


def imagine(model: Model, policy: NumpyPolicy, addon: AddonTask, noise: np.ndarray, args: Args) -> Imagined:
    """Roll out from the environment's present state, with noise (K, H, action_dim) on the prior's plan."""
    lead = int(args.horizon > 1)  # first, a rollout without noise: the plan of the others
    noise = np.concatenate((np.zeros_like(noise[:lead]), noise))
    state, space = np.tile(present_state(model), (len(noise), 1)), model.env.action_space
    obs, actions, shape = observations(model, state), [], (len(noise), args.horizon + args.tail)
    reward, log_prob, log_proposal, ended = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    log_k, where = np.log(args.noise_scale or 1), slice(None if args.reached else 1)
    for t in range(args.horizon + args.tail):
        u, log_std = mean_and_log_std(policy, obs)
        if t < args.horizon:
            mean, log_std = u, np.broadcast_to(log_std, u.shape)
            u = mean[:1] + args.noise_scale * np.exp(log_std[:1]) * noise[:, t]
            log_proposal[:, t] = log_density(u, mean[:1], log_std[:1] + log_k, policy.squash)
            log_prob[:, t] = log_density(u, mean[where], log_std[where], policy.squash)
            actions.append(u)
        action = bounded(policy, u, space.low, space.high)
        state = simulate_rollouts(model, state, action)
        before, obs = obs, observations(model, state)
        reward[:, t] = addon.coef * addon.reward(addon.quantity(before, action, obs))
        ended[:, t] = terminated(model, state)
    alive = ended.cumsum(1) == ended  # before this step there was no end
    found = np.stack(actions, 1), alive * reward, alive & ended, alive * log_prob, alive * log_proposal
    return Imagined(*(x[lead:] for x in found))


def plan_step(model: Model, policy: NumpyPolicy, addon: AddonTask, args: Args, rng: np.random.Generator) -> np.ndarray:
    """The next action before squashing, (action_dim,), float32: the weighted mean over the samples.

    If the prior could not go on from there for args.backup_steps: one after which it lives longest.
    """
    noise = noise_pairs(rng, args.num_samples, args.horizon, model.env.action_space.shape[0])
    imagined = imagine(model, policy, addon, noise, args)
    score = rollout_scores(imagined, args.omega_prime, args.survival_reward, args.gamma)
    weights = sample_weights(score, imagined.log_proposal.sum(1) * args.importance, args.temperature)
    u = weights @ imagined.u[:, 0]
    if lifetimes(model, policy, u[None], args.backup_steps)[0] < args.backup_steps:
        mean, _ = mean_and_log_std(policy, observations(model, present_state(model)))
        choices = np.concatenate((mean[None], imagined.u[:, 0], u[None]))  # of equals the first is taken
        u = choices[np.argmax(lifetimes(model, policy, choices, args.backup_steps))]
    return u.astype(np.float32)


def lifetimes(model: Model, policy: NumpyPolicy, u: np.ndarray, steps: int) -> np.ndarray:
    """Steps that the episode lives, of so many, after actions before squashing u (n, action_dim) and then the prior's.

    So the prior is the backup policy of model predictive shielding, arXiv 1905.10691; (n,).
    """
    state, space = np.tile(present_state(model), (len(u), 1)), model.env.action_space
    lived, alive = np.zeros(len(u), int), np.ones(len(u), bool)
    for _ in range(steps):
        state = simulate_rollouts(model, state, bounded(policy, u, space.low, space.high))
        alive &= ~terminated(model, state)
        if not alive.any():
            break
        lived += alive
        u, _ = mean_and_log_std(policy, observations(model, state))
    return lived


class PlannedEpisode(NamedTuple):
    """What an episode has come to."""

    seed: int
    basic: float  # sum of the environment's own reward
    addon: float  # sum of the add-on reward
    total: float
    quantity: float  # of the add-on task, mean over the steps
    length: int  # steps
    seconds: float  # of planning and of the environment


class Player(NamedTuple):
    """Who plays, in an environment of its own."""

    name: str
    planning: Args | None  # None: the prior's mean actions
    model: Model


def play_planned(
    player: Player, policy: NumpyPolicy, addon: AddonTask, seed: int, max_steps: int
) -> Iterator[PlannedEpisode]:
    """Play an episode, yielding what it has come to after the reset and after each step.

    Environment and noise follow from the seed, so all that play with one seed start in the same state.
    """
    env, rng = player.model.env, np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    basic, bonus, quantity, length, seconds, done = 0.0, 0.0, 0.0, 0, 0.0, False
    yield PlannedEpisode(seed, basic, bonus, basic + bonus, quantity, length, seconds)
    while not done and length < max_steps:
        before, start = obs.astype(np.float32), time.perf_counter()
        if player.planning:
            u = plan_step(player.model, policy, addon, player.planning, rng)
        else:
            u, _ = mean_and_log_std(policy, before)
        action = bounded(policy, u, env.action_space.low, env.action_space.high)
        obs, reward, done, _, _ = env.step(action)
        measured = addon.quantity(before[None], action[None], obs.astype(np.float32)[None])
        addon_reward = float(addon.reward(measured)[0])
        if not math.isfinite(addon_reward):
            raise StopRun(f"the add-on reward on {addon.label} is {addon_reward}; mend the task", 1)
        basic, bonus = basic + float(reward), bonus + addon.coef * addon_reward
        quantity, length = quantity + float(measured[0]), length + 1
        seconds += time.perf_counter() - start
        yield PlannedEpisode(seed, basic, bonus, basic + bonus, quantity / length, length, seconds)


def play_players(
    players: list[Player], policy: NumpyPolicy, addon: AddonTask, args: Args, film: Callable | None
) -> list[list[PlannedEpisode]]:
    """All episodes of each player. They play side by side; film is called after each step of the first episode."""
    results = [[] for _ in players]
    with rich.progress.Progress(console=TERMINAL, transient=True, disable=not TERMINAL.is_terminal) as progress:
        bar = progress.add_task("", total=args.episodes * args.max_steps)
        for i in range(args.episodes):
            seed, episodes = args.seed + i, [None for _ in players]
            games = [play_planned(player, policy, addon, seed, args.max_steps) for player in players]
            for step, now in enumerate(itertools.zip_longest(*games)):  # None is of a game that has ended
                episodes = [new or old for new, old in zip(now, episodes, strict=True)]
                if film and i == 0:
                    film(step)
                progress.update(bar, completed=i * args.max_steps + step, description=f"seed {seed}")
            for kept, episode in zip(results, episodes, strict=True):
                kept.append(episode)
    return results


# --------------------------------------------------------------------------------------- video


NEEDS_EGL = "without a display, install EGL: apt-get install libegl1, and set MUJOCO_GL=egl"


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


@contextlib.contextmanager
def open_film(path: Path, envs: list[Any], size: tuple[int, int]) -> Iterator[Callable]:
    """A function of the step that adds a picture of all envs side by side, at the robot's speed, in about 20 a second.

    Who has ended stays still on the last picture.  The file appears when all is played.
    """
    import imageio

    renderer, every = open_renderer(envs[0], size), max(1, round(0.05 / envs[0].dt))
    camera = 0 if renderer.model.ncam else -1  # the model's own, which follows the robot, else a free one
    options = {"fps": 1 / (every * envs[0].dt), "macro_block_size": 1, "ffmpeg_log_level": "error"}
    if path.suffix == ".gif":
        options |= {"codec": "gif", "pixelformat": "rgb8", "output_params": ["-loop", "0", "-f", "gif"]}
    temporary = path.with_name(path.name + ".tmp.mp4")  # imageio gives ffmpeg no other names

    def film(step):
        if step % every == 0:
            pictures = []
            for env in envs:
                renderer.update_scene(env.data, camera)
                pictures.append(renderer.render())
            video.append_data(np.hstack(pictures))

    try:
        with imageio.get_writer(temporary, format="FFMPEG", **options) as video:
            yield film
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------- main


TERMINAL = rich.console.Console(highlight=False, soft_wrap=True)


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


def comparison_table(players: list[Player], results: list[list[PlannedEpisode]], label: str) -> rich.table.Table:
    """Mean ± standard deviation over the episodes of each player; label names the add-on task's quantity."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in ("", *(player.name for player in players)):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    rows = {"basic": "return (basic)", "addon": "add-on", "total": "total", "quantity": label, "length": "length"}
    for name, title in rows.items():
        columns = [np.array([getattr(episode, name) for episode in episodes]) for episodes in results]
        digits = 3 if name == "quantity" else 1
        table.add_row(title, *[f"{x.mean():.{digits}f} ± {x.std():.{digits}f}" for x in columns])
    return table


# What can work, from and to; None is for what is not given.
FLAG_BOUNDS = {
    "episodes": (1, 10**6), "seed": (0, 2**31 - 1), "max_steps": (1, 10**6), "addon_coef": (-1e6, 1e6),
    "omega_prime": (0, 1e6), "temperature": (1e-12, 1e6), "survival_reward": (0, 1e6), "gamma": (0, 1 - 1e-6),
    "horizon": (1, 1000), "tail": (0, 1000), "num_samples": (1, 10**5), "noise_scale": (0, 100), "threads": (1, 256),
    "backup_steps": (0, 10**4),
}  # fmt: skip


def check_planning_flags(args: Args) -> None:
    """StopRun if a flag cannot work, or would overwrite a file."""
    for name, (low, high) in FLAG_BOUNDS.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise StopRun(f"--{name.replace('_', '-')} is {value}; it must be from {low:g} to {high:g}")
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


def complete(args: Args, policy: NumpyPolicy, info: dict[str, str], path: Path) -> Args:
    """With what the flags leave open, of the prior, its metadata and path, and ROBOTS; StopRun if these do not say."""
    env_id, alpha = args.env_id or policy.env_id, float(info.get("alpha", 0))
    if policy.env_id.rpartition("-v")[0] != env_id.rpartition("-v")[0]:
        raise StopRun(f"a policy for {policy.env_id} cannot play in {env_id}; change --env-id or --prior")
    if alpha == 0 and None in (args.omega_prime, args.temperature):
        raise StopRun(f"{path} names no temperature alpha above 0; give --omega-prime and --temperature")
    robot = ROBOTS.get(env_id.rpartition("-v")[0], ROBOTS["HalfCheetah"])
    defaults = {name: getattr(robot, name) for name in ("num_samples", "horizon", "tail", "backup_steps")}
    defaults |= {"env_id": env_id, "prior": path, "omega_prime": alpha, "temperature": alpha}
    defaults["survival_reward"] = float(info.get("survival_reward", 0))
    defaults["threads"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})


def open_players(policy: NumpyPolicy, args: Args) -> list[Player]:
    """The prior, greedy and residual planning; StopRun unless the environment fits the policy and can be planned."""
    if args.video and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
    planning = {"prior": None, "greedy": replace(args, omega_prime=0.0), "residual": args}
    players = [Player(name, how, make_model(args.env_id, args.threads)) for name, how in planning.items()]
    env, shapes = players[0].model.env, (policy.tensors["obs_mean"].shape, policy.layers[-1][1].shape)
    if shapes != (theirs := (env.observation_space.shape, env.action_space.shape)):
        what = f"observations and actions have shapes {theirs[0]} and {theirs[1]}"
        raise StopRun(f"{args.env_id}'s {what}, the prior's {shapes[0]} and {shapes[1]}; change --env-id or --prior")
    return players


def main(args: Args) -> None:
    """Play, show and record."""
    check_planning_flags(args)
    path = args.prior or default_prior(args.env_id or "HalfCheetah-v4")
    policy, info = read_prior(path)
    args = complete(args, policy, info, path)
    task, addon = named_task(args.env_id, args.addon, args.addon_coef)
    players = open_players(policy, args)
    env = players[0].model.env
    check_task(task, addon, env.reset(seed=args.seed)[0], env.action_space.sample())

    TERMINAL.print(
        f"[bold]{args.env_id}[/bold], episodes: {args.episodes}, seed: {args.seed}, add-on: {addon.coef:g} x {task}\n"
        f"prior {path}; {args.num_samples} samples of {args.horizon} + {args.tail} steps, backup {args.backup_steps}, "
        f"omega' {args.omega_prime:g}, temperature {args.temperature:g}, c {args.survival_reward:g}"
    )
    recording = open_film(args.video, [x.model.env for x in players], args.video_size) if args.video else None
    with recording or contextlib.nullcontext() as film:
        results = play_players(players, policy, addon, args, film)
    if args.json:
        pairs = zip(players, results, strict=True)
        played = [{"name": player.name, "episodes": [x._asdict() for x in episodes]} for player, episodes in pairs]
        content = {"settings": vars(args) | {"addon": task}, "quantity": addon.label, "players": played}
        write_atomic(args.json, json.dumps(content, indent=1, default=str).encode())
    TERMINAL.print(comparison_table(players, results, addon.label))
    steps, seconds = (sum(getattr(x, name) for x in results[-1]) for name in ("length", "seconds"))
    physics = steps * (args.num_samples * (args.horizon + args.tail) + args.backup_steps) * env.frame_skip
    TERMINAL.print(
        f"residual: {1000 * seconds / steps:.1f} s per 1000 steps, which are {1000 * env.dt:.0f} s of the robot's "
        f"time; {physics / seconds:,.0f} physics steps/s"
    )
    for path, what in ((args.json, "every episode"), (args.video, "the first episode")):
        if path:
            TERMINAL.print(f"{what} is in {shlex.quote(str(path))}")


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
    except (OSError, MemoryError) as error:  # as of a full disk
        end(str(error), 1)
    except KeyboardInterrupt:
        end("interrupted", 130)
