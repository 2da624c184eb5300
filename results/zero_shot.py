"""Zero-shot customisation by planning: run what is missing in results/zero-shot.csv, then draw zero-shot.png.

    python results/zero_shot.py                # run, write zero-shot.csv, zero-shot.png and the table in README.md
    python results/zero_shot.py --no-run       # only the picture and the table
    python results/zero_shot.py --parts speed  # only these runs

Each episode is added when it is done, so that the command can be interrupted and given again. One core is enough.
"""

import csv
import dataclasses
import datetime
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.figure
import numpy as np
import scipy.stats
import tyro

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT / "residual_q_learning"))
import residual_mppi as mppi  # noqa: E402

PARTS = ("table", "noise", "samples", "official", "speed")
EPISODES = dict.fromkeys(("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Swimmer-v4"), 50)  # of the default
# Of the authors' code for Residual-MPPI: horizon, samples, lambda, omega', variance of the noise; gamma is 0.9.
OFFICIAL = {
    "HalfCheetah-v4": (2, 10_000, 5e-5, 1e-7, 0.017),
    "Hopper-v4": (8, 10_000, 1e-5, 2e-7, 0.005),
    "Ant-v4": (5, 5_000, 5e-3, 1e-2, 0.005),
    "Swimmer-v4": (5, 5_000, 1e-4, 1e-4, 0.02),
}
OFFICIAL_SAMPLES = {"HalfCheetah-v4": 64, "Hopper-v4": 128, "Ant-v4": 64, "Swimmer-v4": 64}  # for whole episodes
# With all samples, beside the default's; a whole episode takes up to two and a half hours.
OFFICIAL_STEPS = {"HalfCheetah-v4": 20, "Hopper-v4": 50, "Ant-v4": 50, "Swimmer-v4": 50}
SCAN_STEPS = 300


class Setting(NamedTuple):
    """What is played from each seed, by one player: prior, greedy or residual planning."""

    part: str  # of the results
    env_id: str
    label: str
    player: str
    flags: str
    episodes: int


def settings() -> Iterator[Setting]:
    """All there are."""
    for env_id, episodes in EPISODES.items():
        yield Setting("table", env_id, "default", "prior", "", episodes)
        yield Setting("table", env_id, "default", "residual", "", episodes)
    before = "--num-samples 64 --horizon 1 --tail 1"  # the default until seeds 201 to 205 had been seen
    for player, episodes in (("residual", 5), ("greedy", 1)):
        yield Setting("table", "HalfCheetah-v4", "K = 64, H = 1, tail 1", player, before, episodes)
    yield Setting("noise", "HalfCheetah-v4", "prior", "prior", f"--max-steps {SCAN_STEPS}", 1)
    yield Setting("table", "HalfCheetah-v4", "default", "greedy", "", 10)
    scans = (
        ("noise", "--num-samples 32 --noise-scale", (0.5, 1, 2, 3)),
        ("samples", "--num-samples", (2, 4, 8, 16, 32)),
    )
    for part, flag, values in scans:
        for x in values:
            for player in ("residual", "greedy"):
                for division in ("--importance", "--no-importance"):
                    flags = f"--max-steps {SCAN_STEPS} {flag} {x:g} {division}"
                    yield Setting(part, "HalfCheetah-v4", f"{x:g} {division}", player, flags, 1)
    no_backup = "--backup-steps 0"  # as all was played until there was that flag
    for env_id, episodes in {"Hopper-v4": 50, "Walker2d-v4": 50, "Ant-v4": 15}.items():
        yield Setting("table", env_id, "no backup", "residual", no_backup, episodes)
        yield Setting("table", env_id, "no backup", "greedy", no_backup, min(episodes, 10))
    for env_id in EPISODES:
        yield Setting("table", env_id, "H = 1, no tail", "residual", f"--horizon 1 --tail 0 {no_backup}", 2)
    for env_id in ("Hopper-v4", "Walker2d-v4"):
        yield Setting("table", env_id, "c = 0", "residual", f"--survival-reward 0 {no_backup}", 1)
    yield Setting("table", "Ant-v4", "log pi in reached states", "residual", f"--reached {no_backup}", 1)
    for env_id in EPISODES:
        yield Setting("speed", env_id, "no backup", "residual", no_backup, 1)
    for env_id, (horizon, samples, temperature, omega_prime, variance) in OFFICIAL.items():
        scale = np.sqrt(variance) / mean_deviation(env_id)
        flags = f"--gamma 0.9 --horizon {horizon} --tail 0 --temperature {temperature:g} --omega-prime {omega_prime:g}"
        flags += f" --noise-scale {scale:.3g} --no-importance --reached --survival-reward 0 {no_backup} --num-samples"
        fewer = OFFICIAL_SAMPLES[env_id]
        yield Setting("official", env_id, f"official, but K = {fewer}", "residual", f"{flags} {fewer}", 1)
        if env_id == "HalfCheetah-v4":
            yield Setting("official", env_id, "official", "residual", f"{flags} {samples}", 1)
        limit, label = f"--max-steps {OFFICIAL_STEPS[env_id]}", f"{OFFICIAL_STEPS[env_id]} steps"
        yield Setting("official", env_id, f"default, {label}", "prior", limit, 1)
        yield Setting("official", env_id, f"default, {label}", "residual", limit, 1)
        yield Setting("official", env_id, f"official, {label}", "residual", f"{flags} {samples} {limit}", 1)


