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

In this order: flags; policy and critic; mathematics; tasks and simulator; rollout and update; train and main;
evaluation; policy files. Then what a copy can do without: run folder and log; checks, command line and processes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import envpool
import flax
import flax.linen as nn
import gymnasium
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
from jax import Array, NamedSharding, P, lax
from jax.flatten_util import ravel_pytree

Metrics = dict[str, Array]  # of an iteration
xp = jnp  # what the line of a task calls it, as in enjoy.py, where it is NumPy


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
    """episodes of an evaluation, with sampled and again with deterministic actions"""
    num_snapshots: int | None = None
    """snapshots, the best of which is kept if a run ends below the prior; if not given, 10, or 0 with --omega-prime"""

    # environment and task
    env_id: str = "HalfCheetah-v4"
    """an EnvPool environment with vectors (Box) for observations and actions"""
    env_kwargs: str = "{}"
    """keyword arguments for EnvPool's make, in JSON"""
    num_envs: int = 16
    """parallel environments"""
    total_timesteps: int = 500_000
    """environment steps of the whole training, all environments together"""
    addon: str = "default"
    """add-on task r_R; "default": the environment's own; "none": a zero reward"""
    addon_coef: float = 1.0
    """factor on the add-on reward"""

    # customisation; the customised policy has the prior's form
    prior: Path | None = None
    """the prior's policy file; if not given, priors/<env-id>.safetensors, looked for as README.md says"""
    prior_alpha: float | None = None
    """temperature alpha at which the prior is soft-optimal, reward per nat; if not given, its file's; 0: unknown"""
    omega: float = 1.0
    """weight of the basic task in the objective; divides the budget, and scales the survival reward"""
    budget: float | None = None
    """nats that mean actions may be off the prior's, n²/2 for n of its deviations; if not given, min(2, actions / 2)"""
    omega_prime: float | None = None
    """constant weight of log pi, in units of reward per nat, instead of a budget; no survival reward unless given"""
    alpha_hat: float | None = None
    """constant temperature, reward per nat; if not given, omega' / 3 falling to 0, or alpha / 3 with --omega-prime"""
    survival_reward: float | None = None
    """reward per step, times omega, that an end forgoes; if not given, of the prior's file, or measured; 0: none"""
    jacobian: bool | None = None
    """tanh's Jacobian counts in both log-probabilities; if not given, unless a budget holds a prior without alpha"""
    init_from_prior: bool = True
    """start as the prior, whose frozen normaliser is kept; the critic starts fresh in any case"""
    hidden_sizes: tuple[int, ...] | None = None
    """widths of the hidden layers of policy and critic; if not given, the prior's"""

    # PPO
    num_steps: int = 128
    """steps per environment between two updates; over few, advantages rest on the critic, which starts fresh"""
    learning_rate: float = 3e-4
    """learning rate of Adam; the narrower the prior's Gaussian, the smaller it must be"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over the run"""
    gamma: float | None = None
    """discount; if not given, the prior's, with which log pi equals its reward up to shaping, but at most 0.99"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation; 0.98 for a prior that meets the wish already: the critic errs more"""
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
    desired_kl: float = 0.04
    """nats of an update's KL that the policy's learning rate follows, from a tenth up to --learning-rate; 0: fixed"""
    target_kl: float | None = None
    """skip an update's remaining epochs once the policy is this far from the rollout's (approximate KL, in nats)"""


# -------------------------------------------------------------------------- policy and critic


class RunningStats(NamedTuple):
    """Mean, variance and number of the data seen so far."""

    mean: Array
    var: Array
    count: Array


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
    log_std_form: str = "clip -20 2"  # how a state-dependent deviation comes out of the network

    @nn.compact
    def __call__(self, obs: Array) -> tuple[Array, Array]:
        """Map normalised observations (..., obs_dim) to mean (..., action_dim) and log_std, which broadcasts to it."""
        x = hidden_layers(obs, "actor_mean", self.hidden_sizes, self.activation)
        mean = dense(self.action_dim, 0.01, f"actor_mean.{2 * len(self.hidden_sizes)}")(x)
        if self.state_dependent_std:
            return mean, bounded_log_std(dense(self.action_dim, 0.01, "actor_logstd")(x), self.log_std_form)
        return mean, self.param("actor_logstd", nn.initializers.zeros, (self.action_dim,))


class Critic(nn.Module):
    """Soft state value, in units of the scaled reward."""

    hidden_sizes: tuple[int, ...]
    activation: str = "tanh"

    @nn.compact
    def __call__(self, obs: Array) -> Array:
        """Map normalised observations (..., obs_dim) to values (...)."""
        x = hidden_layers(obs, "critic", self.hidden_sizes, self.activation)
        return dense(1, 1.0, f"critic.{2 * len(self.hidden_sizes)}")(x)[..., 0]


def dense(size: int, scale: float, name: str) -> nn.Dense:
    """A linear layer with orthogonal weights, in true float32 on every device.

    GPUs and TPUs round the factors of a product unless told otherwise, which moves log pi by up to 0.7 nats.
    """
    return nn.Dense(size, kernel_init=nn.initializers.orthogonal(scale), precision=lax.Precision.HIGHEST, name=name)


def hidden_layers(x: Array, name: str, sizes: tuple[int, ...], activation: str) -> Array:
    """The hidden layers of a network, named as those of a torch.nn.Sequential; (..., inputs) -> (..., sizes[-1])."""
    for i, size in enumerate(sizes):
        x = getattr(nn, activation)(dense(size, 2**0.5, f"{name}.{2 * i}")(x))
    return x


def bounded_log_std(x: Array, form: str) -> Array:
    """A network's output as a log standard deviation, by a form of priors/README.md; ValueError if it is none."""
    kind, low, high = (*form.split(), "2")[:3]
    low, high = float(low), float(high)
    if kind == "clip" and -20 <= low < high <= 20:
        return jnp.clip(x, low, high)
    if kind == "tanh" and -20 <= low < high <= 20:
        return low + (high - low) / 2 * (jnp.tanh(x) + 1)
    if kind == "softplus" and 0 < low <= 1:
        return jnp.log(jax.nn.softplus(x) + low)
    raise ValueError(f"log_std is {form!r}, none of 'clip LOW HIGH', 'tanh LOW HIGH' and 'softplus MIN'")


@flax.struct.dataclass
class Policy:
    """All that acting needs: parameters of an Actor, and the normaliser of its observations."""

    params: Any
    obs_stats: RunningStats
    actor: Actor = flax.struct.field(pytree_node=False)


def normalise(obs: Array, stats: RunningStats, obs_clip: float) -> Array:
    """Observations (..., obs_dim) with zero mean and unit variance, clipped to [-obs_clip, obs_clip]."""
    return jnp.clip((obs - stats.mean) / jnp.sqrt(stats.var + 1e-8), -obs_clip, obs_clip)


def action_distribution(policy: Policy, obs: Array) -> tuple[Array, Array]:
    """Mean and log_std of the action before squashing or clipping, given observations that are not normalised."""
    return policy.actor.apply(policy.params, normalise(obs, policy.obs_stats, policy.actor.obs_clip))


def gaussian_log_prob(action: Array, mean: Array, log_std: Array) -> Array:
    """log N(action; mean, exp(log_std)^2), summed over the last axis; (..., action_dim) -> (...), in nats."""
    z = (action - mean) * jnp.exp(-log_std)
    return (-0.5 * z**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def tanh_log_det(action: Array) -> Array:
    """log |det d tanh(u)/du| at u = action, (..., action_dim) -> (...), in a form exact also where tanh saturates."""
    return (2 * (jnp.log(2.0) - action - jax.nn.softplus(-2 * action))).sum(-1)


def policy_log_prob(policy: Policy, obs: Array, action: Array) -> Array:
    """log pi(a|s) in nats, the action given before squashing or clipping; (..., obs_dim), (..., action_dim) -> (...).

    A squashed policy's density is that of a = tanh(u) in [-1, 1]^action_dim.
    """
    log_prob = gaussian_log_prob(action, *action_distribution(policy, obs))
    return log_prob - tanh_log_det(action) if policy.actor.squash else log_prob


def merge_stats(stats: RunningStats, data: Array, valid: Array) -> RunningStats:
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
    addon_reward: Array, prior_log_prob: Array, log_prob: Array, end_reward: Array, omega_prime: float, alpha_hat: float
) -> Array:
    """r_R + omega' log pi(a|s) - alpha_hat log pi_theta(a|s) (arXiv 2503.11019) + termination_reward, of equal shapes.

    The log-probabilities are numbers here, not something to differentiate: E[grad log pi_theta] = 0 removes that term
    from the gradient of the maximum-entropy objective. With end_reward 0 it is the paper's reward.
    """
    return addon_reward + lax.stop_gradient(omega_prime * prior_log_prob - alpha_hat * log_prob) + end_reward


