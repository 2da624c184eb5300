"""Train one algorithm from scratch for some minutes by the clock, and say what its policy returns then.

    python results/clock.py --algorithm "SAC of SBX" --env-id Hopper-v4 --minutes 1 3

Prints JSON: for each number of minutes, the seconds of training (compilation included, evaluation not), the environment
steps, and the mean return of the first episodes of 20 EnvPool environments, with sampled and deterministic actions.
reproduce.py's table `clock` calls this. Besides requirements.txt it needs requirements-bench.txt.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import envpool
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = ("soft_ppo.py", "soft_sac.py", "PPO of SBX", "PPO of SB3", "SAC of SBX")


@dataclass(frozen=True)
class Args:
    algorithm: Literal[ALGORITHMS]
    """the peers with their default settings, PPO with 8 environments and VecNormalize, SAC with 1 environment"""
    env_id: str = "HalfCheetah-v4"
    """a MuJoCo environment of Gymnasium"""
    seed: int = 1
    """seed of the environments, the networks and the sampling"""
    minutes: tuple[float, ...] = (1, 3, 10)
    """when to evaluate; training ends with the last"""


def own_script(args: Args) -> list[dict[str, float]]:
    """A run for each number of minutes, of the steps that it has time for: soft_ppo.py anneals its learning rate."""
    measured, results = [], []
    unit = 40_960 if args.algorithm == "soft_ppo.py" else 10_240
    for minutes in (None, None, *args.minutes):  # the first two runs only measure compilation and speed
        steps = unit * (3 if measured else 1)
        if minutes:
            (steps_0, seconds_0), (steps_1, seconds_1) = measured[0], measured[-1]
            speed = (steps_1 - steps_0) / (seconds_1 - seconds_0)
            steps = int(steps_1 + 0.98 * speed * (60 * minutes - seconds_1))
        with tempfile.TemporaryDirectory() as folder:
            path = ROOT / ("residual_q_learning" if args.algorithm == "soft_sac.py" else "") / args.algorithm
            command = [sys.executable, str(path), "--env-id", args.env_id, "--seed", str(args.seed)]
            command += ["--total-timesteps", str(max(steps, unit // 2)), "--no-progress", "--runs-dir", folder]
            subprocess.run(command, check=True, capture_output=True, text=True)
            (run_dir,) = Path(folder).iterdir()
            last_row = np.atleast_1d(np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True))[-1]
            means = json.loads((run_dir / "eval.json").read_text())["policy"]["mean"]
        measured.append((float(last_row["global_step"]), float(last_row["elapsed_s"])))
        returns = {actions: means[actions]["basic"] for actions in ("stochastic", "deterministic")}
        results.append({"steps": measured[-1][0], "seconds": measured[-1][1]} | returns)
    return [{"minutes": m} | result for m, result in zip(args.minutes, results[2:], strict=True)]


def peer(args: Args) -> list[dict[str, float]]:
    """One run, which pauses for the evaluations."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    name, _, package = args.algorithm.partition(" of ")
    if package == "SBX":
        import sbx as library
    else:
        import stable_baselines3 as library
    results = []

    class Clock(BaseCallback):
        def _on_training_start(self) -> None:
            self.start = time.time()

        def _on_step(self) -> bool:
            now = time.time()
            seconds = now - self.start
            if seconds >= 60 * args.minutes[len(results)]:
                result = {"minutes": args.minutes[len(results)], "steps": self.num_timesteps, "seconds": seconds}
                for actions in ("stochastic", "deterministic"):
                    result[actions] = mean_return(args, self.model, actions == "deterministic")
                results.append(result)
                self.start += time.time() - now  # the evaluation does not count
            return len(results) < len(args.minutes)

    if name == "PPO":
        envs = VecNormalize(make_vec_env(args.env_id, 8, seed=args.seed))
        model = library.PPO("MlpPolicy", envs, n_steps=2048 // 8, seed=args.seed, device="cpu")
    else:
        model = library.SAC("MlpPolicy", make_vec_env(args.env_id, 1, seed=args.seed), seed=args.seed)
    model.learn(10**9, callback=Clock())
    return results


def mean_return(args: Args, model: Any, deterministic: bool) -> float:
    """Of the first episodes of 20 environments."""
    envs = envpool.make(args.env_id, "gymnasium", num_envs=20, seed=args.seed + 10**6)
    normaliser = model.get_vec_normalize_env()
    obs, _ = envs.reset()
    returns, running = np.zeros(20), np.ones(20, bool)
    while running.any():
        obs = normaliser.normalize_obs(obs) if normaliser else obs
        action = model.predict(obs.astype(np.float32), deterministic=deterministic)[0]
        obs, reward, terminated, truncated, _ = envs.step(action.astype(np.float64))
        returns += reward * running
        running &= ~(terminated | truncated)
    return float(returns.mean())


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    print(json.dumps(own_script(args) if args.algorithm.endswith(".py") else peer(args)))
