# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["jax>=0.10", "numpy>=2.0", "tyro>=0.9", "rich>=13.9", "matplotlib>=3.10"]
# ///
"""Residual tree search: customise a prior by planning, without training, where the answer can be computed exactly.

Residual Q-Learning's "zero-shot" algorithm (arXiv 2306.09526), discrete actions, a known model.  A node's value is

    V(s) = alpha_hat log sum_a exp((Q_R(s, a) + omega' log pi(a|s)) / alpha_hat),  Q_R(s, a) = r_R + gamma E[V(s')],

pi the prior, r_R the add-on reward; the basic reward is not used.  A simulation walks down the tree, adds a node where
it leaves it, values this leaf by one rollout of the prior, and backs the values up.  Whoever acts as the prior from the
leaf on earns, of r_R + omega' log pi - alpha_hat log pi_theta,

    V_pi(s) = E_pi[sum_t gamma^t (r_R + (omega' - alpha_hat) log pi(a_t|s_t))] <= V(s).

So the paper's rollout of r_R alone is right where omega' = alpha_hat, its own setting.  An action not yet tried at a
node of value v counts as Q_R = v - (omega' - alpha_hat) log pi(a|s), which gives V = v, and the prior as policy.  With
all nodes to the horizon in the tree, no rollout is left, and values are exact.  A short horizon cuts off r_R alone: log
pi = (r + gamma E[V*(s')] - V*(s)) / alpha carries the future of the prior's own task.  In this order: flags; worlds;
exact answers; tree search; planned policies; pictures and command line.
"""

import csv
import dataclasses
import json
import signal
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

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
    """seed of the searches and of the prior's errors"""
    runs_dir: Path = Path("runs")
    """the run writes to RUNS_DIR/<world>__residual_mcts__<seed>__<time>"""
    mdp: Path | None = None
    """instead of the road: a file of numpy.savez with P (states, actions, states), r, r_R (states, actions), gamma"""
    gamma: float = 0.8
    """discount of the road"""
    alpha: float = 0.1
    """temperature at which the prior is soft-optimal, in reward per nat"""
    omega_prime: float | None = None
    """weight of log pi, in reward per nat; default: alpha"""
    alpha_hat: float | None = None
    """temperature of the customised policy, in reward per nat; default: alpha"""
    prior_error: float = 0.0
    """standard deviation of normal errors on the prior's action values, in reward"""
    prior_errors: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    """the same, in the picture wrong_prior"""
    num_simulations: tuple[int, ...] = (10, 30, 100, 300, 1000)
    """simulations of a search, ascending; the picture wrong_prior has the middle one"""
    horizon: int = 6
    """steps from the root to where a search and its rollouts end"""
    num_seeds: int = 4
    """searches at each state"""


# ------------------------------------------------------------------------------------- worlds


class World(NamedTuple):
    """A finite MDP, the wish, and what is measured.  State S, the last, is the end: no reward, and no way out."""

    successors: jax.Array  # (S + 1, actions, outcomes), the next state
    chances: jax.Array  # (S + 1, actions, outcomes), of each
    gamma: jax.Array  # ()
    reward: jax.Array  # (S + 1, actions), r, for the prior alone
    addon: jax.Array  # (S + 1, actions), r_R
    start: jax.Array  # (S + 1,), chances
    measures: dict[str, jax.Array]  # (S + 1, actions), summed over an episode; a mean is per step


def make_world(transition, gamma, *tables) -> World:
    """The world of arrays without the end, to which goes what rows of transition (S, actions, S) lack to 1."""
    end = 1 - transition.sum(-1, keepdims=True)
    chances = np.pad(np.concatenate([transition, np.where(end > 1e-6, end, 0)], -1), ((0, 1), (0, 0), (0, 0)))
    chances[-1, :, -1] = 1
    order = np.argsort(-chances, axis=-1, kind="stable")[..., : (chances > 0).sum(-1).max()].astype(np.int32)
    tables = jax.tree.map(lambda x: np.pad(x, ((0, 1), (0, 0))[: x.ndim]), tables)
    return jax.tree.map(jnp.asarray, World(order, np.take_along_axis(chances, order, -1), gamma, *tables))


