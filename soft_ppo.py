# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.5", "numpy>=2.0",
#   "gymnasium>=1.1", "mujoco>=3.3", "envpool>=1.2.5", "imageio[ffmpeg]>=2.36",
#   "tyro>=0.9", "rich>=13.9", "safetensors>=0.5", "tensorboardX>=2.6.2", "matplotlib>=3.10",
# ]
# ///
"""Soft PPO: maximum-entropy reinforcement learning by an ordinary policy gradient.

The objective J(theta) = E[ sum_t gamma^t ( r(s_t,a_t) + alpha H(pi_theta(.|s_t)) ) ] has the gradient

    E[ sum_t gamma^t grad log pi_theta(a_t|s_t) sum_{k>=t} gamma^(k-t) ( r(s_k,a_k) - alpha log pi_theta(a_k|s_k) ) ],

which is a policy gradient on the reward r - alpha log pi_theta.  So PPO maximises it when it is given that reward, with
no entropy bonus in the loss, where the entropy would count twice.  Soft Policy Gradient, in arXiv 2503.11019.

The task is the environment's own reward, or omega r + r_R with an add-on task (the paper's "full policy").

    python soft_ppo.py --env-id HalfCheetah-v4 --alpha 0.1
    python soft_ppo.py --env-id Ant-v4 --alpha 0.05 --addon ant-right --omega 0.5
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import envpool
import flax.linen as nn
import flax.serialization
import jax
import jax.experimental.multihost_utils
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.console
import rich.progress
import rich.table
import safetensors.numpy
import tensorboardX
import tyro
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Args:
    # run
    seed: int = 1
    """seed of the environments, the networks and the sampling"""
    runs_dir: Path = Path("runs")
    """the run writes to RUNS_DIR/<env-id>__<script>__<seed>__<time>"""
    resume: Path | None = None
    """continue the run in this folder with the arguments it was started with; takes no other flag"""
    checkpoint_interval: float = 30.0
    """seconds between checkpoints (0: after every iteration)"""
    progress: bool = True
    """live progress bar; with --no-progress, or without a terminal, plain lines"""
    track: bool = False
    """mirror the metrics to Weights & Biases"""
    wandb_project_name: str = "residual-policy-gradients"
    """the project of --track"""
    wandb_entity: str | None = None
    """the team of --track"""
    capture_video: bool = False
    """record an episode of the final policy, with deterministic actions, to video.mp4"""

    # several processes
    distributed: bool = False
    """be one of several processes that train together, each stepping its share of the environments"""
    coordinator_address: str | None = None
    """host:port of process 0; like the next two, if not given, as SLURM or Open MPI say"""
    num_processes: int | None = None
    """how many processes there are"""
    process_id: int | None = None
    """which of them this one is, from 0; process 0 writes the run folder"""

    # environment and task
    env_id: str = "HalfCheetah-v4"
    """a MuJoCo environment of Gymnasium, v4 or v5"""
    num_envs: int = 64
    """parallel environments, of all processes together"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole training, all environments together"""
    addon: str = "none"
    """add-on task r_R; "none" is a zero reward"""
    addon_coef: float = 1.0
    """factor on the add-on reward"""
    omega: float = 1.0
    """weight of the basic reward r"""

    # entropy
    entropy: Literal["soft", "bonus", "repeat", "none"] = "soft"
    """where the entropy goes: soft: into the reward; bonus: into the loss, as in classical PPO; repeat: into both (it
    counts twice; for comparison); none: nowhere"""
    alpha: float = 0.1
    """temperature of the entropy in the reward (soft, repeat), in units of reward per nat"""
    ent_coef: float = 0.01
    """coefficient of the entropy in the loss (bonus, repeat), in units of normalised advantage per nat"""

    # policy
    squash: bool = True
    """tanh-squashed Gaussian; --no-squash: plain Gaussian, actions clipped"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """widths of the hidden layers of policy and critic"""

    # PPO
    num_steps: int = 32
    """steps per environment between two updates"""
    learning_rate: float = 7e-4
    """learning rate of Adam"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over the run"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 16
    """minibatches per epoch; divides num_envs * num_steps"""
    update_epochs: int = 5
    """passes over the data of an iteration"""
    norm_adv: bool = True
    """normalise the advantages in each minibatch"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio"""
    clip_vloss: bool = True
    """clip the value loss, too"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """the gradient's norm is clipped to this"""
    target_kl: float | None = None
    """skip an update's remaining epochs once the policy is this far from the rollout's (approximate KL, in nats)"""

    # evaluation
    eval_episodes: int = 20
    """episodes of the final evaluation, with sampled and again with deterministic actions"""


class StopRun(Exception):
    """Ends the program with one line for the user; exit code 2: bad input, 1: diverged, 130: interrupted."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


# ---------------------------------------------------------------- networks and distribution


class RunningStats(NamedTuple):
    """Mean, variance and number of the data seen so far."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


class Policy(NamedTuple):
    """All that acting needs: parameters of an Actor, and the normaliser of its observations."""

    params: Any
    obs_stats: RunningStats


class Actor(nn.Module):
    """Diagonal Gaussian over actions before squashing or clipping, its deviation independent of the state."""

    action_dim: int
    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map normalised observations (..., obs_dim) to mean (..., action_dim) and log_std (action_dim,)."""
        for size in self.hidden_sizes:
            obs = jnp.tanh(nn.Dense(size, kernel_init=nn.initializers.orthogonal(2**0.5))(obs))
        mean = nn.Dense(self.action_dim, kernel_init=nn.initializers.orthogonal(0.01))(obs)
        return mean, self.param("log_std", nn.initializers.zeros, (self.action_dim,))


class Critic(nn.Module):
    """Soft state value, in units of the scaled reward."""

    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        """Map normalised observations (..., obs_dim) to values (...)."""
        for size in self.hidden_sizes:
            obs = jnp.tanh(nn.Dense(size, kernel_init=nn.initializers.orthogonal(2**0.5))(obs))
        return nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(obs)[..., 0]


def gaussian_log_prob(action: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """log N(action; mean, exp(log_std)^2), summed over the last axis; (..., action_dim) -> (...), in nats."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * z**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def tanh_log_det(action: jax.Array) -> jax.Array:
    """log |det d tanh(u)/du| at u = action, exact also where tanh saturates; (..., action_dim) -> (...).

    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)).
    """
    return (2 * (jnp.log(2.0) - action - jax.nn.softplus(-2 * action))).sum(-1)


def policy_log_prob(actor: Actor, policy: Policy, squash: bool, obs: jax.Array, action: jax.Array) -> jax.Array:
    """log pi(a|s) in nats, the action given before squashing or clipping; (..., obs_dim), (..., action_dim) -> (...).

    A squashed policy's density is that of a = tanh(u) in [-1, 1]^action_dim.
    """
    log_prob = gaussian_log_prob(action, *actor.apply(policy.params, normalise(obs, policy.obs_stats)))
    return log_prob - tanh_log_det(action) if squash else log_prob


