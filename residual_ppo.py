# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.5", "numpy>=2.0", "envpool>=1.2.5", "gymnasium>=1.1",
#   "tyro>=0.9", "rich>=13.9", "safetensors>=0.5", "tensorboardX>=2.6.2", "matplotlib>=3.10",
# ]
# ///
"""Residual PPO: customise a trained policy with an add-on reward, knowing of it only its log-probability.

If the prior pi is soft-optimal for a basic reward r at temperature alpha, then alpha log pi(a|s) = Q*(s,a) - V*(s), and
omega r equals omega' log pi, omega' = omega alpha, up to potential-based shaping, which changes no optimal policy.  So
the soft-optimal policy of omega r + r_R at temperature alpha_hat is found without r, by an ordinary policy gradient on

    r_RPG(s,a) = r_R(s,a) + omega' log pi(a|s) - alpha_hat log pi_theta(a|s),

with no entropy bonus in the loss.  omega' = alpha_hat = beta is the KL-regularised objective of RLHF; omega' = 0
forgets the prior.  Residual Policy Gradient, arXiv 2503.11019; Residual Q-Learning, arXiv 2306.09526.  A trained prior
does not know what the end of an episode costs: that is a term of its own (termination_reward).

    python residual_ppo.py --env-id Ant-v4 --omega 0.5

In this order: flags; policy and critic; mathematics; add-on tasks and environment; rollout and update; train and main.
Then what is not the algorithm: defaults and checks; evaluation; policy files; run folder and logs; command line and
processes.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import envpool
import flax
import flax.linen as nn
import jax
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
from jax import NamedSharding, P, lax
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree


@dataclasses.dataclass(frozen=True)
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
    eval_episodes: int = 20
    """episodes of the final evaluation, with sampled and again with deterministic actions"""
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
    total_timesteps: int = 500_000
    """environment steps of the whole training, all environments together"""
    addon: str | None = None
    """add-on task r_R, "none" for a zero reward; if not given, the environment's own"""
    addon_coef: float = 1.0
    """factor on the add-on reward"""

    # customisation; the customised policy has the prior's form
    prior: Path | None = None
    """the prior's policy file; if not given, priors/<env-id>.safetensors here or beside this script"""
    omega: float | None = None
    """weight of the basic task in the objective; sets omega' = 3 omega alpha and the survival term; if not given, 1"""
    omega_prime: float | None = None
    """weight of log pi, in units of reward per nat, instead of --omega's; the survival reward is then 0 unless given"""
    alpha_hat: float | None = None
    """temperature of the customised policy, in units of reward per nat; if not given, a third of the prior's alpha"""
    survival_reward: float | None = None
    """reward per step, times omega, that an end forgoes; if not given, the prior's file's; 0: the paper's objective"""
    init_from_prior: bool = True
    """start as the prior, whose frozen normaliser is kept; the critic starts fresh in any case"""
    hidden_sizes: tuple[int, ...] | None = None
    """widths of the hidden layers of policy and critic; if not given, the prior's"""

    # PPO
    num_steps: int = 32
    """steps per environment between two updates"""
    learning_rate: float = 3e-4
    """learning rate of Adam; the narrower the prior's Gaussian, the smaller it must be"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over the run"""
    gamma: float | None = None
    """discount; if not given, the prior's, with which log pi equals its reward up to shaping, but at most 0.99"""
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


# -------------------------------------------------------------------------- policy and critic


class RunningStats(NamedTuple):
    """Mean, variance and number of the data seen so far."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


class Actor(nn.Module):
    """Diagonal Gaussian over actions u before squashing or clipping; its parameters are named as in a policy file.

    The action is tanh(u), stretched from [-1, 1] to the environment's bounds, if squash, else u, clipped to them.
    """

    action_dim: int
    hidden_sizes: tuple[int, ...]
    activation: str = "tanh"
    state_dependent_std: bool = False
    squash: bool = True
    obs_clip: float = 10.0  # bound on normalised observations

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map normalised observations (..., obs_dim) to mean (..., action_dim) and log_std, which broadcasts to it."""
        x = hidden_layers(obs, "actor_mean", self.hidden_sizes, self.activation)
        last = partial(nn.Dense, self.action_dim, kernel_init=nn.initializers.orthogonal(0.01))
        mean = last(name=f"actor_mean.{2 * len(self.hidden_sizes)}")(x)
        if self.state_dependent_std:
            return mean, jnp.clip(last(name="actor_logstd")(x), -20, 2)  # the clip of Stable-Baselines3's SAC
        return mean, self.param("actor_logstd", nn.initializers.zeros, (self.action_dim,))


class Critic(nn.Module):
    """Soft state value, in units of the scaled reward."""

    hidden_sizes: tuple[int, ...]
    activation: str = "tanh"

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        """Map normalised observations (..., obs_dim) to values (...)."""
        x = hidden_layers(obs, "critic", self.hidden_sizes, self.activation)
        last = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0), name=f"critic.{2 * len(self.hidden_sizes)}")
        return last(x)[..., 0]


def hidden_layers(x: jax.Array, name: str, sizes: tuple[int, ...], activation: str) -> jax.Array:
    """The hidden layers of a network, named as those of a torch.nn.Sequential; (..., inputs) -> (..., sizes[-1])."""
    for i, size in enumerate(sizes):
        x = nn.Dense(size, kernel_init=nn.initializers.orthogonal(2**0.5), name=f"{name}.{2 * i}")(x)
        x = {"tanh": nn.tanh, "relu": nn.relu}[activation](x)
    return x


@flax.struct.dataclass
class Policy:
    """All that acting needs: parameters of an Actor, and the normaliser of its observations."""

    params: Any
    obs_stats: RunningStats
    actor: Actor = flax.struct.field(pytree_node=False)


def normalise(obs: jax.Array, stats: RunningStats, obs_clip: float) -> jax.Array:
    """Observations (..., obs_dim) with zero mean and unit variance, clipped to [-obs_clip, obs_clip]."""
    return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-8), -obs_clip, obs_clip)


