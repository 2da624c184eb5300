# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.5", "numpy>=2.0", "envpool>=1.2.5", "gymnasium>=1.1",
#   "tyro>=0.9", "rich>=13.9", "safetensors>=0.5", "tensorboardX>=2.6.2",
# ]
# ///
"""Soft DQN, for discrete actions: deep Q-learning with entropy, with a KL penalty to the previous policy, or neither.

With L(s') = alpha log sum_a exp(Q'(s',a) / alpha), Q' the target network, pi' = softmax(Q' / alpha), Q moves towards

    y = r + munchausen clip(alpha log pi'(a|s), -munchausen_clip, 0) + gamma (1 - terminated) L(s'),

and the policy is softmax(Q / alpha), with an epsilon-greedy on top; by default L is evaluated as Double DQN does it.
Four algorithms are points of it:

    DQN                   --alpha 0                       L is the maximum, the policy greedy
    soft DQN              --alpha 1                       maximum entropy at temperature alpha
    Munchausen DQN        --alpha 0.03 --munchausen 0.9   KL weight munchausen alpha, entropy (1 - munchausen) alpha
    mirror descent        --alpha 0.03 --munchausen 1     KL alone

DQN, Nature 518; soft, arXiv 2306.09526; Munchausen, arXiv 2007.14430; as mirror descent, arXiv 2003.14089.  A soft DQN
is a prior for residual_dqn.py.  Observations are vectors or small tables, not pictures: Atari is left out.

    python soft_dqn.py --env-id LunarLander-v3 --alpha 0.03 --munchausen 0.9

In this order: flags; policy and action values; mathematics; tasks and simulator; buffer and update; train and main;
evaluation; policy files. Then what a copy can do without: run folder and log; checks and command line.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
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
import rich.table
import safetensors.numpy
import tensorboardX
import tyro
from jax import Array, lax

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
    eval_episodes: int = 20
    """episodes of an evaluation, with sampled and again with deterministic actions"""

    # environment and task
    env_id: str = "CartPole-v1"
    """an EnvPool environment with discrete actions, and numbers (Box) as observations"""
    env_kwargs: str = "{}"
    """keyword arguments for EnvPool's make, in JSON"""
    num_envs: int = 16
    """parallel environments"""
    total_timesteps: int = 100_000
    """environment steps of the whole training, all environments together"""
    basic: str = "default"
    """basic reward r, a row of BASIC_TASKS; "own": the environment's; "default": the first row for it, else its own"""
    addon: str = "none"
    """add-on task r_R; "default": the environment's own; "none": a zero reward"""
    addon_coef: float = 1.0
    """factor on the add-on reward"""
    omega: float = 1.0
    """weight of the basic reward r"""

    # entropy and KL
    alpha: float = 1.0
    """temperature, in units of reward per nat"""
    munchausen: float = 0.0
    """share of alpha log pi' that is added to the reward, from 0 to 1"""
    munchausen_clip: float = 1.0
    """alpha log pi' is clipped to [-MUNCHAUSEN_CLIP, 0], in units of reward"""

    # DQN
    double: bool = True
    """value the next state by the network's policy and the target network's values; --no-double: by the latter alone"""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """widths of the hidden layers, with ReLU after each"""
    start_e: float = 1.0
    """share of actions that are uniformly random, at the start"""
    end_e: float = 0.04
    """the same at the end"""
    exploration_fraction: float = 0.16
    """share of the run over which it falls from the one to the other"""
    num_steps: int = 16
    """steps per environment between two updates"""
    updates_per_step: float = 0.5
    """gradient steps per environment step"""
    batch_size: int = 64
    """transitions per gradient step"""
    buffer_size: int = 100_000
    """transitions kept, the latest ones; memory is taken for total_timesteps at most"""
    learning_starts: int = 1_000
    """transitions in the buffer before the first gradient step"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """lower it linearly to 0 over the run"""
    max_grad_norm: float = 10.0
    """bound on the norm of a gradient"""
    target_network_frequency: int = 1
    """gradient steps between two updates of the target network"""
    tau: float = 0.005
    """how far an update moves the target network to the network, from 0 to 1"""
    gamma: float = 0.99
    """discount"""


# ----------------------------------------------------------------------- policy and action values


class QNetwork(nn.Module):
    """Action values, or the logits of a policy; its parameters are named as in a policy file."""

    action_dim: int
    hidden_sizes: tuple[int, ...]
    activation: str = "relu"
    last_scale: float = 1.0  # of the last layer's first weights

    @nn.compact
    def __call__(self, obs: Array) -> Array:
        """Map observations (..., obs_dim) to (..., action_dim)."""
        x = hidden_layers(obs, "actor", self.hidden_sizes, self.activation)
        return dense(self.action_dim, self.last_scale, f"actor.{2 * len(self.hidden_sizes)}")(x)


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


@flax.struct.dataclass
class CategoricalPolicy:
    """All that acting needs: a QNetwork that gives logits, and its parameters."""

    params: Any
    actor: QNetwork = flax.struct.field(pytree_node=False)


def action_logits(policy: CategoricalPolicy, obs: Array) -> Array:
    """Observations (..., obs_dim) -> logits (..., action_dim)."""
    return policy.actor.apply(policy.params, obs)


def choose_action(logits: Array, noise: Array) -> Array:
    """A one-hot action (..., action_dim): sampled, given standard Gumbel noise (..., action_dim), or the best for 0."""
    return jax.nn.one_hot((logits + noise).argmax(-1), logits.shape[-1], dtype=logits.dtype)


# ------------------------------------------------------------------------------------ mathematics


def soft_maximum(q: Array, alpha: float) -> Array:
    """alpha log sum_a exp(q / alpha), its limit max_a q for alpha = 0; (..., action_dim) -> (...), exact for any q.

    Of action values it is the soft value, and q - soft_maximum(q) is alpha log pi of pi = softmax(q / alpha).
    """
    best = q.max(-1)
    return best + alpha * jax.nn.logsumexp((q - best[..., None]) / alpha, axis=-1) if alpha else best


def double_value(q: Array, online_q: Array, alpha: float) -> Array:
    """E[q - alpha log pi] over pi = softmax(online_q / alpha), at most soft_maximum(q); (..., action_dim) -> (...).

    With q of the target network and alpha = 0 it is Double DQN's (arXiv 1509.06461). It holds back overestimates.
    """
    policy = jax.nn.softmax(online_q / alpha) if alpha else jax.nn.one_hot(online_q.argmax(-1), q.shape[-1])
    return soft_maximum(online_q, alpha) + (policy * (q - online_q)).sum(-1)


def munchausen_reward(q: Array, action: Array, alpha: float, munchausen: float, clip: float) -> Array:
    """munchausen clip(alpha log pi(a|s), -clip, 0) of pi = softmax(q / alpha), in reward (arXiv 2007.14430).

    q and the one-hot action are (..., action_dim). With alpha = 0 it is advantage learning.
    """
    return munchausen * jnp.clip((q * action).sum(-1) - soft_maximum(q, alpha), -clip, 0)


def bellman_target(reward: Array, terminated: Array, next_value: Array, gamma: float) -> Array:
    """r + gamma (1 - terminated) V(s'), of any equal shapes."""
    return reward + gamma * jnp.where(terminated, 0, next_value)


def masked_mean(x: Array, valid: Array) -> Array:
    """Mean of x where valid is true; 0 if it is nowhere."""
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)