def road(gamma: float, num_cells: int = 5, brake_chance: float = 0.2) -> World:
    """Three lanes, a car in each; actions: left, idle, right, faster, slower.

    State: lane (2: right), speed (0 to 2), and how many cells each lane's car is ahead, on a ring of num_cells.  Cars
    drive 2, 1 and 1 cells a step; the one in one's own lane may brake, and waits if it is behind.  To drive onto it, or
    to change onto it, ends the episode.  Basic reward: 1 + 0.2 speed, less 0.5 for a crash; wish: 0.25 lane.
    """
    shape = (3, 3, num_cells, num_cells, num_cells)
    lane, speed, *cars = np.indices(shape).reshape(5, -1)
    cars, states = np.stack(cars), np.arange(len(lane))
    transition, crash = np.zeros((len(lane), 5, len(lane))), np.zeros((len(lane), 5))
    lanes = np.clip(lane[:, None] + [-1, 0, 1, 0, 0], 0, 2)  # (S, actions), after the action
    speeds = np.clip(speed[:, None] + [0, 0, 0, 1, -1], 0, 2)
    for action in range(5):
        here = lanes[:, action] == np.arange(3)[:, None]  # (lanes, S)
        for brake, chance in ((0, 1 - brake_chance), (1, brake_chance)):
            ahead = cars + [[2], [1], [1]] - speeds[:, action] - brake * here
            hit = (here & ((cars == 0) | (ahead <= 0))).any(0)
            gaps = np.where(here, np.clip(ahead, 0, num_cells - 1), ahead % num_cells)
            after = np.ravel_multi_index((lanes[:, action], speeds[:, action], *gaps), shape)
            transition[states, action, after] += chance * ~hit
            crash[:, action] += chance * hit
    basic, addon = 1 + 0.2 * speeds - 0.5 * crash, 0.25 * lanes
    start = (speed == 1) & (cars[lane, states] > 0)
    measures = {"total": basic + addon, "crashes": crash, "mean lane": lanes}
    return make_world(transition, gamma, basic, addon, start / start.sum(), measures)


@lru_cache
def find_world(path: Path | None, gamma: float) -> World:
    """The road, or the world of --mdp, where all states can be the first; BadInput if it is none."""
    if path is None:
        return road(gamma)
    try:
        with np.load(path, allow_pickle=False) as file:
            transition, reward, addon, gamma = (np.asarray(file[x], np.float64) for x in ("P", "r", "r_R", "gamma"))
        good = reward.ndim == 2 and reward.size and transition.shape == (*reward.shape, len(reward))
        if not good or addon.shape != reward.shape or gamma.ndim:
            raise ValueError("P, r, r_R, gamma must have the shapes (S, A, S), (S, A), (S, A), ()")
        good = np.abs(transition.sum(-1) - 1).max() < 1e-6 and (transition >= 0).all()  # which NaN is not
        if not (good and np.isfinite(reward + addon).all() and 0 <= gamma <= BOUNDS["gamma"][1]):
            raise ValueError("rows of P must be positive and sum to 1, r and r_R be finite, gamma from 0 to 0.9999")
    except Exception as error:  # a damaged archive can raise nearly anything
        raise BadInput(f"--mdp {path} cannot be used: {' '.join(str(error).split())}") from None
    measures = {"total": reward + addon, "basic": reward, "add-on": addon}
    return make_world(transition, gamma, reward, addon, np.full(len(reward), 1 / len(reward)), measures)


# ------------------------------------------------------------------------------ exact answers


class Problem(NamedTuple):
    """What to plan for in a world."""

    world: World
    log_prior: jax.Array  # (S + 1, actions), 0 at the end
    omega_prime: float
    alpha_hat: float
    leaf_weight: float  # of log pi in rollouts: omega' - alpha_hat, or the paper's 0


def node_value(problem: Problem, q: jax.Array, log_prior: jax.Array) -> jax.Array:
    """V (...) of Q_R and log pi (..., actions): alpha_hat log sum_a exp((Q_R + omega' log pi) / alpha_hat)."""
    return problem.alpha_hat * jax.nn.logsumexp((q + problem.omega_prime * log_prior) / problem.alpha_hat, axis=-1)