def mean_shift(policy: Policy, prior: Policy, obs: Array) -> Array:
    """sum ((mu_theta - mu) / sigma)^2 / 2: how far mean actions are from the prior's; (..., obs_dim) -> (...).

    In nats, the KL divergence from the prior if the policy had its deviation sigma. Its own is left out: that the KL
    divergence grows when a policy gets narrower is nothing that omega' log pi could mend.
    """
    (mean, _), (prior_mean, log_std) = action_distribution(policy, obs), action_distribution(prior, obs)
    return jnp.sum(((mean - prior_mean) * jnp.exp(-log_std)) ** 2, axis=-1) / 2


def dual_step(multiplier: Array, shift: Array, budget: float, start: Array) -> Array:
    """multiplier exp(0.03 clip(shift - budget, -1, 1)), both in nats per step, within 0.3 and 10 times its start.

    Dual ascent in the log of the multiplier of E[mean_shift] <= budget, as on SAC's temperature (arXiv 1812.05905). A
    policy still on its way misses the budget whatever the multiplier is; the bounds keep that from adding up.
    """
    return jnp.clip(multiplier * jnp.exp(0.03 * jnp.clip(shift - budget, -1, 1)), 0.3 * start, 10 * start)


def termination_reward(terminated: Array, survival_reward: float, gamma: float) -> Array:
    """-gamma c / (1 - gamma) where an episode terminates, else 0: up to a constant return the same as c on every step.

    c = mean r - alpha mean log pi = (1 - gamma) mean V* under the prior: the value that an end forgoes (README.md).
    """
    return jnp.where(terminated, -gamma * survival_reward / ((1 - gamma) or 1), 0.0)  # with gamma = 1, c is 0


def rate_step(rate: Array, kl: Array, desired_kl: float) -> Array:
    """The rate, times 1.5 after an update by less than half of the desired KL (nats), 1/1.5 after one by over twice.

    arXiv 2109.11978.
    """
    return rate * jnp.where(kl < desired_kl / 2, 1.5, jnp.where(kl > 2 * desired_kl, 1 / 1.5, 1))


def discounted_sum(start: Array, x: Array, decay: Array, reverse: bool = False) -> Array:
    """y_t = x_t + decay_t y_{t-1} from y_{-1} = start (num_envs,), or in reverse; (num_steps, num_envs) -> the same."""

    def step(y, x_and_decay):
        y = x_and_decay[0] + x_and_decay[1] * y
        return y, y

    return lax.scan(step, start, (x, decay), reverse=reverse)[1]


def gae(reward: Array, value: Array, terminated: Array, truncated: Array, gamma: float, gae_lambda: float) -> Array:
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

    obs: Array  # normalised, (batch_size, obs_dim)
    action: Array  # before squashing or clipping, (batch_size, action_dim)
    log_prob: Array  # of the Gaussian, under the rollout's policy
    advantage: Array
    value: Array  # of the rollout's critic
    target: Array
    valid: Array  # false on an auto-reset step


def masked_mean(x: Array, valid: Array) -> Array:
    """Mean of x where valid is true; 0 if it is nowhere."""
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)


def make_minibatches(batch: Batch, order: Array, num_minibatches: int, norm_adv: bool) -> tuple[Batch, Array]:
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
    params: Any,
    batch: Batch,
    weight: Array,
    actor: Actor,
    critic: Critic,
    clip_coef: float,
    clip_vloss: bool,
    vf_coef: float,
) -> tuple[Array, Metrics]:
    """Clipped surrogate plus value loss (arXiv 1707.06347), a scalar to minimise, and its diagnostics.

    There is no entropy bonus: the entropy is in the reward, and here it would count twice. The losses of a minibatch's
    parts, their weights being those of make_minibatches, add up to that of the whole.
    """
    # Squashing changes both densities by the same Jacobian, which cancels in the ratio.
    log_ratio = gaussian_log_prob(batch.action, *actor.apply(params["actor"], batch.obs)) - batch.log_prob
    log_ratio = jnp.where(batch.valid, log_ratio, 0)  # before exp: times 0, an infinite ratio would still be NaN
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)
    policy_loss = -(jnp.minimum(batch.advantage * ratio, batch.advantage * clipped_ratio) * weight).sum()

    value = critic.apply(params["critic"], batch.obs)
    error = value - batch.target
    if clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -clip_coef, clip_coef)
        error = jnp.maximum(jnp.abs(error), jnp.abs(clipped_value - batch.target))
    value_loss = 0.5 * (jnp.where(batch.valid, error, 0) ** 2 * weight).sum()
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss}
    metrics["approx_kl"] = ((ratio - 1 - log_ratio) * weight).sum()  # E[ratio - 1 - log ratio], in nats
    metrics["clip_fraction"] = ((jnp.abs(ratio - 1) > clip_coef) * weight).sum()
    return policy_loss + vf_coef * value_loss, metrics


# ------------------------------------------------------------------------ tasks and simulator


class StopRun(Exception):
    """Ends the program with one line for the user; exit code 2: bad input, 1: a fault on the way, 128 + n: signal n."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


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


class Simulator(NamedTuple):
    """Environments behind two functions. For a simulator of your own, replace make_simulator and nothing else.

    An end: the step that ends an episode returns its last observation. The next one ignores its action, resets, and
    returns the first observation of the next episode: it is no transition, and its reward does not count (Gymnasium's
    AutoresetMode.NEXT_STEP). A simulator that resets within the same step must hold the first observation back until
    then. To return it at once is a silent error: values would be bootstrapped from the wrong observation.

    device is where the environments live, and rollouts and evaluations run: a CPU, to which the policy is then copied
    in every iteration, or the accelerator, jax.devices()[0], if the environments are of JAX.
    """

    reset: Callable  # () -> state, obs (num_envs, obs_dim); called once before training, and before each evaluation
    step: Callable  # state, action (num_envs, action_dim) -> state, obs, reward, terminated, truncated; to be traced
    obs_dim: int
    low: np.ndarray  # bounds of the action (action_dim,)
    high: np.ndarray
    device: jax.Device
    version: str  # for the record


def make_simulator(env_id: str, env_kwargs: str, seeds: np.ndarray) -> Simulator:
    """EnvPool's environments, one for each of the seeds (num_envs,); StopRun unless it has what fits.

    Training has one of --num-envs environments, each evaluation one with an environment for every episode.
    """
    try:
        kwargs = json.loads(env_kwargs)
        pool = envpool.make(env_id, env_type="gymnasium", num_envs=len(seeds), seed=seeds.tolist(), **kwargs)
        obs_space, action_space = pool.observation_space, pool.action_space
    except Exception as error:  # each of its environments fails in its own way
        hint = "envpool.list_all_envs() names them, --env-kwargs is a JSON object"
        raise StopRun(f"EnvPool has no {env_id} with {env_kwargs} ({type(error).__name__}: {error}); {hint}") from None
    parts = [*obs_space.values()] if isinstance(obs_space, gymnasium.spaces.Dict) else [obs_space]
    for what, space in [*(("observations", part) for part in parts), ("actions", action_space)]:
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            kind = " ".join([type(space).__name__, *([str(space.shape)] if space.shape else [])])
            raise StopRun(f"the {what} of {env_id} are {kind}, not vectors (Box); choose another --env-id")
    with jax.enable_x64(True):  # some of EnvPool's environments speak float64
        handle, _, _, xla_step = pool.xla()

    def reset():
        return handle, np.concatenate(jax.tree.leaves(pool.reset()[0]), -1).astype(np.float32)  # a Dict, by name

    def step(handle, action):
        with jax.enable_x64(True):
            handle, (obs, reward, *ends, _) = xla_step(handle, action.astype(action_space.dtype))
            return handle, jnp.float32(jnp.concatenate(jax.tree.leaves(obs), -1)), jnp.float32(reward), *ends

    bounds, device = (np.float32(action_space.low), np.float32(action_space.high)), jax.devices("cpu")[0]
    version = f"envpool {importlib.metadata.version('envpool')}"  # which has a MuJoCo of its own within
    return Simulator(reset, step, sum(part.shape[0] for part in parts), *bounds, device, version)


class EnvState(NamedTuple):
    """The environments between two steps."""

    simulator: Any  # the simulator's own state, threaded through the steps
    obs: Array  # (num_envs, obs_dim)
    done: Array  # the last step ended an episode, so the next one is the auto-reset
    running: dict[str, Array]  # sums over the episodes under way: basic, addon, quantity, length, each (num_envs,)
    finished: dict[str, Array]  # those of each environment's last episode; all 0 before there is one


class Transitions(NamedTuple):
    """A rollout; leading axes (num_steps, num_envs)."""

    obs: Array  # before the step, not normalised; a rollout's has num_steps + 1 rows, the last one what came last
    action: Array  # before squashing or clipping
    basic_reward: Array
    addon_reward: Array
    terminated: Array
    truncated: Array
    valid: Array  # false on auto-reset steps: they ignore the action and are no transitions


class Env(NamedTuple):
    """A simulator's environments with an add-on task; their step is compiled for their device."""

    reset: Callable  # () -> EnvState
    step: Callable  # EnvState, action (num_envs, action_dim) before squashing or clipping -> EnvState, Transitions
    action_dim: int
    device: jax.Device