class Experience(NamedTuple):
    """Transitions; of a batch the leading axis is batch_size, in the buffer its capacity."""

    obs: Array  # not normalised, (..., obs_dim)
    action: Array  # before squashing or clipping, for exact log-probabilities, (..., action_dim)
    reward: Array
    next_obs: Array  # at the end of an episode its last observation, not that of the auto-reset
    terminated: Array


def dqn_loss(params: Any, state: "DQNState", batch: Experience, target: Array) -> Array:
    """Mean Huber loss of the values that these parameters give the actions taken."""
    q = (state.actor.apply(params, batch.obs) * batch.action).sum(-1)
    return optax.huber_loss(q, target).mean()


# ---------------------------------------------------------------------------- tasks and simulator


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


def make_discrete_simulator(env_id: str, env_kwargs: str, basic: str, seeds: np.ndarray) -> Simulator:
    """EnvPool's environments, one for each of the seeds (num_envs,); StopRun unless it has what fits.

    An action is a one-hot vector (actions,), for which low and high are 0 and 1; observations are flattened. Training
    has one simulator of --num-envs environments, each evaluation one with an environment for every episode.
    """
    warnings.filterwarnings("ignore", ".*precision lowered by casting")  # of the bounds of an observation
    try:
        pool = envpool.make(
            env_id, env_type="gymnasium", num_envs=len(seeds), seed=seeds.tolist(), **json.loads(env_kwargs)
        )
        obs_space, action_space = pool.observation_space, pool.action_space
    except Exception as error:  # each of its environments fails in its own way
        hint = "envpool.list_all_envs() names them, --env-kwargs is a JSON object"
        raise StopRun(f"EnvPool has no {env_id} with {env_kwargs} ({type(error).__name__}: {error}); {hint}") from None
    if not (isinstance(action_space, gymnasium.spaces.Discrete) and isinstance(obs_space, gymnasium.spaces.Box)):
        what = f"{env_id} has the actions {action_space}, the observations {type(obs_space).__name__}"
        raise StopRun(f"{what}; they must be Discrete and Box: choose another --env-id")
    with jax.enable_x64(True):  # some of EnvPool's environments speak float64
        handle, _, _, xla_step = pool.xla()

    def flat(obs):
        return obs.reshape(len(seeds), -1).astype(np.float32)

    def reset():
        obs = flat(pool.reset()[0])
        return (handle, obs), obs

    def step(state, action):
        index = action.argmax(-1).astype(jnp.int32)
        with jax.enable_x64(True):
            handle, (obs, reward, terminated, truncated, _) = xla_step(state[0], index)
            obs, reward = flat(obs), reward.astype(jnp.float32)
        if basic != "own":
            reward = BASIC_TASKS[basic].reward(BASIC_TASKS[basic].quantity(state[1], action, obs))
        return (handle, obs), obs, reward, terminated, truncated

    actions, device = np.zeros(action_space.n, np.float32), jax.devices("cpu")[0]
    version = f"envpool {importlib.metadata.version('envpool')}"
    return Simulator(reset, step, int(np.prod(obs_space.shape)), actions, actions + 1, device, version)


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


