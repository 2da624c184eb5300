# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["jax>=0.10", "numpy>=2.0", "tyro>=0.9", "rich>=13.9", "matplotlib>=3.10"]
# ///
"""Mirror descent value iteration: what a KL penalty to the previous policy is good for, by exact dynamic programming.

MD-VI(lambda, tau), from q_0 = 0 and the uniform policy pi_0, with evaluation errors eps_k:

    pi_{k+1} = argmax_pi <pi, q_k> - lambda KL(pi || pi_k) + tau H(pi)
    q_{k+1} = r + gamma P (<pi_{k+1}, q_k> - lambda KL(pi_{k+1} || pi_k) + tau H(pi_{k+1})) + eps_{k+1}

pi_{k+1} is the softmax of an average of q-values: of (q_0 + ... + q_k) / lambda if tau = 0; else of h_k / tau, with
h_k = beta h_{k-1} + (1 - beta) q_k, beta = lambda / (lambda + tau).  So errors average, too.  If tau = 0 < lambda,

    ||q* - q_{pi_k}|| <= 2 / (1 - gamma) ||(eps_1 + ... + eps_k) / k|| + 4 v_max^lambda / ((1 - gamma) k),

linear in the horizon 1 / (1 - gamma); plain value iteration (lambda = tau = 0) accumulates errors: quadratic.
Leverage the Average, arXiv 2003.14089.  The KL of Residual Policy Gradient (arXiv 2503.11019) is to a fixed prior
instead: one picture asks what it costs that this prior is not soft-optimal.  In this order: flags; worlds; schemes;
losses and bounds; customisation; pictures and command line.
"""

import csv
import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import rich.progress
import tyro
from jax import lax


@dataclasses.dataclass(frozen=True)
class Args:
    seed: int = 1
    """seed of the worlds and of the errors"""
    runs_dir: Path = Path("runs")
    """the run writes to RUNS_DIR/<world>__mirror_descent_vi__<seed>__<time>"""
    world: Literal["garnet", "chain"] = "garnet"
    """random MDPs, or a walk along a line; the pictures residual and behaviour have worlds of their own"""
    mdp: Path | None = None
    """instead of --world: a file of numpy.savez with P (states, actions, states), r (states, actions) and gamma"""
    num_mdps: int = 100
    """MDPs, each with errors of its own; only Garnets differ otherwise"""
    num_states: int = 30
    """states of an MDP"""
    num_actions: int = 4
    """actions of a Garnet; a chain has two"""
    branching: int = 2
    """next states that an action of a Garnet can lead to"""
    gamma: float = 0.9
    """discount; the picture of the bounds has 0.9 and 0.99"""
    scheme: Literal["mirror_descent", "dual_averaging", "munchausen"] = "mirror_descent"
    """form of value iteration: but for rounding, all have the same policies"""
    lambdas: tuple[float, ...] = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
    """weights of the KL penalty, in reward per nat; 0: none"""
    taus: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1, 1.0)
    """weights of the entropy, in reward per nat; 0: none"""
    num_iterations: int = 1000
    """iterations, each with one application of the Bellman operator"""
    noise: Literal["gaussian", "sampled"] = "gaussian"
    """errors: normal ones, or those of Bellman backups from sampled next states; the same draws for all schemes"""
    noise_scale: float = 1.0
    """standard deviation of normal errors, in reward; 0: exact evaluation"""
    num_samples: int = 1
    """next states per state and action in sampled backups"""


# ------------------------------------------------------------------------------------- worlds


class MDP(NamedTuple):
    """A finite Markov decision process; where a row of transition sums to less than 1, the rest is a fall: the end."""

    transition: jax.Array  # (states, actions, states)
    reward: jax.Array  # (states, actions)
    gamma: jax.Array  # ()