def make_env(simulator: Simulator, task: AddonTask, squash: bool) -> Env:
    """Put squashing, the add-on task and the sums of episodes before a simulator, whichever it is."""
    low, high = simulator.low, simulator.high
    if squash and not np.isfinite([low, high]).all():
        raise StopRun("the environment's actions have no bounds, to which squashing could stretch; use --no-squash")

    def reset():
        state, obs = simulator.reset()
        sums = dict.fromkeys(("basic", "addon", "quantity", "length"), np.zeros(len(obs), np.float32))
        return jax.device_put(EnvState(state, obs, np.zeros(len(obs), bool), sums, sums), simulator.device)

    def step(state, action):
        bounded = low + (jnp.tanh(action) + 1) / 2 * (high - low) if squash else jnp.clip(action, low, high)
        inner, obs, reward, terminated, truncated = simulator.step(state.simulator, bounded)
        valid = ~state.done
        reward, terminated, truncated = jnp.where(valid, reward, 0), terminated & valid, truncated & valid
        quantity = jnp.where(valid, task.quantity(state.obs, bounded, obs), 0)
        addon_reward = jnp.where(valid, task.coef * task.reward(quantity), 0)
        step_sums = {"basic": reward, "addon": addon_reward, "quantity": quantity, "length": valid}
        sums, done = jax.tree.map(jnp.add, state.running, step_sums), terminated | truncated
        finished = jax.tree.map(lambda new, old: jnp.where(done, new, old), sums, state.finished)
        running = jax.tree.map(lambda x: jnp.where(done, 0, x), sums)
        transition = Transitions(state.obs, action, reward, addon_reward, terminated, truncated, valid)
        return EnvState(inner, obs, done, running, finished), transition

    return Env(reset, step, len(low), simulator.device)


# -------------------------------------------------------------------------- rollout and update


# What the random numbers of a run are for; each use has seeds of its own.
TRAINING, EVALUATION, NETWORKS, ROLLOUT, UPDATE, PLAY, REFILL = range(7)


def seed_words(seed: int, use: int, iteration: int = 0, size: int = 2) -> np.ndarray:
    """Random uint32 numbers (size,): environments' seeds or a key, independent for different arguments."""
    return np.random.SeedSequence((seed, use, iteration)).generate_state(size)


def wrap_key(words: Array) -> Array:
    """A key for jax.random from seed_words, an argument of compiled functions, which thus serve every seed."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


@partial(jax.jit, static_argnames=("env", "num_steps"))
def rollout(env: Env, num_steps: int, policy: Policy, state: EnvState, key: Array) -> tuple[EnvState, Transitions]:
    """Act with sampled actions for so many steps."""

    def step(state, noise):
        mean, log_std = action_distribution(policy, state.obs)
        return env.step(state, mean + jnp.exp(log_std) * noise)

    noise = jax.random.normal(wrap_key(key), (num_steps, len(state.obs), env.action_dim), jnp.float32)
    state, transitions = lax.scan(step, state, noise)
    return state, transitions._replace(obs=jnp.concatenate([transitions.obs, state.obs[None]]))


@flax.struct.dataclass
class TrainState:
    """What an iteration changes."""

    params: Any  # {"actor", "critic"}
    opt_state: optax.OptState
    obs_stats: RunningStats
    return_stats: RunningStats  # of the discounted returns; their standard deviation is the unit of the critic
    return_trace: Array  # the discounted returns under way, (num_envs,)
    iteration: Array
    policy_rate: Array  # learning rate of the policy, before the schedule bounds it
    actor: Actor = flax.struct.field(pytree_node=False)
    critic: Critic = flax.struct.field(pytree_node=False)

    @property
    def policy(self) -> Policy:
        """The policy that this state has learned."""
        return Policy(self.params["actor"], self.obs_stats, self.actor)


def across_devices(spec: P) -> NamedSharding:
    """A layout over all devices: split along the axis that is "data" in spec, else copied to each."""
    return NamedSharding(jax.sharding.Mesh(jax.devices(), ("data",)), spec)


def num_iterations(args: Args) -> int:
    """How many times a run alternates rollouts and updates."""
    return args.total_timesteps // (args.num_envs * args.num_steps)


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam on clipped gradients, without the learning rate; all parameters as one vector, which is faster on a CPU."""
    return optax.flatten(optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5)))


@partial(jax.jit, static_argnames=("args", "actor", "obs_dim"))
def init_state(args: Args, actor: Actor, obs_dim: int, key: Array) -> TrainState:
    """The state before the first iteration, with a critic of the actor's widths."""
    critic = Critic(actor.hidden_sizes, actor.activation)
    actor_key, critic_key = jax.random.split(wrap_key(key))
    obs = jnp.zeros(obs_dim, jnp.float32)
    params = {"actor": actor.init(actor_key, obs), "critic": critic.init(critic_key, obs)}
    obs_stats = RunningStats(obs, obs + 1, jnp.float32(1e-4))
    return_stats = RunningStats(jnp.float32(0), jnp.float32(1), jnp.float32(1e-4))
    opt_state, return_trace = make_optimizer(args).init(params), jnp.zeros(args.num_envs, jnp.float32)
    statistics, policy_rate = (obs_stats, return_stats, return_trace), jnp.float32(args.learning_rate / 10)
    return TrainState(params, opt_state, *statistics, jnp.int32(0), policy_rate, actor, critic)