def action_distribution(policy: Policy, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log_std of the action before squashing or clipping, given observations that are not normalised."""
    return policy.actor.apply(policy.params, normalise(obs, policy.obs_stats, policy.actor.obs_clip))


def gaussian_log_prob(action: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """log N(action; mean, exp(log_std)^2), summed over the last axis; (..., action_dim) -> (...), in nats."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * z**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def tanh_log_det(action: jax.Array) -> jax.Array:
    """log |det d tanh(u)/du| at u = action, (..., action_dim) -> (...), in a form exact also where tanh saturates."""
    return (2 * (jnp.log(2.0) - action - jax.nn.softplus(-2 * action))).sum(-1)


def policy_log_prob(policy: Policy, obs: jax.Array, action: jax.Array) -> jax.Array:
    """log pi(a|s) in nats, the action given before squashing or clipping; (..., obs_dim), (..., action_dim) -> (...).

    A squashed policy's density is that of a = tanh(u) in [-1, 1]^action_dim.
    """
    log_prob = gaussian_log_prob(action, *action_distribution(policy, obs))
    return log_prob - tanh_log_det(action) if policy.actor.squash else log_prob


def merge_stats(stats: RunningStats, data: jax.Array, valid: jax.Array) -> RunningStats:
    """Statistics after also seeing data (..., *shape) where valid (...) is true, by Chan's parallel update (1983)."""
    axes = tuple(range(valid.ndim))
    seen = valid.reshape(valid.shape + (1,) * (data.ndim - valid.ndim))
    count = valid.sum().astype(data.dtype)
    mean = jnp.where(seen, data, 0).sum(axes) / jnp.maximum(count, 1)
    var = jnp.where(seen, (data - mean) ** 2, 0).sum(axes) / jnp.maximum(count, 1)
    total = stats.count + count
    delta = mean - stats.mean
    var = (stats.var * stats.count + var * count + delta**2 * stats.count * count / total) / total
    return RunningStats(stats.mean + delta * count / total, var, total)


# -------------------------------------------------------------------------------- mathematics


def residual_reward(
    addon_reward: jax.Array, prior_log_prob: jax.Array, log_prob: jax.Array, omega_prime: float, alpha_hat: float
) -> jax.Array:
    """r_R + omega' log pi(a|s) - alpha_hat log pi_theta(a|s), of any equal shapes (arXiv 2503.11019).

    The log-probabilities are numbers here, not something to differentiate: E[grad log pi_theta] = 0 removes that term
    from the gradient of the maximum-entropy objective.
    """
    return addon_reward + lax.stop_gradient(omega_prime * prior_log_prob - alpha_hat * log_prob)


def termination_reward(terminated: jax.Array, survival_reward: float, gamma: float) -> jax.Array:
    """-gamma c / (1 - gamma) where an episode terminates, else 0: up to a constant return the same as c on every step.

    c = mean r - alpha mean log pi = (1 - gamma) mean V* under the prior: the value that an end forgoes (README.md).
    """
    return jnp.where(terminated, -gamma * survival_reward / ((1 - gamma) or 1), 0.0)  # with gamma = 1, c is 0


def discounted_sum(start: jax.Array, x: jax.Array, decay: jax.Array, reverse: bool = False) -> jax.Array:
    """y_t = x_t + decay_t y_{t-1} from y_{-1} = start (num_envs,), or in reverse; (num_steps, num_envs) -> the same."""

    def step(y, x_and_decay):
        y = x_and_decay[0] + x_and_decay[1] * y
        return y, y

    return lax.scan(step, start, (x, decay), reverse=reverse)[1]


def gae(
    reward: jax.Array, value: jax.Array, terminated: jax.Array, truncated: jax.Array, gamma: float, gae_lambda: float
) -> jax.Array:
    """Advantages by generalised advantage estimation (arXiv 1506.02438); all (num_steps, num_envs), value a row more.

    value[t] is of the observation before step t, value[t + 1] of what step t returned. A terminated episode has no
    future value; a truncated one is bootstrapped from the value of its last observation, without which the shaping
    hidden in log pi would not cancel. Entries of auto-reset steps are meaningless.
    """
    delta = reward + gamma * jnp.where(terminated, 0, value[1:]) - value[:-1]
    decay = gamma * gae_lambda * (1 - (terminated | truncated))
    return discounted_sum(jnp.zeros_like(delta[0]), delta, decay, reverse=True)


class Batch(NamedTuple):
    """What the loss needs of each transition; leading axis batch_size."""

    obs: jax.Array  # normalised, (batch_size, obs_dim)
    action: jax.Array  # before squashing or clipping, (batch_size, action_dim)
    log_prob: jax.Array  # of the Gaussian, under the rollout's policy
    advantage: jax.Array
    value: jax.Array  # of the rollout's critic
    target: jax.Array
    valid: jax.Array  # false on an auto-reset step


def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of x where valid is true; 0 if it is nowhere."""
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)


def make_minibatches(batch: Batch, order: jax.Array, num_minibatches: int, norm_adv: bool) -> tuple[Batch, jax.Array]:
    """Cut a batch, in the given order, into minibatches (num_minibatches, minibatch_size, ...), and weigh transitions.

    The weights of a minibatch sum to 1, those of auto-reset steps are 0; norm_adv: its advantages get mean 0, std 1.
    """
    batch = jax.tree.map(lambda x: x[order].reshape(num_minibatches, -1, *x.shape[1:]), batch)
    weight = batch.valid / jnp.maximum(batch.valid.sum(1, keepdims=True), 1).astype(batch.advantage.dtype)
    advantage = jnp.where(batch.valid, batch.advantage, 0)
    if norm_adv:
        centred = advantage - (advantage * weight).sum(1, keepdims=True)
        advantage = centred / (jnp.sqrt((centred**2 * weight).sum(1, keepdims=True)) + 1e-8)
    return batch._replace(advantage=advantage), weight


def ppo_loss(
    params: Any, batch: Batch, weight: jax.Array, actor: Actor, critic: Critic, args: Args
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate plus value loss (arXiv 1707.06347), a scalar to minimise, and its diagnostics.

    There is no entropy bonus: the entropy is in the reward, and here it would count twice. The losses of a minibatch's
    parts, their weights being those of make_minibatches, add up to that of the whole.
    """
    # Squashing changes both densities by the same Jacobian, which cancels in the ratio.
    log_ratio = gaussian_log_prob(batch.action, *actor.apply(params["actor"], batch.obs)) - batch.log_prob
    log_ratio = jnp.where(batch.valid, log_ratio, 0)  # before exp: times 0, an infinite ratio would still be NaN
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -(jnp.minimum(batch.advantage * ratio, batch.advantage * clipped_ratio) * weight).sum()

    value = critic.apply(params["critic"], batch.obs)
    error = value - batch.target
    if args.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -args.clip_coef, args.clip_coef)
        error = jnp.maximum(jnp.abs(error), jnp.abs(clipped_value - batch.target))
    value_loss = 0.5 * (jnp.where(batch.valid, error, 0) ** 2 * weight).sum()
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss}
    metrics["approx_kl"] = ((ratio - 1 - log_ratio) * weight).sum()  # E[ratio - 1 - log ratio], in nats
    metrics["clip_fraction"] = ((jnp.abs(ratio - 1) > args.clip_coef) * weight).sum()
    return policy_loss + args.vf_coef * value_loss, metrics


# --------------------------------------------------------------- add-on tasks and environment


class AddonTask(NamedTuple):
    """An add-on reward, and the quantity of which it is a function, known from the observation that a step returns."""

    env: str  # the environment it is for, without the version
    label: str  # the quantity's name and unit
    quantity: Callable  # obs (..., obs_dim) -> (...)
    reward: Callable  # quantity (...) -> (...)
    coef: float = 1.0