# ------------------------------------------------------------------------------ buffer and update


# What the random numbers of a run are for; each use has seeds of its own.
TRAINING, EVALUATION, NETWORKS, ROLLOUT, UPDATE, PLAY, REFILL = range(7)


def seed_words(seed: int, use: int, iteration: int = 0, size: int = 2) -> np.ndarray:
    """Random uint32 numbers (size,): environments' seeds or a key, independent for different arguments."""
    return np.random.SeedSequence((seed, use, iteration)).generate_state(size)


def wrap_key(words: Array) -> Array:
    """A key for jax.random from seed_words, an argument of compiled functions, which thus serve every seed."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


@partial(jax.jit, static_argnames=("env", "num_steps"))
def rollout_categorical(
    env: Env, num_steps: int, policy: CategoricalPolicy, epsilon: float, state: EnvState, key: Array
) -> tuple[EnvState, Transitions]:
    """Act for so many steps: with sampled actions, a share epsilon of them uniformly random."""

    def step(state, noise):
        gumbel, uniform = noise
        logits = jnp.where(uniform[:, None] < epsilon, 0, action_logits(policy, state.obs))
        return env.step(state, choose_action(logits, gumbel))

    keys, shape = jax.random.split(wrap_key(key)), (num_steps, len(state.obs))
    gumbel = jax.random.gumbel(keys[0], (*shape, env.action_dim), jnp.float32)
    state, transitions = lax.scan(step, state, (gumbel, jax.random.uniform(keys[1], shape, jnp.float32)))
    return state, transitions._replace(obs=jnp.concatenate([transitions.obs, state.obs[None]]))


class Buffer(NamedTuple):
    """A ring of transitions."""

    data: Experience  # leading axis capacity
    count: Array  # transitions stored so far, overwritten ones, too


@partial(jax.jit, static_argnames=("args", "obs_dim", "action_dim"))
def empty_buffer(args: Args, obs_dim: int, action_dim: int) -> Buffer:
    """A buffer for args.buffer_size transitions, or as many as there will be."""
    capacity = min(args.buffer_size, args.total_timesteps)
    obs, action, scalar = (jnp.zeros((capacity, *shape), jnp.float32) for shape in ((obs_dim,), (action_dim,), ()))
    return Buffer(Experience(obs, action, scalar, obs, scalar > 0), jnp.int32(0))


def store(buffer: Buffer, experience: Experience, valid: Array) -> Buffer:
    """Write the transitions (num_steps, num_envs, ...) that are valid (num_steps, num_envs), and no others."""
    capacity, valid = len(buffer.data.reward), valid.ravel()
    place = (buffer.count + jnp.cumsum(valid) - 1) % capacity
    place = jnp.where(valid, place, capacity)  # what is put beyond the end is dropped

    def write(column, new):
        return column.at[place].set(new.reshape(-1, *column.shape[1:]), mode="drop")

    return Buffer(jax.tree.map(write, buffer.data, experience), buffer.count + valid.sum())


@flax.struct.dataclass
class DQNState:
    """What an iteration changes, but for the buffer."""

    params: Any
    target_params: Any
    opt_state: optax.OptState
    num_updates: Array  # gradient steps so far
    iteration: Array
    actor: QNetwork = flax.struct.field(pytree_node=False)


def num_iterations(args: Args) -> int:
    """How many times a run alternates rollouts and updates."""
    return args.total_timesteps // (args.num_envs * args.num_steps)


def dqn_optimiser(args: Args) -> optax.GradientTransformation:
    """Adam with clipped gradients, for all parameters as one vector, which is faster on a CPU."""
    num_updates = args.total_timesteps * args.updates_per_step
    rate = optax.linear_schedule(args.learning_rate, 0, num_updates) if args.anneal_lr else args.learning_rate
    return optax.flatten(optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(rate)))


@partial(jax.jit, static_argnames=("args", "actor", "obs_dim"))
def init_dqn_state(args: Args, actor: QNetwork, obs_dim: int, key: Array) -> DQNState:
    """The state before the first iteration."""
    params = actor.init(wrap_key(key), jnp.zeros(obs_dim, jnp.float32))
    return DQNState(params, params, dqn_optimiser(args).init(params), jnp.int32(0), jnp.int32(0), actor)


def learn_values(target: Callable, args: Args, state: DQNState, buffer: Buffer, key: Array) -> tuple[DQNState, Metrics]:
    """An iteration's gradient steps towards target(state, batch) (batch_size,), once args.learning_starts is reached.

    The metrics are means over the steps, or 0 before there are any.
    """
    num_updates, opt = round(args.num_envs * args.num_steps * args.updates_per_step), dqn_optimiser(args)
    stored = jnp.clip(buffer.count, 1, len(buffer.data.reward))
    index = jax.random.randint(wrap_key(key), (num_updates, args.batch_size), 0, stored)

    def step(state, index):
        batch = jax.tree.map(lambda column: column[index], buffer.data)
        y = target(state, batch)
        loss, grads = jax.value_and_grad(dqn_loss)(state.params, state, batch, y)
        updates, opt_state = opt.update(grads, state.opt_state)
        params, count = optax.apply_updates(state.params, updates), state.num_updates + 1
        tau = jnp.where(count % args.target_network_frequency == 0, args.tau, 0)
        targets = jax.tree.map(lambda new, old: old + tau * (new - old), params, state.target_params)
        state = state.replace(params=params, target_params=targets, opt_state=opt_state, num_updates=count)
        return state, {"value_loss": loss, "td_target": y.mean()}

    def improve(state):
        state, metrics = lax.scan(step, state, index)
        return state, jax.tree.map(jnp.mean, metrics)

    def wait(state):
        return state, jax.tree.map(jnp.zeros_like, jax.eval_shape(improve, state)[1])

    state, metrics = lax.cond(buffer.count >= args.learning_starts, improve, wait, state)
    return state.replace(iteration=state.iteration + 1), metrics | {"param_norm": optax.tree.norm(state.params)}


def soft_dqn_target(args: Args, state: DQNState, batch: Experience) -> Array:
    """y of transitions, (batch_size,), by the target network."""
    reward, next_q = batch.reward, state.actor.apply(state.target_params, batch.next_obs)
    if args.munchausen:
        q = state.actor.apply(state.target_params, batch.obs)
        reward += munchausen_reward(q, batch.action, args.alpha, args.munchausen, args.munchausen_clip)
    online_q = state.actor.apply(state.params, batch.next_obs) if args.double else next_q
    return bellman_target(reward, batch.terminated, double_value(next_q, online_q, args.alpha), args.gamma)


COLD = 1e-3  # temperature at which --alpha 0 acts, and is written to a file: in reward per nat, so all but greedy


def soft_policy(args: Args, state: DQNState) -> CategoricalPolicy:
    """softmax(Q / alpha), by a division of the last layer."""
    layers, last = state.params["params"], f"actor.{2 * len(state.actor.hidden_sizes)}"
    scaled = jax.tree.map(lambda x: x / (args.alpha or COLD), layers[last])
    return CategoricalPolicy({"params": layers | {last: scaled}}, state.actor)


@partial(jax.jit, static_argnames="args", donate_argnames="buffer")
def soft_dqn_update(
    args: Args, state: DQNState, buffer: Buffer, transitions: Transitions, key: Array
) -> tuple[DQNState, Buffer, Metrics]:
    """One iteration of soft DQN on the reward omega r + r_R."""
    obs, valid = transitions.obs[:-1], transitions.valid
    reward = args.omega * transitions.basic_reward + transitions.addon_reward
    experience = Experience(obs, transitions.action, reward, transitions.obs[1:], transitions.terminated)
    log_policy = jax.nn.log_softmax(action_logits(soft_policy(args, state), obs))
    buffer = store(buffer, experience, valid)
    state, metrics = learn_values(partial(soft_dqn_target, args), args, state, buffer, key)
    metrics |= {"entropy": -masked_mean((jnp.exp(log_policy) * log_policy).sum(-1), valid)}
    metrics |= {"basic_reward": masked_mean(transitions.basic_reward, valid)}
    return state, buffer, metrics | {"addon_reward": masked_mean(transitions.addon_reward, valid)}


# --------------------------------------------------------------------------------- train and main


def exploration(args: Args, iteration: int) -> float:
    """epsilon, which falls linearly from args.start_e to args.end_e."""
    done = iteration / max(1, args.exploration_fraction * num_iterations(args))
    return args.start_e + min(1.0, done) * (args.end_e - args.start_e)


def train_discrete(
    env: Env, policy_of: Callable, update: Callable, args: Args, state: DQNState, log: Callable
) -> DQNState:
    """Alternate rollouts of policy_of(state) and updates (state, buffer, transitions, key) -> (state, buffer, metrics).

    log(iteration, state, metrics) hears of each iteration, counted from 1. A run that is resumed first fills its buffer
    anew, up to args.learning_starts transitions at most, and learns nothing from these steps.
    """
    env_state, device, policy_of = env.reset(), jax.devices()[0], jax.jit(policy_of)
    state, buffer = jax.device_put((state, empty_buffer(args, env_state.obs.shape[1], env.action_dim)), device)

    def step(use, iteration, state, buffer, env_state):
        policy, key = jax.device_put((policy_of(state), seed_words(args.seed, use, iteration)), env.device)
        epsilon = exploration(args, iteration)
        env_state, transitions = rollout_categorical(env, args.num_steps, policy, epsilon, env_state, key)
        transitions, key = jax.device_put((transitions, seed_words(args.seed, UPDATE, iteration)), device)
        return env_state, *update(state, buffer, transitions, key)

    start = int(jax.device_get(state.iteration))
    steps = args.num_envs * args.num_steps
    for i in range(-(-min(start * steps, args.learning_starts) // steps)):
        env_state, _, buffer, _ = step(REFILL, start + i, state, buffer, env_state)
    for iteration in range(start, num_iterations(args)):
        env_state, state, buffer, metrics = step(ROLLOUT, iteration, state, buffer, env_state)
        log(iteration + 1, state, metrics | jax.device_get(episode_metrics(env_state.finished)))
    return state


def main(args: Args, open_run: Callable) -> None:
    """Train a policy; open_run is DiscreteRun, below, or what stands for it in a copy: log, and who keeps results."""
    simulator_of = partial(make_discrete_simulator, args.env_id, args.env_kwargs, args.basic)
    simulator = simulator_of(env_seeds(args.seed, TRAINING, args.num_envs))
    task = DISCRETE_TASKS[args.addon]._replace(coef=args.addon_coef)
    actor = QNetwork(len(simulator.low), args.hidden_sizes)
    state = init_dqn_state(args, actor, simulator.obs_dim, seed_words(args.seed, NETWORKS))
    with open_run(args, simulator, task, state) as run:
        env, update = make_env(simulator, task, squash=False), partial(soft_dqn_update, args)
        state = train_discrete(env, partial(soft_policy, args), update, args, run.state, run.write)
    eval_env = simulator_of(np.tile(env_seeds(args.seed, EVALUATION, args.eval_episodes), 2))  # with either actions
    policy = soft_policy(args, state)
    results = evaluate_categorical(make_env(eval_env, task, squash=False), {"policy": policy}, args.omega, args.seed)
    run.save_policy(policy, args.alpha, results["policy"])
    run.finish(task.label, results)


# ------------------------------------------------------------------------------------- evaluation


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
def first_categorical_episodes(env: Env, policies: list[CategoricalPolicy], state: EnvState, key: Array) -> Metrics:
    """Sums over each environment's first episode after a reset, those of EnvState and that of log pi.

    Each policy has an equal share of the environments, half of it for each of ACTIONS, and the same noise.
    """

    def step(carry):
        key, state, log_prob = carry
        key, noise_key = jax.random.split(key)
        shape = len(state.obs) // len(policies) // len(ACTIONS), env.action_dim
        noise = jax.random.gumbel(noise_key, shape, jnp.float32)
        noise = jnp.tile(jnp.concatenate([noise, jnp.zeros_like(noise)]), (len(policies), 1))
        shares = zip(policies, jnp.split(state.obs, len(policies)), strict=True)
        logits = jnp.concatenate([action_logits(policy, obs) for policy, obs in shares])
        action, first = choose_action(logits, noise), state.finished["length"] == 0
        after, _ = env.step(state, action)
        finished = jax.tree.map(lambda new, old: jnp.where(first, new, old), after.finished, state.finished)
        log_prob += jnp.where(first, (jax.nn.log_softmax(logits) * action).sum(-1), 0)
        return key, after._replace(finished=finished), log_prob

    start = (wrap_key(key), state, jnp.zeros_like(state.finished["length"]))
    _, state, log_prob = lax.while_loop(lambda carry: (carry[1].finished["length"] == 0).any(), step, start)
    return state.finished | {"log_prob": log_prob}


def evaluate_categorical(env: Env, policies: dict[str, CategoricalPolicy], omega: float, seed: int) -> Results:
    """Play each policy with sampled and with deterministic actions, an episode in each environment of its share.

    Returns: {policy: {"stochastic", "deterministic"}} -> {"objective", "total", "basic", "addon", "quantity", "length",
    "log_prob"} -> array (episodes,); objective = omega basic + addon; total = basic + addon; quantity, and log_prob,
    which is log pi of the actions in nats, are means over the episode's steps.
    """
    players, key = jax.device_put((list(policies.values()), seed_words(seed, PLAY)), env.device)
    sums = jax.device_get(first_categorical_episodes(env, players, env.reset(), key))
    columns = {name: np.float64(x).reshape(len(policies), len(ACTIONS), -1) for name, x in sums.items()}
    columns |= {name: columns[name] / columns["length"] for name in ("quantity", "log_prob")}
    columns["total"] = columns["basic"] + columns["addon"]
    columns["objective"] = omega * columns["basic"] + columns["addon"]
    return {
        policy: {actions: {name: x[i, j] for name, x in columns.items()} for j, actions in enumerate(ACTIONS)}
        for i, policy in enumerate(policies)
    }


# ----------------------------------------------------------------------------------- policy files


def categorical_tensors(policy: CategoricalPolicy) -> dict[str, Any]:
    """A policy's arrays as a policy file has them (see priors/README.md): weights are (outputs, inputs)."""
    params = flax.traverse_util.flatten_dict(policy.params["params"])
    return {".".join(path).replace("kernel", "weight"): x.T for path, x in params.items()}