def improve(loss: Callable, args: Args, state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
    """Pass over a batch args.update_epochs times, or until args.target_kl; the metrics are the last epoch's means."""
    learning_rate = args.learning_rate * (1 - state.iteration / num_iterations(args) if args.anneal_lr else 1)
    policy_rate = jnp.minimum(learning_rate, state.policy_rate) if args.desired_kl else learning_rate
    rates = {"actor": policy_rate, "critic": learning_rate}
    loss = partial(loss, clip_coef=args.clip_coef, clip_vloss=args.clip_vloss, vf_coef=args.vf_coef)

    @partial(jax.shard_map, mesh=across_devices(P()).mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    def gradient(params, minibatch):  # each device's part of the minibatch has its gradient, and they add up
        grads_and_metrics = jax.grad(loss, has_aux=True)(params, *minibatch, state.actor, state.critic)
        flat, unflatten = ravel_pytree(grads_and_metrics)
        return unflatten(lax.psum(flat, "data"))  # one vector, as every message costs its delay

    def minibatch_step(carry, minibatch):
        params, opt_state = carry
        grads, metrics = gradient(params, minibatch)
        updates, opt_state = make_optimizer(args).update(grads, opt_state)
        steps = {part: jax.tree.map(lambda u, rate=rate: rate * u, updates[part]) for part, rate in rates.items()}
        return (jax.tree.map(jnp.subtract, params, steps), opt_state), metrics

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

    metrics = dict.fromkeys(("policy_loss", "value_loss", "approx_kl", "clip_fraction"), jnp.float32(0))
    carry = (0, wrap_key(key), (state.params, state.opt_state), metrics)
    *_, (params, opt_state), metrics = lax.while_loop(go_on, epoch, carry)
    metrics |= {"learning_rate": jnp.float32(policy_rate), "param_norm": optax.tree.norm(params)}
    policy_rate = rate_step(policy_rate, metrics["approx_kl"], args.desired_kl) if args.desired_kl else policy_rate
    return state.replace(params=params, opt_state=opt_state, policy_rate=jnp.float32(policy_rate)), metrics


def ppo_update(
    loss: Callable, args: Args, state: TrainState, transitions: Transitions, reward: Array, gamma: Array, key: Array
) -> tuple[TrainState, Metrics]:
    """Improve policy and critic by a rollout, whose reward (num_steps, num_envs) is all that they are to maximise."""
    obs = normalise(transitions.obs, state.obs_stats, state.actor.obs_clip)
    value = state.critic.apply(state.params["critic"], obs)  # (num_steps + 1, num_envs)
    log_prob = gaussian_log_prob(transitions.action, *state.actor.apply(state.params["actor"], obs[:-1]))

    # One running scale for the whole reward keeps the proportions of its terms.
    valid, terminated, truncated = transitions.valid, transitions.terminated, transitions.truncated
    reward = jnp.where(valid, reward, 0)
    returns = discounted_sum(state.return_trace, reward, gamma * valid)  # an auto-reset step starts from 0
    return_stats = merge_stats(state.return_stats, returns, valid)
    reward_scale = jnp.sqrt(return_stats.var + 1e-8)
    advantage = gae(reward / reward_scale, value, terminated, truncated, gamma, args.gae_lambda)
    batch = Batch(obs[:-1], transitions.action, log_prob, advantage, value[:-1], advantage + value[:-1], valid)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    state, metrics = improve(loss, args, state, batch, key)

    rewards = {"basic_reward": transitions.basic_reward, "addon_reward": transitions.addon_reward}
    metrics |= {name: masked_mean(x, valid) for name, x in rewards.items()} | {"reward_scale": reward_scale}
    state = state.replace(return_stats=return_stats, return_trace=returns[-1], iteration=state.iteration + 1)
    return lax.with_sharding_constraint((state, metrics), across_devices(P()))


@flax.struct.dataclass
class ResidualState(TrainState):
    """TrainState with the multiplier of the budget and its start, (2,); 0 until the add-on reward has a spread."""

    multiplier: Array
    snapshots: Policy  # with a leading axis, num_snapshots


def falling_weights(args: Args, state: ResidualState, addon_reward: Array, valid: Array) -> tuple[Array, ...]:
    """omega', alpha_hat, and what they are made of: the multiplier of the budget, and its start.

    At the start a nat costs 0.3 standard deviations of the add-on reward, so that its unit does not matter. Of a prior
    that is soft-optimal at alpha a nat is worth omega alpha in basic reward. What the start falls short of that is the
    weight of a KL penalty, in omega' and alpha_hat alike: a small wish should not move the policy far. A third of the
    multiplier falls to 0 over 70 % of the run, in alpha_hat. Where nothing says what a nat costs, it is 1.
    """
    spread = jnp.sqrt(masked_mean((addon_reward - masked_mean(addon_reward, valid)) ** 2, valid))
    multiplier, start = jnp.where(state.multiplier > 0, state.multiplier, 0.3 * spread)
    kl_weight = jnp.maximum(0, args.omega * args.prior_alpha - start)
    multiplier = jnp.where(multiplier + kl_weight > 0, multiplier, 1.0)
    falling = multiplier / 3 * jnp.maximum(0, 1 - state.iteration / num_iterations(args) / 0.7)
    return multiplier + kl_weight, falling + kl_weight, multiplier, start


def take_snapshot(args: Args, state: Any) -> Any:
    """The state after an iteration, its policy put among the snapshots: they end equal parts of a run but the last."""
    place = (state.iteration * (args.num_snapshots + 1) - 1) // num_iterations(args)  # past the end in the last part
    snapshots = jax.tree.map(lambda x, y: x.at[place].set(y, mode="drop"), state.snapshots, state.policy)
    return state.replace(snapshots=snapshots)


@partial(jax.jit, static_argnames="args")
def residual_update(
    args: Args, prior: Policy, state: TrainState, transitions: Transitions, key: Array
) -> tuple[TrainState, Metrics]:
    """One iteration of Residual PPO; a ResidualState, unless omega' is constant and args.num_snapshots 0.

    Without args.jacobian both densities are those of the action before tanh. The density of tanh(u) grows without bound
    where it saturates: of a soft-optimal prior this belongs to log pi, but of one that is optimal for nothing, as a
    clone, it makes states attractive in which the prior saturates, and in them it may know nothing.
    """
    obs, action, valid = transitions.obs[:-1], transitions.action, transitions.valid
    log_prob = policy_log_prob(state.policy, obs, action)
    prior_log_prob = policy_log_prob(prior, obs, action)
    jacobian = tanh_log_det(action) if prior.actor.squash and args.jacobian is False else 0
    shift = masked_mean(mean_shift(state.policy, prior, obs), valid)
    end = termination_reward(transitions.terminated, args.omega * args.survival_reward, args.gamma)
    omega_prime, alpha_hat = args.omega_prime, args.alpha_hat
    if omega_prime is None:
        omega_prime, falling, multiplier, start = falling_weights(args, state, transitions.addon_reward, valid)
        alpha_hat = falling if alpha_hat is None else alpha_hat
    log_probs = prior_log_prob + jacobian, log_prob + jacobian
    reward = residual_reward(transitions.addon_reward, *log_probs, end, omega_prime, alpha_hat)
    state, metrics = ppo_update(ppo_loss, args, state, transitions, reward, args.gamma, key)
    if not args.init_from_prior:  # else keep the prior's normaliser, so that the policy changes by learning alone
        state = state.replace(obs_stats=merge_stats(state.obs_stats, obs, valid))
    if args.omega_prime is None:
        following = dual_step(multiplier, shift, args.budget / args.omega, start)
        state = state.replace(multiplier=jnp.stack([following, start]))
    metrics |= {"kl_to_prior": masked_mean(log_prob - prior_log_prob, valid), "mean_shift": shift}
    if args.num_snapshots:
        state = take_snapshot(args, state)
    weights = {"omega_prime": omega_prime, "alpha_hat": alpha_hat, "survival_reward": args.survival_reward}
    metrics |= {name: jnp.float32(x) for name, x in weights.items()}
    return state, {"entropy": -masked_mean(log_prob, valid)} | metrics


# ------------------------------------------------------------------------------ train and main


def train(env: Env, update: Callable, args: Args, state: TrainState, log: Callable) -> TrainState:
    """Alternate rollouts and updates, (state, transitions, key) -> (state, metrics).

    log(iteration, state, metrics) hears of each iteration, counted from 1.
    """
    env_state, state = env.reset(), jax.device_put(state, across_devices(P()))
    for iteration in range(int(jax.device_get(state.iteration)), num_iterations(args)):
        policy, key = jax.device_put((state.policy, seed_words(args.seed, ROLLOUT, iteration)), env.device)
        env_state, transitions = rollout(env, args.num_steps, policy, env_state, key)
        key = jax.device_put(seed_words(args.seed, UPDATE, iteration), across_devices(P()))
        state, metrics = update(state, jax.device_put(transitions, across_devices(P(None, "data"))), key)
        log(iteration + 1, state, metrics | jax.device_get(episode_metrics(env_state.finished)))
    return state


def log_kept(log: Callable, prior_return: float, iteration: int, state: Any, metrics: Metrics) -> None:
    """Log an iteration, with the share of the prior's basic return, if that is above 0, that the last episodes have."""
    kept = {"kept_return": metrics["basic_return"] / prior_return} if prior_return > 0 else {}
    log(iteration, state, metrics | kept)


def main(args: Args, open_run: Callable) -> None:
    """Customise the prior. open_run is Run, below, or what stands for it in a copy: the log, and who keeps results."""
    prior, prior_info = load_policy(args.prior)
    constant = args.omega_prime is not None or args.omega == 0
    args = resolve_args(args, prior, prior_info, PPO_SCALES if constant else None)
    budget = None if constant else min(2.0, prior.actor.action_dim / 2)
    defaults = {"budget": budget, "jacobian": constant or args.prior_alpha > 0}
    args = dataclasses.replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})
    simulator_of = partial(make_simulator, args.env_id, args.env_kwargs)
    simulator = simulator_of(env_seeds(args.seed, TRAINING, args.num_envs))
    task, actor = ADDON_TASKS[args.addon]._replace(coef=args.addon_coef), prior.actor
    actor = dataclasses.replace(actor, hidden_sizes=args.hidden_sizes)
    state = init_state(args, actor, simulator.obs_dim, seed_words(args.seed, NETWORKS))
    if args.init_from_prior:
        state = state.replace(params=state.params | {"actor": prior.params}, obs_stats=prior.obs_stats)
    snapshots = jax.tree.map(lambda x: jnp.repeat(x[None], args.num_snapshots, 0), state.policy)
    state = ResidualState(**vars(state), multiplier=jnp.zeros(2, jnp.float32), snapshots=snapshots)

    def eval_env(num_policies=1):  # new environments, which start alike
        seeds = np.tile(env_seeds(args.seed, EVALUATION, args.eval_episodes), num_policies * len(ACTIONS))
        return make_env(simulator_of(seeds), task, actor.squash)

    def play(policies, noise=0):
        return evaluate(eval_env(len(policies)), policies, args.omega, args.seed + noise)

    with open_run(args, simulator, task, state) as run:
        results = play({"prior": prior})
        if args.survival_reward is None:  # nor does the prior's file say it
            c = measured_survival_reward(eval_env(), prior, args.prior_alpha, args.seed)
            args = dataclasses.replace(args, survival_reward=c)
        log = partial(log_kept, run.write, results["prior"]["stochastic"]["basic"].mean())
        update = partial(residual_update, args, jax.device_put(prior, across_devices(P())))
        state = train(make_env(simulator, task, actor.squash), update, args, run.state, log)
    policy, results = state.policy, results | play({"customised": state.policy})
    if args.num_snapshots:
        snapshots = (jax.tree.map(lambda x, i=i: x[i], state.snapshots) for i in range(args.num_snapshots))
        policy, results = best_if_lost(play, results, [prior, *snapshots, policy])
    run.save_policy(policy, args.prior_alpha if policy is prior else args.alpha_hat or 0.0, results["customised"])
    run.finish(task.label, results)


