"""Measure how fast soft_dqn.py trains, beside bare stepping of the same EnvPool environments with random actions.

    taskset -c 0 python benchmark/discrete.py

Speeds are environment steps per second of the process's CPU time, so that a machine that is shared does not change
them; the two take turns. With default flags a gradient step on 64 transitions goes with every second step.
"""

import contextlib
import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import envpool
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "residual_q_learning"))
import soft_dqn  # noqa: E402


@dataclass(frozen=True)
class Args:
    env_ids: tuple[str, ...] = ("CartPole-v1", "LunarLander-v3", "highway-fast-v0")
    """environments"""
    seconds: float = 5.0
    """CPU time of a turn"""
    turns: int = 5
    """turns of each; the table has their medians"""


def bare_speed(env_id: str, seconds: float) -> float:
    """Steps per CPU second of a Python loop over EnvPool, with as many environments."""
    num_envs, rng = soft_dqn.Args().num_envs, np.random.default_rng(0)
    pool = envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, num_threads=1)
    actions = rng.integers(0, pool.action_space.n, (1000, num_envs)).astype(np.int32)
    pool.reset()
    start, steps = time.process_time(), 0
    while time.process_time() - start < seconds:
        for action in actions[:100]:
            pool.step(action)
        steps += 100 * num_envs
    return steps / (time.process_time() - start)


def training_speeds(env_id: str, args: Args) -> tuple[list[float], list[float]]:
    """Steps per CPU second of training, once it learns and is compiled, and of bare stepping between its turns."""
    flags = soft_dqn.Args(env_id=env_id, total_timesteps=10**7, basic="own", buffer_size=100_000)
    seeds = soft_dqn.env_seeds(1, soft_dqn.TRAINING, flags.num_envs)
    simulator = soft_dqn.make_discrete_simulator(env_id, "{}", "own", seeds)
    env = soft_dqn.make_env(simulator, soft_dqn.DISCRETE_TASKS["none"], squash=False)
    actor = soft_dqn.QNetwork(len(simulator.low), flags.hidden_sizes)
    state = soft_dqn.init_dqn_state(flags, actor, simulator.obs_dim, soft_dqn.seed_words(1, soft_dqn.NETWORKS))
    training, bare, steps = [], [], flags.num_envs * flags.num_steps
    started = [None, 0]  # CPU time and iteration at which the turn began

    def log(iteration, state, metrics):
        metrics["value_loss"].block_until_ready()
        if iteration < 20:
            return
        if started[0] is None:
            started[:] = time.process_time(), iteration
        elif (elapsed := time.process_time() - started[0]) >= args.seconds:
            training.append(steps * (iteration - started[1]) / elapsed)
            bare.append(bare_speed(env_id, args.seconds / 5))
            started[0] = None
            if len(training) == args.turns:
                raise StopIteration

    update = partial(soft_dqn.soft_dqn_update, flags)
    with contextlib.suppress(StopIteration):
        soft_dqn.train_discrete(env, partial(soft_dqn.soft_policy, flags), update, flags, state, log)
    return training, bare


def main(args: Args) -> None:
    """Measure, and print the table."""
    print("| environment | soft_dqn.py, steps/s | bare EnvPool, steps/s | training ÷ bare |\n|---|---|---|---|")
    for env_id in args.env_ids:
        training, bare = (np.median(x) for x in training_speeds(env_id, args))
        print(f"| {env_id} | {training:,.0f} | {bare:,.0f} | {training / bare:.2f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