# A task of your own is a line here. An environment's first task is its default.
ADDON_TASKS = {
    "half-cheetah-front-foot": AddonTask("HalfCheetah", "|θ| (rad)", lambda obs: abs(obs[..., 7]), lambda x: -10 * x),
    "hopper-height": AddonTask("Hopper", "z (m)", lambda obs: obs[..., 0], lambda z: 10 * (z - 1)),
    "ant-right": AddonTask("Ant", "-v_y (m/s)", lambda obs: -obs[..., 14], lambda v: v),
    "swimmer-straight": AddonTask("Swimmer", "|θ| (rad)", lambda obs: abs(obs[..., 1]), lambda x: -0.5 * x),
    "walker-upright": AddonTask("Walker2d", "|θ| (rad)", lambda obs: abs(obs[..., 1]), lambda x: -10 * x),
    "humanoid-right": AddonTask("Humanoid", "-v_y (m/s)", lambda obs: -obs[..., 23], lambda v: v),
    "none": AddonTask("", "–", lambda obs: 0 * obs[..., 0], lambda x: x),
}


class EnvState(NamedTuple):
    """The environments between two steps."""

    handle: jax.Array  # EnvPool's token, threaded through the steps
    obs: jax.Array  # (num_envs, obs_dim)
    done: jax.Array  # the last step ended an episode, so the next one is EnvPool's auto-reset
    running: dict[str, jax.Array]  # sums over the episodes under way: basic, addon, quantity, length, each (num_envs,)
    finished: dict[str, jax.Array]  # those of each environment's last episode; NaN before there is one


class Transitions(NamedTuple):
    """A rollout; leading axes (num_steps, num_envs)."""

    obs: jax.Array  # before the step, not normalised; a rollout's has num_steps + 1 rows, the last one what came last
    action: jax.Array  # before squashing or clipping
    basic_reward: jax.Array
    addon_reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    valid: jax.Array  # false on auto-reset steps: they ignore the action and are no transitions


class Env(NamedTuple):
    """EnvPool environments with an add-on task; to be compiled for the CPU backend."""

    reset: Callable  # () -> EnvState
    step: Callable  # EnvState, action (num_envs, action_dim) before squashing or clipping -> EnvState, Transitions
    obs_dim: int
    action_dim: int


def make_env(env_id: str, addon: AddonTask, squash: bool, seeds: np.ndarray) -> Env:
    """Make one environment for each of the seeds, behind a pure step that knows the add-on task and squashing."""
    num_envs = len(seeds)
    pool = envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, seed=seeds.tolist())
    low, high = np.float32(pool.action_space.low), np.float32(pool.action_space.high)
    with jax.enable_x64(True):
        handle, _, _, xla_step = pool.xla()

    def reset():
        running = dict.fromkeys(("basic", "addon", "quantity", "length"), np.zeros(num_envs, np.float32))
        finished = dict.fromkeys(running, np.full(num_envs, np.nan, np.float32))
        state = EnvState(handle, pool.reset()[0].astype(np.float32), np.zeros(num_envs, bool), running, finished)
        return jax.device_put(state, jax.local_devices(backend="cpu")[0])

    def step(state, action):
        bounded = low + (jnp.tanh(action) + 1) / 2 * (high - low) if squash else jnp.clip(action, low, high)
        with jax.enable_x64(True):  # EnvPool's MuJoCo speaks float64
            handle, (obs, reward, terminated, truncated, _) = xla_step(state.handle, bounded.astype(jnp.float64))
            obs, reward = obs.astype(jnp.float32), reward.astype(jnp.float32)
        valid, done = ~state.done, terminated | truncated
        quantity = jnp.where(valid, addon.quantity(obs), 0)
        addon_reward = jnp.where(valid, addon.coef * addon.reward(quantity), 0)
        step_sums = {"basic": reward, "addon": addon_reward, "quantity": quantity, "length": valid}
        sums = jax.tree.map(jnp.add, state.running, step_sums)
        finished = jax.tree.map(lambda new, old: jnp.where(done, new, old), sums, state.finished)
        running = jax.tree.map(lambda x: jnp.where(done, 0, x), sums)
        transition = Transitions(state.obs, action, reward, addon_reward, terminated, truncated, valid)
        return EnvState(handle, obs, done, running, finished), transition

    return Env(reset, step, *pool.observation_space.shape, *pool.action_space.shape)


# -------------------------------------------------------------------------- rollout and update


@partial(jax.jit, static_argnames=("env", "args"))
def rollout(env: Env, args: Args, policy: Policy, state: EnvState, iteration: int) -> tuple[EnvState, Transitions]:
    """Act with sampled actions for args.num_steps steps."""

    def step(state, noise):
        mean, log_std = action_distribution(policy, state.obs)
        return env.step(state, mean + jnp.exp(log_std) * noise)

    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), 2 * iteration)
    noise = jax.random.normal(key, (args.num_steps, args.num_envs, env.action_dim))
    noise = jnp.split(noise, jax.process_count(), axis=1)[jax.process_index()]
    state, transitions = lax.scan(step, state, noise)
    return state, transitions._replace(obs=jnp.concatenate([transitions.obs, state.obs[None]]))


@flax.struct.dataclass
class TrainState:
    """What an iteration changes. Random keys follow from the seed and the iteration."""

    params: Any  # {"actor", "critic"}
    opt_state: optax.OptState
    obs_stats: RunningStats
    return_stats: RunningStats  # of the discounted returns; their standard deviation is the unit of the critic
    return_trace: jax.Array  # the discounted returns under way, (num_envs,)
    iteration: jax.Array
    actor: Actor = flax.struct.field(pytree_node=False)
    critic: Critic = flax.struct.field(pytree_node=False)

    @property
    def policy(self) -> Policy:
        """The policy that this state has learned."""
        return Policy(self.params["actor"], self.obs_stats, self.actor)


def across_devices(spec: P) -> NamedSharding:
    """A layout over all devices of all processes: split along the axis that is "data" in spec, else copied to each."""
    return NamedSharding(jax.sharding.Mesh(jax.devices(), ("data",)), spec)


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam on clipped gradients, without the learning rate; all parameters as one vector, which is faster on a CPU."""
    return optax.flatten(optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5)))


@partial(jax.jit, static_argnames=("args", "actor", "obs_dim"))
def init_state(args: Args, actor: Actor, obs_dim: int) -> TrainState:
    """The state before the first iteration, with a critic of the actor's widths."""
    critic = Critic(actor.hidden_sizes, actor.activation)
    actor_key, critic_key = jax.random.split(jax.random.PRNGKey(args.seed))
    obs = jnp.zeros(obs_dim)
    params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
    obs_stats = RunningStats(jnp.zeros(obs_dim), jnp.ones(obs_dim), jnp.float32(1e-4))
    return_stats = RunningStats(jnp.float32(0), jnp.float32(1), jnp.float32(1e-4))
    opt_state, return_trace = make_optimizer(args).init(params), jnp.zeros(args.num_envs)
    return TrainState(params, opt_state, obs_stats, return_stats, return_trace, jnp.int32(0), actor, critic)