def measured_survival_reward(env: Env, prior: Policy, alpha: float, seed: int) -> float:
    """c = mean r - alpha mean log pi over 1000 steps of the prior in each environment, but at least 0.

    Without steps that terminate: what they pay, as where they reach a goal, is not what living on would pay.
    """
    policy, key = jax.device_put((prior, seed_words(seed, PLAY)), env.device)
    _, transitions = rollout(env, 1000, policy, env.reset(), key)
    log_prob = policy_log_prob(policy, transitions.obs[:-1], transitions.action)
    lasting = transitions.valid & ~transitions.terminated
    return max(0.0, float(masked_mean(transitions.basic_reward - alpha * log_prob, lasting)))


PPO_SCALES = 3, 1 / 3  # omega' = 3 omega alpha, alpha_hat = alpha / 3 where they are constants that are not given


def resolve_args(args: Args, prior: Policy, prior_info: dict[str, str], scales: tuple[float, float] | None) -> Args:
    """The arguments, with what is not given set by the prior and its file; StopRun if the file does not say it.

    A soft-optimal prior asks for omega' = omega alpha. The log-probability of a trained one understates its reward
    where customisation goes; hence scales, of omega' and alpha_hat (how they were found: results/defaults.md). Without
    scales the run finds both by itself, and they stay None here.
    """
    alpha = float(prior_info.get("alpha", 0)) if args.prior_alpha is None else args.prior_alpha
    plain, known = args.omega_prime is not None, prior_info.get("survival_reward")
    if alpha == 0 and scales and None in (args.omega_prime, args.alpha_hat):
        raise StopRun("no alpha above 0 is known of the prior; give --prior-alpha, or --omega-prime and --alpha-hat")
    defaults = {
        "prior_alpha": alpha,
        "omega_prime": scales and scales[0] * args.omega * alpha,
        "alpha_hat": scales and scales[1] * alpha,
        "num_snapshots": 0 if plain else 10,
        "survival_reward": 0.0 if plain or (args.gamma == 1 and not known) else known and float(known),
        "gamma": min(0.99, float(prior_info.get("gamma", 0.99))),  # a fresh critic learns no longer horizon in time
        "hidden_sizes": prior.actor.hidden_sizes,
    }
    args = dataclasses.replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})
    if args.init_from_prior and args.hidden_sizes != prior.actor.hidden_sizes:
        raise StopRun(f"--hidden-sizes are not the prior's {prior.actor.hidden_sizes}; add --no-init-from-prior")
    if args.gamma == 1 and args.survival_reward:
        raise StopRun("with --gamma 1 the end of an episode costs without bound; add --survival-reward 0")
    return args


# --------------------------------------------------------------------------------- evaluation


ACTIONS = ("stochastic", "deterministic")
Results = dict[str, dict[str, dict[str, np.ndarray]]]  # what evaluate returns


def env_seeds(seed: int, use: int, num_envs: int) -> np.ndarray:
    """Seeds of environments (num_envs,), below 2^31, as EnvPool wants them; use is TRAINING or EVALUATION."""
    return seed_words(seed, use, size=num_envs) // 2


@jax.jit
def episode_metrics(finished: Metrics) -> Metrics:
    """Means over the environments' last episodes, with episodes_seen, without which they are 0 and mean nothing."""
    seen, per_step = finished["length"] > 0, finished["quantity"] / jnp.maximum(finished["length"], 1)
    means = {name: masked_mean(x, seen) for name, x in (finished | {"quantity": per_step}).items()}
    returns = {"basic_return": means["basic"], "addon_return": means["addon"]}
    returns |= {"total_return": means["basic"] + means["addon"], "addon_quantity": means["quantity"]}
    return returns | {"episode_length": means["length"], "episodes_seen": seen.sum()}


@partial(jax.jit, static_argnames="env")
def first_episodes(env: Env, policies: list[Policy], state: EnvState, key: Array) -> Metrics:
    """Sums over each environment's first episode after a reset, those of EnvState and that of log pi.

    Each policy has an equal share of the environments, half of it for each of ACTIONS, and the same noise.
    """

    def step(carry):
        key, state, log_prob = carry
        key, noise_key = jax.random.split(key)
        shape = len(state.obs) // len(policies) // len(ACTIONS), env.action_dim
        noise = jax.random.normal(noise_key, shape, jnp.float32)
        noise = jnp.concatenate([noise, jnp.zeros_like(noise)])
        actions, log_probs = [], []
        for policy, obs in zip(policies, jnp.split(state.obs, len(policies)), strict=True):
            mean, log_std = action_distribution(policy, obs)
            actions.append(mean + jnp.exp(log_std) * noise)
            log_probs.append(policy_log_prob(policy, obs, actions[-1]))
        first = state.finished["length"] == 0
        after, _ = env.step(state, jnp.concatenate(actions))
        finished = jax.tree.map(lambda new, old: jnp.where(first, new, old), after.finished, state.finished)
        return key, after._replace(finished=finished), log_prob + jnp.where(first, jnp.concatenate(log_probs), 0)

    start = (wrap_key(key), state, jnp.zeros_like(state.finished["length"]))
    _, state, log_prob = lax.while_loop(lambda carry: (carry[1].finished["length"] == 0).any(), step, start)
    return state.finished | {"log_prob": log_prob}


def evaluate(env: Env, policies: dict[str, Policy], omega: float, seed: int) -> Results:
    """Play each policy with sampled and with deterministic actions, an episode in each environment of its share.

    Returns: {policy: {"stochastic", "deterministic"}} -> {"objective", "total", "basic", "addon", "quantity", "length",
    "log_prob"} -> array (episodes,); objective = omega basic + addon; total = basic + addon; quantity, and log_prob,
    which is log pi of the actions in nats, are means over the episode's steps.
    """
    players, key = jax.device_get((list(policies.values()), seed_words(seed, PLAY)))
    players, key = jax.device_put((players, key), env.device)
    sums, shape = jax.device_get(first_episodes(env, players, env.reset(), key)), (len(policies), len(ACTIONS), -1)
    columns = {name: np.float64(x).reshape(shape) for name, x in sums.items()}
    columns |= {name: columns[name] / columns["length"] for name in ("quantity", "log_prob")}
    columns["total"] = columns["basic"] + columns["addon"]
    columns["objective"] = omega * columns["basic"] + columns["addon"]
    return {
        policy: {actions: {name: x[i, j] for name, x in columns.items()} for j, actions in enumerate(ACTIONS)}
        for i, policy in enumerate(policies)
    }


def best_if_lost(play: Callable, results: Results, policies: list[Policy]) -> tuple[Policy, Results]:
    """The last of the policies, or, if it is worse than the first, the prior, the one with the best score.

    Score: mean objective of sampled and deterministic actions; nothing learns from it. Worse: by over 5 % and two
    standard errors. Results are evaluate's, as play is; those of a last policy that is not kept are named "last".
    """
    before, after = (np.ravel([x["objective"] for x in results[name].values()]) for name in ("prior", "customised"))
    error = np.sqrt((before.var() + after.var()) / len(before))
    if before.mean() - after.mean() <= max(0.05 * abs(before.mean()), 2 * error):
        return policies[-1], results
    score = {i: np.mean([x["objective"] for x in y.values()]) for i, y in play(dict(enumerate(policies)), 1).items()}
    best = policies[max(score, key=score.get)]
    return best, {"prior": results["prior"], "last": results["customised"]} | play({"customised": best})


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


