# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.5", "numpy>=2.0", "envpool>=1.2.5", "gymnasium>=1.1",
#   "tyro>=0.9", "rich>=13.9", "safetensors>=0.5", "h5py>=3.12",
# ]
# ///
"""Make a prior of demonstrations: maximum likelihood of a Gaussian policy, where no reward is known.

Behaviour cloning maximises E[ log pi_theta(a|s) ] over the recorded steps.  Residual Q-Learning (arXiv 2306.09526)
customises such imitated priors: residual_ppo.py and residual_sac.py need its log pi, and no reward.  The density of a
squashed policy is that of a = tanh(u), log pi(a|s) = log N(u; mean, std) - log |da/du|, whose last term is the same for
every theta.  Log pi says what a deviation costs only if the demonstrations deviate: record sampled actions, not mean
ones.  The policy file names no temperature alpha: none is known.

    python enjoy.py priors/Hopper-v4.safetensors --episodes 20 --record hopper.npz
    python residual_q_learning/train_prior_bc.py --env-id Hopper-v4 --demonstrations hopper.npz

In this order: flags; policy; mathematics; demonstrations; simulator; update; train and main; evaluation; policy files.
Then what a copy can do without: checks and command line.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import envpool
import flax
import flax.linen as nn
import gymnasium
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import safetensors.numpy
import tyro
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Args:
    # data
    demonstrations: Path
    """what was recorded: a .npz file, or a Minari dataset, its folder or its .hdf5 file; see read_demonstrations"""
    env_id: str
    """the environment that was recorded; EnvPool's of that name evaluates the clone"""
    env_kwargs: str = "{}"
    """keyword arguments for EnvPool's make, in JSON"""
    export: Path | None = None
    """the policy file to write; if not given, priors/<env-id>-bc.safetensors"""
    eval_episodes: int = 20
    """episodes of the evaluation, with sampled and again with deterministic actions; 0: none, and no simulator"""
    seed: int = 1
    """seed of the networks, the minibatches, the split and the evaluation"""

    # policy
    squash: bool = True
    """tanh-squashed Gaussian; --no-squash: plain Gaussian, actions clipped"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers"""
    activation: Literal["tanh", "relu", "elu", "silu"] = "relu"
    """after each hidden layer"""
    state_dependent_std: bool = False
    """let the policy's standard deviation be an output of its network"""
    min_std: float = 0.05
    """floor of the standard deviation before squashing, below which log pi would price every change too high"""

    # likelihood
    num_updates: int = 5_000
    """updates; those beyond a multiple of --eval-interval are left out"""
    batch_size: int = 256
    """steps in a minibatch, drawn with replacement"""
    learning_rate: float = 1e-3
    """learning rate of Adam, which falls linearly to 0 over the updates"""
    weight_decay: float = 0.0
    """decoupled weight decay (AdamW) of the networks' matrices, per update, as a multiple of the learning rate"""
    noise: float = 0.0
    """standard deviation of Gaussian noise on the normalised observations, as augmentation"""
    held_out: float = 0.1
    """share of the episodes, at least one of two or more, left out of a first training that they judge; 0: none"""
    early_stopping: bool = False
    """in the second training, on all episodes, make as many updates as were best for those held out, instead of all"""
    eval_interval: int = 250
    """updates between two looks at the likelihood"""


# ----------------------------------------------------------------------------------------- policy


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


# ------------------------------------------------------------------------------------ mathematics


FEW = 1.0  # nats; see results/README.md
BOUND_MARGIN = 1e-6  # of the actions' half range, beyond which atanh knows nothing: |u| <= 7.25