def normalise(obs: jax.Array, stats: RunningStats) -> jax.Array:
    """Observations (..., obs_dim) with zero mean and unit variance, clipped to [-10, 10]."""
    return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10, 10)


def merge_stats(stats: RunningStats, data: jax.Array, valid: jax.Array) -> RunningStats:
    """Statistics after also seeing data (..., *shape) where valid (...) is true, by Chan's parallel update (1983)."""
    axes = tuple(range(valid.ndim))
    weight = valid.reshape(valid.shape + (1,) * (data.ndim - valid.ndim)).astype(data.dtype)
    count = weight.sum()
    mean = (data * weight).sum(axes) / jnp.maximum(count, 1)
    var = ((data - mean) ** 2 * weight).sum(axes) / jnp.maximum(count, 1)
    total = stats.count + count
    delta = mean - stats.mean
    var = (stats.var * stats.count + var * count + delta**2 * stats.count * count / total) / total
    return RunningStats(stats.mean + delta * count / total, var, total)


# ------------------------------------------------------------------------------ mathematics


def soft_reward(reward: jax.Array, log_prob: jax.Array, alpha: float) -> jax.Array:
    """r - alpha log pi_theta(a|s), of any equal shapes (arXiv 2503.11019).

    The log-probability is a number here, not something to differentiate: E[grad log pi_theta] = 0 removes that term
    from the gradient of the maximum-entropy objective.
    """
    return reward - lax.stop_gradient(alpha * log_prob)


def gae(
    reward: jax.Array, value: jax.Array, terminated: jax.Array, truncated: jax.Array, gamma: float, gae_lambda: float
) -> jax.Array:
    """Advantages (num_steps, num_envs) by generalised advantage estimation (arXiv 1506.02438).

    A terminated episode has no future value; a truncated one is bootstrapped from the value of its last observation,
    without which the shaping hidden in log pi would not cancel. Entries of auto-reset steps are meaningless.

    Args:
      reward, terminated, truncated: (num_steps, num_envs), returned by step t.
      value: (num_steps + 1, num_envs), of the observation before step t; the one at t + 1 is what step t returned.
    """
    delta = reward + gamma * (1 - terminated) * value[1:] - value[:-1]
    decay = gamma * gae_lambda * (1 - (terminated | truncated))

    def step(advantage, inputs):
        delta_t, decay_t = inputs
        advantage = delta_t + decay_t * advantage
        return advantage, advantage

    return lax.scan(step, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)[1]


def discounted_returns(
    trace: jax.Array, reward: jax.Array, done: jax.Array, gamma: float
) -> tuple[jax.Array, jax.Array]:
    """Discounted sums of past rewards, g_t = gamma g_{t-1} + r_t, from 0 in each episode.

    Args: trace (num_envs,), gamma times which the first step continues; reward and done (num_steps, num_envs).
    Returns: the trace for the next call (num_envs,) and all g_t (num_steps, num_envs).
    """

    def step(trace, inputs):
        reward_t, done_t = inputs
        total = gamma * trace + reward_t
        return jnp.where(done_t, 0, total), total

    return lax.scan(step, trace, (reward, done))


class Batch(NamedTuple):
    """What the loss needs of each transition; leading axis batch_size."""

    obs: jax.Array  # normalised, (batch_size, obs_dim)
    action: jax.Array  # before squashing or clipping, (batch_size, action_dim)
    log_prob: jax.Array  # of the Gaussian, under the rollout's policy
    advantage: jax.Array
    value: jax.Array  # of the rollout's critic
    target: jax.Array
    weight: jax.Array  # in means over a minibatch; 0 for an auto-reset step


def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of x where valid is 1; 0 if it is nowhere."""
    return (x * valid).sum() / jnp.maximum(valid.sum(), 1)


def make_minibatches(batch: Batch, order: jax.Array, num_minibatches: int, norm_adv: bool) -> Batch:
    """Cut a batch, in the given order, into minibatches (num_minibatches, minibatch_size, ...).

    In each the weights are scaled to sum to 1 and, if norm_adv, the advantages to mean 0 and deviation 1.
    """
    batch = jax.tree.map(lambda x: x[order].reshape(num_minibatches, -1, *x.shape[1:]), batch)
    weight = batch.weight / jnp.maximum(batch.weight.sum(1, keepdims=True), 1)
    advantage = batch.advantage
    if norm_adv:
        centred = advantage - (advantage * weight).sum(1, keepdims=True)
        advantage = centred / (jnp.sqrt((centred**2 * weight).sum(1, keepdims=True)) + 1e-8)
    return batch._replace(weight=weight, advantage=advantage)


class LossMetrics(NamedTuple):
    """Scalar diagnostics of a minibatch."""

    policy_loss: jax.Array
    value_loss: jax.Array
    approx_kl: jax.Array  # E[ratio - 1 - log ratio], in nats
    clip_fraction: jax.Array


def ppo_loss(params: Any, batch: Batch, actor: Actor, critic: Critic, args: Any) -> tuple[jax.Array, LossMetrics]:
    """Clipped surrogate plus value loss (arXiv 1707.06347), a scalar to minimise, and its diagnostics.

    There is no entropy bonus: the entropy is in the reward, and here it would count twice. Means are sums with the
    batch's weights, so the losses of a minibatch's parts add up to that of the whole.
    """
    # Squashing changes both densities by the same Jacobian, which cancels in the ratio.
    log_ratio = gaussian_log_prob(batch.action, *actor.apply(params["actor"], batch.obs)) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -(jnp.minimum(batch.advantage * ratio, batch.advantage * clipped_ratio) * batch.weight).sum()

    value = critic.apply(params["critic"], batch.obs)
    squared_error = (value - batch.target) ** 2
    if args.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -args.clip_coef, args.clip_coef)
        squared_error = jnp.maximum(squared_error, (clipped_value - batch.target) ** 2)
    value_loss = 0.5 * (squared_error * batch.weight).sum()

    approx_kl = ((ratio - 1 - log_ratio) * batch.weight).sum()
    clip_fraction = ((jnp.abs(ratio - 1) > args.clip_coef) * batch.weight).sum()
    return policy_loss + args.vf_coef * value_loss, LossMetrics(policy_loss, value_loss, approx_kl, clip_fraction)


def entropy_bonus_loss(
    params: Any, batch: Batch, actor: Actor, critic: Critic, args: Any
) -> tuple[jax.Array, LossMetrics]:
    """ppo_loss with an entropy bonus, as in classical PPO.

    The entropy of a squashed policy, E[-log N(u) + log |det d tanh(u)/du|], is estimated at the batch's actions u =
    mean + std z, through which the gradient flows for fixed z.
    """
    loss, metrics = ppo_loss(params, batch, actor, critic, args)
    mean, log_std = actor.apply(params["actor"], batch.obs)
    entropy = (log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e)).sum()
    if args.squash:
        z = lax.stop_gradient((batch.action - mean) * jnp.exp(-log_std))
        entropy += tanh_log_det(mean + jnp.exp(log_std) * z)
    return loss - args.ent_coef * (entropy * batch.weight).sum(), metrics


# -------------------------------------------------------------------------------- add-on tasks


class AddonTask(NamedTuple):
    """An add-on reward and the quantity it is about."""

    env: str  # the environment it is for, without the version
    metric: str  # name of the quantity
    function: Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # next obs (..., obs_dim) -> reward, quantity (...)
    coef: float = 1.0


def half_cheetah_front_foot(obs):
    """Keep the front foot's joint straight: -10 |theta|, theta in rad."""
    angle = jnp.abs(obs[..., 7])
    return -10 * angle, angle


