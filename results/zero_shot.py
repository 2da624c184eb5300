"""Zero-shot customisation by planning: run what is missing in results/zero-shot.csv, then draw zero-shot.png.

    python results/zero_shot.py                # run, write zero-shot.csv and zero-shot.png, print the table
    python results/zero_shot.py --no-run       # only the picture and the table
    python results/zero_shot.py --parts speed  # only these runs

Each run is added when it is done, so that the command can be interrupted and given again. One core is enough.
"""

import csv
import dataclasses
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.figure
import numpy as np
import tyro

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
SCRIPT = ROOT / "residual_q_learning" / "residual_mppi.py"
sys.path.insert(0, str(SCRIPT.parent))
ENV_IDS = ("HalfCheetah-v4", "Ant-v4", "Hopper-v4", "Walker2d-v4")
# gamma, horizon, samples, lambda, omega', variance of the noise: those of the authors' code for Residual-MPPI
OFFICIAL = {
    "HalfCheetah-v4": (2, 10_000, 5e-5, 1e-7, 0.017),
    "Hopper-v4": (8, 10_000, 1e-5, 2e-7, 0.005),
    "Ant-v4": (5, 5_000, 5e-3, 1e-2, 0.005),
}
OFFICIAL_STEPS = {"HalfCheetah-v4": 200, "Hopper-v4": 40, "Ant-v4": 40}


class Setting(NamedTuple):
    """What is played with each seed."""

    part: str  # of the results
    env_id: str
    label: str
    flags: str = ""
    seeds: int = 5


def settings() -> Iterator[Setting]:
    """All runs; each plays the prior, greedy and residual planning."""
    for env_id in ENV_IDS:
        yield Setting("table", env_id, "default")
        yield Setting("table", env_id, "no importance", "--no-importance")
        if env_id != "HalfCheetah-v4":
            yield Setting("table", env_id, "c = 0", "--survival-reward 0", 3)
            yield Setting("table", env_id, "no tail", "--tail 0", 3)
    for env_id in ("Hopper-v4", "Walker2d-v4"):
        yield Setting("table", env_id, "real time", "--num-samples 8 --tail 9")
    for k in (0.25, 0.5, 1, 2, 3):
        for importance in ("", " --no-importance"):
            yield Setting("noise", "HalfCheetah-v4", f"{k:g}{importance}", f"--noise-scale {k:g}{importance}", 3)
    for k in (2, 4, 8, 16, 32, 64, 128, 256):
        for importance in ("", " --no-importance"):
            yield Setting("samples", "HalfCheetah-v4", f"{k:g}{importance}", f"--num-samples {k:g}{importance}", 3)
    for env_id, (horizon, samples, temperature, omega_prime, variance) in OFFICIAL.items():
        steps, scale = OFFICIAL_STEPS[env_id], np.sqrt(variance) / mean_deviation(env_id)
        flags = f"--gamma 0.9 --horizon {horizon} --tail 0 --num-samples {samples} --temperature {temperature:g}"
        flags += f" --omega-prime {omega_prime:g} --noise-scale {scale:.3g} --no-importance --survival-reward 0"
        yield Setting("official", env_id, "official", f"{flags} --max-steps {steps}", 1)
        yield Setting("official", env_id, "default", f"--max-steps {steps}", 1)


def mean_deviation(env_id: str) -> float:
    """Of the shipped prior's actions before squashing."""
    import safetensors.numpy

    log_std = safetensors.numpy.load_file(ROOT / "priors" / f"{env_id}.safetensors")["actor_logstd"]
    return float(np.exp(log_std).mean())


@dataclasses.dataclass(frozen=True)
class Args:
    parts: tuple[Literal["table", "noise", "samples", "official", "speed"], ...] = (
        "table",
        "noise",
        "samples",
        "official",
        "speed",
    )
    """what to run"""
    first_seed: int = 201
    """of the seeds, each an episode"""
    run: bool = True
    """run what is missing; with --no-run, only write the picture and print the table"""
    out: Path = RESULTS
    """where zero-shot.csv and zero-shot.png are"""