@jax.jit
def residual_q(problem: Problem, horizon: float = np.inf) -> jax.Array:
    """Q_R (S + 1, actions) by value iteration, where all ends after horizon steps, or where gamma^t is below 1e-12."""
    world = problem.world

    def iterate(carry):
        i, q = carry
        value = node_value(problem, q, problem.log_prior).at[-1].set(0)
        return i + 1, world.addon + world.gamma * jnp.sum(world.chances * value[world.successors], axis=-1)

    return lax.while_loop(lambda x: (x[0] < horizon) & (world.gamma ** x[0] > 1e-12), iterate, (1, world.addon))[1]


def make_prior(world: World, alpha: float, error: float, seed: tuple[int, ...]) -> jax.Array:
    """log pi (S + 1, actions), soft-optimal for r at alpha but for normal errors of its action values."""
    basic = Problem(world._replace(addon=world.reward), jnp.zeros_like(world.reward), 0.0, alpha, 0.0)
    noise = error * np.random.default_rng(seed).normal(size=world.reward.shape)
    return jax.nn.log_softmax((residual_q(basic) + noise) / alpha).at[-1].set(0)


@partial(jax.jit, static_argnums=1)
def episodes(world: World, length: int, policies: jax.Array) -> dict:
    """Expected sums {what is measured: (n,)} over length steps under policies (n, S + 1, actions)."""

    def of_one(policy):
        def step(now, _):
            flow = (now[:, None] * policy)[..., None] * world.chances
            return jnp.zeros_like(now).at[world.successors].add(flow), now.at[-1].set(0)

        visits = lax.scan(step, world.start, None, length)[1].sum(0)  # (S + 1,)
        sums = {name: jnp.sum(visits[:, None] * policy * x) for name, x in world.measures.items()}
        return {name: x / visits.sum() if name.startswith("mean") else x for name, x in sums.items()}

    return lax.map(of_one, policies)


# -------------------------------------------------------------------------------- tree search


class Tree(NamedTuple):
    """One root's tree; node 0 is the root.  A number of a node that is not there is the number of nodes."""

    children: jax.Array  # (nodes, actions, outcomes), nodes
    q: jax.Array  # (nodes, actions), Q_R
    value: jax.Array  # (nodes,)
    visits: jax.Array  # (nodes,)


def mixture(kind: str, problem: Problem, log_prior: jax.Array, q: jax.Array, visits: jax.Array) -> jax.Array:
    """Probabilities (actions,) with which a walk goes on at a node: the first time the prior's, then a mixture of
    softmax((Q_R + omega' log pi) / alpha_hat) and the uniform policy, this with weight min(1, scale / log(1 + N)).
    "uniform", the paper's, has scale |A|: for |A| = 5 it is uniform until N = 147, log pi has no say.  "soft" has 1."""
    scale = len(q) if kind == "uniform" else 1
    weight = jnp.minimum(1.0, scale / jnp.log1p(jnp.maximum(visits, 1)))  # no division by log 1 = 0 at a new node
    soft = jax.nn.softmax((q + problem.omega_prime * log_prior) / problem.alpha_hat)
    return jnp.where(visits > 1, weight / len(q) + (1 - weight) * soft, jnp.exp(log_prior))


def sample(chances: jax.Array, uniform: jax.Array) -> jax.Array:
    """An index drawn with chances (n,) by a uniform number, never one without a chance."""
    sums = jnp.cumsum(chances)
    return jnp.sum(sums[:-1] <= uniform * sums[-1])


def walk(kind: str, problem: Problem, tree: Tree, node: jax.Array, root: jax.Array, uniforms: jax.Array) -> tuple:
    """From root by the tree's policy, once outside the tree by the prior's, for as many steps as uniforms (horizon, 2).

    Returns (horizon,) each: the node, or the number of nodes when outside; the state; action; outcome; next state.
    """
    end, nowhere = len(problem.world.addon) - 1, len(tree.value)

    def step(carry, uniform):
        node, state = carry
        inside, log_prior = node < nowhere, problem.log_prior[state]
        inner = mixture(kind, problem, log_prior, tree.q[node], tree.visits[node])
        action = sample(jnp.where(inside, inner, jnp.exp(log_prior)), uniform[0])
        outcome = sample(problem.world.chances[state, action], uniform[1])
        after = problem.world.successors[state, action, outcome]
        child = jnp.where(inside & (after != end), tree.children[node, action, outcome], nowhere)
        return (child, after), (node, state, action, outcome, after)

    return lax.scan(step, (node, root), uniforms)[1]