def garnets(rng: np.random.Generator, shape: tuple[int, ...], branching: int, gamma: float) -> MDP:
    """Random MDPs, shape (MDPs, states, actions): an action leads to branching states; rewards are in [-1, 1]."""
    order = rng.random((*shape, shape[1])).argsort(-1)
    cuts = np.sort(rng.random((*shape, branching - 1)))
    transition = np.zeros(order.shape)
    np.put_along_axis(transition, order[..., :branching], np.diff(cuts, prepend=0, append=1), -1)
    return MDP(transition, rng.uniform(-1, 1, shape), np.full(shape[0], gamma))


def chain(num_states: int, gamma: float) -> MDP:
    """A line: action 0 steps left, 1 right, every tenth step the other way; each step at an end is worth 0.2 or 1."""
    state, transition, reward = np.arange(num_states), np.zeros((num_states, 2, num_states)), np.zeros((num_states, 2))
    for action, step, chance in ((0, -1, 0.9), (0, 1, 0.1), (1, 1, 0.9), (1, -1, 0.1)):
        transition[state, action, np.clip(state + step, 0, num_states - 1)] += chance
    reward[0], reward[-1] = 0.2, 1.0
    return MDP(transition, reward, np.array(gamma))


def load_mdp(path: Path) -> MDP:
    """The MDP of --mdp; BadInput if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            transition, reward, gamma = (np.asarray(file[name], np.float64) for name in ("P", "r", "gamma"))
        if reward.ndim != 2 or reward.size == 0 or transition.shape != (*reward.shape, len(reward)) or gamma.ndim:
            raise ValueError("P, r, gamma must have the shapes (S, A, S), (S, A), ()")
        sums_to_1 = np.abs(transition.sum(-1) - 1).max() < 1e-6  # which NaN is not, nor infinite
        if not (sums_to_1 and (transition >= 0).all() and np.isfinite(reward).all() and 0 <= gamma < 1):
            raise ValueError("rows of P must be positive and sum to 1, r be finite, gamma at least 0 and below 1")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise BadInput(f"--mdp {path} cannot be used: {' '.join(str(error).split())}") from None
    return MDP(transition, reward, gamma)


# ------------------------------------------------------------------------------------ schemes


class Iterate(NamedTuple):
    """Where an iteration is after k steps, and what the bounds need of its errors; arrays are (states, actions)."""

    q: jax.Array  # q_k; munchausen's is q_k + lambda log pi_k, up to a constant
    log_policy: jax.Array  # log pi_k
    average: jax.Array  # h_{k-1}, if the scheme is dual_averaging
    error_sum: jax.Array  # eps_1 + ... + eps_k
    error_average: jax.Array  # (1 - beta) sum_j beta^(k-j) eps_j
    discounted: jax.Array  # (), what discounted_bound makes of error_average
    discounted_before: jax.Array  # (), the same after k - 1 steps: all that pi_k has seen
    largest_q: jax.Array  # (), max_j ||q_j||


def soft_greedy(x: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """max_pi <pi, x> + temperature H(pi), (...), and log of the pi that attains it, as x (..., actions)."""
    best = x.max(-1, keepdims=True)
    greedy = jnp.where(x == best, -jnp.log(jnp.sum(x == best, axis=-1, keepdims=True)), -1e300)  # 0 times that is 0
    positive = jnp.where(temperature > 0, temperature, 1.0)
    scaled = (x - best) / positive
    log_sum = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    value = jnp.where(temperature > 0, best + positive * log_sum, best)
    return value[..., 0], jnp.where(temperature > 0, scaled - log_sum, greedy)


def mirror_descent(old: Iterate, k: jax.Array, lambda_: jax.Array, tau: jax.Array, beta: jax.Array) -> tuple:
    """MD-VI: v = max_pi <pi, q_k> - lambda KL(pi || pi_k) + tau H(pi), and the pi that attains it.

    Returns, like all schemes: v (states,), log pi_{k+1} and h_k (states, actions), and what to add to r + gamma P v.
    """
    value, log_policy = soft_greedy(old.q + lambda_ * old.log_policy, lambda_ + tau)
    return value, log_policy, old.average, 0.0


def dual_averaging(old: Iterate, k: jax.Array, lambda_: jax.Array, tau: jax.Array, beta: jax.Array) -> tuple:
    """DA-VI: pi_{k+1} is the softmax of the average h_k of q_0, ..., q_k; v is MD-VI's, written out."""
    kept = jnp.where((tau > 0) | (lambda_ == 0), beta, k / (k + 1))
    average = kept * old.average + (1 - kept) * old.q
    log_policy = soft_greedy(average, jnp.where(tau > 0, tau, lambda_ / (k + 1)))[1]
    penalty = lambda_ * (log_policy - old.log_policy) + tau * log_policy
    return jnp.sum(jnp.exp(log_policy) * (old.q - penalty), axis=-1), log_policy, average, 0.0