def play(setting: Setting, seed: int) -> list[dict[str, object]]:
    """The rows of one run: one for each player."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "played.json"
        command = [sys.executable, str(SCRIPT), "--env-id", setting.env_id, "--seed", str(seed), "--threads", "1"]
        command += ["--json", str(path), *setting.flags.split()]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        played = json.loads(path.read_text())["players"]
    rows = []
    for player in played:
        (episode,) = player["episodes"]
        seconds = 1000 * player["seconds"] / episode["length"]
        rows.append(describe(setting, seed) | {"player": player["name"], "seconds per 1000 steps": f"{seconds:.2f}"})
        rows[-1] |= {name: f"{episode[name]:.6g}" for name in ("total", "basic", "addon", "quantity", "length")}
    return rows


def describe(setting: Setting, seed: int) -> dict[str, object]:
    """What a run is of."""
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row = setting._asdict() | {"seed": seed, "commit": commit.stdout.strip(), "date": str(datetime.date.today())}
    del row["seeds"]
    return row | {"cpu": f"{os.cpu_count()} cores"}


def speed(env_id: str) -> list[dict[str, object]]:
    """Physics steps per second of processor time: of the planner, and of mujoco.rollout alone, in turn, five times."""
    import gymnasium

    import residual_mppi as mppi

    args = mppi.Args(env_id=env_id, threads=1)
    path = ROOT / "priors" / f"{env_id}.safetensors"
    planner, policy = mppi.make_planner(path, env_id, args), mppi.read_policy(path)
    env = gymnasium.make(env_id, disable_env_checker=True)
    model, (_, addon) = mppi.make_model(env, env_id, 1), mppi.named_task(env_id, None, 1.0)
    rng, space, rates = np.random.default_rng(0), env.action_space, []
    obs, _ = env.reset(seed=201)
    length = (planner.horizon + planner.tail) * env.unwrapped.frame_skip
    for _ in range(5):
        seconds = np.zeros(2)
        for _ in range(20):  # the same states for both: those of the residual planner
            state = np.tile(mppi.present_state(model), (planner.num_samples, 1))
            control = rng.uniform(space.low, space.high, (planner.num_samples, 1, space.shape[0])).repeat(length, 1)
            times = [time.process_time()]
            u = mppi.plan(model, policy, addon, planner, rng)
            times.append(time.process_time())
            model.pool.rollout(model.env.model, model.data, state, control)
            times.append(time.process_time())
            seconds += np.diff(times)
            _, _, terminated, truncated, _ = env.step(mppi.bounded(policy, u, space.low, space.high))
            if terminated or truncated:
                env.reset()
        rates.append(20 * planner.num_samples * length / seconds)
    planned, alone = np.median(rates, 0)
    row = describe(Setting("speed", env_id, "default"), 201) | {"player": "residual"}
    return [row | {"physics steps/s": f"{planned:.0f}", "of mujoco.rollout": f"{alone:.0f}"}]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The runs so far."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write all runs."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def run_missing(args: Args, path: Path) -> list[dict[str, str]]:
    """Run what the CSV lacks, and add it there; returns all runs."""
    rows = read_rows(path)
    wanted = [(x, args.first_seed + i) for x in settings() for i in range(x.seeds) if x.part in args.parts]
    wanted += [(Setting("speed", x, "default"), args.first_seed) for x in ENV_IDS if "speed" in args.parts]
    for setting, seed in sorted(wanted, key=lambda x: x[1]):
        done = {(x["part"], x["env_id"], x["label"], int(x["seed"])) for x in rows}
        if args.run and (setting.part, setting.env_id, setting.label, seed) not in done:
            rows += speed(setting.env_id) if setting.part == "speed" else play(setting, seed)
            write_rows(path, rows)
            print(f"{setting.part}, {setting.env_id}, {setting.label}, seed {seed}: done", flush=True)
    return read_rows(path)


def mean_of(rows: list[dict[str, str]], column: str, **where: str) -> tuple[float, float, int]:
    """Mean, half of Student's 95 % interval, and number, of a column over the rows that are so."""
    import scipy.stats

    x = [float(row[column]) for row in rows if all(row[name] == value for name, value in where.items())]
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
    return np.mean(x), half, len(x)


def markdown(rows: list[dict[str, str]]) -> str:
    """A row for each setting and player."""
    columns = ["total", "basic", "addon", "length", "seconds per 1000 steps"]
    lines = [f"| part | environment | setting | player | seeds | {' | '.join(columns)} |", "|---" * 10 + "|"]
    groups = dict.fromkeys((x["part"], x["env_id"], x["label"], x["player"]) for x in rows if x["part"] != "speed")
    for part, env_id, label, player in groups:
        where = {"part": part, "env_id": env_id, "label": label, "player": player}
        total, half, count = mean_of(rows, "total", **where)
        cells = [f"{mean_of(rows, column, **where)[0]:.0f}" for column in columns[1:]]
        lines.append(f"| {' | '.join([*where.values(), str(count), f'{total:.0f} ± {half:.0f}', *cells])} |")
    lines += ["", "| environment | planner, physics steps/s | mujoco.rollout alone | ratio |", "|---" * 4 + "|"]
    for x in (x for x in rows if x["part"] == "speed"):
        planned, alone = float(x["physics steps/s"]), float(x["of mujoco.rollout"])
        lines.append(f"| {x['env_id']} | {planned:,.0f} | {alone:,.0f} | {planned / alone:.2f} |")
    return "\n".join(lines)


def picture(rows: list[dict[str, str]], path: Path) -> None:
    """Total against noise scale, and against the number of samples, with and without log pi and the division."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, part, title in zip(axes, ("noise", "samples"), ("noise scale k", "number of samples K"), strict=True):
        chosen = [row for row in rows if row["part"] == part]
        for (player, color), division in itertools.product((("residual", "C0"), ("greedy", "C1")), (True, False)):
            style = f"{'o-' if division else 's--'}{color}"
            kept = [x for x in chosen if x["player"] == player and ("no-importance" in x["label"]) != division]
            xs = sorted({float(x["label"].split()[0]) for x in kept})
            labels = [f"{x:g}" + ("" if division else " --no-importance") for x in xs]
            means = [mean_of(kept, "total", label=label) for label in labels]
            name = {"residual": "ω′ = α", "greedy": "ω′ = 0"}[player] + ("" if division else ", not divided by g")
            ax.errorbar(xs, [x[0] for x in means], [x[1] for x in means], fmt=style, capsize=2, label=name)
        if chosen:
            prior = mean_of(chosen, "total", player="prior")[0]
            ax.axhline(prior, color="black", linestyle=":", label="prior")
        ax.set(xscale="log", xlabel=title)
        ticks = sorted({float(x["label"].split()[0]) for x in chosen})
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
    axes[0].set(ylabel="basic + add-on return, HalfCheetah", ylim=(0, None))
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Run what is missing, then draw and print."""
    path = args.out / "zero-shot.csv"
    rows = run_missing(args, path)
    if not rows:
        print(f"zero_shot.py: {path} has no runs yet; leave out --no-run", file=sys.stderr)
        sys.exit(2)
    picture(rows, args.out / "zero-shot.png")
    print(markdown(rows))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except subprocess.CalledProcessError as error:
        print(f"zero_shot.py: {error.stderr.strip()}; the same command goes on from here", file=sys.stderr)
        sys.exit(1)