def policy_digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over all that a policy file says, to find damage."""
    digest = hashlib.sha256(json.dumps({**metadata, "sha256": ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()


def categorical_bytes(
    policy: CategoricalPolicy, args: Args, alpha: float, results: dict[str, dict], training: dict
) -> bytes:
    """A policy file (safetensors), with alpha, evaluate's results for the policy, and how it was trained."""
    actor = policy.actor
    tensors = {name: np.ascontiguousarray(x) for name, x in categorical_tensors(jax.device_get(policy)).items()}
    metadata = {"format": "pt", "kind": "categorical", "env_id": args.env_id, "alpha": str(alpha)}
    metadata |= {"gamma": str(args.gamma), "hidden_sizes": json.dumps(actor.hidden_sizes)}
    metadata["activation"] = actor.activation
    returns = {actions: f"{x['basic'].mean():.4g} ± {x['basic'].std():.4g}" for actions, x in results.items()}
    metadata["returns"] = ", ".join(f"{actions} {text}" for actions, text in returns.items())
    metadata["training"] = json.dumps(training, default=str)
    metadata["sha256"] = policy_digest(tensors, metadata)
    return safetensors.numpy.save(tensors, metadata)


# A copy for a project of your own may end here; CONTRIBUTING.md shows the few lines that then stand for all below.