def backup(problem: Problem, tree: Tree, nodes: jax.Array, states: jax.Array, actions: jax.Array) -> Tree:
    """Q_R and V along a walk's nodes (horizon,), from the last to the first; outcomes not yet seen share the mean."""

    def step(carry, at):
        q, value = carry
        node, state, action = at
        children = tree.children[node, action]  # (outcomes,)
        seen = jnp.where(children < len(value), problem.world.chances[state, action], 0.0)
        mean = jnp.sum(seen * value[children]) / jnp.sum(seen)
        row = q[node].at[action].set(problem.world.addon[state, action] + problem.world.gamma * mean)
        return (q.at[node].set(row), value.at[node].set(node_value(problem, row, problem.log_prior[state]))), None

    (q, value), _ = lax.scan(step, (tree.q, tree.value), (nodes, states, actions), reverse=True)
    return tree._replace(q=q, value=value, visits=tree.visits.at[nodes].add(1))


def simulate(kind: str, problem: Problem, horizon: int, root: jax.Array, key: jax.Array, i, tree: Tree) -> Tree:
    """Simulation i: a walk, its leaf as node i, and the backup; simulation 0 is a rollout, and makes the root."""
    nowhere, end = len(tree.value), len(problem.world.addon) - 1
    uniforms = jax.random.uniform(jax.random.fold_in(key, i), (horizon, 2), jnp.float32)
    nodes, states, actions, outcomes, after = walk(kind, problem, tree, jnp.where(i > 0, 0, nowhere), root, uniforms)
    depth = jnp.sum(nodes < nowhere)  # of the leaf
    time_left = jnp.arange(horizon) - depth
    rewards = problem.world.addon[states, actions] + problem.leaf_weight * problem.log_prior[states, actions]
    leaf_value = jnp.sum(jnp.where(time_left >= 0, problem.world.gamma**time_left * rewards, 0.0))
    leaf_state = jnp.where(depth > 0, after[depth - 1], root)
    edge = jnp.where(depth > 0, nodes[depth - 1], nowhere), actions[depth - 1], outcomes[depth - 1]
    leaf = jnp.where((depth == 0) | (tree.children[edge] == nowhere), i, nowhere)
    q_row = leaf_value - (problem.omega_prime - problem.alpha_hat) * problem.log_prior[leaf_state]
    tree = tree._replace(
        children=tree.children.at[edge].min(leaf),
        q=tree.q.at[leaf].set(q_row),
        value=tree.value.at[leaf].set(jnp.where(leaf_state == end, 0.0, leaf_value)),
        visits=tree.visits.at[leaf].set(1),
    )
    return backup(problem, tree, nodes, states, actions)