def munchausen(old: Iterate, k: jax.Array, lambda_: jax.Array, tau: jax.Array, beta: jax.Array) -> tuple:
    """Munchausen's and conservative value iteration: lambda log pi_{k+1} as reward is beta (q - v), the kept gap."""
    value, log_policy = soft_greedy(old.q, lambda_ + tau)
    return value, log_policy, old.average, lambda_ * log_policy


def evaluation_error(noise: tuple, scale: jax.Array, key: jax.Array, mdp: MDP, value: jax.Array) -> jax.Array:
    """An error of r + gamma P value, (states, actions); noise is its kind and the number of samples."""
    if noise[0] == "gaussian":
        return scale * jax.random.normal(key, mdp.reward.shape)
    uniform = jax.random.uniform(key, (*mdp.reward.shape, noise[1], 1))
    sampled = jnp.sum(uniform >= jnp.cumsum(mdp.transition, axis=-1)[:, :, None], axis=-1)  # (S, A, num_samples)
    return mdp.gamma * (jnp.append(value, 0.0)[sampled].mean(-1) - mdp.transition @ value)  # 0 is the value of the end


def start_iterate(mdp: MDP, tau: jax.Array) -> Iterate:
    """q_0 = 0, pi_0 uniform, no errors yet."""
    zeros, start = jnp.zeros_like(mdp.reward), (1 - mdp.gamma) * largest_value(mdp, tau)
    return Iterate(zeros, zeros - jnp.log(zeros.shape[1]), zeros, zeros, zeros, start, start, jnp.zeros(()))


def advance(scheme: str, noise: tuple, mdp: MDP, key: jax.Array, weights: tuple, k: jax.Array, old: Iterate) -> Iterate:
    """Step k + 1 of a scheme; weights are (lambda, tau, scale of the noise); random numbers are those of key and k."""
    lambda_, tau, scale = weights
    beta = jnp.where(lambda_ > 0, lambda_ / jnp.where(lambda_ > 0, lambda_ + tau, 1.0), 0.0)
    value, log_policy, average, extra = SCHEMES[scheme](old, k, lambda_, tau, beta)
    error = evaluation_error(noise, scale, jax.random.fold_in(key, k), mdp, value)
    q = mdp.reward + mdp.gamma * mdp.transition @ value + error
    error_average = beta * old.error_average + (1 - beta) * error
    start_share = (1 - mdp.gamma) * largest_value(mdp, tau) * beta ** (k + 1)
    discounted = mdp.gamma * old.discounted + jnp.abs(error_average).max() + start_share
    sums = (old.error_sum + error, error_average, discounted, old.discounted)
    return Iterate(q + extra, log_policy, average, *sums, jnp.maximum(old.largest_q, jnp.abs(q).max()))


# -------------------------------------------------------------------------- losses and bounds


def evaluate_policy(mdp: MDP, log_policy: jax.Array, tau: float = 0.0) -> jax.Array:
    """q^tau_pi (states, actions), with entropy from the second step on, by a linear system."""
    policy = jnp.exp(log_policy)
    transition = jnp.einsum("sa,sat->st", policy, mdp.transition)
    reward = jnp.sum(policy * (mdp.reward - tau * log_policy), axis=-1)
    value = jnp.linalg.solve(jnp.eye(len(reward)) - mdp.gamma * transition, reward)
    return mdp.reward + mdp.gamma * mdp.transition @ value