# ----------------------------------------------------------------------------- run folder and log


SCREEN = rich.console.Console(highlight=False, soft_wrap=True)


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


class DiscreteRun(contextlib.AbstractContextManager):
    """A run's folder, and the log of its training: metrics.csv, TensorBoard, the terminal.

    The folder is this process's as long as it lives. However the training ends, short of a kill, its last state whose
    metrics are finite is in the folder.
    """

    def __init__(self, args: Args, simulator: Simulator, task: AddonTask, state: Any):
        """Make the folder, or go on with that of --resume, whose rows after its state are dropped.

        Raises: StopRun if it is not to be had, or if task, policy and simulator do not go together.
        """
        check_tasks(args, simulator, task, state)
        name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{time.time():.3f}".replace("/", "-")
        self.folder, self.args = args.resume or args.runs_dir / name, args
        self.about = provenance(args, simulator.version)
        if not args.resume:
            make_folder(self.folder, args, self.about)
        try:
            lock = os.open(self.folder / "args.json", os.O_RDWR)  # NFS locks only what is open for writing
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StopRun(f"another process goes on with the run {self.folder}; wait for it") from None
        self.state = load_checkpoint(self.folder, state) if args.resume else state
        names = [name for name in ("omega", "alpha", "munchausen", "omega_prime", "alpha_hat") if hasattr(args, name)]
        SCREEN.print(f"{args.env_id} on {jax.devices()[0].device_kind}, run folder {self.folder}")
        SCREEN.print(f"basic    {args.basic}\nadd-on   {task.coef:g} x the reward on {task.label}")
        SCREEN.print("weights  " + ", ".join(f"{name} = {getattr(args, name):.4g}" for name in names))

        self.iteration_steps = args.num_envs * args.num_steps
        first_step, path = int(jax.device_get(self.state.iteration)) * self.iteration_steps, self.folder / "metrics.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
        rows = rows[:1] + [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= first_step]
        write_atomic(path, "".join(",".join(row) + "\n" for row in rows).encode())
        self.columns = rows[0] if rows else []  # those of the version that began the run
        self.csv = path.open("a", buffering=1)
        self.tensorboard = tensorboardX.SummaryWriter(str(self.folder), purge_step=first_step + 1)
        self.start = time.time() - (float(rows[-1][1]) if len(rows) > 1 else 0)  # of the clock, less interruptions
        self.saved_at = self.next_report = self.signal = self.warned = 0
        self.handlers = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, kind: Any, error: Any, *_: Any) -> None:
        """Keep the last state."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
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
        """Log an iteration: a row always, the rest every five seconds; StopRun if it is not finite, or on a signal."""
        metrics = jax.device_get(metrics)
        if bad := [name for name, value in metrics.items() if not np.isfinite(value)]:
            what = f"{', '.join(bad)} not finite in iteration {iteration}; the state before it is in {self.folder}"
            raise StopRun(f"{what}; mend the reward, or try a lower learning rate", exit_code=1)
        if (seen := metrics.pop("episodes_seen")) == 0:
            metrics |= {name: np.nan for name in metrics if name.endswith(("_return", "_quantity", "_length"))}
        if seen == self.args.num_envs and metrics.get("kept_return", 1) < 0.5 and not self.warned:
            SCREEN.print("note     the basic return is below half of the prior's; a larger --omega keeps more of it")
            self.warned = True
        self.state, global_step, now = state, iteration * self.iteration_steps, time.time()
        row = {"global_step": global_step, "elapsed_s": f"{now - self.start:.3f}"}
        row |= {name: f"{value:.6g}" for name, value in metrics.items()}
        if not self.columns:
            self.columns = list(row)
            print(*self.columns, sep=",", file=self.csv)
        print(*(row.get(name, "nan") for name in self.columns), sep=",", file=self.csv)
        if now >= self.next_report or self.signal or iteration == num_iterations(self.args):
            self.next_report = now + 5
            metrics = {name: x for name, x in metrics.items() if np.isfinite(x)}
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, global_step)
            values = [f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
            speed = global_step / (now - self.start)
            SCREEN.print(f"{iteration / num_iterations(self.args):4.0%}  {speed:,.0f} steps/s  {'  '.join(values)}")
        if self.signal:
            what = f"{signal.Signals(self.signal).name}: stopped, continue with: python {shlex.quote(sys.argv[0])}"
            raise StopRun(f"{what} --resume {shlex.quote(str(self.folder))}", 128 + self.signal)
        if now - self.saved_at >= self.args.checkpoint_interval:
            self.save_checkpoint()

    def save_policy(self, policy: CategoricalPolicy, alpha: float, results: dict[str, dict]) -> None:
        """Write the policy file, with alpha and evaluate's results for this policy."""
        data = categorical_bytes(policy, self.args, alpha, results, self.about)
        write_atomic(self.folder / "policy.safetensors", data)

    def finish(self, quantity: str, results: Results) -> None:
        """Write the evaluation, with which the run counts as complete; then show it."""
        statistics = {"mean": np.mean, "std": np.std, "episodes": np.ndarray.tolist}
        content = {name: {k: jax.tree.map(f, x) for k, f in statistics.items()} for name, x in results.items()}
        write_atomic(self.folder / "eval.json", json.dumps(content, indent=1).encode())
        SCREEN.print(results_table(quantity, results))
        SCREEN.print(f"policy and metrics are in {self.folder}")


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