def hopper_height(obs):
    """Hop higher: 10 (z - 1), z the torso's height in m."""
    return 10 * (obs[..., 0] - 1), obs[..., 0]


def ant_right(obs):
    """Favour the right side: the torso's velocity along -y in m/s."""
    return -obs[..., 14], -obs[..., 14]


def swimmer_straight(obs):
    """Keep the first joint straight: -|theta|, theta in rad."""
    angle = jnp.abs(obs[..., 1])
    return -angle, angle


def walker_upright(obs):
    """Carry the torso upright: -10 |theta|, theta its pitch in rad."""
    angle = jnp.abs(obs[..., 1])
    return -10 * angle, angle


def humanoid_right(obs):
    """Favour the right side: the torso's velocity along -y in m/s."""
    return -obs[..., 23], -obs[..., 23]


def no_addon(obs):
    """Zero reward."""
    return jnp.zeros_like(obs[..., 0]), jnp.zeros_like(obs[..., 0])


# A task of your own is a function like these and a line here. An environment's first task is its default.
ADDON_TASKS = {
    "half-cheetah-front-foot": AddonTask("HalfCheetah", "|θ| (rad)", half_cheetah_front_foot),
    "hopper-height": AddonTask("Hopper", "z (m)", hopper_height),
    "ant-right": AddonTask("Ant", "-v_y (m/s)", ant_right),
    "swimmer-straight": AddonTask("Swimmer", "|θ| (rad)", swimmer_straight),
    "walker-upright": AddonTask("Walker2d", "|θ| (rad)", walker_upright),
    "humanoid-right": AddonTask("Humanoid", "-v_y (m/s)", humanoid_right),
    "none": AddonTask("", "–", no_addon),
}


def choose_addon(name: str | None, env_id: str, coef: float) -> AddonTask:
    """The named add-on task, or the environment's default; StopRun if there is none."""
    env = env_id.rpartition("-v")[0]
    choices = [key for key, task in ADDON_TASKS.items() if task.env == env] + ["none"]
    if name is None and len(choices) == 1:
        raise StopRun(f"{env_id} has no add-on task yet; add one to ADDON_TASKS, or give --addon none")
    if name is not None and name not in choices:
        raise StopRun(
            f"--addon {name} is no add-on task for {env_id}; choose from {', '.join(choices)}, or add your own"
        )
    return ADDON_TASKS[name or choices[0]]._replace(coef=coef)


# --------------------------------------------------------------------------------- environment


@dataclass(frozen=True, eq=False)
class Env:
    """A pool of EnvPool environments behind one pure step, to be compiled for the CPU backend."""

    pool: Any  # EnvPool's own object
    step: Callable  # handle, action (num_envs, action_dim) -> handle, obs, reward, terminated, truncated
    handle: np.ndarray  # EnvPool's token, threaded through the steps
    low: np.ndarray  # bounds of the action, (action_dim,)
    high: np.ndarray
    obs_dim: int
    action_dim: int


class EpisodeSums(NamedTuple):
    """Sums over the steps of an episode, each (num_envs,)."""

    basic: jax.Array
    addon: jax.Array
    metric: jax.Array
    length: jax.Array


class EnvState(NamedTuple):
    """The environments between two steps."""

    handle: jax.Array
    obs: jax.Array  # (num_envs, obs_dim)
    done: jax.Array  # the last step ended an episode, so the next one is EnvPool's auto-reset
    running: EpisodeSums  # of the episodes under way
    finished: EpisodeSums  # of each environment's last episode; NaN before there is one


class Transitions(NamedTuple):
    """A rollout; leading axes (num_steps, num_envs)."""

    obs: jax.Array  # before the step, not normalised
    action: jax.Array  # before squashing or clipping
    basic_reward: jax.Array
    addon_reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    valid: jax.Array  # false on auto-reset steps: they ignore the action and are no transitions


def make_env(env_id: str, num_envs: int, seed: int) -> Env:
    """Make the environments; StopRun unless env_id is a Gymnasium MuJoCo environment, v4 or v5, that EnvPool has."""
    specs = envpool.registration.registry.specs
    known = [name for name in specs if specs[name][0] == "envpool.mujoco.gym" and name.endswith(("-v4", "-v5"))]
    if env_id not in known:
        raise StopRun(f"{env_id!r} is no MuJoCo environment that --env-id can be: {', '.join(sorted(known))}")
    pool = envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, seed=seed)
    with jax.enable_x64(True):
        handle, _, _, xla_step = pool.xla()

    def step(handle, action):
        with jax.enable_x64(True):  # EnvPool's MuJoCo speaks float64
            handle, (obs, reward, terminated, truncated, _) = xla_step(handle, action.astype(jnp.float64))
            return handle, obs.astype(jnp.float32), reward.astype(jnp.float32), terminated, truncated

    low, high = (np.float32(bound) for bound in (pool.action_space.low, pool.action_space.high))
    return Env(pool, step, handle, low, high, *pool.observation_space.shape, *pool.action_space.shape)


def reset_env(env: Env) -> EnvState:
    """Reset all environments."""
    obs, _ = env.pool.reset()
    num_envs = len(obs)
    running, finished = (EpisodeSums(*[np.full(num_envs, x, np.float32) for _ in range(4)]) for x in (0, np.nan))
    state = EnvState(env.handle, obs.astype(np.float32), np.zeros(num_envs, bool), running, finished)
    return jax.device_put(state, jax.local_devices(backend="cpu")[0])


def env_action(action: jax.Array, low: np.ndarray, high: np.ndarray, squash: bool) -> jax.Array:
    """The action in the environment's units, within its bounds; (..., action_dim) -> the same."""
    return low + (jnp.tanh(action) + 1) / 2 * (high - low) if squash else jnp.clip(action, low, high)