def optimal_q(mdp: MDP, tau: float = 0.0) -> jax.Array:
    """q*_tau (states, actions), by policy iteration: a few steps also where gamma is close to 1."""

    def improve(carry):
        q = evaluate_policy(mdp, soft_greedy(carry[0], tau)[1], tau)
        return q, jnp.max(q - carry[0]) > 1e-14 * largest_value(mdp, tau) / (1 - mdp.gamma)

    return lax.while_loop(lambda carry: carry[1], improve, (jnp.full_like(mdp.reward, -1e300), jnp.array(True)))[0]


def largest_value(mdp: MDP, tau: jax.Array) -> jax.Array:
    """v_max^tau = (max |r| + tau log |A|) / (1 - gamma)."""
    return (jnp.abs(mdp.reward).max() + tau * jnp.log(mdp.reward.shape[1])) / (1 - mdp.gamma)


def averaged_bound(mdp: MDP, iterate: Iterate, k: jax.Array, lambda_: jax.Array) -> jax.Array:
    """Theorem 1 in norms (see above), if lambda > 0, tau = 0; where ||q_j|| > v_max, the largest stands for v_max."""
    v_max = largest_value(mdp, lambda_) + jnp.maximum(iterate.largest_q - largest_value(mdp, 0.0), 0)
    return (2 * jnp.abs(iterate.error_sum).max() + 4 * v_max) / ((1 - mdp.gamma) * k)


def discounted_bound(mdp: MDP, iterate: Iterate) -> jax.Array:
    """Theorem 2 in norms, on q*_tau - q^tau_{pi_k} if tau > 0 or lambda = 0, E_j being error_average after j steps: 2 /
    (1 - gamma) sum_{0<j<k} gamma^(k-1-j) ||E_j|| + 2 v_max^tau sum_{0<=j<k} gamma^(k-1-j) beta^j.  For q_0 = 0, as then
    h_j = r + gamma P (soft maximum of h_{j-1}) + E_j - beta^j (r + gamma tau log |A|)."""
    return 2 / (1 - mdp.gamma) * iterate.discounted_before


@partial(jax.jit, static_argnums=(0, 1))
@partial(jax.vmap, in_axes=(None, None, None, None, None, 0))
@partial(jax.vmap, in_axes=(None, None, None, 0, 0, None))
def iterate_scheme(scheme: str, noise: tuple, steps: jax.Array, mdp: MDP, key: jax.Array, weights: tuple) -> dict:
    """Of pi_k at steps k, which ascend from 1: loss, ||q* - q_{pi_k}||; regularised_loss, ||q*_tau - q^tau_{pi_k}||;
    bound, on loss if tau = 0, else on the other; last_action (..., states), its probability.  All are (grid, num_mdps,
    steps), in reward; mdp and key are (num_mdps, ...), weights (grid,)."""
    lambda_, tau, _ = weights
    taus = jnp.array([0.0, tau])
    optima = jax.vmap(optimal_q, (None, 0))(mdp, taus)

    def to_step(carry, step):
        iterate = lax.fori_loop(carry[0], step, partial(advance, scheme, noise, mdp, key, weights), carry[1])
        q = jax.vmap(evaluate_policy, (None, None, 0))(mdp, iterate.log_policy, taus)
        averages = (tau == 0) & (lambda_ > 0)
        bound = jnp.where(averages, averaged_bound(mdp, iterate, step, lambda_), discounted_bound(mdp, iterate))
        record = dict(zip(("loss", "regularised_loss"), jnp.max(optima - q, axis=(1, 2)), strict=True))
        return (step, iterate), record | {"bound": bound, "last_action": jnp.exp(iterate.log_policy[:, -1])}

    return lax.scan(to_step, (jnp.zeros_like(steps[0]), start_iterate(mdp, tau)), steps)[1]


