"""Measure how fast soft_sac.py trains, beside SAC of SBX with the same networks, batches, environments and updates.

    pip install -r requirements.txt -r requirements-bench.txt && python benchmark/off_policy.py

Both alternate 16 steps of 16 environments with gradient steps, one per environment step or one per 16 of them: batches
of 256, an actor and two critics of 128-128, the actor updated at every second step. As in throughput.py, each has a
process of its own that waits for its turn, and ratios are taken within a round. Prints a table.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
from throughput import ROOT, Turns, compete  # noqa: E402

NUM_ENVS, NUM_STEPS, WIDTHS, BATCH_SIZE, POLICY_FREQUENCY, LEARNING_STARTS = 16, 16, (128, 128), 256, 2, 1000
BEFORE = 1 + LEARNING_STARTS // (NUM_ENVS * NUM_STEPS) + 3  # iterations until all is compiled and learning


@dataclass(frozen=True)
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4")
    """environments"""
    rounds: int = 5
    """how often everything has its turn"""
    seconds: float = 4.0
    """length of a turn, rounded up to whole iterations"""


def ours(connection: Connection, args: Args, env_id: str, num_envs: int, updates_per_step: float) -> None:
    """soft_sac.py's own main."""
    sys.path.insert(0, str(ROOT / "residual_q_learning"))
    import rich.console

    import soft_sac

    soft_sac.CONSOLE = rich.console.Console(file=open(os.devnull, "w"), force_terminal=True, width=120)  # noqa: SIM115
    turns, train = Turns(connection, args.seconds, BEFORE), soft_sac.train_off_policy

    def measure(*given):
        *given, log = given
        train(*given, lambda *logged: (log(*logged), turns(NUM_ENVS * NUM_STEPS)))

    soft_sac.train_off_policy = measure
    with tempfile.TemporaryDirectory() as folder:
        flags = {"env_id": env_id, "num_envs": num_envs, "num_steps": NUM_STEPS, "hidden_sizes": WIDTHS}
        flags |= {"critic_hidden_sizes": WIDTHS, "batch_size": BATCH_SIZE, "policy_frequency": POLICY_FREQUENCY}
        flags |= {"learning_starts": LEARNING_STARTS, "updates_per_step": updates_per_step, "runs_dir": Path(folder)}
        soft_sac.main(soft_sac.Args(**flags, total_timesteps=10**9), soft_sac.Run)


def peer(connection: Connection, args: Args, env_id: str, num_envs: int, updates_per_step: float) -> None:
    """SAC of SBX."""
    from sbx import SAC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    turns = Turns(connection, args.seconds, BEFORE)

    class Pause(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            turns(NUM_ENVS * NUM_STEPS)

    model = SAC(
        "MlpPolicy",
        make_vec_env(env_id, num_envs, seed=1),
        train_freq=NUM_STEPS,
        gradient_steps=round(NUM_ENVS * NUM_STEPS * updates_per_step),
        batch_size=BATCH_SIZE,
        policy_delay=POLICY_FREQUENCY,
        learning_starts=LEARNING_STARTS,
        policy_kwargs={"net_arch": list(WIDTHS)},
    )
    model.learn(10**9, callback=Pause())


def main(args: Args) -> None:
    """Measure and print."""
    print(
        "| environment | updates a step | soft_sac.py, steps/s | SAC of SBX, steps/s | ratio |\n|---|---|---|---|---|"
    )
    for env_id in args.env_ids:
        for updates_per_step in (1, 1 / 16):
            contestants = {"soft_sac": (ours, updates_per_step), "SBX": (peer, updates_per_step)}
            rows = compete(args, env_id, NUM_ENVS, contestants, args.rounds)
            speeds = {what: np.array([row.value for row in rows if row.what == what]) for what in contestants}
            ratio = speeds["soft_sac"] / speeds["SBX"]
            cells = [f"{np.median(x):.0f}" for x in speeds.values()]
            cells.append(f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
            print(f"| {env_id} | {updates_per_step:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