def mean_deviation(env_id: str) -> float:
    """Of the shipped prior's actions before squashing."""
    policy, _ = mppi.read_prior(mppi.default_prior(env_id))
    return float(np.exp(policy.tensors["actor_logstd"]).mean())


@dataclasses.dataclass(frozen=True)
class Args:
    parts: tuple[Literal[PARTS], ...] = PARTS
    """what to run"""
    env_ids: tuple[str, ...] = tuple(EPISODES)
    """where"""
    first_seed: int = 201
    """of the episodes"""
    run: bool = True
    """run what is missing; with --no-run, only draw and write the table"""
    out: Path = RESULTS
    """where zero-shot.csv, zero-shot.png and README.md are"""


class Game(NamedTuple):
    """A setting, ready to be played."""

    args: mppi.Args
    policy: mppi.NumpyPolicy
    addon: mppi.AddonTask
    player: mppi.Player


def open_game(setting: Setting) -> Game:
    """What residual_mppi.py makes of the flags."""
    flags = ["--env-id", setting.env_id, "--threads", "1", *setting.flags.split()]
    args, path = tyro.cli(mppi.Args, args=flags), mppi.default_prior(setting.env_id)
    policy, info = mppi.read_prior(path)
    args = mppi.complete(args, policy, info, path)
    (player,) = (player for player in mppi.open_players(policy, args) if player.name == setting.player)
    return Game(args, policy, mppi.named_task(args.env_id, None, 1.0)[1], player)


def play(game: Game, seed: int) -> dict[str, str]:
    """One episode, with the processor's time."""
    start = time.process_time()
    *_, episode = mppi.play_planned(game.player, game.policy, game.addon, seed, game.args.max_steps)
    seconds = 1000 * (time.process_time() - start) / episode.length
    numbers = {name: f"{getattr(episode, name):.6g}" for name in ("total", "basic", "addon", "quantity", "length")}
    return numbers | {"core seconds per 1000 steps": f"{seconds:.2f}"}


def speed(game: Game, seed: int) -> dict[str, str]:
    """Physics steps per second of processor time: of the planner, and of mujoco.rollout alone, in turn, five times."""
    args, model, rng = game.args, game.player.model, np.random.default_rng(0)
    env, space, rates = model.env, model.env.action_space, []
    length = (args.horizon + args.tail) * env.frame_skip
    env.reset(seed=seed)
    for _ in range(5):
        seconds = np.zeros(2)
        for _ in range(20):  # the same states for both: those of the residual planner
            state = np.tile(mppi.present_state(model), (args.num_samples, 1))
            control = rng.uniform(space.low, space.high, (args.num_samples, 1, space.shape[0])).repeat(length, 1)
            times = [time.process_time()]
            u = mppi.plan_step(model, game.policy, game.addon, args, rng)
            times.append(time.process_time())
            model.pool.rollout(env.model, model.data, state, control)
            times.append(time.process_time())
            seconds += np.diff(times)
            _, _, ended, _, _ = env.step(mppi.bounded(game.policy, u, space.low, space.high))
            if ended:
                env.reset()
        rates.append(20 * args.num_samples * length / seconds)
    planned, alone = np.median(rates, 0)
    return {"physics steps/s": f"{planned:.0f}", "of mujoco.rollout": f"{alone:.0f}"}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The episodes so far."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write all episodes."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def run_missing(args: Args, path: Path) -> None:
    """Play what the CSV lacks, and add it there: an episode of each setting, then the next."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    games, rows = {}, read_rows(path)
    done = {(x["part"], x["env_id"], x["label"], x["player"], int(x["seed"])) for x in rows}
    wanted = [(i, x) for x in settings() for i in range(x.episodes)]
    wanted = [(i, x) for i, x in wanted if x.part in args.parts and x.env_id in args.env_ids]
    for i, setting in sorted(wanted, key=lambda x: x[0]):
        key, seed = setting[:4], args.first_seed + i
        if (*key, seed) in done:
            continue
        game = games[setting] = games.get(setting) or open_game(setting)
        numbers = speed(game, seed) if setting.part == "speed" else play(game, seed)
        about = {"commit": commit, "date": str(datetime.date.today()), "cores": str(os.cpu_count())}
        rows.append(dict(zip(Setting._fields, key, strict=False)) | {"seed": str(seed)} | numbers | about)
        write_rows(path, rows)
        print(*key, seed, numbers.get("total", numbers), flush=True)


def mean_and_half(rows: list[dict[str, str]], column: str) -> tuple[float, float]:
    """Mean of a column, and half of Student's 95 % interval."""
    x = [float(row[column]) for row in rows]
    half = scipy.stats.t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
    return float(np.mean(x)), float(half)