def unsquash(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions before squashing, u with action = low + (tanh(u) + 1) / 2 (high - low), and where they were clipped.

    Args: action (..., action_dim), bounds (action_dim,). Returns: two arrays (..., action_dim), the second of bool.
    """
    unit, bound = 2 * (np.float64(action) - low) / (np.float64(high) - low) - 1, 1 - BOUND_MARGIN
    return np.float32(np.arctanh(np.clip(unit, -bound, bound))), np.abs(unit) > bound


def observation_stats(obs: np.ndarray) -> RunningStats:
    """Mean and variance of observations (steps, obs_dim); a constant one gets a variance that silences it."""
    mean, var = np.float64(obs).mean(0), np.float64(obs).var(0)
    return RunningStats(np.float32(mean), np.float32(np.where(var > 1e-10, var, 1e12)), np.float32(len(obs)))


def negative_log_likelihood(params: Any, actor: Actor, obs: Array, action: Array) -> Array:
    """- mean log N(action; mean(obs), std(obs)) in nats, of normalised observations and actions before squashing.

    The Jacobian of the squashing is left out: it does not depend on the parameters.
    """
    return -gaussian_log_prob(action, *actor.apply(params, obs)).mean()


def floor_deviation(params: Any, min_std: float) -> Any:
    """The parameters with a deviation of at least min_std, if it is one of them; else log_std_form has the floor."""
    log_std, floor = params["params"]["actor_logstd"], jnp.log(min_std)
    floored = log_std if isinstance(log_std, dict) else jnp.maximum(log_std, floor)
    return {"params": params["params"] | {"actor_logstd": floored}}


# --------------------------------------------------------------------------------- demonstrations


class StopRun(Exception):
    """Ends the program with one line for the user; exit code 2: bad input, 1: a fault on the way, 128 + n: signal n."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class Demonstrations(NamedTuple):
    """Recorded episodes, one after the other."""

    obs: np.ndarray  # before each step, (steps, obs_dim), float32
    action: np.ndarray  # in the environment's units, (steps, action_dim), float32
    episode: np.ndarray  # the number of each step's episode, (steps,)
    bounds: tuple[np.ndarray, np.ndarray] | None  # of the actions, each (action_dim,), if they are known


def read_npz(path: Path) -> tuple[list[dict[str, np.ndarray]], Any]:
    """Episodes and bounds of an .npz file, with or without compression; ValueError or KeyError if it is none.

    observations (steps, obs_dim), each before its step; actions (steps, action_dim) in the environment's units;
    terminations and truncations (steps,), of which one is true on the last step of an episode, and the last step of all
    is one; optionally action_low and action_high (action_dim,), the bounds of the actions.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("observations", "actions", "terminations", "truncations")}
        bounds = [file[f"action_{x}"] for x in ("low", "high")] if {"action_low", "action_high"} & {*file} else None
    if len({len(x) for x in arrays.values()}) > 1:
        raise ValueError(f"its arrays differ in length: {', '.join(f'{k} {len(x)}' for k, x in arrays.items())}")
    ends = np.flatnonzero(arrays["terminations"].astype(bool) | arrays["truncations"].astype(bool)) + 1
    if len(ends) and ends[-1] < len(arrays["actions"]):
        raise ValueError("its last episode does not end; set the last of truncations, or leave that episode out")
    parts = zip(*(np.split(x, ends)[:-1] for x in arrays.values()), strict=True)
    return [dict(zip(arrays, part, strict=True)) for part in parts], bounds


def read_minari(path: Path) -> tuple[list[dict[str, np.ndarray]], Any]:
    """Episodes and bounds of a Minari dataset in HDF5; ValueError, OSError or KeyError if it is none.

    A group episode_<number> for each episode has observations, one more than steps, actions, terminations and
    truncations; metadata.json beside the file, or an attribute of old versions, has the space of the actions in JSON.
    """
    path = path / "data" if (path / "data").is_dir() else path
    path = path / "main_data.hdf5" if path.is_dir() else path
    names, metadata = ("observations", "actions", "terminations", "truncations"), path.with_name("metadata.json")
    with h5py.File(path) as file:
        groups = sorted((name for name in file if name.startswith("episode_")), key=lambda x: int(x[8:]))
        episodes = [{name: np.asarray(file[f"{group}/{name}"]) for name in names} for group in groups]
        space = json.loads(metadata.read_text() if metadata.exists() else "{}").get("action_space")
        space = json.loads(space or file.attrs.get("action_space", "{}"))
    for episode in episodes:
        if len(episode["observations"]) == len(episode["actions"]) + 1:
            episode["observations"] = episode["observations"][:-1]
    return episodes, (space["low"], space["high"]) if "low" in space else None


def read_demonstrations(path: Path) -> Demonstrations:
    """Demonstrations from an .npz file (see read_npz), or from a Minari dataset (see read_minari); StopRun if unfit."""
    try:
        minari = path.is_dir() or path.suffix in (".hdf5", ".h5")
        episodes, bounds = read_minari(path) if minari else read_npz(path)
        if not episodes:
            raise ValueError("it has no complete episode")
        for number, episode in enumerate(episodes):
            check_episode(episode, episodes[0], number)
        obs, action = (np.concatenate([np.float32(x[k]) for x in episodes]) for k in ("observations", "actions"))
        bounds = bounds and tuple(np.broadcast_to(np.float32(x), action.shape[1:]) for x in bounds)
        if bounds and not (bounds[0] < bounds[1]).all():
            raise ValueError("its actions' lower bounds are not all below the upper ones")
        numbers = np.repeat(np.arange(len(episodes)), [len(episode["actions"]) for episode in episodes])
        return Demonstrations(obs, action, numbers, bounds)
    except FileNotFoundError:
        hint = "name an .npz file or a Minari dataset in HDF5, or record one with enjoy.py --record"
        raise StopRun(f"there are no demonstrations {path}; {hint}") from None
    except Exception as error:  # a damaged file can fail in any way
        raise StopRun(f"the demonstrations {path} cannot be used: {type(error).__name__}: {error}") from None


def check_episode(episode: dict[str, np.ndarray], first: dict[str, np.ndarray], number: int) -> None:
    """ValueError unless an episode has finite vectors for each of its steps, as long as the first one's, and ends."""
    steps = len(episode["actions"])
    for name in ("observations", "actions"):
        x, size = episode[name], first[name].shape[-1:]
        if x.ndim != 2 or x.shape != (steps, *size) or not x.size or not np.issubdtype(x.dtype, np.number):
            expected = f"numbers of shape ({steps}, {size[0] if size else 'size'})"
            raise ValueError(f"the {name} of episode {number} are {x.dtype} {x.shape}, not {expected}")
        if np.iscomplexobj(x) or not (np.abs(x) < 1e30).all():
            raise ValueError(f"the {name} of episode {number} have entries that are NaN, infinite or complex")
    ends = episode["terminations"].astype(bool) | episode["truncations"].astype(bool)
    if ends.shape != (steps,) or not ends[-1] or ends[:-1].any():
        raise ValueError(f"terminations or truncations of episode {number} are not true on its last step alone")


def held_out_steps(args: Args, episode: np.ndarray) -> np.ndarray:
    """Which steps are held out (steps,): those of whole episodes, as steps of one episode are too much alike."""
    count = episode[-1] + 1
    size = max(1, round(args.held_out * count)) if args.held_out and count > 1 else 0
    return np.isin(episode, np.random.default_rng(seed_words(args.seed, TRAINING)).permutation(count)[:size])


def action_bounds(args: Args, data: Demonstrations, simulator: Any) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of the actions, each (action_dim,): the simulator's, or else those of the demonstrations' file.

    Raises: StopRun if demonstrations and simulator do not fit, or if there are no bounds to squash to.
    """
    ours, bounds = (data.obs.shape[1], data.action.shape[1]), data.bounds
    if simulator:
        theirs, bounds = (simulator.obs_dim, len(simulator.low)), (simulator.low, simulator.high)
        if ours != theirs:
            what = "the demonstrations have {} observations and {} actions a step, {} has {} and {}; change --env-id"
            raise StopRun(what.format(*ours, args.env_id, *theirs))
        if data.bounds and not np.allclose(bounds, data.bounds):
            raise StopRun(f"the demonstrations' actions have other bounds than {args.env_id}'s; change --env-id")
    bounds = bounds or (np.float32([-np.inf]), np.float32([np.inf]))
    if args.squash and not np.isfinite(bounds).all():
        how = "add action_low and action_high to the file, or use --no-squash"
        raise StopRun(f"the actions of {args.demonstrations} have no known bounds to squash to; {how}")
    return bounds


# -------------------------------------------------------------------------------------- simulator


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


# ----------------------------------------------------------------------------------------- update


TRAINING, EVALUATION, NETWORKS, ROLLOUT, UPDATE, PLAY, REFILL = range(7)


def seed_words(seed: int, use: int, iteration: int = 0, size: int = 2) -> np.ndarray:
    """Random uint32 numbers (size,): environments' seeds or a key, independent for different arguments."""
    return np.random.SeedSequence((seed, use, iteration)).generate_state(size)


def wrap_key(words: Array) -> Array:
    """A key for jax.random from seed_words, an argument of compiled functions, which thus serve every seed."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def clone_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam with a rate that falls linearly to 0, and with decoupled weight decay of the matrices (AdamW)."""
    adam = optax.flatten(optax.scale_by_adam())  # all parameters as one vector, which is faster on a CPU
    decay = optax.add_decayed_weights(args.weight_decay, mask=partial(jax.tree.map, lambda x: x.ndim > 1))
    rate = optax.linear_schedule(args.learning_rate, 0, args.num_updates)
    return optax.chain(adam, decay, optax.scale_by_learning_rate(rate))


@partial(jax.jit, static_argnames=("args", "actor"))
def updates(
    args: Args, actor: Actor, stats: RunningStats, learned: tuple, obs: Array, action: Array, key: Array
) -> tuple:
    """args.eval_interval updates of learned, (params, opt_state), on random steps; actions are before squashing."""

    def update(learned, key):
        params, opt_state = learned
        rows = jax.random.randint(key, (args.batch_size,), 0, len(obs))
        seen = normalise(obs[rows], stats, actor.obs_clip)
        if args.noise:
            seen += args.noise * jax.random.normal(jax.random.fold_in(key, 1), seen.shape, jnp.float32)
        grads = jax.grad(negative_log_likelihood)(params, actor, seen, action[rows])
        step, opt_state = clone_optimizer(args).update(grads, opt_state, params)
        return (floor_deviation(optax.apply_updates(params, step), args.min_std), opt_state), None

    return lax.scan(update, learned, jax.random.split(wrap_key(key), args.eval_interval))[0]


# --------------------------------------------------------------------------------- train and main


@jax.jit
def median_log_prob(policy: Policy, obs: Array, action: Array) -> Array:
    """Median of log pi(a|s) over steps, in nats: a mean is ruled by the few that no policy knows, as of a fall."""
    return jnp.median(policy_log_prob(policy, obs, action))


def clone(args: Args, actor: Actor, steps: tuple, judges: tuple, say: Callable) -> tuple[Policy, np.ndarray]:
    """The policy after args.num_updates, and the judges' median log pi every args.eval_interval of them.

    Args: steps and judges are (obs, action before squashing). Raises: StopRun if log pi is not finite.
    """
    recipe = dataclasses.replace(args, demonstrations=Path(), export=None, seed=0)  # so that one compilation serves all
    stats, scores = observation_stats(steps[0]), []
    params = jax.jit(actor.init)(wrap_key(seed_words(args.seed, NETWORKS)), steps[0][0])
    learned = params, jax.jit(clone_optimizer(args).init)(params)
    for i in range(args.num_updates // args.eval_interval):
        learned = updates(recipe, actor, stats, learned, *steps, seed_words(args.seed, UPDATE, i))
        policy, done = Policy(learned[0], stats, actor), (i + 1) * args.eval_interval
        scores.append(float(median_log_prob(policy, *judges)))
        if not np.isfinite(scores[-1]):
            raise StopRun(f"log pi is {scores[-1]} after {done} updates; try a lower --learning-rate", 1)
        if done % (10 * args.eval_interval) == 0:
            say(f"{done:6} updates  median log pi {scores[-1]:.3f} nats")
    return policy, np.array(scores)


def main(args: Args, say: Callable) -> None:
    """Clone what was recorded; say is told about it, in lines of text."""
    data, simulator = read_demonstrations(args.demonstrations), None
    if args.eval_episodes:
        seeds = seed_words(args.seed, EVALUATION, size=len(ACTIONS) * args.eval_episodes) // 2  # below 2^31
        simulator = make_simulator(args.env_id, args.env_kwargs, seeds)
    low, high = action_bounds(args, data, simulator)
    action, at_bound = data.action, (data.action <= low) | (data.action >= high)
    if args.squash:
        action, at_bound = unsquash(data.action, low, high)
    steps, held = (data.obs, action), held_out_steps(args, data.episode)
    form = (args.hidden_sizes, args.activation, args.state_dependent_std, args.squash)
    actor = Actor(action.shape[1], *form, log_std_form=f"clip {np.log(args.min_std):.6g} 2")
    say(f"{args.demonstrations}: {data.episode[-1] + 1} episodes, {len(held)} steps, {held.sum()} of them held out")

    log_prob = {}
    if held.any():
        fit = [x[~held] for x in steps]
        policy, scores = clone(args, actor, fit, [x[held] for x in steps], say)
        log_prob = {"fit": float(median_log_prob(policy, *fit)), "held out": scores[-1]}
        if args.early_stopping:
            args = dataclasses.replace(args, num_updates=args.eval_interval * int(scores.argmax() + 1))
    policy, scores = clone(args, actor, steps, steps, say)
    log_prob["all"] = scores[-1]
    for note in notes(args, policy, data.obs, at_bound, log_prob):
        say(f"note     {note}")

    returns = play_episodes(simulator, policy, args.seed) if simulator else {}
    about = provenance(args, simulator.version if simulator else "none") | {"median_log_prob": log_prob}
    args.export.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.export, clone_bytes(policy, args, returns, about))
    texts = [f"return with {kind} actions {x.mean():.0f} ± {x.std():.0f}" for kind, x in returns.items()]
    say(", ".join([f"the clone is {args.export}", *texts]))


def notes(args: Args, policy: Policy, obs: np.ndarray, at_bound: np.ndarray, log_prob: dict[str, float]) -> list[str]:
    """What to beware of in the demonstrations, or in what was learned from them."""
    found, log_std = [], np.asarray(jax.jit(action_distribution)(policy, obs)[1])
    if at_bound.any():
        how = "clipped a millionth of the half range before it" if args.squash else "taken as they are"
        found.append(f"{at_bound.mean():.2%} of the actions' entries are at a bound or beyond, and {how}")
    if narrow := (log_std < np.log(args.min_std) + 1e-3).mean():
        what = "have their deviation at --min-std, as with mean actions: log pi then says little; record sampled ones"
        found.append(f"{narrow:.0%} of the actions' entries {what}")
    if "held out" not in log_prob:
        found.append("no episode is held out, so that nothing says whether these are enough demonstrations")
    elif log_prob["fit"] - log_prob["held out"] > FEW:
        what = "median log pi is {fit:.2f} nats in training, {held out:.2f} in episodes held out".format(**log_prob)
        found.append(f"{what}: these are too few demonstrations; record more episodes")
    return found


# ------------------------------------------------------------------------------------- evaluation


ACTIONS = ("stochastic", "deterministic")


@partial(jax.jit, static_argnames="step_simulator")
def first_returns(
    step_simulator: Callable, low: Array, high: Array, policy: Policy, state: Any, obs: Array, key: Array
) -> Array:
    """The return of each environment's first episode (num_envs,), half of them with sampled actions."""
    sampled = jnp.arange(len(obs))[:, None] < len(obs) // 2

    def step(carry):
        key, state, obs, returns, running = carry
        key, noise_key = jax.random.split(key)
        mean, log_std = action_distribution(policy, obs)
        action = mean + sampled * jnp.exp(log_std) * jax.random.normal(noise_key, mean.shape, jnp.float32)
        squashed = low + (jnp.tanh(action) + 1) / 2 * (high - low)
        bounded = squashed if policy.actor.squash else jnp.clip(action, low, high)
        state, obs, reward, terminated, truncated = step_simulator(state, bounded)
        return key, state, obs, returns + jnp.where(running, reward, 0), running & ~(terminated | truncated)

    start = (wrap_key(key), state, obs, jnp.zeros(len(obs)), jnp.ones(len(obs), bool))
    return lax.while_loop(lambda carry: carry[-1].any(), step, start)[-2]


def play_episodes(simulator: Simulator, policy: Policy, seed: int) -> dict[str, np.ndarray]:
    """Returns of episodes with ACTIONS, an episode in each environment; {actions: (episodes,)}."""
    inputs = (simulator.low, simulator.high, policy, *simulator.reset(), seed_words(seed, PLAY))
    returns = first_returns(simulator.step, *jax.device_put(jax.device_get(inputs), simulator.device))
    return dict(zip(ACTIONS, np.split(np.float64(jax.device_get(returns)), 2), strict=True))


# ----------------------------------------------------------------------------------- policy files


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


def clone_bytes(policy: Policy, args: Args, returns: dict[str, np.ndarray], training: dict) -> bytes:
    """A policy file (safetensors), with its returns and how it was made; alpha, gamma and reward are not known."""
    actor = policy.actor
    tensors = {name: np.ascontiguousarray(x) for name, x in policy_tensors(jax.device_get(policy)).items()}
    metadata = {"format": "pt", "env_id": args.env_id, "squash": str(actor.squash).lower()}
    metadata |= {"activation": actor.activation, "obs_clip": str(actor.obs_clip)}
    metadata["hidden_sizes"] = json.dumps(actor.hidden_sizes)
    if actor.state_dependent_std:
        metadata["log_std"] = actor.log_std_form
    if returns:
        metadata["returns"] = ", ".join(f"{kind} {x.mean():.0f} ± {x.std():.0f}" for kind, x in returns.items())
    metadata["training"] = json.dumps(training, default=str)
    metadata["sha256"] = policy_digest(tensors, metadata)
    return safetensors.numpy.save(tensors, metadata)


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


# A copy for a project of your own may end here; `main(Args(...), print)` then stands for all below.

# ------------------------------------------------------------------------ checks and command line


class Console(rich.console.Console):
    """A terminal whose reader may go away: the run goes on."""

    def on_broken_pipe(self) -> None:
        """Say it once, where it can still be read."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("standard output is closed; going on without it", file=sys.stderr, flush=True)


CONSOLE = Console(highlight=False, soft_wrap=True)


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


def check_clone_args(args: Args) -> Args:
    """The arguments, with an --export that can be; StopRun if flags cannot work."""
    limits = {"seed": (0, 2**30 - 1), "held_out": (0, 0.9), "min_std": (1e-4, 1), "learning_rate": (1e-30, np.inf)}
    limits |= {"batch_size": (1, np.inf), "eval_interval": (1, np.inf), "num_updates": (args.eval_interval, np.inf)}
    for name, value in vars(args).items():
        low, high = limits.get(name, (0, np.inf))
        if isinstance(value, int | float) and not (low <= value <= high and np.isfinite(value)):
            raise StopRun(f"--{name.replace('_', '-')} is {value}; it must be finite and from {low:g} to {high:g}")
        if name == "hidden_sizes" and min(value or (1,)) < 1:
            raise StopRun(f"--hidden-sizes is {value}; every layer needs at least 1 unit")
    export = args.export or Path("priors") / f"{args.env_id}-bc.safetensors"
    if export.exists():
        raise StopRun(f"{export} exists; move it away, or choose another file with --export")
    folder = next(parent for parent in export.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise StopRun(f"cannot write to {export.parent}; choose another file with --export")
    return dataclasses.replace(args, export=export)


if __name__ == "__main__":
    with one_line_errors():
        main(check_clone_args(tyro.cli(Args, description=__doc__)), CONSOLE.print)
