"""Measure how fast soft_sac.py and soft_dqn.py train, beside SAC and DQN of SBX, and of Stable-Baselines3 with --sb3.

    pip install -r requirements.txt -r requirements-bench.txt && python benchmark/off_policy.py

All alternate 16 steps of 16 environments with gradient steps, and have networks of 128-128. SAC: batches of 256, one
gradient step per environment step or one per 16 of them, two critics, the actor updated at every second one. DQN:
batches of 64, one per two environment steps. As in throughput.py, each has a process of its own that waits for its
turn, and ratios are taken within a round. Prints a table.
"""

import importlib
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

NUM_ENVS, NUM_STEPS, WIDTHS, POLICY_FREQUENCY, LEARNING_STARTS = 16, 16, (128, 128), 2, 1000
BEFORE = 1 + LEARNING_STARTS // (NUM_ENVS * NUM_STEPS) + 3  # iterations until all is compiled and learning
BATCH_SIZE = {"sac": 256, "dqn": 64}
UPDATES_PER_STEP = {"sac": (1, 1 / 16), "dqn": (1 / 2,)}


@dataclass(frozen=True)
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4")
    """environments of SAC, which have continuous actions"""
    discrete_env_ids: tuple[str, ...] = ("CartPole-v1",)
    """environments of DQN, which have discrete ones"""
    sb3: bool = False
    """Stable-Baselines3, too, with PyTorch"""
    rounds: int = 5
    """how often everything has its turn"""
    seconds: float = 4.0
    """length of a turn, rounded up to whole iterations"""


def ours(connection: Connection, args: Args, env_id: str, num_envs: int, kind: str, updates_per_step: float) -> None:
    """The script's own main."""
    sys.path.insert(0, str(ROOT / "residual_q_learning"))
    import rich.console

    script, name = importlib.import_module(f"soft_{kind}"), {"sac": "train_off_policy", "dqn": "train_discrete"}[kind]
    script.CONSOLE = rich.console.Console(file=open(os.devnull, "w"), force_terminal=True, width=120)  # noqa: SIM115
    turns, train = Turns(connection, args.seconds, BEFORE), getattr(script, name)

    def measure(*given):
        *given, log = given
        train(*given, lambda *logged: (log(*logged), turns(NUM_ENVS * NUM_STEPS)))

    setattr(script, name, measure)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"env_id": env_id, "num_envs": num_envs, "num_steps": NUM_STEPS, "hidden_sizes": WIDTHS}
        flags |= {"batch_size": BATCH_SIZE[kind], "learning_starts": LEARNING_STARTS, "runs_dir": Path(folder)}
        flags |= {"updates_per_step": updates_per_step, "total_timesteps": 10**9}
        if kind == "sac":
            flags |= {"critic_hidden_sizes": WIDTHS, "policy_frequency": POLICY_FREQUENCY}
            run = script.Run
        else:
            flags |= {"basic": "own"}
            run = script.DiscreteRun
        script.main(script.Args(**flags), run)


def peer(
    connection: Connection, args: Args, env_id: str, num_envs: int, kind: str, updates_per_step: float, library: str
) -> None:
    """SAC or DQN of a library."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    turns = Turns(connection, args.seconds, BEFORE)

    class Pause(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            turns(NUM_ENVS * NUM_STEPS)

    further = {"policy_delay": POLICY_FREQUENCY} if (kind, library) == ("sac", "sbx") else {}
    model = getattr(importlib.import_module(library), kind.upper())(
        "MlpPolicy",
        make_vec_env(env_id, num_envs, seed=1),
        train_freq=NUM_STEPS,
        gradient_steps=round(NUM_ENVS * NUM_STEPS * updates_per_step),
        batch_size=BATCH_SIZE[kind],
        learning_starts=LEARNING_STARTS,
        policy_kwargs={"net_arch": list(WIDTHS)},
        **further,
    )
    model.learn(10**9, callback=Pause())


def main(args: Args) -> None:
    """Measure and print."""
    libraries = {"SBX": "sbx"} | ({"SB3": "stable_baselines3"} if args.sb3 else {})
    columns = [f"{name}, steps/s | ours ÷ {name}" for name in libraries]
    print(f"| environment | script | updates a step | ours, steps/s | {' | '.join(columns)} |")
    print("|---" * (4 + 2 * len(libraries)) + "|")
    for kind, env_ids in (("sac", args.env_ids), ("dqn", args.discrete_env_ids)):
        for env_id, updates in ((env_id, updates) for env_id in env_ids for updates in UPDATES_PER_STEP[kind]):
            contestants = {"ours": (ours, kind, updates)}
            contestants |= {name: (peer, kind, updates, library) for name, library in libraries.items()}
            rows = compete(args, env_id, NUM_ENVS, contestants, args.rounds)
            speeds = {what: np.array([row.value for row in rows if row.what == what]) for what in contestants}
            cells = [env_id, f"`soft_{kind}.py`", f"{updates:g}", f"{np.median(speeds['ours']):,.0f}"]
            for name in libraries:
                ratio = speeds["ours"] / speeds[name]
                cells.append(f"{np.median(speeds[name]):,.0f}")
                cells.append(f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