# ------------------------------------------------------------------------------ customisation


def soft_prior(mdp: MDP, alpha: float, num_iterations: int, key: jax.Array, noise_scale: float) -> jax.Array:
    """log pi (states, actions) of soft value iteration at temperature alpha, stopped early, or with normal errors."""
    step = partial(advance, "mirror_descent", ("gaussian", 0), mdp, key, (jnp.zeros(()), alpha, noise_scale))
    return soft_greedy(lax.fori_loop(0, num_iterations, step, start_iterate(mdp, alpha)).q, alpha)[1]


def mean_soft_value(mdp: MDP, log_policy: jax.Array, alpha: float) -> jax.Array:
    """Mean over start states of the value of r - alpha log pi; (states, actions) -> ()."""
    q = evaluate_policy(mdp, log_policy, alpha)
    return jnp.sum(jnp.exp(log_policy) * (q - alpha * log_policy), axis=-1).mean()


def customise(mdp: MDP, addon: jax.Array, log_prior: jax.Array, c, alpha, omega_prime, alpha_hat) -> jax.Array:
    """log pi_theta that is optimal for r_R + omega' log pi - alpha_hat log pi_theta + c omega' / alpha."""
    residual = mdp._replace(reward=addon + omega_prime * log_prior + omega_prime / alpha * c)
    return soft_greedy(optimal_q(residual, alpha_hat), alpha_hat)[1]


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, 0, 0, None, None, None))
def customisation_losses(world: MDP, addon, log_prior, c, alpha, omega_primes, alpha_hat) -> jax.Array:
    """What of the largest mean_soft_value of r + r_R at alpha is lost with each omega' (n,); (num_mdps, n)."""
    full = world._replace(reward=world.reward + addon)
    best = soft_greedy(optimal_q(full, alpha), alpha)[1]
    found = lax.map(lambda x: customise(world, addon, log_prior, c, alpha, x, alpha_hat), omega_primes)
    return mean_soft_value(full, best, alpha) - jax.vmap(mean_soft_value, (None, 0, None))(full, found, alpha)


# ------------------------------------------------------------------ pictures and command line


def run_grid(args: Args, pairs: list[tuple], **changes) -> tuple[np.ndarray, dict]:
    """About 60 steps k, even on a logarithmic axis, and what is measured then with each (lambda, tau) in pairs."""
    args = dataclasses.replace(args, **changes)
    if args.mdp or args.world == "chain":
        one = load_mdp(args.mdp) if args.mdp else chain(args.num_states, args.gamma)
        one = one._replace(gamma=np.array(changes.get("gamma", one.gamma)))
        mdps = jax.tree.map(lambda x: np.broadcast_to(x, (args.num_mdps, *x.shape)), one)
    else:
        shape = (args.num_mdps, args.num_states, args.num_actions)
        mdps = garnets(np.random.default_rng(args.seed), shape, args.branching, args.gamma)
    keys = jax.random.split(jax.random.PRNGKey(args.seed), args.num_mdps)
    steps = np.unique(np.geomspace(1, args.num_iterations, 60).round().astype(int))
    weights = tuple(np.array([(*pair, args.noise_scale) for pair in pairs]).T)
    record = iterate_scheme(args.scheme, (args.noise, args.num_samples), steps, mdps, keys, weights)
    return steps, jax.device_get(record)


def compare(args: Args, title: str, pairs: dict[str, tuple], measures: tuple = ("loss",), **changes) -> tuple:
    """What is measured against the iteration for {label: (lambda, tau)}, and slopes for the eye."""
    steps, record = run_grid(args, list(pairs.values()), **changes)
    curves = {f"{y} of {x}": (steps, record[y][i]) for i, x in enumerate(pairs) for y in measures}
    for slope, power in {"slope of 1/√k": -0.5, "slope of 1/k": -1.0}.items():
        curves[slope] = steps, record["loss"][0, :, :1].mean(0) * steps[None] ** power
    return title, "iteration k", "reward", curves, {"yscale": "log", "ylim": (1e-4, None)}