# ------------------------------------------------------------------------ checks and command line


def choose_tasks(args: Args) -> Args:
    """The arguments with the names of tasks that the environment has; StopRun if there is none."""
    names = {}
    for flag, tasks in (("basic", BASIC_TASKS | {"own": DISCRETE_TASKS["none"]}), ("addon", DISCRETE_TASKS)):
        choices = [name for name, task in tasks.items() if task.env in (args.env_id.rpartition("-v")[0], "")]
        name = getattr(args, flag)
        if name == "default" and choices == ["none"]:
            raise StopRun(f"{args.env_id} has no add-on task yet; add one to DISCRETE_TASKS, or give --addon none")
        names[flag] = choices[0] if name == "default" else name
        if names[flag] not in choices:
            raise StopRun(f"--{flag} {name} is no task for {args.env_id}; choose from {', '.join(choices)}")
    return dataclasses.replace(args, **names)


def check_tasks(args: Args, simulator: Simulator, addon: AddonTask, state: Any) -> None:
    """StopRun unless the network fits the simulator, and the tasks can be computed: in NumPy, as in enjoy.py, and here.

    NumPy knows an index that is out of range, and tracing knows what cannot be compiled.
    """
    ours = len(state.params["params"]["actor.0"]["kernel"]), state.actor.action_dim
    if ours != (theirs := (simulator.obs_dim, len(simulator.low))):
        what = "the policy has {} observations and {} actions, {} has {} and {}; change --env-id, or the policy"
        raise StopRun(what.format(*ours, args.env_id, *theirs))
    obs = np.tile(np.float32(jax.device_get(simulator.reset()[1])[0]), (2, 3, 1))  # so that t[7] is no t[..., 7]
    action = np.tile(simulator.low, (2, 3, 1))
    for name, task in {args.addon: addon, args.basic: BASIC_TASKS.get(args.basic, addon)}.items():
        try:
            with np.errstate(all="ignore"):
                reward = task.reward(task.quantity(obs, action, obs))
            shape = jax.eval_shape(
                lambda s, a, t, task=task: task.reward(task.quantity(s, a, t)), obs, action, obs
            ).shape
            if not (np.shape(reward) == shape == (2, 3) and np.isfinite(reward).all()):
                raise ValueError(f"it is {np.ravel(reward)[0]}, of shape {np.shape(reward)} for {obs.shape}")
        except Exception as error:  # a task is code of the user's
            how = "use indices as in t[..., 3], operators, abs, and functions of xp; no if, min, float or np"
            what = f"the task {name} cannot be computed: {type(error).__name__}"
            raise StopRun(f"{what}: {(str(error).splitlines() or [''])[0]}; {how}") from None


