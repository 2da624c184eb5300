"""Clones of the shipped priors, by train_prior_bc.py and by the library imitation, against the number of episodes.

    python results/bc.py                                  # clones what is missing in bc.csv, then prints the table
    python results/bc.py --imitation venv/bin/python      # and, with a Python that has imitation, its clones

Each seed has 20 episodes of sampled actions by enjoy.py, in Gymnasium; smaller sets are the first of them.  Both learn
by as many updates on minibatches of 256, with the same widths.  Returns are means over 100 episodes in EnvPool.
"""

import csv
import datetime
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "residual_q_learning"))
sys.path.insert(0, str(ROOT))
import train_prior_bc as bc  # noqa: E402
from train_prior_ppo import load_policy  # noqa: E402

COLUMNS = (
    "env_id",
    "method",
    "episodes",
    "seed",
    "demonstrations",
    "stochastic",
    "deterministic",
    "log_prob",
    "min_std",
)
COLUMNS += ("seconds", "commit", "date")


@dataclass(frozen=True)
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4")
    """environments; priors/ must have a prior for each"""
    episodes: tuple[int, ...] = (1, 4, 20)
    """sizes of the demonstrations"""
    seeds: tuple[int, ...] = (206, 207, 208, 209, 210)
    """of the demonstrations and the clones"""
    imitation: Path | None = None
    """a Python that has the library imitation"""
    out: Path = ROOT / "results" / "bc.csv"
    """the table, to which rows are added"""
    keep: Path | None = None
    """a folder for the clones of train_prior_bc.py"""
    run: bool = True
    """clone what is missing; --no-run: only print"""


def record(folder: Path, env_id: str, seed: int) -> dict[str, np.ndarray]:
    """20 episodes of the shipped prior, with sampled actions."""
    file, first = folder / "all.npz", 1000 * seed  # seeds of the episodes
    command = [sys.executable, ROOT / "enjoy.py", ROOT / "priors" / f"{env_id}.safetensors", "--record", file]
    subprocess.run([*command, "--episodes", "20", "--seed", str(first)], check=True, capture_output=True)
    with np.load(file) as content:
        return {name: content[name] for name in content}


def first_episodes(data: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The first so many episodes of recorded ones."""
    end = np.flatnonzero(data["terminations"] | data["truncations"])[number - 1] + 1
    return {name: x if name.startswith("action_") else x[:end] for name, x in data.items()}


def clone(method: str, python: Path | None, file: Path, env_id: str, seed: int) -> Path:
    """Clone a file of demonstrations by one of the methods, without an evaluation; the policy file."""
    export = file.with_name(f"{method}.safetensors")
    if method == "imitation":
        budget = ("--num-updates", str(bc.Args.num_updates), "--batch-size", str(bc.Args.batch_size))
        command = [python, ROOT / "results" / "bc_imitation.py", file, export, *budget]
        subprocess.run([*command, "--env-id", env_id, "--seed", str(seed)], check=True, capture_output=True)
    else:
        flags = {"eval_episodes": 0, "held_out": 0.0}  # which would measure, and not change the clone
        args = bc.Args(demonstrations=file, env_id=env_id, export=export, seed=seed, **flags)
        bc.main(bc.check_clone_args(args), lambda _: None)
    return export


def measure(simulator: bc.Simulator, export: Path, data: dict[str, np.ndarray], seed: int) -> dict[str, str]:
    """Returns, mean log pi of the demonstrations, and the smallest deviation of a clone."""
    policy = load_policy(export)[0]
    returns = bc.play_episodes(simulator, policy, seed)
    action = data["actions"]
    if policy.actor.squash:
        action = bc.unsquash(action, simulator.low, simulator.high)[0]
    row = {name: f"{x.mean():.1f}" for name, x in returns.items()}
    log_std = bc.action_distribution(policy, data["observations"])[1]
    row["log_prob"] = f"{bc.policy_log_prob(policy, data['observations'], action).mean():.3f}"
    return row | {"min_std": f"{np.exp(log_std.min()):.3f}"}


def table(rows: list[dict[str, str]]) -> str:
    """Mean ± the half width of Student's 95 % interval over seeds, in Markdown."""
    lines = ["| environment | policy | episodes | seeds | sampled | deterministic | mean log π | smallest deviation |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    groups = {}
    for row in rows:
        groups.setdefault((row["env_id"], row["method"], int(row["episodes"])), []).append(row)
    for (env_id, method, episodes), group in sorted(groups.items()):
        cells = []
        for name, digits in {"stochastic": 0, "deterministic": 0, "log_prob": 2, "min_std": 2}.items():
            x = np.array([float(row[name]) for row in group])
            half = scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan
            shown = digits == 0 and len(x) > 1
            cells.append(f"{x.mean():.{digits}f} ± {half:.0f}" if shown else f"{x.mean():.{digits}f}")
        shown = str(episodes) if episodes else "–"
        lines.append(f"| {env_id} | {method} | {shown} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Clone and measure what is missing, then print."""
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    done = {(row["env_id"], row["method"], int(row["episodes"]), int(row["seed"])) for row in rows}
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    where = {"commit": git.stdout.strip(), "date": datetime.date.today().isoformat()}
    methods = ("train_prior_bc.py", *(["imitation"] if args.imitation else []))
    for seed in args.seeds if args.run else ():
        for env_id in args.env_ids:
            wanted = [(m, n) for n in (*args.episodes, 0) for m in ((*methods,) if n else ("prior",))]
            wanted = [(m, n) for m, n in wanted if (env_id, m, n, seed) not in done]
            if not wanted:
                continue
            with tempfile.TemporaryDirectory() as folder:
                data = record(Path(folder), env_id, seed)
                simulator = bc.make_simulator(env_id, "{}", bc.seed_words(seed, bc.EVALUATION, size=200) // 2)
                for method, number in wanted:
                    start, part = time.time(), first_episodes(data, number or 20)
                    file = Path(folder) / f"{method}-{number}.npz"
                    np.savez(file, **part)
                    prior = ROOT / "priors" / f"{env_id}.safetensors"
                    export = clone(method, args.imitation, file, env_id, seed) if number else prior
                    seconds = f"{time.time() - start:.0f}"
                    shown = {"env_id": env_id, "method": method, "episodes": number, "seed": seed, "seconds": seconds}
                    shown["demonstrations"] = f"{part['rewards'].sum() / (number or 20):.1f}"
                    rows.append(shown | measure(simulator, export, part, seed) | where)
                    print(rows[-1], flush=True)
                    if args.keep and method == methods[0]:
                        (args.keep / f"{env_id}-{number}-{seed}.safetensors").write_bytes(export.read_bytes())
                    export.unlink() if number else None
                    with args.out.open("w", newline="") as out:
                        writer = csv.DictWriter(out, COLUMNS)
                        writer.writeheader()
                        writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