def losses(args: Args) -> list[tuple]:
    """||q* - q_{pi_k}|| for all lambdas without entropy."""
    return [compare(args, "MD-VI(λ, 0); λ = 0: value iteration", {f"λ = {x:g}": (x, 0.0) for x in args.lambdas})]


def averaging(args: Args) -> list[tuple]:
    """Value iteration's error floor stays, MD-VI's falls; without errors value iteration is the faster of the two."""
    changes = {"normal errors": {"noise": "gaussian"}, "sampled backups": {"noise": "sampled"}}
    changes["no errors"] = {"noise": "gaussian", "noise_scale": 0.0}
    return [compare(args, title, VI_AND_MD, **each) for title, each in changes.items()]


def bounds(args: Args) -> list[tuple]:
    """Losses below their bounds at two horizons."""
    return [compare(args, f"γ = {x}", VI_AND_MD, ("loss", "bound"), gamma=x) for x in (0.9, 0.99)]


def heatmap(args: Args) -> list[tuple]:
    """The last ||q* - q_{pi_k}|| for all lambdas and taus."""
    _, record = run_grid(args, [(lambda_, tau) for tau in args.taus for lambda_ in args.lambdas])
    rows = np.maximum(record["loss"][..., -1], 1e-12).reshape(len(args.taus), len(args.lambdas), -1)
    curves = {tau: (np.array(args.lambdas), row.T) for tau, row in zip(args.taus, rows, strict=True)}
    return [(f"loss at k = {args.num_iterations}", "λ", "τ", curves, {"cmap": "viridis", "norm": "log"})]


def behaviour(args: Args) -> list[tuple]:
    """The probability of a step to the right on the chain, under the policy of each iteration."""
    steps, record = run_grid(args, list(VI_AND_MD.values()), world="chain", mdp=None, num_mdps=1)
    rows = [{i: (steps, x[:, :, i]) for i in range(args.num_states)} for x in record["last_action"]]
    names = [f"P(right) of {x}" for x in VI_AND_MD]
    return [(x, "iteration k", "state", y, {"cmap": "viridis"}) for x, y in zip(names, rows, strict=True)]


def residual(args: Args) -> list[tuple]:
    """What the customised policy loses by omega', alpha_hat and the prior's errors, and where actions can end."""
    rng, alpha, omega_primes = np.random.default_rng(args.seed), 0.1, 0.1 * np.geomspace(0.25, 16, 13)
    safe = garnets(rng, (args.num_mdps, 8, 4), 2, 0.95)
    safe = safe._replace(reward=1 + safe.reward / 2)
    addon, falls = rng.uniform(-1.5, 0, safe.reward.shape), rng.random(safe.reward.shape) < [0, 0.2, 0.2, 0.2]
    risky = safe._replace(transition=np.where(falls[..., None], 0, safe.transition))
    keys, nothing = jax.random.split(jax.random.PRNGKey(args.seed), args.num_mdps), np.zeros(args.num_mdps)
    make_prior = jax.jit(jax.vmap(soft_prior, (0, None, None, 0, None)))

    def curve(world, log_prior, c=nothing, alpha_hat=1.0):
        loss = customisation_losses(world, addon, log_prior, c, alpha, omega_primes, alpha * alpha_hat)
        return omega_primes / alpha, np.asarray(loss)

    priors = {f"errors of {x}": make_prior(safe, alpha, 1000, keys, x) for x in (0.3, 0.1)}
    priors |= {x: make_prior(safe, alpha, n, keys, 0.0) for x, n in {"one iteration": 1, "soft-optimal": 1000}.items()}
    noisy, blind, wise = priors["errors of 0.3"], priors["soft-optimal"], make_prior(risky, alpha, 1000, keys, 0.0)
    c = 0.05 * jax.jit(jax.vmap(mean_soft_value, (0, 0, None)))(safe, blind, alpha)  # mean r - alpha mean log pi
    ends = {"knows the ends": curve(risky, wise), "blind": curve(risky, blind), "blind, with c": curve(risky, blind, c)}
    rows = {x: curve(safe, noisy, nothing, x) for x in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)}
    x, y, curves = "ω′ / α", "loss of soft value", {label: curve(safe, prior) for label, prior in priors.items()}
    first, last = ("by prior, α̂ = α", x, y, curves, {}), ("by prior, where actions can end", x, y, ends, {})
    return [first, ("loss, prior with errors of 0.3", x, "α̂ / α", rows, {"cmap": "viridis"}), last]