def markdown(rows: list[dict[str, str]]) -> str:
    """The commands' line, and the tables: a row for each setting and player of the parts that no picture shows."""
    seeds = sorted({int(x["seed"]) for x in rows})
    commits, dates = (", ".join(sorted({x[name] for x in rows})) for name in ("commit", "date"))
    about = f"`python results/zero_shot.py`, commit {commits}, {dates}. An episode a seed, the first {seeds[0]}."
    lines = textwrap.wrap(f"{about} Mean ± half of Student's 95 % interval.", 120)
    names = {"basic": 0, "addon": 0, "length": 0, "core seconds per 1000 steps": 1}  # and digits
    header = " | ".join(["environment", "setting", "player", "episodes", "total", *names]).replace("addon", "add-on")
    lines += ["", f"| {header} |", "|---" * 9 + "|"]
    for part in ("table", "official"):
        groups = dict.fromkeys((x["env_id"], x["label"], x["player"]) for x in rows if x["part"] == part)
        for group in sorted(groups, key=lambda x: (list(EPISODES).index(x[0]), x[1] != "default")):
            kept = [x for x in rows if (x["part"], x["env_id"], x["label"], x["player"]) == (part, *group)]
            total, half = mean_and_half(kept, "total")
            cells = [f"{total:.0f}" + (f" ± {half:.0f}" if len(kept) > 1 else "")]
            cells += [f"{mean_and_half(kept, column)[0]:.{digits}f}" for column, digits in names.items()]
            lines.append(f"| {group[0]} | {group[1]} | {group[2]} | {len(kept)} | {' | '.join(cells)} |")
    lines += ["", "| environment | planner, physics steps/s | mujoco.rollout alone | ratio |", "|---" * 4 + "|"]
    for x in (x for x in rows if x["part"] == "speed"):
        planned, alone = float(x["physics steps/s"]), float(x["of mujoco.rollout"])
        lines.append(f"| {x['env_id']} | {planned:,.0f} | {alone:,.0f} | {planned / alone:.2f} |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, str]], path: Path) -> None:
    """Total against noise scale, and against the number of samples, with and without log pi and the division."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    prior = [x for x in rows if (x["part"], x["player"]) == ("noise", "prior")]
    curves = {
        ("residual", "--importance"): ("o-C0", "ω′ = α"),
        ("residual", "--no-importance"): ("s--C0", "ω′ = α, not divided by g"),
        ("greedy", "--importance"): ("o-C1", "ω′ = 0"),
        ("greedy", "--no-importance"): ("s--C1", "ω′ = 0, not divided by g"),
    }
    for ax, part, title in zip(
        axes, ("noise", "samples"), ("noise scale k, with 32 samples", "number of samples K"), strict=True
    ):
        chosen = [row for row in rows if row["part"] == part and row["player"] != "prior"]
        ticks = sorted({float(x["label"].split()[0]) for x in chosen})
        for (player, division), (style, name) in curves.items():
            points = [[x for x in chosen if x["player"] == player and x["label"] == f"{t:g} {division}"] for t in ticks]
            shown = [(t, *mean_and_half(x, "total")) for t, x in zip(ticks, points, strict=True) if x]
            x, mean, half = np.array(shown).reshape(-1, 3).T
            ax.errorbar(x, mean, half, fmt=style, capsize=2, label=name)
        if prior:
            ax.axhline(mean_and_half(prior, "total")[0], color="black", linestyle=":", label="prior")
        ax.set(xscale="log", xlabel=title)
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
    axes[0].set(ylabel=f"basic + add-on return of {SCAN_STEPS} steps, HalfCheetah-v4")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    """Run what is missing, then draw, and write the table."""
    path = args.out / "zero-shot.csv"
    if args.run:
        run_missing(args, path)
    rows = read_rows(path)
    if not rows:
        print(f"zero_shot.py: {path} has no episodes yet; leave out --no-run", file=sys.stderr)
        sys.exit(2)
    picture(rows, args.out / "zero-shot.png")
    table, readme = markdown(rows), args.out / "README.md"
    print(table)
    before, mark, rest = readme.read_text().partition("<!-- zero-shot from here -->\n")
    if mark:
        readme.write_text(before + mark + table + "<!-- to here -->" + rest.partition("<!-- to here -->")[2])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