def search(kind: str, counts: tuple, horizon: int, problem: Problem, root: jax.Array, key: jax.Array) -> tuple:
    """Q_R at the root after each of counts simulations (counts, actions), and the tree (counts[-1] nodes)."""
    shape = counts[-1], problem.world.addon.shape[1]
    children = jnp.full((*shape, problem.world.chances.shape[2]), counts[-1], jnp.int32)
    zeros = jnp.zeros(shape, problem.world.addon.dtype)
    tree = Tree(children, zeros, zeros[:, 0], children[:, 0, 0] * 0)

    def grow(tree, span):
        tree = lax.fori_loop(*span, partial(simulate, kind, problem, horizon, root, key), tree)
        return tree, tree.q[0]

    return lax.scan(grow, tree, jnp.array([(0, *counts[:-1]), counts], jnp.int32).T)[::-1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def plan(kind: str, counts: tuple, horizon: int, problem: Problem, roots: jax.Array, keys: jax.Array) -> jax.Array:
    """Q_R (roots, counts, actions) by independent searches: side by side, as many as fit into a cache."""
    size = max(1, int(1e6 / (counts[-1] * problem.world.chances[0].size)))
    return lax.map(lambda x: search(kind, counts, horizon, problem, *x)[0], (roots, keys), batch_size=size)


# ---------------------------------------------------------------------------- planned policies


@lru_cache
def scores(args: Args, way: str, horizon: float = np.inf, alone: bool = False) -> np.ndarray:
    """Q_R + omega' log pi, whose softmax at alpha_hat is the policy: (seeds, n, S + 1, actions).

    way: a tree policy, for a search at each state, n = counts; "exact", n = 1; "unplanned", which is the prior, n = 1.
    alone: rollouts sum r_R alone."""
    world, found = find_world(args.mdp, args.gamma), []
    roots = jnp.arange(len(world.addon), dtype=jnp.int32)
    for seed, keys in enumerate(jax.random.split(jax.random.PRNGKey(args.seed), (args.num_seeds, len(roots)))):
        log_prior = make_prior(world, args.alpha, args.prior_error, (args.seed, seed))
        leaf_weight = 0.0 if alone else args.omega_prime - args.alpha_hat
        problem = Problem(world, log_prior, args.omega_prime, args.alpha_hat, leaf_weight)
        if way == "unplanned":
            q = (args.alpha_hat - args.omega_prime) * log_prior[None]
        elif way == "exact":
            q = residual_q(problem, horizon)[None]
        else:
            q = jnp.moveaxis(plan(way, args.num_simulations, args.horizon, problem, roots, keys), 1, 0)
        found.append(np.asarray(q + args.omega_prime * log_prior))
    return np.stack(found)


# ------------------------------------------------------------------ pictures and command line


def panels(args: Args, style: dict, x: tuple, found: dict[str, np.ndarray], best: bool = False) -> list[tuple]:
    """A panel for each of what is measured, a curve for each of the scores found (n = 1: a level line); the policies
    sample from the softmax, or always take the best action."""
    world, exact, curves = find_world(args.mdp, args.gamma), dataclasses.replace(args, prior_error=0.0), {}
    greedy = scores(dataclasses.replace(exact, omega_prime=0.0), "exact")
    for label, each in (found | {"exact optimum": scores(exact, "exact"), "greedy, ω′ = 0": greedy}).items():
        flat = jnp.asarray(each).reshape(-1, *each.shape[2:])
        policies = jax.nn.one_hot(flat.argmax(-1), flat.shape[-1]) if best else jax.nn.softmax(flat / args.alpha_hat)
        for name, y in episodes(world, EPISODE_LENGTH, policies).items():
            curves.setdefault(name, {})[label] = x, y.reshape(each.shape[:2])
    return [(name, style, curves[name]) for name in world.measures]


def simulations(args: Args, best: bool = False) -> list[tuple]:
    """What the policies of searches bring, by the number of simulations; actions are sampled, or the best."""
    found = {f"search, {kind} tree policy": scores(args, kind) for kind in TREE_POLICIES}
    found |= {"exact to the horizon": scores(args, "exact", args.horizon), "prior": scores(args, "unplanned")}
    return panels(args, SIMULATIONS, args.num_simulations, found, best)


def errors(args: Args) -> list[tuple]:
    """Errors of the searches' Q_R: by tree policy, and by what rollouts sum where omega' is not alpha_hat."""

    def curve(args, kind, alone=False):
        gap = (scores(args, kind, alone=alone) - scores(args, "exact", args.horizon))[:, :, :-1]
        return args.num_simulations, np.sqrt((gap**2).mean((2, 3)))

    apart = dataclasses.replace(args, omega_prime=3 * args.alpha, alpha_hat=args.alpha / 3)
    kinds = {f"{kind} tree policy": curve(args, kind) for kind in TREE_POLICIES}
    leaves = {"rollouts of r_R alone": curve(apart, "soft", True), "of r_R + (ω′ − α̂) log π": curve(apart, "soft")}
    style = SIMULATIONS | {"ylabel": "RMS error of Q_R, in reward", "yscale": "log"}
    title = f"ω′ = {args.omega_prime:g}, α̂ = {args.alpha_hat:g}"
    return [(title, style, kinds), ("ω′ = 3 α, α̂ = α / 3", style, leaves)]


def wrong_prior(args: Args) -> list[tuple]:
    """What errors of the prior do to it, to planning with it, and with half its weight; actions are sampled."""
    count = args.num_simulations[len(args.num_simulations) // 2]
    full = [dataclasses.replace(args, num_simulations=(count,), prior_error=x) for x in args.prior_errors]
    half = [dataclasses.replace(x, omega_prime=x.omega_prime / 2) for x in full]
    ways = {f"search, {count} simulations": (full, "soft"), "planning without error": (full, "exact")}
    ways |= {"the same, half of ω′": (half, "exact"), "the prior": (full, "unplanned")}
    found = {label: np.concatenate([scores(x, way) for x in each], 1) for label, (each, way) in ways.items()}
    return panels(args, {"xlabel": "the prior's errors, in reward"}, args.prior_errors, found)


BOUNDS = {"gamma": (0, 0.9999), "seed": (0, 2**31)} | dict.fromkeys(("alpha", "alpha_hat"), (1e-6, 1e6))
BOUNDS |= dict.fromkeys(("num_simulations", "horizon", "num_seeds"), (1, 1e5))
SIMULATIONS = {"xlabel": "simulations", "xscale": "log"}
TREE_POLICIES, EPISODE_LENGTH = ("uniform", "soft"), 40
FIGURES = {"simulations": simulations, "best_actions": partial(simulations, best=True)}
FIGURES |= {"errors": errors, "wrong_prior": wrong_prior}


class BadInput(Exception):
    """Ends the program with one line for the user, and exit code 2."""


def checked(args: Args) -> Args:
    """The arguments, omega' and alpha_hat filled in; BadInput if they cannot work."""
    filled = {x: args.alpha for x in ("omega_prime", "alpha_hat") if getattr(args, x) is None}
    for name, value in vars(args := dataclasses.replace(args, **filled)).items():
        (low, high), flag = BOUNDS.get(name, (0, 1e6)), f"--{name.replace('_', '-')}"
        for x in value or (np.nan,) if isinstance(value, tuple) else (value,):
            if isinstance(x, int | float) and not low <= x <= high:
                raise BadInput(f"{flag} is {value}; it must be from {low:g} to {high:g}")
    if list(args.num_simulations) != sorted(set(args.num_simulations)):
        raise BadInput(f"--num-simulations is {args.num_simulations}; it must ascend")
    return args


def write_picture(path: Path, panels: list[tuple]) -> None:
    """Draw means over seeds of curves {label: (x, y (seeds, n))}, from lowest to highest a band; the same as CSV."""
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(panels) + 2, 3.8), layout="constrained")
    lines, colors, rows = {}, {}, [("panel", "curve", "x", "mean", "lowest", "highest")]
    for axes, (title, style, curves) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for label, (x, y) in curves.items():
            low, mean, high = (np.broadcast_to(of(y, 0), len(x)) for of in (np.min, np.mean, np.max))
            color = colors.setdefault(label, f"C{len(colors)}")
            (lines[label],) = axes.plot(x, mean, "--" if y.shape[1] < len(x) else "-", color=color)
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
            rows += [(title, label, *(f"{value:.5g}" for value in row)) for row in zip(x, mean, low, high, strict=True)]
        axes.set(title=title, **style)
    figure.legend(lines.values(), lines, loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=90)
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def main(args: Args) -> None:
    """Make the pictures, each with its CSV."""
    args = checked(args)
    with jax.enable_x64(True):
        find_world(args.mdp, args.gamma)
        name = f"{args.mdp.stem if args.mdp else 'road'}__{Path(__file__).stem}__{args.seed}__{time.time():.3f}"
        try:
            (run_dir := args.runs_dir / name).mkdir(parents=True)
        except OSError as error:
            raise BadInput(f"cannot write to {run_dir}: {error.strerror}; choose another --runs-dir") from None
        (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2, default=str))
        for name in rich.progress.track(FIGURES, f"pictures in {run_dir}"):
            write_picture(run_dir / f"{name}.png", FIGURES[name](args))


def stop(message: str, exit_code: int) -> None:
    """End this process with one line."""
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: stop("SIGTERM", 128 + signal.SIGTERM))
    try:
        main(tyro.cli(Args, description=__doc__))
    except (BadInput, OSError) as error:  # as of a full disk
        stop(str(error), 2 if isinstance(error, BadInput) else 1)
    except KeyboardInterrupt:
        stop("interrupted", 130)