def improve(loss: Callable, args: Args, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """Pass over a batch args.update_epochs times, or until args.target_kl; the metrics are the last epoch's means."""
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    learning_rate = args.learning_rate * (1 - state.iteration / num_iterations if args.anneal_lr else 1)

    @partial(jax.shard_map, mesh=across_devices(P()).mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    def gradient(params, minibatch):  # each device's part of the minibatch has its gradient, and they add up
        grads_and_metrics = jax.grad(loss, has_aux=True)(params, *minibatch, state.actor, state.critic, args)
        flat, unflatten = ravel_pytree(grads_and_metrics)
        return unflatten(lax.psum(flat, "data"))  # one vector, as every message costs its delay

    def minibatch_step(carry, minibatch):
        params, opt_state = carry
        grads, metrics = gradient(params, minibatch)
        updates, opt_state = make_optimizer(args).update(grads, opt_state)
        return (jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt_state), metrics

    def epoch(carry):
        epochs_done, key, learned, _ = carry
        key, permutation_key = jax.random.split(key)
        order = jnp.argsort(jax.random.bits(permutation_key, batch.valid.shape))  # jax.random.permutation sorts twice
        minibatches = make_minibatches(batch, order, args.num_minibatches, args.norm_adv)
        learned, metrics = lax.scan(minibatch_step, learned, minibatches)
        return epochs_done + 1, key, learned, jax.tree.map(jnp.mean, metrics)

    def go_on(carry):
        near = True if args.target_kl is None else carry[-1]["approx_kl"] <= args.target_kl
        return (carry[0] < args.update_epochs) & near

    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), 2 * state.iteration + 1)
    metrics = dict.fromkeys(("policy_loss", "value_loss", "approx_kl", "clip_fraction"), jnp.float32(0))
    carry = (0, key, (state.params, state.opt_state), metrics)
    *_, (params, opt_state), metrics = lax.while_loop(go_on, epoch, carry)
    metrics |= {"learning_rate": jnp.float32(learning_rate), "param_norm": optax.tree.norm(params)}
    return state.replace(params=params, opt_state=opt_state), metrics


