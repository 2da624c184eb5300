"""Measure the search of residual_mcts.py beside that of mctx, on the same road, with the same prior and rollouts.

    pip install -r requirements.txt -r requirements-bench.txt && python benchmark/tree_search.py

mctx is the field's library for tree search in JAX.  It backs up means of returns, not soft values, and keeps one next
state for each action of a node, the first that was sampled: it answers another question, and is a peer in speed alone.
Its simulations walk down to the horizon at most, too, add a node, and value it by one rollout of the prior, or ("no
rollout") by 0.  A rollout of mctx makes as many steps as the horizon has, as searches side by side are at different
depths; residual_mcts.py makes so many steps in walk and rollout together.  residual_mcts.py computes in float64, as its
script does, mctx in float32.  All take turns, so that what else the machine does falls on all alike; ratios are taken
within a round.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import tyro
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "residual_q_learning"))
import residual_mcts as mcts  # noqa: E402


@dataclass(frozen=True)
class Args:
    num_roots: int = 64
    """searches side by side"""
    num_simulations: tuple[int, ...] = (100, 300)
    """simulations of a search"""
    horizon: int = 6
    """steps from the root to where a search and its rollouts end"""
    rounds: int = 5
    """how often all have their turn"""


def sampled_step(problem: mcts.Problem, state: jax.Array, action: jax.Array, key: jax.Array) -> jax.Array:
    """The next states (n,) of states and actions (n,)."""
    uniforms = jax.random.uniform(key, state.shape, jnp.float32)
    outcome = jax.vmap(mcts.sample)(problem.world.chances[state, action], uniforms)
    return problem.world.successors[state, action, outcome]


def rollout(problem: mcts.Problem, horizon: int, state: jax.Array, depth: jax.Array, key: jax.Array) -> jax.Array:
    """Discounted r_R (n,) of the prior from states (n,) in this depth to the horizon."""

    def step(carry, now):
        state, total, discount = carry
        t, keys = now
        uniforms = jax.random.uniform(keys[0], state.shape, jnp.float32)
        action = jax.vmap(mcts.sample)(jnp.exp(problem.log_prior[state]), uniforms)
        total += jnp.where(depth + t < horizon, discount * problem.world.addon[state, action], 0.0)
        return (sampled_step(problem, state, action, keys[1]), total, discount * problem.world.gamma), None

    times, start = jnp.arange(horizon), (state, jnp.zeros(state.shape), jnp.ones(()))
    return lax.scan(step, start, (times, jax.random.split(key, (horizon, 2))))[0][1]


def peer(problem: mcts.Problem, args: Args, count: int, rolls: bool):
    """The values of actions (n, actions) at roots (n,) by mctx's MuZero search."""

    def value(state, depth, key):
        return rollout(problem, args.horizon, state, depth, key) if rolls else jnp.zeros(state.shape)

    def recurrent(_, key, action, embedding):
        state, depth = embedding
        keys = jax.random.split(key)
        after, depth = sampled_step(problem, state, action, keys[0]), depth + 1
        discount = jnp.where(after == len(problem.log_prior) - 1, 0.0, problem.world.gamma)
        output = mctx.RecurrentFnOutput(
            reward=problem.world.addon[state, action],
            discount=discount,
            prior_logits=problem.log_prior[after],
            value=value(after, depth, keys[1]),
        )
        return output, (after, depth)

    @jax.jit
    def search(roots, key):
        depth = jnp.zeros_like(roots)
        logits, values = problem.log_prior[roots], value(roots, depth, key)
        root = mctx.RootFnOutput(prior_logits=logits, value=values, embedding=(roots, depth))
        return mctx.muzero_policy((), key, root, recurrent, count, max_depth=args.horizon).search_tree.summary().qvalues

    return search


def problem_and_roots(num_roots: int) -> tuple[mcts.Problem, jax.Array]:
    """The road with its prior, and states at which episodes begin."""
    world = mcts.road(0.8)
    roots = np.random.default_rng(0).choice(np.flatnonzero(world.start), num_roots)
    return mcts.Problem(world, mcts.make_prior(world, 0.1, 0.0, (1,)), 0.1, 0.1, 0.0), jnp.asarray(roots, jnp.int32)


def ours(args: Args, count: int):
    """A function without arguments that searches, in float64."""
    with jax.enable_x64(True):
        problem, roots = problem_and_roots(args.num_roots)
    keys = jax.random.split(jax.random.PRNGKey(0), args.num_roots)

    def search():
        with jax.enable_x64(True):
            return mcts.plan("soft", (count,), args.horizon, problem, roots, keys)

    return search


def main(args: Args) -> None:
    """Let all have their turns; print medians."""
    problem, roots = problem_and_roots(args.num_roots)
    for count in args.num_simulations:
        ways = {"residual_mcts.py": ours(args, count)}
        for name, rolls in (("mctx", True), ("mctx, no rollout", False)):
            ways[name] = partial(peer(problem, args, count, rolls), roots, jax.random.PRNGKey(0))
        speeds = {name: [] for name in ways}
        for i in range(args.rounds + 1):
            for name, run in ways.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                if i:  # the first also compiles
                    speeds[name].append(args.num_roots * count / (time.perf_counter() - start))
        for name, found in speeds.items():
            ratios = [ours / theirs for ours, theirs in zip(speeds["residual_mcts.py"], found, strict=True)]
            speed, ratio = (
                f"{statistics.median(x):.{y}f} ({min(x):.{y}f} to {max(x):.{y}f})" for x, y in ((found, 0), (ratios, 2))
            )
            print(f"{count} simulations, {name}: {speed} a second; residual_mcts.py ÷ this {ratio}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