def policy_bytes(policy: Policy, args: Args, alpha: float, results: dict[str, dict], training: dict) -> bytes:
    """A policy file (safetensors), with alpha, evaluate's results for the policy, and how it was trained."""
    actor, sampled = policy.actor, results["stochastic"]
    tensors = {name: np.ascontiguousarray(x) for name, x in policy_tensors(jax.device_get(policy)).items()}
    metadata = {"format": "pt", "env_id": args.env_id, "alpha": str(alpha), "gamma": str(args.gamma)}
    metadata |= {"squash": str(actor.squash).lower(), "hidden_sizes": json.dumps(actor.hidden_sizes)}
    metadata |= {"activation": actor.activation, "obs_clip": str(actor.obs_clip)}
    if actor.state_dependent_std:
        metadata["log_std"] = actor.log_std_form
    returns = {actions: f"{x['basic'].mean():.0f} ± {x['basic'].std():.0f}" for actions, x in results.items()}
    metadata["returns"] = ", ".join(f"{actions} {text}" for actions, text in returns.items())
    metadata["training"] = json.dumps(training, default=str)
    # mean r - alpha mean log pi over the steps, r the objective's reward
    soft_returns = sampled["objective"] - alpha * sampled["log_prob"] * sampled["length"]
    metadata["survival_reward"] = str(soft_returns.sum() / sampled["length"].sum())
    metadata["sha256"] = policy_digest(tensors, metadata)
    return safetensors.numpy.save(tensors, metadata)


def load_policy(path: Path) -> tuple[Policy, dict[str, str]]:
    """Read a policy file: the policy, in NumPy, and the metadata. It must be sound: check_policy_file says if not."""
    data = path.read_bytes()
    tensors = {name: x for name, x in safetensors.numpy.load(data).items() if not name.startswith("critic.")}
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    hidden_sizes, form = tuple(json.loads(metadata["hidden_sizes"])), metadata.get("log_std", "clip -20 2")
    kind = (metadata["activation"], "actor_logstd.weight" in tensors, metadata["squash"] == "true")
    action_dim = len(tensors[f"actor_mean.{2 * len(hidden_sizes)}.bias"])
    actor = Actor(action_dim, hidden_sizes, *kind, float(metadata.get("obs_clip", 10)), form)
    stats = RunningStats(tensors.pop("obs_mean"), tensors.pop("obs_var"), np.float32(1))
    params = {tuple(name.replace("weight", "kernel").rsplit(".", 1)): x.T for name, x in tensors.items()}
    return Policy({"params": flax.traverse_util.unflatten_dict(params)}, stats, actor), metadata


# A copy for a project of your own may end here; CONTRIBUTING.md shows the few lines that then stand for all below.

# ------------------------------------------------------------------------- run folder and log


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


def provenance(args: Args, simulator: str) -> dict[str, Any]:
    """The arguments, and what else results depend on; without git, no commit."""
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    return {
        "command": shlex.join(sys.argv),
        "args": dataclasses.asdict(args),
        "git_commit": git.stdout.strip() or None,
        "packages": {"python": sys.version.split()[0]} | packages,
        "simulator": simulator,
        "device": jax.devices()[0].device_kind,
    }


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


SHOWN = ("basic_return", "kept_return", "addon_return", "total_return")  # if there are such
SHOWN += ("kl_to_prior", "entropy", "omega_prime", "alpha_hat")
CAUSES = {  # of numbers that are not finite, in the order of what follows from what
    "basic_reward": "the environment's own reward",
    "addon_reward": "the reward of the add-on task {addon}, whose quantity {label} or reward wants mending,",
    "kl_to_prior": "log pi of the prior, whose deviation is too small or whose mean is too far away,",
}


class Run(contextlib.AbstractContextManager):
    """A run's folder, and the log of its training: metrics.csv, TensorBoard (--track mirrors it), the terminal.

    The folder is this process's as long as it lives. However the training ends, short of a kill, its last state whose
    metrics are finite is in the folder.
    """

    def __init__(self, args: Args, simulator: Simulator, task: AddonTask, state: Any):
        """Make the folder, or go on with that of --resume, whose rows after its state are dropped.

        Raises: StopRun if it is not to be had, or if task, policy and simulator do not go together.
        """
        check_simulator(args, simulator, task, state)
        name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.time():.3f}".replace("/", "-")
        self.folder, self.args = args.resume or args.runs_dir / name, args
        self.about, self.label = provenance(args, simulator.version), task.label
        if args.track:
            start_tracking(args, self.folder.name)
        if not args.resume:
            make_folder(self.folder, args, self.about)
        try:
            lock = os.open(self.folder / "args.json", os.O_RDWR)  # NFS locks only what is open for writing
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StopRun(f"another process goes on with the run {self.folder}; wait for it") from None
        self.state = load_checkpoint(self.folder, state) if args.resume else state
        CONSOLE.print(f"{args.env_id} on {jax.devices()[0].device_kind}, run folder {self.folder}")
        names = ("omega", "budget", "omega_prime", "alpha_hat", "survival_reward", "alpha", "ent_coef", "entropy")
        weights = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
        shown = (f"{k} = {x:.4g}" if isinstance(x, float) else f"{k} = {x}" for k, x in weights.items())
        CONSOLE.print(f"add-on   {task.coef:g} x the reward on {task.label}\nweights  {', '.join(shown)}")

        self.iteration_steps = args.num_envs * args.num_steps
        self.total = args.total_timesteps - args.total_timesteps % self.iteration_steps
        first_step, path = int(jax.device_get(self.state.iteration)) * self.iteration_steps, self.folder / "metrics.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
        rows = rows[:1] + [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= first_step]
        write_atomic(path, "".join(",".join(row) + "\n" for row in rows).encode())
        self.columns = rows[0] if rows else []  # those of the version that began the run
        self.csv = path.open("a", buffering=1)
        self.tensorboard = tensorboardX.SummaryWriter(str(self.folder), purge_step=first_step + 1)
        self.bar = rich.progress.Progress(console=CONSOLE, refresh_per_second=2)
        self.bar.disable = not (args.progress and CONSOLE.is_terminal)
        self.task = self.bar.add_task("starting", total=self.total, completed=first_step)
        self.bar.start()
        self.written_at = time.time()
        self.start = self.written_at - (float(rows[-1][1]) if len(rows) > 1 else 0)  # of the clock, less interruptions
        self.saved_at = self.next_report = self.next_line = self.signal = self.warned = 0
        self.handlers = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, kind: Any, error: Any, *_: Any) -> None:
        """Keep the last state."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.stop()
        full = isinstance(error, OSError)  # a full disk, say: then the state before is the last good one
        with contextlib.suppress(OSError) if full else contextlib.nullcontext():
            self.save_checkpoint()
            self.csv.close()
            self.tensorboard.close()

    def interrupt(self, number: int, _: Any) -> None:
        """Let the first Ctrl-C, or a SIGTERM, end the run after the iteration under way, a second one at once."""
        self.signal = number
        signal.signal(number, self.handlers[number])

    def save_checkpoint(self) -> None:
        """Write the state, once what was logged until then is on the disk."""
        self.csv.flush()
        self.tensorboard.flush()
        write_atomic(self.folder / "checkpoint.msgpack", flax.serialization.to_bytes(jax.device_get(self.state)))
        self.saved_at = time.time()

    def write(self, iteration: int, state: Any, metrics: Metrics) -> None:
        """Log an iteration: a row always, the rest about every second, a plain line every ten, and all at the end.

        Raises: StopRun if metrics are not finite, or after a signal.
        """
        metrics = jax.device_get(metrics)
        if bad := [name for name, value in metrics.items() if not np.isfinite(value)]:
            cause = next((text for name, text in CAUSES.items() if name in bad), None)
            names = {"addon": getattr(self.args, "addon", ""), "label": self.label}
            what = f"{cause.format(**names)} is" if cause else f"{', '.join(bad)} are"
            what += f" not finite in iteration {iteration}; the state before it is in {self.folder}"
            raise StopRun(what + ("" if cause else "; try a lower learning rate"), exit_code=1)
        if (seen := metrics.pop("episodes_seen")) == 0:
            metrics |= {name: np.nan for name in metrics if name.endswith(("_return", "_quantity", "_length"))}
        if seen == self.args.num_envs and metrics.get("kept_return", 1) < 0.5 and not self.warned:
            CONSOLE.print("note     the basic return is below half of the prior's; a larger --omega keeps more of it")
            self.warned = True
        self.state, global_step, now = state, iteration * self.iteration_steps, time.time()
        speed, self.written_at = self.iteration_steps / (now - self.written_at), now
        row = {"global_step": global_step, "elapsed_s": f"{now - self.start:.3f}", "steps_per_s": f"{speed:.0f}"}
        row |= {name: f"{value:.6g}" for name, value in metrics.items()}
        if not self.columns:
            self.columns = list(row)
            print(*self.columns, sep=",", file=self.csv)
        print(*(row.get(name, "nan") for name in self.columns), sep=",", file=self.csv)
        if now >= self.next_report or global_step >= self.total or self.signal:
            self.next_report = now + 1
            self.report(global_step, speed, {name: x for name, x in metrics.items() if np.isfinite(x)})
        if self.signal:
            what = f"{signal.Signals(self.signal).name}: stopped, continue with: python {shlex.quote(sys.argv[0])}"
            raise StopRun(f"{what} --resume {shlex.quote(str(self.folder))}", 128 + self.signal)
        if now - self.saved_at >= self.args.checkpoint_interval:
            self.save_checkpoint()

    def report(self, global_step: int, speed: float, metrics: dict[str, np.ndarray]) -> None:
        """Show an iteration in TensorBoard and on the terminal."""
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, global_step)
        shown = [(name.removesuffix("_return").replace("_prime", "'"), metrics.get(name)) for name in SHOWN]
        text = " ".join([f"{speed:,.0f} steps/s", *(f"{name} {x:.4g}" for name, x in shown if x is not None)])
        self.bar.update(self.task, completed=global_step, description=text)
        if self.bar.disable and (time.time() >= self.next_line or global_step >= self.total):
            self.next_line = time.time() + 10
            CONSOLE.print(f"{global_step / self.total:4.0%}  {(self.total - global_step) / speed:5.0f} s left  {text}")

    def save_policy(self, policy: Policy, alpha: float, results: dict[str, dict]) -> None:
        """Write the policy file, with alpha and evaluate's results for this policy."""
        write_atomic(self.folder / "policy.safetensors", policy_bytes(policy, self.args, alpha, results, self.about))

    def finish(self, quantity: str, results: Results) -> None:
        """Draw, and write the evaluation, with which the run counts as complete; then show it."""
        plot_learning_curve(self.folder)
        statistics = {"mean": np.mean, "std": np.std, "episodes": np.ndarray.tolist}
        content = {name: {k: jax.tree.map(f, x) for k, f in statistics.items()} for name, x in results.items()}
        write_atomic(self.folder / "eval.json", json.dumps(content, indent=1).encode())
        CONSOLE.print(results_table(quantity, results))
        where, here = shlex.quote(str(self.folder)), Path(__file__).resolve().parent
        player = next((path for path in (here / "enjoy.py", here.parent / "enjoy.py") if path.exists()), "enjoy.py")
        watch = f"python {shlex.quote(os.path.relpath(player))} {where} --window"
        CONSOLE.print(f"policy, metrics and curves are in {where}; to watch it: {watch}")