def ppo_update(
    loss: Callable, args: Args, state: TrainState, transitions: Transitions, reward: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Improve policy and critic by a rollout, whose reward (num_steps, num_envs) is all that they are to maximise."""
    obs = normalise(transitions.obs, state.obs_stats, state.actor.obs_clip)
    value = state.critic.apply(state.params["critic"], obs)  # (num_steps + 1, num_envs)
    log_prob = gaussian_log_prob(transitions.action, *state.actor.apply(state.params["actor"], obs[:-1]))

    # One running scale for the whole reward keeps the proportions of its terms.
    valid, terminated, truncated = transitions.valid, transitions.terminated, transitions.truncated
    reward = jnp.where(valid, reward, 0)
    returns = discounted_sum(state.return_trace, reward, args.gamma * valid)  # an auto-reset step starts from 0
    return_stats = merge_stats(state.return_stats, returns, valid)
    reward_scale = jnp.sqrt(return_stats.var + 1e-8)
    advantage = gae(reward / reward_scale, value, terminated, truncated, args.gamma, args.gae_lambda)
    batch = Batch(obs[:-1], transitions.action, log_prob, advantage, value[:-1], advantage + value[:-1], valid)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    state, metrics = improve(loss, args, state, batch)

    state = state.replace(return_stats=return_stats, return_trace=returns[-1], iteration=state.iteration + 1)
    return lax.with_sharding_constraint((state, metrics | {"reward_scale": reward_scale}), across_devices(P()))


@partial(jax.jit, static_argnames="args")
def residual_update(
    args: Args, prior: Policy, state: TrainState, transitions: Transitions
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration of Residual PPO."""
    obs, action, valid = transitions.obs[:-1], transitions.action, transitions.valid
    log_prob = policy_log_prob(state.policy, obs, action)
    prior_log_prob = policy_log_prob(prior, obs, action)
    reward = residual_reward(transitions.addon_reward, prior_log_prob, log_prob, args.omega_prime, args.alpha_hat)
    omega = 1.0 if args.omega is None else args.omega
    reward += omega * termination_reward(transitions.terminated, args.survival_reward, args.gamma)
    state, metrics = ppo_update(ppo_loss, args, state, transitions, reward)
    if not args.init_from_prior:  # else keep the prior's normaliser, so that the policy changes by learning alone
        state = state.replace(obs_stats=merge_stats(state.obs_stats, obs, valid))
    kl_to_prior = masked_mean(log_prob - prior_log_prob, valid)
    return state, {"kl_to_prior": kl_to_prior, "entropy": -masked_mean(log_prob, valid)} | metrics


# ------------------------------------------------------------------------------ train and main


def train(
    env: Env, update: Callable, args: Args, state: TrainState, run_dir: Path, after: Callable = lambda state: None
) -> TrainState:
    """Alternate rollouts and updates, (state, transitions) -> (state, metrics); call after(state) every time."""
    env_state, state = env.reset(), jax.device_put(state, across_devices(P()))
    with RunLog(run_dir, args, state) as log:  # stops the run on Ctrl-C, and when numbers stop being finite
        for iteration in range(int(state.iteration), args.total_timesteps // (args.num_envs * args.num_steps)):
            env_state, transitions = rollout(env, args, jax.device_get(state.policy), env_state, iteration)
            transitions = jax.make_array_from_process_local_data(across_devices(P(None, "data")), transitions)
            finished = jax.make_array_from_process_local_data(across_devices(P("data")), env_state.finished)
            state, metrics = update(state, transitions)
            log.write(state, *jax.device_get((metrics, episode_metrics(finished))))
            after(state)
    return state


def main(args: Args) -> None:
    """Customise the prior."""
    args = prepare_args(join_processes(args), check_args)
    addon = choose_addon(args.addon, args.env_id, args.addon_coef)
    prior_path = args.resume / "prior.safetensors" if args.resume else args.prior or default_prior(args.env_id)
    prior, prior_info = load_policy(prior_path, args.env_id)
    args = resolve_args(args, prior, prior_info, PPO_SCALES)
    actor = dataclasses.replace(prior.actor, hidden_sizes=args.hidden_sizes)
    seeds = np.split(env_seeds(args.seed, 0, args.num_envs), jax.process_count())[jax.process_index()]
    env = make_env(args.env_id, addon, actor.squash, seeds)
    state = init_state(args, actor, env.obs_dim)
    if args.init_from_prior:
        state = state.replace(params=state.params | {"actor": prior.params}, obs_stats=prior.obs_stats)
    run_dir, state = open_run(args, state, {"prior.safetensors": prior_path.read_bytes()})
    describe_prior(args, addon, prior_path, prior_info)
    state = train(env, partial(residual_update, args, prior), args, state, run_dir)
    policies = {"prior": prior, "customised": state.policy}
    eval_seeds = np.tile(env_seeds(args.seed, 1, args.eval_episodes), 4)  # two policies, with either actions
    eval_env = make_env(args.env_id, addon, actor.squash, eval_seeds)
    results = evaluate(eval_env, policies, args.omega, args.seed)
    save_policy(run_dir / "policy.safetensors", state.policy, args, args.alpha_hat, results["customised"])
    finish_run(run_dir, addon.label, results)


# This was the algorithm. From here on: what surrounds it.

# ------------------------------------------------------------------------- defaults and checks


class StopRun(Exception):
    """Ends the program with one line for the user; exit code 2: bad input, 1: diverged, 130: interrupted."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message.replace("\n", " "))
        self.exit_code = exit_code


PPO_SCALES = 3, 1 / 3  # by default omega' = 3 omega alpha, alpha_hat = alpha / 3


def resolve_args(args: Args, prior: Policy, prior_info: dict[str, str], scales: tuple[float, float]) -> Args:
    """The arguments, with what is not given set by the prior and its file; StopRun if the file does not say it.

    A soft-optimal prior asks for omega' = omega alpha. The log-probability of a trained one understates its reward
    where customisation goes; hence scales, of omega' and alpha_hat (how they were found: results/defaults.md).
    """
    alpha, plain = float(prior_info.get("alpha", 0)), args.omega_prime is not None
    if alpha == 0 and None in (args.omega_prime, args.alpha_hat):
        raise StopRun("the prior's file names no temperature alpha above 0; give --omega-prime and --alpha-hat")
    omega = 1.0 if args.omega is None and not plain else args.omega
    defaults = {
        "omega_prime": scales[0] * omega * alpha if omega else 0.0,
        "alpha_hat": scales[1] * alpha,
        "survival_reward": 0.0 if plain else float(prior_info.get("survival_reward", 0)),
        "gamma": min(0.99, float(prior_info.get("gamma", 0.99))),  # a fresh critic learns no longer horizon in time
        "hidden_sizes": prior.actor.hidden_sizes,
    }
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    args = dataclasses.replace(args, omega=omega, **(defaults | given))
    if args.init_from_prior and args.hidden_sizes != prior.actor.hidden_sizes:
        raise StopRun(f"--hidden-sizes are not the prior's {prior.actor.hidden_sizes}; add --no-init-from-prior")
    if args.gamma == 1 and args.survival_reward:
        raise StopRun("with --gamma 1 the end of an episode costs without bound; add --survival-reward 0")
    return args


def choose_addon(name: str | None, env_id: str, coef: float) -> AddonTask:
    """The named add-on task, or the environment's default; StopRun if there is none."""
    choices = [key for key, task in ADDON_TASKS.items() if task.env in (env_id.rpartition("-v")[0], "")]
    if name is None and len(choices) == 1:
        raise StopRun(f"{env_id} has no add-on task yet; add one to ADDON_TASKS, or give --addon none")
    if name is not None and name not in choices:
        raise StopRun(f"--addon {name} is no task for {env_id}; choose from {', '.join(choices)}, or add your own")
    return ADDON_TASKS[name or choices[0]]._replace(coef=coef)


def env_seeds(seed: int, role: int, num_envs: int) -> np.ndarray:
    """Seeds of environments (num_envs,), independent also between seeds, and between the roles 0, training, and 1."""
    return np.random.SeedSequence((seed, role)).generate_state(num_envs) // 2  # EnvPool's are below 2^31


LIMITS = dict.fromkeys(("num_envs", "num_steps", "num_minibatches", "update_epochs", "num_evals"), (1, np.inf))
LIMITS |= dict.fromkeys(("eval_episodes", "batch_size", "policy_frequency", "target_network_frequency"), (1, np.inf))
LIMITS |= dict.fromkeys(("learning_rate", "max_grad_norm", "clip_coef", "q_lr", "policy_lr"), (1e-30, np.inf))
LIMITS |= dict.fromkeys(("addon_coef", "survival_reward", "target_entropy"), (-np.inf, np.inf))
LIMITS |= {"seed": (0, 2**30 - 1), "gamma": (0, 1), "gae_lambda": (0, 1), "tau": (0, 1)}


def check_args(args: Args) -> None:
    """StopRun if flags cannot work, alone or together."""
    specs = envpool.registration.registry.specs
    known = [name for name in specs if specs[name][0] == "envpool.mujoco.gym" and name.endswith(("-v4", "-v5"))]
    if args.env_id not in known:
        raise StopRun(f"{args.env_id!r} is no MuJoCo environment that --env-id can be: {', '.join(sorted(known))}")
    for name, value in vars(args).items():
        low, high = LIMITS.get(name, (0, np.inf))
        if isinstance(value, int | float) and not (low <= value <= high and np.isfinite(value)):
            raise StopRun(f"--{name.replace('_', '-')} is {value}; it must be finite and from {low:g} to {high:g}")
    if min(args.hidden_sizes or (1,)) < 1:
        raise StopRun(f"--hidden-sizes is {args.hidden_sizes}; every layer needs at least 1 unit")
    try:
        jax.devices("cpu"), jax.devices()  # the first is where the environments run
    except (RuntimeError, AssertionError) as error:
        raise StopRun(f"JAX lacks a device ({error}); unset JAX_PLATFORMS, or let it name cpu, too") from None
    batch_size, devices = args.num_envs * args.num_steps, jax.device_count()
    if args.num_envs % devices:
        raise StopRun(f"--num-envs {args.num_envs} cannot be split among {devices} devices; choose a multiple")
    if batch_size % (args.num_minibatches * devices):
        parts = f"--num-minibatches {args.num_minibatches} on {devices} devices; choose a divisor"
        raise StopRun(f"--num-envs times --num-steps is {batch_size}, which cannot be split into {parts}")
    if args.norm_adv and batch_size == args.num_minibatches:
        raise StopRun("--norm-adv makes 0 of every advantage in minibatches of one step; lower --num-minibatches")
    if args.total_timesteps < batch_size:
        raise StopRun(f"--total-timesteps {args.total_timesteps} is less than one iteration, {batch_size} steps")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise StopRun("--track needs Weights & Biases; install it with: pip install wandb")


# --------------------------------------------------------------------------------- evaluation


ACTIONS = ("stochastic", "deterministic")
Results = dict[str, dict[str, dict[str, np.ndarray]]]  # what evaluate returns


@partial(jax.jit, static_argnames="env")
def first_episodes(env: Env, policies: list[Policy], state: EnvState, key: jax.Array) -> dict[str, jax.Array]:
    """Sums over each environment's first episode after a reset, those of EnvState and that of log pi.

    Each policy has an equal share of the environments, half of it for each of ACTIONS, and the same noise.
    """

    def step(carry):
        key, state, log_prob = carry
        key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (len(state.obs) // len(policies) // len(ACTIONS), env.action_dim))
        noise = jnp.concatenate([noise, jnp.zeros_like(noise)])
        actions, log_probs = [], []
        for policy, obs in zip(policies, jnp.split(state.obs, len(policies)), strict=True):
            mean, log_std = action_distribution(policy, obs)
            actions.append(mean + jnp.exp(log_std) * noise)
            log_probs.append(policy_log_prob(policy, obs, actions[-1]))
        first = jnp.isnan(state.finished["length"])
        after, _ = env.step(state, jnp.concatenate(actions))
        finished = jax.tree.map(lambda new, old: jnp.where(first, new, old), after.finished, state.finished)
        return key, after._replace(finished=finished), log_prob + jnp.where(first, jnp.concatenate(log_probs), 0)

    start = (key, state, jnp.zeros(len(state.obs)))
    _, state, log_prob = lax.while_loop(lambda carry: jnp.isnan(carry[1].finished["length"]).any(), step, start)
    return state.finished | {"log_prob": log_prob}


def evaluate(env: Env, policies: dict[str, Policy], omega: float | None, seed: int) -> Results:
    """Play each policy with sampled and with deterministic actions, an episode in each environment of its share.

    Returns: {policy: {"stochastic", "deterministic"}} -> {"objective", "total", "basic", "addon", "quantity", "length",
    "log_prob"} -> array (episodes,); objective = omega basic + addon, or left out; total = basic + addon; quantity, and
    log_prob, which is log pi of the actions in nats, are means over the episode's steps.
    """
    players, key = jax.device_get((list(policies.values()), jax.random.PRNGKey(seed)))  # to where the environments are
    sums, shape = first_episodes(env, players, env.reset(), key), (len(policies), len(ACTIONS), -1)
    columns = {name: np.asarray(x, np.float64).reshape(shape) for name, x in sums.items()}
    columns |= {name: columns[name] / columns["length"] for name in ("quantity", "log_prob")}
    columns["total"] = columns["basic"] + columns["addon"]
    if omega is not None:
        columns["objective"] = omega * columns["basic"] + columns["addon"]
    return {
        policy: {actions: {name: x[i, j] for name, x in columns.items()} for j, actions in enumerate(ACTIONS)}
        for i, policy in enumerate(policies)
    }


# ------------------------------------------------------------------------------- policy files


def policy_tensors(policy: Policy) -> dict[str, Any]:
    """A policy's arrays as a policy file has them (see priors/README.md): weights are (outputs, inputs)."""
    params = flax.traverse_util.flatten_dict(policy.params["params"])
    tensors = {".".join(path).replace("kernel", "weight"): x.T for path, x in params.items()}
    return tensors | {"obs_mean": policy.obs_stats.mean, "obs_var": policy.obs_stats.var}


def policy_digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over all that a policy file says, to find damage."""
    digest = hashlib.sha256(json.dumps({**metadata, "sha256": ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()


def save_policy(path: Path, policy: Policy, args: Args, alpha: float, results: dict[str, dict]) -> None:
    """Write a policy file (safetensors), with alpha, evaluate's results for the policy, and how it was trained."""
    actor, sampled = policy.actor, results["stochastic"]
    tensors = {name: np.ascontiguousarray(x) for name, x in policy_tensors(jax.device_get(policy)).items()}
    metadata = {"format": "pt", "env_id": args.env_id, "alpha": str(alpha), "gamma": str(args.gamma)}
    metadata |= {"squash": str(actor.squash).lower(), "hidden_sizes": json.dumps(actor.hidden_sizes)}
    metadata |= {"activation": actor.activation, "obs_clip": str(actor.obs_clip)}
    returns = {actions: f"{x['basic'].mean():.0f} ± {x['basic'].std():.0f}" for actions, x in results.items()}
    metadata["returns"] = ", ".join(f"{actions} {text}" for actions, text in returns.items())
    metadata["training"] = json.dumps(provenance(args), default=str)
    if "objective" in sampled:  # mean r - alpha mean log pi over the steps, r the objective's reward
        soft_returns = sampled["objective"] - alpha * sampled["log_prob"] * sampled["length"]
        metadata["survival_reward"] = str(soft_returns.sum() / sampled["length"].sum())
    metadata["sha256"] = policy_digest(tensors, metadata)
    write_atomic(path, safetensors.numpy.save(tensors, metadata))


def load_policy(path: Path, env_id: str) -> tuple[Policy, dict[str, str]]:
    """Read a policy file: the policy and the metadata; StopRun if it is missing, damaged or for another environment."""
    try:
        data = path.read_bytes()
        tensors = {k: x for k, x in safetensors.numpy.load(data).items() if not k.startswith("critic.")}
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        check_metadata(metadata, policy_digest(tensors, metadata), env_id)
        spec, hidden_sizes = envpool.make_spec(env_id), tuple(json.loads(metadata["hidden_sizes"]))
        form = (metadata["activation"], "actor_logstd.weight" in tensors, metadata["squash"] == "true")
        actor = Actor(*spec.action_space.shape, hidden_sizes, *form, float(metadata.get("obs_clip", 10)))
        obs = jnp.zeros(spec.observation_space.shape)
        params = jax.eval_shape(actor.init, jax.random.PRNGKey(0), obs)
        check_arrays(tensors, jax.eval_shape(policy_tensors, Policy(params, RunningStats(obs, obs, obs), actor)))
        if (tensors["obs_var"] < 0).any() or np.abs(tensors.get("actor_logstd", 0)).max() > 20:
            raise ValueError("obs_var has negative entries, or actor_logstd some beyond ±20, as no policy has them")
        stats = RunningStats(tensors.pop("obs_mean"), tensors.pop("obs_var"), np.float32(1))
        params = {tuple(name.replace("weight", "kernel").rsplit(".", 1)): x.T for name, x in tensors.items()}
        policy = Policy({"params": flax.traverse_util.unflatten_dict(params)}, stats, actor)
        return jax.tree.map(jnp.asarray, policy), metadata
    except FileNotFoundError:
        raise StopRun(f"there is no policy {path}; train one with train_prior_ppo.py, or name a file") from None
    except Exception as error:  # a damaged file can fail in any way
        raise StopRun(f"the policy {path} cannot be used: {error}") from None


def check_metadata(metadata: dict[str, str], digest: str, env_id: str) -> None:
    """ValueError unless a policy file's metadata are as priors/README.md describes them, and for this environment."""
    required, numbers = {"env_id", "squash", "hidden_sizes", "activation"}, {"alpha", "gamma", "survival_reward"}
    known = required | numbers | {"obs_clip", "measured_alpha", "format", "returns", "training", "sha256"}
    if wrong := (required - metadata.keys()) | (metadata.keys() - known):
        raise ValueError(f"the metadata {sorted(wrong)} are missing or unknown")
    if metadata.get("sha256", digest) != digest:
        raise ValueError("it is damaged (its sha256 does not match); copy or export it anew")
    if metadata["env_id"].rpartition("-v")[0] != env_id.rpartition("-v")[0]:
        raise ValueError(f"it is for {metadata['env_id']}, not {env_id}; change --env-id or the policy")
    if metadata["squash"] not in ("true", "false") or metadata["activation"] not in ("tanh", "relu"):
        raise ValueError("its squash is neither true nor false, or its activation neither tanh nor relu")
    alpha, gamma, survival, obs_clip = (float(metadata.get(x, 1)) for x in (*sorted(numbers), "obs_clip"))
    if not (0 <= alpha < np.inf and 0 <= gamma <= 1 and np.isfinite(survival) and obs_clip > 0):
        raise ValueError(f"one of its {sorted(numbers)} or its obs_clip is impossible")


def check_arrays(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """ValueError unless the arrays found are finite and have the names, shapes and types of those expected."""
    for name in sorted(found.keys() | expected.keys()):
        ours, theirs = (f"{x[name].dtype} {x[name].shape}" if name in x else "absent" for x in (found, expected))
        if ours != theirs:
            raise ValueError(f"{name} is {ours}; it should be {theirs}")
        if not np.isfinite(found[name]).all():
            raise ValueError(f"{name} has entries that are NaN or infinite")


# ------------------------------------------------------------------------ run folder and logs


CONSOLE = rich.console.Console(highlight=False, soft_wrap=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Let process 0 write a file such that a crash leaves the old one or the new one, never half of one."""
    if jax.process_index() == 0:
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def default_prior(env_id: str) -> Path:
    """priors/<env-id>.safetensors in the working directory if it exists, else beside this script."""
    path = Path("priors") / f"{env_id}.safetensors"
    return path if path.exists() else Path(__file__).parent / path


def provenance(args: Args) -> dict[str, Any]:
    """The arguments, and what else results depend on; without git, the commit is None."""
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    packages = ("jax", "flax", "optax", "envpool", "gymnasium", "numpy")
    mujoco = ctypes.CDLL(sys.modules["envpool.mujoco.mujoco_gym_envpool"].__file__)
    mujoco.mj_versionString.restype = ctypes.c_char_p
    return {
        "command": " ".join(sys.argv),
        "args": dataclasses.asdict(args),
        "git_commit": git.stdout.strip() or None,
        "packages": {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages},
        "mujoco_in_envpool": mujoco.mj_versionString().decode(),  # the package mujoco does not step these environments
        "device": jax.devices()[0].device_kind,
    }


def open_run(args: Args, state: Any, files: dict[str, bytes]) -> tuple[Path, Any]:
    """The run's folder, new, with args.json and files, or that of --resume, and the state to start from.

    This process locks the folder as long as it lives. Raises: StopRun if the folder is not to be had.
    """
    run_dir = args.resume or args.runs_dir / f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.time():.3f}"
    try:
        if jax.process_index() == 0:
            if not args.resume:
                run_dir.mkdir(parents=True)
                files = files | {"args.json": json.dumps(provenance(args), indent=2, default=str).encode()}
                for name, data in files.items():
                    write_atomic(run_dir / name, data)
            fcntl.flock(os.open(run_dir / "args.json", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)  # NFS: for writing
    except BlockingIOError:
        raise StopRun(f"another process goes on with the run {run_dir}; wait for it, or start a new run") from None
    except OSError as error:
        raise StopRun(f"cannot write to {run_dir}: {error.strerror}; choose another --runs-dir") from None
    state = load_checkpoint(run_dir, state) if args.resume else state
    CONSOLE.print(f"{args.env_id} on {jax.devices()[0].device_kind}, run folder {run_dir}")
    return run_dir, state


def save_checkpoint(run_dir: Path, state: Any) -> None:
    """Write a run's state."""
    write_atomic(run_dir / "checkpoint.msgpack", flax.serialization.to_bytes(jax.device_get(state)))


def load_checkpoint(run_dir: Path, template: Any) -> Any:
    """Read a run's state, shaped like the template; StopRun if that fails. Its environments start anew."""
    try:
        state = flax.serialization.from_bytes(template, (run_dir / "checkpoint.msgpack").read_bytes())
        trees = (flax.serialization.to_state_dict(tree) for tree in (state, template))
        check_arrays(*(flax.traverse_util.flatten_dict(tree, sep=".") for tree in trees))
    except Exception as error:  # a damaged file can fail in any way
        raise StopRun(f"the checkpoint in {run_dir} cannot be used: {error}; start a new run") from None
    anew = {name: x for name, x in vars(template).items() if name == "return_trace"}  # PPO's, of the episodes under way
    return jax.tree.map(jnp.asarray, state).replace(**anew)


SHOWN = ("basic_return", "addon_return", "total_return", "kl_to_prior", "entropy")  # if there are such metrics


@jax.jit
def episode_metrics(finished: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means over the environments' last episodes; NaN before there is one."""
    means = jax.tree.map(jnp.nanmean, finished | {"quantity": finished["quantity"] / finished["length"]})
    returns = {"basic_return": means["basic"], "addon_return": means["addon"]}
    returns["total_return"] = means["basic"] + means["addon"]
    return returns | {"addon_quantity": means["quantity"], "episode_length": means["length"]}


class RunLog(contextlib.AbstractContextManager):
    """Keeps a run's last state, and its metrics: in metrics.csv, TensorBoard (which --track mirrors), the terminal.

    However the run ends, short of a kill, its last state whose metrics are finite is in the run folder.
    """

    def __init__(self, run_dir: Path, args: Args, state: Any):
        """Go on from a state; rows that an interrupted run wrote after it are dropped."""
        self.run_dir, self.args, self.state, self.interrupted = run_dir, args, state, False
        self.iteration_steps, writes = args.num_envs * args.num_steps, jax.process_index() == 0
        self.total = args.total_timesteps // self.iteration_steps * self.iteration_steps
        first_step = int(state.iteration) * self.iteration_steps
        path = run_dir / "metrics.csv" if writes else Path(os.devnull)
        rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
        rows = rows[:1] + [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= first_step]
        self.csv = path.open("w", buffering=1)
        self.csv.writelines(",".join(row) + "\n" for row in rows)
        if args.track and writes:
            import wandb

            where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
            wandb.init(**where, id=run_dir.name, resume="allow", config=vars(args), sync_tensorboard=True)
        self.tensorboard = tensorboardX.SummaryWriter(str(run_dir), purge_step=first_step, write_to_disk=writes)
        live = args.progress and CONSOLE.is_terminal
        self.bar = rich.progress.Progress(console=CONSOLE, refresh_per_second=2, disable=not live)
        self.task = self.bar.add_task("compiling", total=self.total, completed=first_step)
        self.bar.start()
        self.written_at = time.time()
        self.start = self.written_at - (float(rows[-1][1]) if len(rows) > 1 else 0)  # of the clock, less interruptions
        self.saved_at = self.next_report = self.next_line = 0.0
        signal.signal(signal.SIGINT, self.interrupt)

    def __exit__(self, *_: Any) -> None:
        save_checkpoint(self.run_dir, self.state)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for log in (self.csv, self.tensorboard):
            log.close()
        self.bar.stop()

    def interrupt(self, *_: Any) -> None:
        """Let the first Ctrl-C end the run after the iteration under way, a second one at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def write(self, state: Any, metrics: dict[str, np.ndarray], returns: dict[str, np.ndarray]) -> None:
        """Log an iteration: a row always, the rest about every second, a plain line every ten, and all at the end.

        Raises: StopRun if metrics are not finite, or after Ctrl-C.
        """
        if bad := [name for name, value in metrics.items() if not np.isfinite(value)]:
            where = f"in iteration {int(state.iteration)}; the state before it is in {self.run_dir}"
            raise StopRun(f"{', '.join(bad)} not finite {where}; try a lower learning rate", exit_code=1)
        self.state, metrics, global_step = state, returns | metrics, int(state.iteration) * self.iteration_steps
        now, last = time.time(), global_step >= self.total
        speed, self.written_at = self.iteration_steps / (now - self.written_at), now
        row = {"global_step": global_step, "elapsed_s": f"{now - self.start:.3f}", "steps_per_s": f"{speed:.0f}"}
        row |= {name: f"{value:.6g}" for name, value in metrics.items()}
        if not self.csv.tell():
            print(*row, sep=",", file=self.csv)
        print(*row.values(), sep=",", file=self.csv)
        if self.interrupted:
            raise StopRun(f"interrupted; continue with: python {sys.argv[0]} --resume {self.run_dir}", exit_code=130)
        if now - self.saved_at >= self.args.checkpoint_interval:
            save_checkpoint(self.run_dir, state)
            self.saved_at = now
        if now < self.next_report and not last:
            return
        self.next_report = now + 1
        for name, value in metrics.items():
            if np.isfinite(value):
                self.tensorboard.add_scalar(name, value, global_step)
        values = [f"{name.partition('_')[0]} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
        text = " ".join([f"{speed:,.0f} steps/s", *values])
        self.bar.update(self.task, completed=global_step, description=text)
        if self.bar.disable and (now >= self.next_line or last):
            self.next_line = now + 10
            CONSOLE.print(f"{global_step / self.total:4.0%}  {(self.total - global_step) / speed:5.0f} s left  {text}")


def finish_run(run_dir: Path, quantity: str, results: Results) -> None:
    """Let process 0 draw, and write the evaluation, with which the run counts as complete; then show it."""
    if jax.process_index() > 0:
        return
    plot_learning_curve(run_dir)
    statistics = {"mean": np.mean, "std": np.std, "episodes": np.ndarray.tolist}
    content = {name: {k: jax.tree.map(f, x) for k, f in statistics.items()} for name, x in results.items()}
    write_atomic(run_dir / "eval.json", json.dumps(content, indent=1).encode())
    columns = {f"{policy}\n{actions}": x for policy, row in results.items() for actions, x in row.items()}
    headers = (rich.table.Column(header, justify="right", no_wrap=True) for header in columns)
    table = rich.table.Table("", *headers, box=rich.box.SIMPLE_HEAD)
    for name, digits in {"objective": 0, "total": 0, "basic": 0, "addon": 0, "quantity": 3, "length": 0}.items():
        cells = [f"{x[name].mean():.{digits}f} ± {x[name].std():.{digits}f}" for x in columns.values() if name in x]
        if cells:
            table.add_row({"addon": "add-on", "quantity": quantity}.get(name, name), *cells)
    CONSOLE.print(table)
    CONSOLE.print(f"policy, metrics and curves are in {run_dir}; to watch it: python enjoy.py {run_dir} --window")


def plot_learning_curve(run_dir: Path) -> None:
    """Draw metrics.csv into learning_curve.png."""
    import matplotlib.figure

    data = np.atleast_1d(np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True))
    shown = [name for name in SHOWN if name in data.dtype.names]
    figure = matplotlib.figure.Figure(figsize=(3 * len(shown), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown)), shown, strict=True):
        axes.plot(data["global_step"], data[name])
        axes.set_title(name.replace("_", " "))
    figure.supxlabel("environment steps")
    figure.savefig(run_dir / "learning_curve.png", dpi=120)


# ------------------------------------------------------------------ command line and processes


def describe_prior(args: Args, addon: AddonTask, path: Path, info: dict[str, str]) -> None:
    """Say what the prior is, how it weighs, and what to beware of."""
    CONSOLE.print(f"add-on   {addon.coef:g} x the reward on {addon.label}")
    known = (f"{name} {info[name]}" for name in ("env_id", "alpha", "gamma", "returns") if name in info)
    CONSOLE.print(f"prior    {path}: {', '.join(known)}")
    weights = {name: getattr(args, name) for name in ("omega", "omega_prime", "alpha_hat", "survival_reward")}
    CONSOLE.print("weights  " + ", ".join(f"{name} = {x:.4g}" for name, x in weights.items() if x is not None))
    if info["env_id"] != args.env_id:
        CONSOLE.print(f"note     the prior is of {info['env_id']}, and need not be as good in {args.env_id}")
    if "gamma" in info and float(info["gamma"]) != args.gamma:
        CONSOLE.print(f"note     gamma is {args.gamma:g}, not the prior's: log pi stands for its reward only roughly")
    if "survival_reward" not in info and not args.survival_reward:
        CONSOLE.print("note     the prior's file names no survival reward; what a fall costs is not known")


START_ARGS = ("resume", "distributed", "coordinator_address", "num_processes", "process_id")  # no part of a run


def join_processes(args: Args) -> Args:
    """The arguments, once the processes of a --distributed run have met; StopRun if they do not, or differ in flags."""
    cluster = {name: getattr(args, name) for name in START_ARGS[2:]}
    if not args.distributed:
        if any(value is not None for value in cluster.values()):
            raise StopRun("--coordinator-address, --num-processes and --process-id need --distributed")
        return args
    how = "give --coordinator-address HOST:PORT, --num-processes and --process-id, or start by SLURM or Open MPI"
    if not (args.coordinator_address or "host:1").rpartition(":")[2].isdigit():
        raise StopRun(f"--coordinator-address {args.coordinator_address} names no port; {how}")
    CONSOLE.print("waiting for the other processes ...")
    try:
        jax.distributed.initialize(**cluster)
    except (RuntimeError, ValueError) as error:
        raise StopRun(f"the processes cannot meet: {error}; {how}") from None
    CONSOLE.quiet = jax.process_index() > 0
    flags = str({name: value for name, value in vars(args).items() if name not in cluster})
    digest = np.frombuffer(hashlib.sha256(flags.encode()).digest(), np.uint32)
    if (multihost_utils.process_allgather(digest) != digest).any():
        raise StopRun("the processes were started with different flags; start all with the same, but for --process-id")
    return args


def prepare_args(args: Args, check: Callable) -> Args:
    """The arguments, with --resume those of its run, which check accepts; StopRun if that fails."""
    if not args.resume:
        check(args)
        return args
    now = {name: value for name, value in vars(args).items() if name in START_ARGS}
    if args != type(args)(**now):
        raise StopRun("--resume takes no other flag: the run goes on with the arguments it was started with")
    try:
        saved = json.loads((args.resume / "args.json").read_text())["args"]
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        paths = {name: Path(saved[name]) for name in ("runs_dir", "prior", "export") if saved.get(name)}
        resumed = type(args)(**(saved | paths | now))
        check(resumed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StopRun(f"{args.resume} holds no run of {Path(__file__).name} to resume: {error}") from None
    if (args.resume / "eval.json").exists():
        raise StopRun(f"the run {args.resume} is complete; start a new one")
    return resumed


def stop(message: str, exit_code: int) -> None:
    """End this process with one line."""
    print(f"{Path(__file__).name}: {message}".replace("\n", " "), file=sys.stderr, flush=True)
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
        what = f"stopped by {type(error).__name__}: {error}"
        stop(f"{what}; if another process was lost, continue with --resume once all are back", 1)
