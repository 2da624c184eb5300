"""Measure mirror_descent_vi.py beside the same iterations in NumPy, looped over MDPs.

    python benchmark/dynamic_programming.py

Both iterate MD-VI(1, 0) with normal errors on the same Garnets, and measure exact losses and bounds at 60 steps.  The
loop of NumPy goes over MDPs and iterations, with array operations over states and actions; it is run on a part of the
MDPs, and its time is scaled up.  The two take turns, so that what else the machine does falls on both alike.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mirror_descent"))
import mirror_descent_vi as vi  # noqa: E402


@dataclass(frozen=True)
class Args:
    num_mdps: int = 100
    """Garnets of 30 states and 4 actions"""
    num_iterations: int = 1000
    """iterations on each"""
    numpy_mdps: int = 5
    """Garnets on which NumPy is measured"""
    num_lambdas: int = 1
    """weights of the KL penalty that are run side by side, as the script's pictures do; NumPy's time is scaled up"""
    rounds: int = 5
    """how often both have their turn"""


def numpy_loop(mdps: vi.MDP, count: int, steps: np.ndarray, lambda_: float = 1.0) -> list[float]:
    """The last losses and bounds of MD-VI(lambda_, 0) on the first count MDPs, one after the other."""
    rng, results = np.random.default_rng(0), []
    for transition, reward, gamma in zip(*(x[:count] for x in mdps), strict=True):
        num_states, num_actions = reward.shape

        def evaluate(policy, transition=transition, reward=reward, gamma=gamma):
            matrix = np.eye(len(policy)) - gamma * np.einsum("sa,sat->st", policy, transition)
            return reward + gamma * transition @ np.linalg.solve(matrix, (policy * reward).sum(-1))

        optimum = evaluate(np.full(reward.shape, 1 / num_actions))
        for _ in range(20):
            optimum = evaluate(np.eye(num_actions)[optimum.argmax(-1)])
        q, log_policy = np.zeros_like(reward), np.full(reward.shape, -np.log(num_actions))
        error_sum, largest_q, measured = np.zeros_like(reward), 0.0, set(steps.tolist())
        for k in range(1, steps[-1] + 1):
            logits = q + lambda_ * log_policy
            best = logits.max(-1, keepdims=True)
            scaled = (logits - best) / lambda_
            log_sum = np.log(np.exp(scaled).sum(-1, keepdims=True))
            log_policy, value = scaled - log_sum, (best + lambda_ * log_sum)[:, 0]
            error = rng.normal(size=reward.shape)
            q = reward + gamma * transition @ value + error
            error_sum += error
            largest_q = max(largest_q, np.abs(q).max())
            if k in measured:
                loss = (optimum - evaluate(np.exp(log_policy))).max()
                v_max = max(np.abs(reward).max() / (1 - gamma), largest_q) + lambda_ * np.log(num_actions) / (1 - gamma)
                bound = (2 * np.abs(error_sum).max() + 4 * v_max) / ((1 - gamma) * k)
        results.append((loss, bound))
    return results


def main(args: Args) -> None:
    """Let both have their turns; print medians."""
    steps = np.unique(np.geomspace(1, args.num_iterations, 60).round().astype(int))
    mdps = vi.garnets(np.random.default_rng(0), (args.num_mdps, 30, 4), 2, 0.9)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.PRNGKey(0), args.num_mdps)
        weights = (np.ones(args.num_lambdas), np.zeros(args.num_lambdas), np.ones(args.num_lambdas))

        def ours():
            return jax.block_until_ready(
                vi.iterate_scheme("mirror_descent", ("gaussian", 1), steps, mdps, keys, weights)
            )

        def timed(function, *inputs):
            start = time.perf_counter()
            function(*inputs)
            return time.perf_counter() - start

        compiling, seconds, ratios = timed(ours), [], []
        for _ in range(args.rounds):
            seconds.append(timed(ours))
            theirs = (
                timed(numpy_loop, mdps, args.numpy_mdps, steps) * args.num_mdps / args.numpy_mdps * args.num_lambdas
            )
            ratios.append(theirs / seconds[-1])
            print(f"here {seconds[-1]:.2f} s, NumPy {theirs:.1f} s, ratio {ratios[-1]:.1f}", flush=True)
    print(f"first call, with compilation: {compiling:.1f} s")
    print(f"here {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})", end=", ")
    print(f"NumPy ÷ here {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