def make_folder(folder: Path, args: Args, about: dict[str, Any]) -> None:
    """Make a run's folder, with args.json, and prior.safetensors if there is a policy to begin with; StopRun if not."""
    source = getattr(args, "prior", None) or getattr(args, "init_from", None)
    try:
        prior = source and source.read_bytes()
        folder.mkdir(parents=True)
        if prior:
            write_atomic(folder / "prior.safetensors", prior)
        write_atomic(folder / "args.json", json.dumps(about, indent=2, default=str).encode())
    except OSError as error:
        raise StopRun(f"cannot write to {folder}: {error.strerror}; choose another --runs-dir") from None


def start_tracking(args: Args, name: str) -> None:
    """Begin a run of Weights & Biases, or go on with it; StopRun if that is not to be had."""
    import wandb

    where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": name, "id": name}
    try:
        wandb.init(**where, resume="allow", config=vars(args), sync_tensorboard=True)
    except Exception as error:  # a login, a name, a network
        raise StopRun(f"--track: Weights & Biases does not start ({error}); see wandb login, WANDB_MODE", 1) from None


def results_table(quantity: str, results: Results) -> rich.table.Table:
    """Mean ± standard deviation over the episodes of each policy but "last", with either actions; quantity's name."""
    columns = {f"{policy}\n{how}": x for policy, row in results.items() if policy != "last" for how, x in row.items()}
    headers = (rich.table.Column(header, justify="right", no_wrap=True) for header in columns)
    table = rich.table.Table("", *headers, box=rich.box.SIMPLE_HEAD)
    for name, digits in {"objective": 0, "total": 0, "basic": 0, "addon": 0, "quantity": 3, "length": 0}.items():
        cells = [f"{x[name].mean():.{digits}f} ± {x[name].std():.{digits}f}" for x in columns.values()]
        table.add_row({"addon": "add-on", "quantity": quantity}.get(name, name), *cells)
    first, last, *_ = [*results.values()] * 2  # the prior, if there is one, and the run's last policy
    for name, share in {"objective": 0.05, "basic": 0.3}.items():  # if both fell, the latter is said
        means = {actions: (first[actions][name].mean(), last[actions][name].mean()) for actions in ACTIONS}
        if fell := {actions: x for actions, x in means.items() if x[1] < x[0] - share * abs(x[0])}:
            what = ", ".join(f"with {actions} actions from {x[0]:.0f} to {x[1]:.0f}" for actions, x in fell.items())
            table.caption = f"{name} fell {what}; a larger --omega keeps nearer to the prior"
    if "last" in results:
        table.caption = f"{table.caption or 'the objective fell'}; kept is the best of the snapshots and the prior"
    return table