def env_step(
    env: Env, addon: AddonTask, squash: bool, state: EnvState, action: jax.Array
) -> tuple[EnvState, Transitions]:
    """Step all environments; action (num_envs, action_dim) is before squashing or clipping."""
    valid = ~state.done
    handle, obs, basic_reward, terminated, truncated = env.step(
        state.handle, env_action(action, env.low, env.high, squash)
    )
    addon_reward, metric = (jnp.where(valid, x, 0) for x in addon.function(obs))
    addon_reward = addon.coef * addon_reward
    done = terminated | truncated
    sums = jax.tree.map(jnp.add, state.running, EpisodeSums(basic_reward, addon_reward, metric, valid))
    finished = jax.tree.map(lambda new, old: jnp.where(done, new, old), sums, state.finished)
    running = jax.tree.map(lambda x: jnp.where(done, 0, x), sums)
    transition = Transitions(state.obs, action, basic_reward, addon_reward, terminated, truncated, valid)
    return EnvState(handle, obs, done, running, finished), transition


# -------------------------------------------------------------------------- rollout and update


@partial(jax.jit, static_argnames=("env", "addon", "actor", "args"))
def rollout(
    env: Env, addon: AddonTask, actor: Actor, args: Any, policy: Policy, state: EnvState, iteration: int
) -> tuple[EnvState, Transitions]:
    """Act with sampled actions for args.num_steps steps."""

    def step(state, noise):
        mean, log_std = actor.apply(policy.params, normalise(state.obs, policy.obs_stats))
        return env_step(env, addon, args.squash, state, mean + jnp.exp(log_std) * noise)

    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), 2 * iteration)
    noise = jax.random.normal(key, (args.num_steps, args.num_envs, actor.action_dim))
    return lax.scan(step, state, jnp.split(noise, jax.process_count(), axis=1)[jax.process_index()])


class TrainState(NamedTuple):
    """What an iteration changes. Random keys follow from the seed and the iteration."""

    params: Any  # {"actor", "critic"}
    opt_state: optax.OptState
    obs_stats: RunningStats
    return_stats: RunningStats  # of the discounted returns; their deviation is the unit of the critic
    return_trace: jax.Array  # the discounted returns under way, (num_envs,)
    iteration: jax.Array


def across_devices(spec: P) -> NamedSharding:
    """A layout over all devices of all processes: split along the axis that is "data" in spec, else copied to each."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, spec)


def make_optimizer(args: Any) -> optax.GradientTransformation:
    """Adam on clipped gradients, yet without the learning rate, which follows the iteration.

    It sees all parameters as one vector: an eighth off the time of an update on a CPU.
    """
    return optax.flatten(optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5)))


@partial(jax.jit, static_argnames=("args", "actor", "critic", "obs_dim"))
def init_state(args: Any, actor: Actor, critic: Critic, obs_dim: int) -> TrainState:
    """The state before the first iteration."""
    actor_key, critic_key = jax.random.split(jax.random.PRNGKey(args.seed))
    obs = jnp.zeros(obs_dim)
    params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
    obs_stats = RunningStats(jnp.zeros(obs_dim), jnp.ones(obs_dim), jnp.float32(1e-4))
    return_stats = RunningStats(jnp.float32(0), jnp.float32(1), jnp.float32(1e-4))
    opt_state = make_optimizer(args).init(params)
    return TrainState(params, opt_state, obs_stats, return_stats, jnp.zeros(args.num_envs), jnp.int32(0))


def improve(
    actor: Actor, critic: Critic, loss: Callable, args: Any, state: TrainState, batch: Batch
) -> tuple[Any, optax.OptState, dict[str, jax.Array]]:
    """Pass over a batch for args.update_epochs epochs, or until args.target_kl, one gradient step a minibatch.

    Returns: parameters, state of the optimiser, and scalar metrics, means over the last epoch.
    """
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    learning_rate = args.learning_rate * (1 - state.iteration / num_iterations if args.anneal_lr else 1)

    @partial(jax.shard_map, mesh=across_devices(P()).mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    def gradient(params, minibatch):  # each device's part of the minibatch has its gradient, and they add up
        part = jax.grad(loss, has_aux=True)(params, minibatch, actor, critic, args)
        flat, unflatten = ravel_pytree(part)
        return unflatten(lax.psum(flat, "data"))  # one vector, as every message costs its delay

    def minibatch_step(carry, minibatch):
        params, opt_state = carry
        grads, metrics = gradient(params, minibatch)
        updates, opt_state = make_optimizer(args).update(grads, opt_state)
        return (jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt_state), metrics

    def epoch(carry):
        epochs_done, key, params, opt_state, _ = carry
        key, permutation_key = jax.random.split(key)
        # As jax.random.permutation, which sorts twice; a ninth off the time of an update.
        order = jnp.argsort(jax.random.bits(permutation_key, batch.weight.shape))
        minibatches = make_minibatches(batch, order, args.num_minibatches, args.norm_adv)
        (params, opt_state), metrics = lax.scan(minibatch_step, (params, opt_state), minibatches)
        return epochs_done + 1, key, params, opt_state, jax.tree.map(jnp.mean, metrics)

    def go_on(carry):
        near = True if args.target_kl is None else carry[-1].approx_kl <= args.target_kl
        return (carry[0] < args.update_epochs) & near

    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), 2 * state.iteration + 1)
    carry = (0, key, state.params, state.opt_state, LossMetrics(*jnp.zeros(4)))
    *_, params, opt_state, metrics = lax.while_loop(go_on, epoch, carry)
    return params, opt_state, metrics._asdict() | {"learning_rate": jnp.float32(learning_rate)}


def ppo_update(
    actor: Actor,
    critic: Critic,
    loss: Callable,
    args: Any,
    state: TrainState,
    transitions: Transitions,
    last_obs: jax.Array,
    reward: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Improve policy and critic by a rollout whose reward (num_steps, num_envs) is all that they are to maximise.

    Args: loss has the signature of ppo_loss; last_obs (num_envs, obs_dim) is what the rollout's last step returned.
    Returns: the state after the iteration, and scalar metrics.
    """
    obs = normalise(jnp.concatenate([transitions.obs, last_obs[None]]), state.obs_stats)
    value = critic.apply(state.params["critic"], obs)  # (num_steps + 1, num_envs)
    log_prob = gaussian_log_prob(transitions.action, *actor.apply(state.params["actor"], obs[:-1]))

    # One running scale for the whole reward keeps the proportions of its terms.
    reward = jnp.where(transitions.valid, reward, 0)
    terminated, truncated = transitions.terminated, transitions.truncated
    return_trace, returns = discounted_returns(state.return_trace, reward, terminated | truncated, args.gamma)
    return_stats = merge_stats(state.return_stats, returns, transitions.valid)
    reward_scale = jnp.sqrt(return_stats.var + 1e-8)
    advantage = gae(reward / reward_scale, value, terminated, truncated, args.gamma, args.gae_lambda)
    target = advantage + value[:-1]
    valid = transitions.valid.astype(jnp.float32)
    batch = Batch(obs[:-1], transitions.action, log_prob, advantage, value[:-1], target, valid)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    params, opt_state, metrics = improve(actor, critic, loss, args, state, batch)

    metrics |= {"reward_scale": reward_scale, "param_norm": optax.tree.norm(params)}
    obs_stats = merge_stats(state.obs_stats, transitions.obs, transitions.valid)
    state = TrainState(params, opt_state, obs_stats, return_stats, return_trace, state.iteration + 1)
    return lax.with_sharding_constraint((state, metrics), across_devices(P()))