def check_arrays(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """ValueError unless the arrays found are finite and have the names, shapes and types of those expected."""
    for name in sorted(found.keys() | expected.keys()):
        ours, theirs = (f"{x[name].dtype} {x[name].shape}" if name in x else "absent" for x in (found, expected))
        if ours != theirs:
            raise ValueError(f"{name} is {ours}; it should be {theirs}")
        if not np.isfinite(found[name]).all():
            raise ValueError(f"{name} has entries that are NaN or infinite")


DQN_LIMITS = dict.fromkeys(("num_envs", "num_steps", "batch_size", "eval_episodes"), (1, np.inf))
DQN_LIMITS |= {"target_network_frequency": (1, np.inf), "max_grad_norm": (1e-30, np.inf)}
DQN_LIMITS |= dict.fromkeys(("gamma", "start_e", "end_e", "exploration_fraction", "munchausen", "tau"), (0, 1))
DQN_LIMITS |= {"seed": (0, 2**30 - 1), "addon_coef": (-np.inf, np.inf), "learning_rate": (1e-30, np.inf)}


def check_dqn_args(args: Args) -> Args:
    """The arguments; StopRun if flags cannot work, alone or together."""
    for name, value in vars(args).items():
        low, high = DQN_LIMITS.get(name, (0, np.inf))
        if isinstance(value, int | float) and not (low <= value <= high and np.isfinite(value)):
            raise StopRun(f"--{name.replace('_', '-')} is {value}; it must be finite and from {low:g} to {high:g}")
    if min(args.hidden_sizes or (1,)) < 1:
        raise StopRun(f"--hidden-sizes is {args.hidden_sizes}; every layer needs at least 1 unit")
    try:
        jax.devices("cpu"), jax.devices()  # the first is where EnvPool's environments run
    except (RuntimeError, AssertionError) as error:
        raise StopRun(f"JAX lacks a device ({error}); unset JAX_PLATFORMS, or let it name cpu, too") from None
    steps = args.num_envs * args.num_steps
    num_updates = steps * args.updates_per_step
    if num_updates < 1 or abs(num_updates - round(num_updates)) > 1e-6:
        what = f"--updates-per-step {args.updates_per_step} of an iteration's {steps} steps"
        raise StopRun(f"{what} makes {num_updates:g} gradient steps; choose a whole number of them, at least 1")
    if min(args.buffer_size, args.total_timesteps) < max(steps, args.learning_starts):
        what = f"--learning-starts {args.learning_starts} and an iteration's {steps} steps"
        raise StopRun(f"{what} must fit into --buffer-size and --total-timesteps; lower it, or raise these")
    return args


def resumed_dqn_args(args: Args) -> Args:
    """The arguments, with --resume those of its run; StopRun if there is none to go on with."""
    folder = args.resume
    if not folder:
        return args
    if args != type(args)(resume=folder):
        raise StopRun("--resume takes no other flag: the run goes on with the arguments it was started with")
    if (folder / "eval.json").exists():
        raise StopRun(f"the run {folder} is complete; start a new one")
    try:
        saved = json.loads((folder / "args.json").read_text())["args"]
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        saved |= {"runs_dir": Path(saved["runs_dir"]), "resume": folder}
        saved |= {name: folder / "prior.safetensors" for name in ("prior",) if saved.get(name)}
        return type(args)(**saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StopRun(f"{folder} holds no run of {Path(__file__).name} to resume: {error}") from None


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
        main(choose_tasks(check_dqn_args(resumed_dqn_args(tyro.cli(Args, description=__doc__)))), DiscreteRun)