def plot_learning_curve(run_dir: Path) -> None:
    """Draw metrics.csv into learning_curve.png."""
    import matplotlib.figure

    data = np.atleast_1d(np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True))
    shown = [name for name in SHOWN if name in data.dtype.names]
    figure = matplotlib.figure.Figure(figsize=(3 * -(-len(shown) // 2), 5), layout="constrained")
    grid = figure.subplots(2, -(-len(shown) // 2), sharex=True).flat
    for name, axes in zip(shown, grid, strict=False):
        axes.plot(data["global_step"], data[name])
        axes.set_title(name.replace("_", " "))
    for axes in grid:  # of an odd number the last
        axes.remove()
    figure.supxlabel("environment steps")
    figure.savefig(run_dir / "learning_curve.png", dpi=120)


# -------------------------------------------------------- checks, command line and processes


def choose_addon(args: Args) -> Args:
    """The arguments with the name of an add-on task that the environment has; StopRun if there is none."""
    choices = [name for name, task in ADDON_TASKS.items() if task.env in (args.env_id.rpartition("-v")[0], "")]
    if args.addon == "default" and len(choices) == 1:
        raise StopRun(f"{args.env_id} has no add-on task yet; add one to ADDON_TASKS, or give --addon none")
    name = {"default": choices[0], "None": "none"}.get(args.addon, args.addon)
    if name not in choices:
        raise StopRun(f"--addon {name} is no task for {args.env_id}; choose from {', '.join(choices)}, or add your own")
    return dataclasses.replace(args, addon=name)


def check_simulator(args: Args, simulator: Simulator, task: AddonTask, state: Any) -> None:
    """StopRun unless the policy fits the simulator, and the task can be computed: in NumPy, as in enjoy.py, and here.

    NumPy knows an index that is out of range, and tracing knows what cannot be compiled.
    """
    ours, theirs = (len(state.obs_stats.mean), state.actor.action_dim), (simulator.obs_dim, len(simulator.low))
    if ours != theirs:
        what = "the policy has {} observations and {} actions, {} has {} and {}; change --env-id, or the policy"
        raise StopRun(what.format(*ours, args.env_id, *theirs))
    obs = np.tile(np.float32(jax.device_get(simulator.reset()[1])[0]), (2, 3, 1))  # so that t[7] is no t[..., 7]
    action = np.tile(np.clip(np.zeros_like(simulator.low), simulator.low, simulator.high), (2, 3, 1))
    try:
        with np.errstate(all="ignore"):
            reward = task.reward(task.quantity(obs, action, obs))
        shape = jax.eval_shape(lambda s, a, t: task.reward(task.quantity(s, a, t)), obs, action, obs).shape
        if not np.shape(reward) == shape == (2, 3):
            raise ValueError(f"it has shape {np.shape(reward)} for observations of shape {obs.shape}")
        if np.iscomplexobj(reward) or not np.isfinite(reward).all():
            raise ValueError(f"it is {np.ravel(reward)[0]} for the first observation")
    except Exception as error:  # a task is code of the user's
        how = "use indices as in t[..., 3], operators, abs, and functions of xp, as xp.minimum; no if, min, float or np"
        what = f"{getattr(args, 'addon', 'none')} cannot be computed: {type(error).__name__}"
        raise StopRun(f"the add-on task {what}: {(str(error).splitlines() or [''])[0]}; {how}") from None


def find_prior(args: Args) -> Args:
    """The arguments with the prior's file, which is sound; says what it is, and what to beware of. StopRun if none."""
    path = args.prior or default_prior(args.env_id)
    check_policy_file(path, args.env_id)
    info = load_policy(path)[1]
    known = (f"{name} {info[name]}" for name in ("env_id", "alpha", "gamma", "returns") if name in info)
    CONSOLE.print(f"prior    {path}: {', '.join(known)}")
    if info["env_id"] != args.env_id:
        CONSOLE.print(f"note     the prior is of {info['env_id']}, and need not be as good in {args.env_id}")
    gamma = float(info.get("gamma", 0.99))
    if gamma != (args.gamma or min(0.99, gamma)):
        CONSOLE.print("note     gamma is not the prior's: log pi stands for its reward only roughly")
    if "survival_reward" not in info and args.survival_reward is args.omega_prime is None:
        CONSOLE.print("note     the prior's file names no survival reward, which is measured of the prior's own steps")
    return dataclasses.replace(args, prior=path)


def default_prior(env_id: str) -> Path:
    """priors/<env-id>.safetensors in the working directory, beside this script or one folder up: the first there is."""
    name, here = Path("priors") / f"{env_id}.safetensors", Path(__file__).resolve().parent
    places = (name, here / name, here.parent / name)
    return next((path for path in places if path.exists()), name)


def check_policy_file(path: Path, env_id: str) -> None:
    """StopRun if a policy file is missing, damaged, for another environment, or none that load_policy can read."""
    try:
        data = path.read_bytes()
        check_metadata(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {}), env_id)
        policy, metadata = load_policy(path)
        tensors, key = policy_tensors(policy), jax.ShapeDtypeStruct((2,), jnp.uint32)
        obs = jax.ShapeDtypeStruct(tensors["obs_mean"].shape, jnp.float32)
        expected = Policy(jax.eval_shape(policy.actor.init, key, obs), RunningStats(obs, obs, obs), policy.actor)
        check_arrays(tensors, jax.eval_shape(policy_tensors, expected))
        if metadata.get("sha256", digest := policy_digest(tensors, metadata)) != digest:
            raise ValueError("it is damaged (its sha256 does not match); copy or export it anew")
        if "log_std" in metadata and not policy.actor.state_dependent_std:
            raise ValueError("it has log_std, which is for a deviation that depends on the state; leave that key out")
        if (tensors["obs_var"] < 0).any() or np.abs(tensors.get("actor_logstd", 0)).max() > 10:
            raise ValueError("obs_var has negative entries, or actor_logstd some beyond ±10, too narrow for float32")
    except FileNotFoundError:
        raise StopRun(f"there is no policy {path}; train one with train_prior_ppo.py, or name a file") from None
    except Exception as error:  # a damaged file can fail in any way
        raise StopRun(f"the policy {path} cannot be used: {type(error).__name__}: {error}") from None


def check_metadata(metadata: dict[str, str], env_id: str) -> None:
    """ValueError unless a policy file's metadata are as priors/README.md describes them, and for this environment."""
    required, numbers = {"env_id", "squash", "hidden_sizes", "activation"}, {"alpha", "gamma", "survival_reward"}
    known = required | numbers | {"obs_clip", "log_std", "measured_alpha", "format", "returns", "training", "sha256"}
    if wrong := (required - metadata.keys()) | (metadata.keys() - known):
        raise ValueError(f"the metadata {sorted(wrong)} are missing or unknown")
    if metadata["env_id"].rpartition("-v")[0] != env_id.rpartition("-v")[0]:
        raise ValueError(f"it is for {metadata['env_id']}, not {env_id}; change --env-id or the policy")
    if metadata["squash"] not in ("true", "false") or metadata["activation"] not in ("tanh", "relu", "elu", "silu"):
        raise ValueError("its squash is neither true nor false, or its activation none of tanh, relu, elu, silu")
    alpha, gamma, survival_reward, obs_clip = (float(metadata.get(x, 1)) for x in (*sorted(numbers), "obs_clip"))
    if not (0 <= alpha < np.inf and 0 <= gamma <= 1 and np.isfinite(survival_reward) and obs_clip > 0):
        numbers = f"{alpha=}, {gamma=}, {survival_reward=}, {obs_clip=}"
        raise ValueError(f"one of its numbers is impossible: {numbers}")


def check_arrays(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """ValueError unless the arrays found are finite and have the names, shapes and types of those expected."""
    for name in sorted(found.keys() | expected.keys()):
        ours, theirs = (f"{x[name].dtype} {x[name].shape}" if name in x else "absent" for x in (found, expected))
        if ours != theirs:
            raise ValueError(f"{name} is {ours}; it should be {theirs}")
        if not np.isfinite(found[name]).all():
            raise ValueError(f"{name} has entries that are NaN or infinite")


LIMITS = dict.fromkeys(("num_envs", "num_steps", "num_minibatches", "update_epochs", "num_evals"), (1, np.inf))
LIMITS |= dict.fromkeys(("eval_episodes", "batch_size", "policy_frequency", "target_network_frequency"), (1, np.inf))
LIMITS |= dict.fromkeys(("learning_rate", "max_grad_norm", "clip_coef", "q_lr", "policy_lr"), (1e-30, np.inf))
LIMITS |= dict.fromkeys(("addon_coef", "survival_reward", "target_entropy"), (-np.inf, np.inf))
LIMITS |= {"seed": (0, 2**30 - 1), "gamma": (0, 1), "initial_gamma": (0, 1), "gae_lambda": (0, 1), "tau": (0, 1)}


def check_flags(args: Args) -> None:
    """StopRun if a flag cannot work, whatever the others are."""
    for name, value in vars(args).items():
        low, high = LIMITS.get(name, (0, np.inf))
        if isinstance(value, int | float) and not (low <= value <= high and np.isfinite(value)):
            raise StopRun(f"--{name.replace('_', '-')} is {value}; it must be finite and from {low:g} to {high:g}")
        if name.endswith("hidden_sizes") and min(value or (1,)) < 1:
            raise StopRun(f"--{name.replace('_', '-')} is {value}; every layer needs at least 1 unit")
    try:
        jax.devices("cpu"), jax.devices()  # the first is where EnvPool's environments run
    except (RuntimeError, AssertionError) as error:
        raise StopRun(f"JAX lacks a device ({error}); unset JAX_PLATFORMS, or let it name cpu, too") from None
    steps = args.num_envs * args.num_steps
    if args.total_timesteps < steps:
        raise StopRun(f"--total-timesteps {args.total_timesteps} is less than one iteration, {steps} steps")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise StopRun("--track needs Weights & Biases; install it with: pip install wandb")


def check_args(args: Args) -> Args:
    """The arguments; StopRun if flags cannot work, alone or together."""
    check_flags(args)
    batch_size, devices = args.num_envs * args.num_steps, jax.device_count()
    if args.num_envs % devices:
        raise StopRun(f"--num-envs {args.num_envs} cannot be split among {devices} devices; choose a multiple")
    if batch_size % (args.num_minibatches * devices):
        parts = f"--num-minibatches {args.num_minibatches} on {devices} devices; choose a divisor"
        raise StopRun(f"--num-envs times --num-steps is {batch_size}, which cannot be split into {parts}")
    if args.norm_adv and batch_size == args.num_minibatches:
        raise StopRun("--norm-adv makes 0 of every advantage in minibatches of one step; lower --num-minibatches")
    return args


def resumed_args(args: Args) -> Args:
    """The arguments, with --resume those of its run; StopRun if there is none to go on with."""
    folder = args.resume
    if not folder:
        return args
    if args != type(args)(resume=folder):
        raise StopRun("--resume takes no other flag: the run goes on with the arguments it was started with")
    try:
        saved = json.loads((folder / "args.json").read_text())["args"]
        if new := sorted(vars(args).keys() - saved.keys()):
            CONSOLE.print(f"note     the run is older than these flags, which are at their defaults: {', '.join(new)}")
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        paths = {name: Path(saved[name]) for name in ("runs_dir", "export") if saved.get(name)}
        paths |= {name: folder / "prior.safetensors" for name in ("prior", "init_from") if saved.get(name)}
        resumed = type(args)(**(saved | paths | {"resume": folder}))
        check_flags(resumed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StopRun(f"{folder} holds no run of {Path(__file__).name} to resume: {error}") from None
    if (folder / "eval.json").exists():
        raise StopRun(f"the run {folder} is complete; start a new one")
    return resumed


def stop(message: str, exit_code: int) -> None:
    """End this process with one line."""
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


@contextlib.contextmanager
def one_line_errors():
    """End this process with one line for what the user, the machine or a signal did; leave faults of ours to Python."""
    jax.config.update("jax_enable_x64", False)  # whatever JAX_ENABLE_X64 says
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks ± or θ shows ?
    threading.excepthook = lambda fault: print(f"the log: {fault.exc_value}", file=sys.stderr)  # as of a full disk
    signal.signal(signal.SIGTERM, lambda *_: stop("SIGTERM", 128 + signal.SIGTERM))
    try:
        yield
    except StopRun as error:
        stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except OSError as error:  # as of a full disk
        stop(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)


if __name__ == "__main__":
    with one_line_errors():
        main(find_prior(choose_addon(check_args(resumed_args(tyro.cli(Args, description=__doc__))))), Run)