@partial(jax.jit, static_argnames=("actor", "critic", "loss", "omega", "alpha", "args"))
def soft_update(
    actor: Actor,
    critic: Critic,
    loss: Callable,
    omega: float,
    alpha: float,
    args: Args,
    state: TrainState,
    transitions: Transitions,
    last_obs: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration of Soft PPO on the reward omega r + r_R."""
    policy = Policy(state.params["actor"], state.obs_stats)
    log_prob = policy_log_prob(actor, policy, args.squash, transitions.obs, transitions.action)
    reward = soft_reward(omega * transitions.basic_reward + transitions.addon_reward, log_prob, alpha)
    new_state, metrics = ppo_update(actor, critic, loss, args, state, transitions, last_obs, reward)
    return new_state, {"entropy": -masked_mean(log_prob, transitions.valid)} | metrics


# This was the algorithm. From here on: evaluation, files, logs, and the loop that calls it all.

# ---------------------------------------------------------------------------------- evaluation


@partial(jax.jit, static_argnames=("env", "addon", "actor", "squash"))
def first_episodes(
    env: Env,
    addon: AddonTask,
    actor: Actor,
    squash: bool,
    policy: Policy,
    state: EnvState,
    key: jax.Array,
    noise_scale: float,
) -> EpisodeSums:
    """Each environment's first episode after a reset, acting with noise_scale times the policy's deviation."""

    def step(carry):
        key, state = carry
        key, noise_key = jax.random.split(key)
        mean, log_std = actor.apply(policy.params, normalise(state.obs, policy.obs_stats))
        noise = noise_scale * jax.random.normal(noise_key, mean.shape)
        after, _ = env_step(env, addon, squash, state, mean + jnp.exp(log_std) * noise)
        first = jax.tree.map(lambda old, new: jnp.where(jnp.isnan(old), new, old), state.finished, after.finished)
        return key, after._replace(finished=first)

    return lax.while_loop(lambda carry: jnp.isnan(carry[1].finished.length).any(), step, (key, state))[1].finished


def evaluate(
    env: Env, addon: AddonTask, actor: Actor, squash: bool, policy: Policy, omega: float, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Play an episode in each environment with sampled actions, and one with deterministic actions.

    Returns: {"stochastic", "deterministic"} -> {"objective", "total", "basic", "addon", "metric", "length"} -> array
    (num_envs,); objective = omega basic + addon, total = basic + addon, metric is a mean over the episode's steps.
    """
    policy, key = jax.device_get((policy, jax.random.PRNGKey(seed)))  # to where the environments are
    results = {}
    for actions, noise_scale in (("stochastic", 1.0), ("deterministic", 0.0)):
        sums = first_episodes(env, addon, actor, squash, policy, reset_env(env), key, noise_scale)
        sums = EpisodeSums(*[np.asarray(x, np.float64) for x in sums])
        results[actions] = {
            "objective": omega * sums.basic + sums.addon,
            "total": sums.basic + sums.addon,
            "basic": sums.basic,
            "addon": sums.addon,
            "metric": sums.metric / sums.length,
            "length": sums.length,
        }
    return results


def evaluation_table(rows: dict[str, dict[str, dict[str, np.ndarray]]], metric: str) -> rich.table.Table:
    """A table, mean ± standard deviation over episodes, of {policy: result of evaluate}."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    results = {f"{policy}\n{actions}": columns for policy, row in rows.items() for actions, columns in row.items()}
    for header in results:
        table.add_column(header, justify="right", no_wrap=True)
    labels = {"objective": 0, "total": 0, "basic": 0, "addon": 0, "metric": 3, "length": 0}
    for name, digits in labels.items():
        cells = [f"{x[name].mean():.{digits}f} ± {x[name].std():.{digits}f}" for x in results.values()]
        table.add_row({"addon": "add-on", "metric": metric}.get(name, name), *cells)
    return table


# -------------------------------------------------------------------------------- policy files


def policy_tensors(actor: Actor, policy: Policy) -> dict[str, np.ndarray]:
    """A policy as float32 arrays, named and shaped as in the state dict of CleanRL's PyTorch agent (see README.md)."""
    policy = jax.device_get(policy)
    params = policy.params["params"]
    tensors = {"actor_logstd": params["log_std"], "obs_mean": policy.obs_stats.mean, "obs_var": policy.obs_stats.var}
    for i in range(len(actor.hidden_sizes) + 1):
        tensors[f"actor_mean.{2 * i}.weight"] = params[f"Dense_{i}"]["kernel"].T
        tensors[f"actor_mean.{2 * i}.bias"] = params[f"Dense_{i}"]["bias"]
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def policy_digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over all that a policy file says, to find damage."""
    digest = hashlib.sha256(json.dumps({**metadata, "sha256": ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()


def save_policy(path: Path, actor: Actor, policy: Policy, args: Any, alpha: float, results: dict) -> None:
    """Write a policy file (safetensors; described in README.md). Args: alpha, and evaluate's results, are recorded."""
    tensors = policy_tensors(actor, policy)
    metadata = {
        "format": "pt",
        "env_id": args.env_id,
        "squash": str(args.squash).lower(),
        "hidden_sizes": json.dumps(actor.hidden_sizes),
        "activation": "tanh",
        "alpha": str(alpha),
        "returns": ", ".join(f"{k} {x['basic'].mean():.0f} ± {x['basic'].std():.0f}" for k, x in results.items()),
        "training": json.dumps(provenance(args), default=str),
    }
    metadata["sha256"] = policy_digest(tensors, metadata)
    write_atomic(path, safetensors.numpy.save(tensors, metadata))


def load_policy(path: Path, env: Env, args: Any) -> tuple[Actor, Policy, dict[str, str]]:
    """Read a policy file: the network, its parameters with the normaliser, and the metadata.

    Raises: StopRun if the file is missing or damaged, or the policy is for another environment or of the other kind.
    """
    try:
        data = path.read_bytes()
        tensors = safetensors.numpy.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        return *parse_policy(tensors, metadata, env, args), metadata
    except FileNotFoundError:
        raise StopRun(f"there is no policy {path}; train one with train_prior_ppo.py, or name a file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise StopRun(f"the policy {path} cannot be used: {error}") from None


def parse_policy(tensors: dict, metadata: dict[str, str], env: Env, args: Any) -> tuple[Actor, Policy]:
    """Make a policy of a file's contents; ValueError says what is wrong with them."""
    tensors = {name: array for name, array in tensors.items() if not name.startswith("critic.")}
    required = {"env_id", "squash", "hidden_sizes", "activation"}
    optional = {"format", "alpha", "returns", "training", "sha256"}
    if wrong := (required - metadata.keys()) | (metadata.keys() - required - optional):
        raise ValueError(f"the metadata {sorted(wrong)} are missing or unknown")
    if metadata.get("sha256", digest := policy_digest(tensors, metadata)) != digest:
        raise ValueError("it is damaged (its sha256 does not match); copy or export it anew")
    if metadata["env_id"].rpartition("-v")[0] != args.env_id.rpartition("-v")[0]:
        raise ValueError(f"it is for {metadata['env_id']}, not {args.env_id}; change --env-id or the policy")
    if metadata["squash"] != str(args.squash).lower():
        flag = "--squash" if metadata["squash"] == "true" else "--no-squash"
        raise ValueError(f"it was made with squash = {metadata['squash']}; add {flag}, or take another policy")
    if metadata["activation"] != "tanh":
        raise ValueError(f"its activation is {metadata['activation']}, and only tanh is supported")
    if not 0 <= float(metadata.get("alpha", 0)) < np.inf:
        raise ValueError(f"its alpha is {metadata['alpha']}, which is no temperature")
    hidden_sizes = tuple(json.loads(metadata["hidden_sizes"]))
    if not all(type(size) is int and size > 0 for size in hidden_sizes):
        raise ValueError(f"its hidden_sizes are {metadata['hidden_sizes']}, not a list of widths")
    widths = (env.obs_dim, *hidden_sizes, env.action_dim)
    shapes = {"actor_logstd": widths[-1:], "obs_mean": widths[:1], "obs_var": widths[:1]}
    for i in range(len(widths) - 1):
        shapes |= {
            f"actor_mean.{2 * i}.weight": widths[i : i + 2][::-1],
            f"actor_mean.{2 * i}.bias": widths[i + 1 : i + 2],
        }
    if wrong := shapes.keys() ^ tensors.keys():
        raise ValueError(f"the tensors {sorted(wrong)} are missing or unknown")
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != np.float32:
            raise ValueError(f"{name} is {tensors[name].dtype} {tensors[name].shape}, not float32 {shape}")
        if not np.isfinite(tensors[name]).all() or (name == "obs_var" and (tensors[name] < 0).any()):
            raise ValueError(f"{name} has impossible entries (NaN, infinite, or a negative variance)")
    params = {"log_std": tensors["actor_logstd"]}
    for i in range(len(widths) - 1):
        kernel, bias = tensors[f"actor_mean.{2 * i}.weight"].T, tensors[f"actor_mean.{2 * i}.bias"]
        params[f"Dense_{i}"] = {"kernel": kernel, "bias": bias}
    policy = Policy({"params": params}, RunningStats(tensors["obs_mean"], tensors["obs_var"], np.float32(1)))
    return Actor(env.action_dim, hidden_sizes), jax.tree.map(jnp.asarray, policy)


# ------------------------------------------------------------------------- run folders and logs


CONSOLE = rich.console.Console(highlight=False, soft_wrap=True)
CLUSTER_ARGS = ("coordinator_address", "num_processes", "process_id")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file such that a crash leaves the old one or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_args(args: Any) -> None:
    """StopRun if flags cannot work, alone or together."""
    at_least_1 = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_episodes", "num_evals")
    above_0 = ("learning_rate", "max_grad_norm", "clip_coef")
    up_to_1 = ("gamma", "gae_lambda")
    any_sign = ("addon_coef",)
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} is {value}; it must"
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not np.isfinite(value):
            raise StopRun(f"{flag} be a finite number")
        if value < 0 and name not in any_sign:
            raise StopRun(f"{flag} not be negative")
        if (name in at_least_1 or name in above_0) and value == 0:
            raise StopRun(f"{flag} be above 0")
        if name in up_to_1 and value > 1:
            raise StopRun(f"{flag} not be above 1")
    if args.seed >= 2**30:
        raise StopRun(f"--seed is {args.seed}; it must be below 2^30")
    if min(args.hidden_sizes or (1,)) < 1:
        raise StopRun(f"--hidden-sizes is {args.hidden_sizes}; every layer needs at least 1 unit")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        split = f"--num-minibatches {args.num_minibatches} does not divide the {batch_size} steps of an iteration"
        raise StopRun(f"{split} (--num-envs {args.num_envs} times --num-steps {args.num_steps}); choose a divisor")
    devices = jax.device_count()
    if args.num_envs % devices:
        raise StopRun(f"--num-envs {args.num_envs} cannot be split among {devices} devices; choose a multiple")
    if batch_size // args.num_minibatches % devices:
        split = f"a minibatch of {batch_size // args.num_minibatches} steps cannot be split among {devices} devices"
        raise StopRun(f"{split}; change --num-envs, --num-steps or --num-minibatches")
    if args.total_timesteps < batch_size:
        raise StopRun(f"--total-timesteps {args.total_timesteps} is less than one iteration, {batch_size} steps")


def provenance(args: Any) -> dict[str, Any]:
    """The arguments, and what else results depend on."""
    git = subprocess.run(
        ["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    packages = ("jax", "flax", "optax", "envpool", "gymnasium", "mujoco", "numpy")
    return {
        "command": " ".join(sys.argv),
        "args": dataclasses.asdict(args),
        "git_commit": git.stdout.strip() or None,
        "packages": {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
    }


def create_run(args: Any) -> Path:
    """Create the run's folder, never one that exists, with args.json; StopRun if it cannot be written."""
    try:
        while True:
            run_dir = args.runs_dir / f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
            if jax.process_index() > 0:  # process 0 writes
                return run_dir
            try:
                run_dir.mkdir(parents=True)
                break
            except FileExistsError:  # another run began in this second
                time.sleep(1)
        write_atomic(run_dir / "args.json", json.dumps(provenance(args), indent=2, default=str).encode())
    except OSError as error:
        raise StopRun(f"cannot write to --runs-dir {args.runs_dir}: {error.strerror}") from None
    return run_dir


def prepare(args: Any) -> Any:
    """The arguments to go by, checked: with --resume those that the run was started with."""
    # JAX's warning of os.fork() is about forks without exec, and Gymnasium's about v4 is known to who chose v4.
    warnings.filterwarnings("ignore", message=r".*(os\.fork\(\)|is out of date)")
    join_processes(args)
    args = resume_args(args) if args.resume else args
    check_args(args)
    if args.track and importlib.util.find_spec("wandb") is None:
        raise StopRun("--track needs Weights & Biases; install it with: pip install wandb")
    return args


def join_processes(args: Any) -> None:
    """Meet the other processes of a --distributed run; StopRun if they do not come, or have other flags."""
    cluster = {name: getattr(args, name) for name in CLUSTER_ARGS}
    if not args.distributed:
        if any(value is not None for value in cluster.values()):
            raise StopRun("--coordinator-address, --num-processes and --process-id need --distributed")
        return
    how = "give --coordinator-address HOST:PORT, --num-processes and --process-id, or start by SLURM or Open MPI"
    if not re.fullmatch(r".+:\d+", args.coordinator_address or "host:1"):
        raise StopRun(f"--coordinator-address {args.coordinator_address} names no port; {how}")
    CONSOLE.print("waiting for the other processes ...")
    try:
        jax.distributed.initialize(**cluster)
    except (RuntimeError, ValueError) as error:
        raise StopRun(f"the processes cannot meet: {error}; {how}") from None
    CONSOLE.quiet = jax.process_index() > 0
    flags = str({name: value for name, value in vars(args).items() if name not in CLUSTER_ARGS})
    digests = jax.experimental.multihost_utils.process_allgather(np.uint32(zlib.crc32(flags.encode())))
    if (digests != digests[0]).any():
        raise StopRun("the processes were started with different flags; start all with the same, but for --process-id")


def resume_args(args: Any) -> Any:
    """The arguments of the run to resume; StopRun if there is none, it is complete, or other flags were given."""
    cluster = {name: getattr(args, name) for name in ("distributed", *CLUSTER_ARGS)}
    if args != type(args)(resume=args.resume, **cluster):
        raise StopRun("--resume takes no other flag: the run goes on with the arguments it was started with")
    try:
        saved = json.loads((args.resume / "args.json").read_text())["args"]
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        paths = {name: Path(saved[name]) for name in ("runs_dir", "prior", "export") if saved.get(name)}
        resumed = type(args)(**(saved | paths | cluster | {"resume": args.resume}))
        check_args(resumed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StopRun(f"{args.resume} holds no run of {Path(__file__).name} to resume: {error}") from None
    if (args.resume / "eval.json").exists():
        raise StopRun(f"the run {args.resume} is complete; start a new one")
    return resumed


def save_checkpoint(run_dir: Path, state: TrainState) -> None:
    """Write a run's state."""
    if jax.process_index() == 0:
        write_atomic(run_dir / "checkpoint.msgpack", flax.serialization.to_bytes(jax.device_get(state)))


def load_checkpoint(run_dir: Path, template: TrainState) -> TrainState:
    """Read a run's state, shaped like the template; StopRun if that fails."""
    try:
        state = flax.serialization.from_bytes(template, (run_dir / "checkpoint.msgpack").read_bytes())
        if jax.tree.map(jax.typeof, state) != jax.tree.map(jax.typeof, template):
            raise ValueError("its arrays have other shapes or types")
    except Exception as error:  # a damaged file can fail in any way
        raise StopRun(f"the checkpoint in {run_dir} cannot be used: {error}; start a new run") from None
    return jax.tree.map(jnp.asarray, state)


class RunLog:
    """Metrics of a run: to metrics.csv, TensorBoard, Weights & Biases with --track, and the terminal."""

    def __init__(self, run_dir: Path, args: Any, global_step: int):
        """Go on from global_step; rows that an interrupted run wrote after its checkpoint are dropped."""
        path = run_dir / "metrics.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
        rows = rows[:1] + [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= global_step]
        write_atomic(path, "".join(",".join(row) + "\n" for row in rows).encode())
        self.csv = path.open("a", buffering=1)
        self.tensorboard = tensorboardX.SummaryWriter(str(run_dir), purge_step=global_step)
        self.wandb = None
        if args.track:
            import wandb

            where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
            self.wandb = wandb.init(**where, id=run_dir.name, resume="allow", config=vars(args))
        batch_size = args.num_envs * args.num_steps
        self.total = args.total_timesteps // batch_size * batch_size
        self.first_step, self.start = global_step, time.time()
        self.elapsed_before = float(rows[-1][1]) if len(rows) > 1 else 0.0
        self.compile_time = self.next_report = self.next_line = 0.0
        self.live = args.progress and CONSOLE.is_terminal
        columns = ["{task.percentage:3.0f}%", rich.progress.TimeRemainingColumn(compact=True), "{task.description}"]
        if CONSOLE.width >= 100:
            columns.insert(0, rich.progress.BarColumn(20))
        self.bar = rich.progress.Progress(*columns, console=CONSOLE, refresh_per_second=2)
        self.task = self.bar.add_task("compiling", total=self.total, completed=global_step)
        if self.live:
            self.bar.start()

    def close(self) -> None:
        """Finish all logs."""
        self.bar.stop()
        self.csv.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def write(self, global_step: int, metrics: dict[str, float]) -> None:
        """Log an iteration: a row always, the rest about every second, a plain line every ten, and all at the end."""
        elapsed = time.time() - self.start
        speed = (global_step - self.first_step) / (elapsed - self.compile_time)
        row = {
            "global_step": str(global_step),
            "elapsed_s": f"{self.elapsed_before + elapsed:.3f}",
            "steps_per_s": f"{speed:.0f}",
        }
        row |= {name: f"{value:.6g}" for name, value in metrics.items()}
        if not self.csv.tell():
            self.csv.write(",".join(row) + "\n")
        self.csv.write(",".join(row.values()) + "\n")
        if not self.compile_time:  # the first iteration is mostly compilation: it does not count for the speed
            self.compile_time, self.first_step, self.next_report = elapsed, global_step, elapsed + 1e-9
        if elapsed < self.next_report and global_step < self.total:
            return
        self.next_report = elapsed + 1
        metrics = {name: value for name, value in metrics.items() if np.isfinite(value)}
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, global_step)
        if self.wandb:
            self.wandb.log(metrics, step=global_step)
        shown = {"basic_return": "basic", "addon_return": "add-on", "total_return": "total"}
        shown |= {"kl_to_prior": "KL", "entropy": "entropy"}
        values = [f"{label} {metrics[name]:.4g}" for name, label in shown.items() if name in metrics]
        text = " ".join([f"{speed:,.0f} steps/s", *values])
        if self.live:
            self.bar.update(self.task, completed=global_step, description=text)
        elif elapsed >= self.next_line or global_step >= self.total:
            self.next_line = elapsed + 10
            left = (self.total - global_step) / speed
            print(f"{global_step / self.total:4.0%}  {left:5.0f} s left  {text}", flush=True)


def plot_learning_curve(run_dir: Path) -> None:
    """Draw metrics.csv into learning_curve.png."""
    import matplotlib.figure

    data = np.atleast_1d(np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True))
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    curves = (("basic_return", "addon_return", "total_return"), ("entropy", "kl_to_prior"))
    for axes, names in zip(figure.subplots(1, 2), curves, strict=True):
        for name in names:
            if name in data.dtype.names:
                axes.plot(data["global_step"], data[name], label=name.replace("_", " "))
        axes.set_xlabel("environment steps")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.suptitle(run_dir.name)
    figure.savefig(run_dir / "learning_curve.png", dpi=120)


def open_renderer(env_id: str) -> Any:
    """Gymnasium's environment, able to draw; StopRun if nothing can be drawn on this machine."""
    import gymnasium

    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        renderer = gymnasium.make(env_id, render_mode="rgb_array")
        renderer.reset()
        renderer.render()
    except Exception as error:  # every drawing library fails in its own way
        raise StopRun(
            f"--capture-video cannot draw ({error}); without a display, install EGL: apt-get install libegl1"
        ) from None
    return renderer


def record_video(renderer: Any, env: Env, actor: Actor, squash: bool, policy: Policy, path: Path) -> None:
    """Record an episode with deterministic actions, in Gymnasium's environment, to an mp4 file."""
    import imageio

    act = jax.jit(lambda obs: actor.apply(policy.params, normalise(obs, policy.obs_stats))[0])
    (obs, _), done = renderer.reset(), False
    with imageio.get_writer(path, fps=renderer.metadata["render_fps"]) as video:
        while not done:
            video.append_data(renderer.render())
            action = np.asarray(env_action(act(obs.astype(np.float32)), env.low, env.high, squash))
            obs, _, terminated, truncated, _ = renderer.step(action)
            done = terminated or truncated


# ---------------------------------------------------------------------------------------- main


def train(
    env: Env,
    addon: AddonTask,
    actor: Actor,
    update: Callable,
    args: Any,
    state: TrainState,
    run_dir: Path,
    after: Callable = lambda state: None,
) -> TrainState:
    """Alternate rollouts and updates for the whole budget; StopRun on Ctrl-C, and when numbers stop being finite.

    However it ends, the last state is in the run folder.

    Args: update maps (state, transitions, last_obs) to (state, metrics); after is called with each new state.
    """
    batch_size = args.num_envs * args.num_steps
    env_state, state = reset_env(env), jax.device_put(state, across_devices(P()))
    save_checkpoint(run_dir, state)
    saved_at = time.time()
    log = RunLog(run_dir, args, int(state.iteration) * batch_size) if jax.process_index() == 0 else None
    interrupted = False

    def interrupt(*_):  # the first Ctrl-C ends the run after the iteration under way, a second one at once
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    try:
        for iteration in range(int(state.iteration), args.total_timesteps // batch_size):
            policy = jax.device_get(Policy(state.params["actor"], state.obs_stats))
            env_state, transitions = rollout(env, addon, actor, args, policy, env_state, iteration)
            transitions = jax.make_array_from_process_local_data(across_devices(P(None, "data")), transitions)
            last = env_state.obs, env_state.finished
            last_obs, finished = jax.make_array_from_process_local_data(across_devices(P("data")), last)
            new_state, metrics = update(state, transitions, last_obs)
            metrics, returns = jax.device_get((metrics, episode_metrics(finished)))
            if bad := [name for name, value in metrics.items() if not np.isfinite(value)]:
                where = f"in iteration {iteration + 1}; the state before it is in {run_dir}"
                raise StopRun(f"{', '.join(bad)} not finite {where}; try a lower --learning-rate", exit_code=1)
            state = new_state
            if log:
                log.write((iteration + 1) * batch_size, returns | metrics)
            after(state)
            if interrupted:
                raise StopRun(f"interrupted; continue with: python {sys.argv[0]} --resume {run_dir}", exit_code=130)
            if time.time() - saved_at >= args.checkpoint_interval:
                save_checkpoint(run_dir, state)
                saved_at = time.time()
    finally:
        save_checkpoint(run_dir, state)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if log:
            log.close()
    return state


@jax.jit
def episode_metrics(finished: EpisodeSums) -> dict[str, jax.Array]:
    """Means over the environments' last episodes; NaN before there is one."""
    basic, addon, metric, length = (jnp.nanmean(x) for x in finished)
    returns = {"basic_return": basic, "addon_return": addon, "total_return": basic + addon}
    return returns | {"addon_metric": metric / length, "episode_length": length}


def finish_run(
    run_dir: Path, env: Env, addon: AddonTask, actor: Actor, policy: Policy, args: Any, rows: dict, renderer: Any
) -> None:
    """Draw, record, and write the evaluation, with which the run counts as complete; then show it."""
    plot_learning_curve(run_dir)
    if renderer:
        record_video(renderer, env, actor, args.squash, policy, run_dir / "video.mp4")
    content = {
        name: {
            "mean": jax.tree.map(np.mean, results),
            "std": jax.tree.map(np.std, results),
            "episodes": jax.tree.map(np.ndarray.tolist, results),
        }
        for name, results in rows.items()
    }
    write_atomic(run_dir / "eval.json", json.dumps(content, indent=1).encode())
    CONSOLE.print(evaluation_table(rows, addon.metric))
    CONSOLE.print(f"the policy, its metrics and curves are in {run_dir}")


def main(args: Args) -> None:
    """Train a policy by Soft PPO, or by one of the treatments of entropy that it is compared with."""
    args = prepare(args)
    num_envs = args.num_envs // jax.process_count()
    env = make_env(args.env_id, num_envs, args.seed + jax.process_index() * num_envs)
    addon = choose_addon(args.addon, args.env_id, args.addon_coef)
    actor, critic = Actor(env.action_dim, args.hidden_sizes), Critic(args.hidden_sizes)
    state = init_state(args, actor, critic, env.obs_dim)
    if args.resume:
        state = load_checkpoint(args.resume, state)
    eval_env = make_env(args.env_id, args.eval_episodes, args.seed + args.num_envs)
    renderer = open_renderer(args.env_id) if args.capture_video else None
    run_dir = args.resume or create_run(args)
    alpha = args.alpha if args.entropy in ("soft", "repeat") else 0.0
    loss = entropy_bonus_loss if args.entropy in ("bonus", "repeat") else ppo_loss
    CONSOLE.print(f"[bold]Soft PPO[/bold] on {args.env_id}, {jax.devices()[0].device_kind}, run folder {run_dir}")
    CONSOLE.print(f"add-on   {addon.coef:g} x ({addon.function.__doc__})")
    CONSOLE.print(f"weights  omega = {args.omega:g}, alpha = {alpha:g}, entropy: {args.entropy}")

    update = partial(soft_update, actor, critic, loss, args.omega, alpha, args)
    state = train(env, addon, actor, update, args, state, run_dir)
    if jax.process_index() > 0:
        return

    policy = Policy(state.params["actor"], state.obs_stats)
    rows = {"policy": evaluate(eval_env, addon, actor, args.squash, policy, args.omega, args.seed)}
    save_policy(run_dir / "policy.safetensors", actor, policy, args, alpha, rows["policy"])
    finish_run(run_dir, env, addon, actor, policy, args, rows, renderer)


def stop(message: str, exit_code: int) -> None:
    """End this process with one line."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(exit_code)  # sys.exit would wait for the other processes, which may be gone
    sys.exit(exit_code)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except StopRun as error:
        stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not jax.distributed.is_initialized():
            raise
        stop(f"lost another process ({error}); continue with --resume once all are back", 1)