def draw(axes, title: str, xlabel: str, ylabel: str, curves: dict, style: dict) -> None:
    """A panel: means of curves {label: (x (n,), y (num_mdps, n))} with 10 and 90 % quantiles, or a map, row by row."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if "cmap" in style:
        rows = [y.mean(0) for _, y in curves.values()]
        axes.figure.colorbar(axes.imshow(rows, aspect="auto", origin="lower", **style))
        for axis, names in ((axes.xaxis, next(iter(curves.values()))[0]), (axes.yaxis, list(curves))):
            shown = range(0, len(names), -(-len(names) // 8))
            axis.set_ticks(shown, [f"{names[i]:.3g}" for i in shown])
        return
    for i, (label, (x, y)) in enumerate(curves.items()):
        line = ("gray", ":") if "slope" in label else (f"C{i}", "--" if "bound" in label or "with c" in label else "-")
        axes.plot(x, y.mean(0), color=line[0], linestyle=line[1], label=label)
        axes.fill_between(x, *np.quantile(y, [0.1, 0.9], axis=0), color=line[0], alpha=0.12, linewidth=0)
    axes.set(xscale="log", **style)
    axes.legend(fontsize=8)


SCHEMES = {x.__name__: x for x in (mirror_descent, dual_averaging, munchausen)}
VI_AND_MD = {"value iteration": (0.0, 0.0), "MD-VI, λ = 1": (1.0, 0.0)}
PICTURES = {x.__name__: x for x in (losses, averaging, bounds, heatmap, residual, behaviour)}


class BadInput(Exception):
    """Ends the program with one line for the user, and exit code 2."""


def check_input(args: Args) -> None:
    """BadInput if flags cannot work, alone or together."""
    for name, value in vars(args).items():
        low, high = int(name.startswith("num_") or name == "branching"), 1 - 1e-9 if name == "gamma" else 2.0**31
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, int | float) and not low <= x <= high:
                raise BadInput(f"--{name.replace('_', '-')} is {x}; it must be from {low} to {high}")
    if args.branching > args.num_states or not (args.lambdas and args.taus):
        raise BadInput("--branching must be at most --num-states, and --lambdas and --taus must each have a value")
    if args.mdp:
        load_mdp(args.mdp)


def main(args: Args) -> None:
    """Make the pictures, each with its CSV."""
    check_input(args)
    run_dir = args.runs_dir / f"{args.world}__{Path(__file__).stem}__{args.seed}__{time.time():.3f}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2, default=str))
    for name in rich.progress.track(PICTURES, f"pictures in {run_dir}"):
        with jax.enable_x64(True):
            panels = PICTURES[name](args)
        figure = matplotlib.figure.Figure(figsize=(4.8 * len(panels), 4), layout="constrained")
        rows = [("panel", "curve", "x", "mean", "quantile_10", "quantile_90")]
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, *panel)
            for label, (x, y) in panel[3].items():
                columns = np.transpose((x, y.mean(0), *np.quantile(y, [0.1, 0.9], axis=0)))
                rows += [(panel[0], label, *(f"{value:.5g}" for value in row)) for row in columns]
        figure.savefig(run_dir / f"{name}.png", dpi=90)
        with (run_dir / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (BadInput, OSError) as error:
        print(f"{Path(__file__).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
