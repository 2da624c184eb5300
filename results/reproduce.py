"""Run what the tables of results need, and write the tables and pictures.

    python results/reproduce.py customisation              # run what is missing, then write the table and the picture
    python results/reproduce.py customisation --no-run     # write them from results/customisation.csv alone
    python results/reproduce.py customisation --smoke      # the same with tiny budgets, in results/smoke

Each run is a row of results/<table>.csv, added when the run is done; a run that has its row, here or in another table,
is not repeated. So the command can be interrupted, and given again. Intervals are Student's, of the mean over seeds, at
95 %; "better" is said after Welch's test. Besides requirements.txt it needs SciPy (requirements-dev.txt).
"""

import csv
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.figure
import numpy as np
import safetensors
import scipy.stats
import tyro

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
EPISODES = 100  # of an evaluation
HIGHWAY_STEPS = 30  # of an episode of highway-fast that no crash ends
SMOKE_FLAGS = "--num-envs 8 --num-steps 16 --total-timesteps 512 --eval-episodes 2"
COLUMNS = ("total", "basic", "addon", "quantity")
CLOCK_COLUMNS = ("steps", "stochastic", "deterministic")
ADDONS = {
    "Ant": "ant-right",
    "HalfCheetah": "half-cheetah-front-foot",
    "Hopper": "hopper-height",
    "Walker2d": "walker-upright",
}
SECOND_TASKS = {
    "HalfCheetah": "half-cheetah-energy",
    "Hopper": "hopper-upright",
    "Ant": "ant-left",
    "Walker2d": "walker-height",
}


class Setting(NamedTuple):
    """What is run with each seed: a row of a table."""

    env_id: str
    label: str
    flags: str = ""
    script: str = "residual_ppo"


def alpha_of(env_id: str) -> float:
    """The nominal temperature of the shipped prior, in units of reward per nat."""
    return from_file(f"priors/{env_id}.safetensors", "alpha")


def from_file(path: str, name: str) -> float:
    """A number that a policy file gives."""
    with safetensors.safe_open(ROOT / path, "numpy") as file:
        return float(file.metadata()[name])


def weights(env_id: str, omega_prime: float, alpha_hat: float) -> str:
    """Flags for omega' and alpha_hat, given as multiples of the prior's temperature: the plain objective."""
    alpha = alpha_of(env_id)
    return f"--omega 1 --omega-prime {omega_prime * alpha:.6g} --alpha-hat {alpha_hat * alpha:.6g}"


def default() -> Iterator[Setting]:
    """Customisation with default flags where no choice was made, beside KL PPO; what customisation() does not have."""
    for env_id in ("Swimmer-v4", "Humanoid-v4"):
        survival = f" --survival-reward {survival_of(env_id):.6g} {SHORT}"
        yield Setting(env_id, DEFAULT)
        if env_id == "Swimmer-v4":
            yield from of_two_nats(env_id)
            yield Setting(env_id, "Residual PPO, a budget of 1 nat", f"--budget 1 {SHORT}")
            yield by_actions(env_id)
        yield Setting(env_id, "KL PPO, ω′ = α̂ = 3 α, with c", weights(env_id, 3, 3) + survival)
    yield Setting("Ant-v4", "Residual PPO, ω = 0.5", "--omega 0.5")
    yield Setting("Ant-v4", "Residual PPO, ω = 0.5, rollouts of 32 steps", f"--omega 0.5 {SHORT}")


def customisation() -> Iterator[Setting]:
    """The paper's table: what the methods make of the same prior."""
    for env_id in ("HalfCheetah-v4", "Hopper-v4", "Ant-v4", "Walker2d-v4"):
        survival = f" --survival-reward {survival_of(env_id):.6g} {SHORT}"
        yield Setting(env_id, DEFAULT, LONG)
        yield from of_two_nats(env_id)
        yield by_actions(env_id)
        for k in KL_WEIGHTS:  # its gain is not to be that of the survival reward
            yield Setting(env_id, f"KL PPO, ω′ = α̂ = {k:g} α, with c", weights(env_id, k, k) + survival)
        best = KL_BEST[env_id]
        flags = f"{weights(env_id, best, best)} --survival-reward {survival_of(env_id):.6g} {LONG}"
        yield Setting(env_id, f"KL PPO, {best} α, with c, 128 steps", flags)
        yield Setting(env_id, "Residual SAC, default", "", "residual_sac")
        for k in KL_WEIGHTS:
            flags = f"{weights(env_id, k, 1 / 3)} {SHORT}"
            yield Setting(env_id, f"Residual PPO, plain, ω′ = {k:g} α, α̂ = α / 3", flags)
        yield from trained_further(env_id)
        yield Setting(env_id, "Greedy PPO", f"{weights(env_id, 0, 1 / 3)} {SHORT}")
        for k in KL_WEIGHTS:
            yield Setting(env_id, f"KL PPO, ω′ = α̂ = {k:g} α", f"{weights(env_id, k, k)} {SHORT}")
        yield full(env_id)


def of_two_nats(env_id: str) -> Iterator[Setting]:
    """Former defaults: rollouts of 32 steps, and, where half a nat an action is less, a budget of 2 nats."""
    budget = "--budget 2 " if env_id in FEW_ACTIONS else ""
    if budget:
        yield Setting(env_id, "Residual PPO, a budget of 2 nats", budget + LONG)
    yield Setting(env_id, SHORT_ROLLOUTS, budget + SHORT)


def by_actions(env_id: str) -> Setting:
    """A budget of 1.5 standard deviations of a Gaussian's log pi(a|s), which is sqrt(actions / 2) nats."""
    with safetensors.safe_open(ROOT / f"priors/{env_id}.safetensors", "numpy") as file:
        budget = 1.5 * (file.get_tensor("actor_logstd").size / 2) ** 0.5
    return Setting(env_id, BY_ACTIONS, f"--budget {budget:.6g} {SHORT}")


def trained_further(env_id: str) -> Iterator[Setting]:
    """What one does who knows the basic reward: train the prior on, on both rewards; in either shape of rollouts."""
    flags = f"--init-from priors/{env_id}.safetensors --addon {ADDONS[env_id.removesuffix('-v4')]}"
    flags += f" --alpha {alpha_of(env_id):g} --gamma 0.99 --total-timesteps 500000"  # the prior's
    yield Setting(env_id, "prior trained further", flags, "soft_ppo")
    yield Setting(env_id, "prior trained further, 128 steps", f"{flags} {LONG}", "soft_ppo")


def tasks() -> Iterator[Setting]:
    """A second task of each environment, with default flags."""
    for env_id, task in SECOND_TASKS.items():
        yield Setting(f"{env_id}-v4", task, f"--addon {task}")


def full(env_id: str) -> Setting:
    """The paper's full policy, which knows both rewards: from scratch, at the prior's temperature."""
    flags = f"--addon {ADDONS[env_id.removesuffix('-v4')]} --alpha {alpha_of(env_id):g} --total-timesteps 4000000"
    return Setting(env_id, "Full: Soft PPO, 4M steps", flags, "soft_ppo")


def survival_of(env_id: str) -> float:
    """The survival reward in the shipped prior's file, in reward per step."""
    return from_file(f"priors/{env_id}.safetensors", "survival_reward")


def entropy_tuning() -> Iterator[Setting]:
    """The four treatments of entropy in PPO, from scratch, each over a grid of three, with tuning seeds."""
    short, long = ("", 500_000), (", 3M steps", 3_000_000)
    for env_id in ("HalfCheetah-v4", "Hopper-v4", "Ant-v4"):
        for (mark, steps), treatment in itertools.product((short, long), ("soft", "bonus", "repeat", "none")):
            for alpha, ent_coef in ((0.03, 0.001), (0.1, 0.01), (0.3, 0.1)):
                soft, bonus = f" α = {alpha}", f" coefficient {ent_coef}"
                names = {"soft": soft, "bonus": bonus, "repeat": f"{soft},{bonus}", "none": ""}
                label = f"{treatment}{names[treatment]}{mark}"
                flags = f"--entropy {treatment} --alpha {alpha} --ent-coef {ent_coef} --gamma 0.99"  # constant
                flags += f" --total-timesteps {steps}"
                if treatment != "none" or alpha == 0.1:  # without entropy there is nothing to tune
                    yield Setting(env_id, label, flags, "soft_ppo")


def entropy() -> Iterator[Setting]:
    """Of each treatment of entropy, and number of steps, the one that was best in tuning."""
    best = {}
    for row in read_rows(RESULTS / "entropy-tuning.csv"):
        group = row["env_id"], row["flags"].split()[1], row["flags"].split()[-1]
        best.setdefault(group, {}).setdefault(row["label"], []).append(row)
    for (env_id, *_), grid in best.items():
        rows = max(grid.values(), key=lambda rows: np.mean([float(row["policy stochastic total"]) for row in rows]))
        yield Setting(env_id, rows[0]["label"], rows[0]["flags"], "soft_ppo")


def clock() -> Iterator[Setting]:
    """Return by wall-clock time, from scratch."""
    for env_id in ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4"):
        for algorithm in ("soft_ppo.py", "soft_sac.py", "PPO of SBX", "PPO of SB3", "SAC of SBX"):
            yield Setting(env_id, algorithm, "--minutes 1 3 10", "clock")


def residual_sac() -> Iterator[Setting]:
    """Residual SAC against Residual PPO, each with the prior of Soft PPO and with one of Soft SAC."""
    for env_id in ("HalfCheetah-v4", "Hopper-v4", "Ant-v4", "Walker2d-v4"):
        yield Setting(env_id, "residual_ppo.py")
        yield Setting(env_id, "residual_sac.py", "", "residual_sac")
        if env_id == "Walker2d-v4":
            continue
        flags = f"--prior priors/{env_id}-sac.safetensors"
        yield Setting(env_id, "residual_ppo.py, SAC prior", flags)
        yield Setting(env_id, "residual_sac.py, SAC prior", flags, "residual_sac")
        if env_id != "HalfCheetah-v4":  # there, nothing terminates
            yield Setting(env_id, "… without survival reward", f"{flags} --survival-reward 0", "residual_sac")


def soft_sac() -> Iterator[Setting]:
    """Soft SAC from scratch, on the environment's own reward."""
    for env_id, alpha in (("HalfCheetah-v4", 0.1), ("Hopper-v4", 0.05), ("Walker2d-v4", 0.05), ("Ant-v4", 0.1)):
        yield Setting(env_id, "soft_sac.py", f"--alpha {alpha}", "soft_sac")


def init() -> Iterator[Setting]:
    """Starting as the prior, or from scratch; and from a prior that classical PPO trained, with the same weights."""
    for env_id in ("Ant-v4", "HalfCheetah-v4", "Hopper-v4"):
        yield Setting(env_id, "from the prior")
        yield Setting(env_id, "from scratch", "--no-init-from-prior")
        if env_id == "Hopper-v4":
            path = f"results/classical/{env_id}.safetensors"
            survival_flag = f" --survival-reward {from_file(path, 'survival_reward'):.6g}"
            flags = f"--prior {path}{survival_flag}"
            yield Setting(env_id, "from a classical prior", flags)


def discrete() -> Iterator[Setting]:
    """Residual DQN on a discrete prior, with log pi left out, and DQN from scratch on the full reward."""
    steps = "--total-timesteps 400000"
    for env_id, budget, flags in (
        ("CartPole-v1", "", ""),
        ("highway-fast-v0", steps, f"--alpha 0.05 --gamma 0.8 {steps}"),
        ("LunarLander-v3", "", f"--alpha 0.1 {steps}"),
    ):
        yield Setting(env_id, "residual_dqn.py", budget, "residual_dqn")
        yield Setting(env_id, "greedy, omega' = 0", f"--omega-prime 0 {budget}".strip(), "residual_dqn")
        yield Setting(env_id, "full, soft_dqn.py", f"--addon default {flags}".strip(), "soft_dqn")


def munchausen() -> Iterator[Setting]:
    """DQN, soft DQN, Munchausen DQN and KL alone: points of soft_dqn.py, as published: without Double DQN's value."""
    for label, flags in (
        ("DQN", "--alpha 0"),
        ("soft DQN", "--alpha 0.03"),
        ("Munchausen DQN", "--alpha 0.03 --munchausen 0.9"),
        ("KL alone", "--alpha 0.03 --munchausen 1"),
    ):
        yield Setting("LunarLander-v3", label, f"{flags} --no-double --total-timesteps 500000", "soft_dqn")


DEFAULT = "Residual PPO, default"
LONG = "--num-envs 16 --num-steps 128"  # the default's own, said since at the rows' commit it was SHORT
SHORT = "--num-envs 64 --num-steps 32"  # the default's until then, with which most rows were run
SHORT_ROLLOUTS = "Residual PPO, rollouts of 32 steps"
FEW_ACTIONS = ("Hopper-v4", "Swimmer-v4")  # whose default budget is less than 2 nats
BY_ACTIONS = "Residual PPO, a budget of 1.5 √(actions / 2)"
OLDER = ("entropy", "clock", "soft-sac")  # tables with former reporting seeds, but for the rows of 3M steps
KL_WEIGHTS = (1, 3, 8)  # of KL PPO, in units of the prior's alpha
KL_BEST = {"HalfCheetah-v4": 1, "Hopper-v4": 3, "Ant-v4": 8, "Walker2d-v4": 3}  # of these, by the rows of SHORT
TABLES: dict[str, Callable[[], Iterator[Setting]]] = {
    "default": default,
    "customisation": customisation,
    "tasks": tasks,
    "entropy-tuning": entropy_tuning,
    "entropy": entropy,
    "clock": clock,
    "init": init,
    "soft-sac": soft_sac,
    "residual-sac": residual_sac,
    "discrete": discrete,
    "munchausen": munchausen,
}


@dataclass(frozen=True)
class Args:
    table: tyro.conf.Positional[Literal[tuple(TABLES)]]
    """which table"""
    seeds: tuple[int, ...] | None = None
    """if not given, those that the row reports: 206 to 210, of some 211 to 220 or 101 to 105; in tuning 21 and 22"""
    env_ids: tuple[str, ...] = ()
    """only these environments; if not given, all of the table"""
    labels: tuple[str, ...] = ()
    """only these rows; if not given, all of the table"""
    run: bool = True
    """run what is missing; with --no-run, only write table and picture"""
    jobs: int = 2
    """runs at a time"""
    smoke: bool = False
    """tiny budgets, one environment, one seed, into results/smoke: a test that everything runs"""
    out: Path = RESULTS
    """where the table's CSV and picture are; its Markdown is in results/README.md, or there, if it is another folder"""


def run(setting: Setting, seed: int, smoke: bool) -> dict[str, object]:
    """One run: the row of the CSV that it gives. Raises: CalledProcessError with what the script printed."""
    row = setting._asdict() | {"seed": seed, "date": str(datetime.date.today())}
    row |= {"cpu": f"{os.cpu_count()} x {platform.machine()}"}
    return row | (run_clock if setting.script == "clock" else run_script)(setting, seed, smoke)


def run_clock(setting: Setting, seed: int, smoke: bool) -> dict[str, object]:
    """What clock.py says: steps and returns after each number of minutes."""
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    command = [sys.executable, str(RESULTS / "clock.py"), "--env-id", setting.env_id, "--algorithm", setting.label]
    command += ["--seed", str(seed), *("--minutes 0.1 0.2" if smoke else setting.flags).split()]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    row = {"commit": commit.stdout.strip()}
    for result in json.loads(said.splitlines()[-1]):
        minutes = result.pop("minutes")
        row |= {f"{name} after {minutes:g} min": f"{value:.6g}" for name, value in result.items()}
    return row


def run_script(setting: Setting, seed: int, smoke: bool) -> dict[str, object]:
    """What a run folder says of training and evaluation."""
    by_value = setting.script.endswith(("sac", "dqn"))
    small = SMOKE_FLAGS + (" --learning-starts 128" if by_value else " --num-minibatches 4")
    flags = ["--env-id", setting.env_id, "--seed", str(seed), "--eval-episodes", str(EPISODES), *setting.flags.split()]
    flags += small.split() if smoke else []
    with tempfile.TemporaryDirectory() as folder:
        path = ROOT / ("residual_q_learning" if by_value else "") / f"{setting.script}.py"
        command = [sys.executable, str(path), *flags, "--runs-dir", folder]
        command += [] if setting.script.endswith("dqn") else ["--no-progress"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        (run_dir,) = Path(folder).iterdir()
        results = json.loads((run_dir / "eval.json").read_text())
        info = json.loads((run_dir / "args.json").read_text())
        metrics = np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True)
        driving = play_highway(run_dir, list(results)) if setting.env_id.startswith("highway") else {}
    row = driving | {
        "commit": info["git_commit"][:7],
        "episodes": str(info["args"]["eval_episodes"]),
        "minutes": f"{metrics['elapsed_s'][-1] / 60:.2f}",
    }
    row |= {name: f"{metrics[name][-1]:.4g}" for name in ("kl_to_prior",) if name in metrics.dtype.names}
    points = metrics[np.linspace(0, len(metrics) - 1, 25).astype(int)][["global_step", "elapsed_s", "total_return"]]
    row["curve"] = " ".join("/".join(f"{x:.0f}" for x in point) for point in points)
    for policy, means in ((policy, results[policy]["mean"]) for policy in results):
        role = "prior" if policy == "prior" else "policy"
        for actions in ("stochastic", "deterministic"):
            row |= {f"{role} {actions} {name}": f"{means[actions][name]:.6g}" for name in COLUMNS}
    return row


def play_highway(run_dir: Path, policies: list[str]) -> dict[str, str]:
    """The paper's metrics of driving, of EPISODES other episodes: share that reach the end, length, speed in m/s."""
    row = {}
    for policy, actions in ((policy, actions) for policy in policies for actions in CLOCK_COLUMNS[1:]):
        path = run_dir / ("prior.safetensors" if policy == "prior" else "policy.safetensors")
        command = [sys.executable, str(ROOT / "enjoy.py"), str(path), "--addon", "highway-slow", "--seed", "1000"]
        command += ["--episodes", str(EPISODES), "--json", str(out := run_dir / f"{policy} {actions}.json")]
        command += ["--deterministic"] if actions == "deterministic" else []
        subprocess.run(command, check=True, capture_output=True, text=True)
        (played,) = json.loads(out.read_text())["policies"]
        speed, length = (np.array([x[name] for x in played["episodes"]]) for name in ("quantity", "length"))
        role = "prior" if policy == "prior" else "policy"
        for name, x in {"success": length == HIGHWAY_STEPS, "length": length, "speed": speed}.items():
            row[f"{role} {actions} {name}"] = f"{x.mean():.6g}"
    return row


def read_rows(path: Path) -> list[dict[str, str]]:
    """The runs that a table has so far."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def rows_of_other_tables(missing: list[tuple[Setting, int]], out: Path) -> list[dict[str, str]]:
    """The missing runs that another table has under another label, with the label that is missing.

    The clock's runs are not among them: their flags do not name the algorithm.
    """
    known = {}
    for row in (row for name in TABLES if name != "clock" for row in read_rows(out / f"{name}.csv")):
        known[row["env_id"], row["flags"], row["script"], int(row["seed"])] = row
    found = ((setting, known.get((setting.env_id, setting.flags, setting.script, seed))) for setting, seed in missing)
    return [row | {"label": setting.label} for setting, row in found if row]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a table's runs."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def in_order(rows: list[dict[str, str]], table: str) -> list[dict[str, str]]:
    """The runs in the order of the table's settings, and of the seeds."""
    order = {(x.env_id, x.label): i for i, x in enumerate(TABLES[table]())}
    return sorted(rows, key=lambda row: (order.get((row["env_id"], row["label"]), len(order)), int(row["seed"])))


def mean_and_interval(values: list[float], digits: int = 0) -> str:
    """Mean ± half of Student's 95 % interval of the mean over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def welch(runs: list[dict[str, str]], others: list[dict[str, str]]) -> str:
    """p of Welch's test on the totals of two groups of runs, with sampled / deterministic actions."""
    if min(len(runs), len(others)) < 2:
        return "–"
    columns = [f"policy {actions} total" for actions in CLOCK_COLUMNS[1:]]
    samples = [[[float(row[column]) for row in group] for group in (runs, others)] for column in columns]
    return " / ".join(f"{scipy.stats.ttest_ind(*pair, equal_var=False).pvalue:.2g}" for pair in samples)


def markdown(rows: list[dict[str, str]], name: str) -> str:
    """The table: a row for each setting, and for each environment's prior, mean [95 % interval] over seeds."""
    if name == "clock":
        return clock_markdown(rows)
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["env_id"], row["label"]), []).append(row)
    cells = f"Mean ± half of Student's 95 % interval over seeds, {episodes_of(rows)} fresh episodes a seed; total with"
    columns = ["total", "basic", "add-on", "quantity", "KL to prior"] if have_addon(rows) else ["return"]
    columns = ["environment", "policy", "seeds", columns[0], f"{columns[0]}, det.", *columns[1:], "minutes"]
    columns += ["p against default"] if compared(rows) else []
    lines = [*heading(rows, name, f"{cells} sampled actions, like all else, and deterministic ones."), ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    priors = {(row["env_id"], prior_of(row)): {} for row in rows}
    for row in rows:  # the prior is evaluated in every run; of the runs with a seed, the last one counts
        if row.get("prior stochastic total"):
            priors[row["env_id"], prior_of(row)][row["seed"]] = row
    for (env_id, label), runs in groups.items():
        if of_seed := priors.pop((env_id, prior_of(runs[0])), None):
            lines.append(table_row(env_id, f"prior{prior_of(runs[0])}", "prior", list(of_seed.values()), rows))
        lines.append(table_row(env_id, label, "policy", runs, rows))
    return "\n".join(lines + driving_table([row for row in rows if row.get("policy stochastic speed")])) + "\n"


def driving_table(rows: list[dict[str, str]]) -> list[str]:
    """What the paper tells of driving, with sampled / deterministic actions; [] without such runs."""
    if not rows:
        return []
    lines = ["", "| highway | share that reaches the end | length (s) | speed (m/s) |", "|---|---|---|---|"]
    players = [("prior", "prior", rows[:1])]  # the same episodes in every run
    for label in dict.fromkeys(row["label"] for row in rows):
        players.append((label, "policy", [row for row in rows if row["label"] == label]))
    for label, role, runs in players:
        cells = []
        for name, digits in {"success": 2, "length": 1, "speed": 1}.items():
            values = ([float(row[f"{role} {x} {name}"]) for row in runs] for x in CLOCK_COLUMNS[1:])
            cells.append(" / ".join(mean_and_interval(x, digits) for x in values))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def episodes_of(rows: list[dict[str, str]]) -> str:
    """How many episodes an evaluation had."""
    return " or ".join(sorted({row.get("episodes") or "20" for row in rows}, key=int))


def compared(rows: list[dict[str, str]]) -> bool:
    """Whether a table has other methods beside the default, with an add-on task."""
    labels = {row["label"] for row in rows}
    return DEFAULT in labels and any(label.startswith("KL PPO") for label in labels)


def heading(rows: list[dict[str, str]], name: str, cells: str) -> list[str]:
    """The lines above a table: which command, commits and dates it is of, and what its cells are."""
    commits, dates = (", ".join(sorted({row[column] for row in rows})) for column in ("commit", "date"))
    return textwrap.wrap(f"`python results/reproduce.py {name}`, commit {commits}, {dates}. {cells}", 120)


def prior_of(row: dict[str, str]) -> str:
    """Which prior a run had: nothing for the shipped one."""
    return ", classical" if "results/classical" in row["flags"] else ", of SAC" if "-sac." in row["flags"] else ""


def have_addon(rows: list[dict[str, str]]) -> bool:
    """Whether the runs have an add-on task; if not, the total return is the basic one."""
    return any(float(row["policy stochastic addon"]) for row in rows)


def table_row(env_id: str, title: str, role: str, runs: list[dict[str, str]], rows: list[dict[str, str]]) -> str:
    """A row of the table of rows: the "prior" or the "policy" (which is its role) of some runs that differ by seed."""
    cells = [mean_and_interval([float(row[f"{role} {x} total"]) for row in runs]) for x in CLOCK_COLUMNS[1:]]
    if have_addon(rows):
        for column in COLUMNS[1:]:
            values = [float(row[f"{role} stochastic {column}"]) for row in runs]
            cells.append(mean_and_interval(values, 3 if column == "quantity" else 0))
        kl = [float(row["kl_to_prior"]) for row in runs if row.get("kl_to_prior")]
        cells.append(f"{np.mean(kl):.2f}" if kl and role == "policy" else "–")
    cells.append(f"{np.mean([float(row['minutes']) for row in runs]):.1f}" if role == "policy" else "–")
    if compared(rows):
        others = [row for row in rows if (row["env_id"], row["label"]) == (env_id, DEFAULT)]
        cells.append(welch(runs, others) if role == "policy" and title != DEFAULT else "–")
    return "| " + " | ".join([env_id, title, str(len(runs)), *cells]) + " |"


def clock_markdown(rows: list[dict[str, str]]) -> str:
    """The table of returns by the clock."""
    minutes = after_minutes(rows)
    cells = (
        "Return with sampled / deterministic actions of 20 episodes, mean ± half of Student's 95 % interval over seeds,"
    )
    lines = [
        *heading(rows, "clock", f"{cells} and environment steps."),
        "",
        f"| environment | algorithm | seeds | {' | '.join(f'after {m:g} min | steps' for m in minutes)} |",
        "|" + "---|" * (3 + 2 * len(minutes)),
    ]
    for env_id, label in dict.fromkeys((row["env_id"], row["label"]) for row in rows):
        runs = [row for row in rows if (row["env_id"], row["label"]) == (env_id, label)]
        cells = []
        for name in (f"after {m:g} min" for m in minutes):
            values = {x: [float(row[f"{x} {name}"]) for row in runs if row.get(f"{x} {name}")] for x in CLOCK_COLUMNS}
            if values["steps"]:
                returns = (mean_and_interval(values[actions]) for actions in CLOCK_COLUMNS[1:])
                cells += [" / ".join(returns), f"{np.mean(values['steps']) / 1000:,.0f}k"]
            else:
                cells += ["–", "–"]
        lines.append("| " + " | ".join([env_id, label, str(len(runs)), *cells]) + " |")
    return "\n".join(lines) + "\n"


def after_minutes(rows: list[dict[str, str]]) -> list[float]:
    """After how many minutes there are evaluations."""
    names = {name for row in rows for name in row if name.startswith("steps after")}
    return sorted(float(name.split()[2]) for name in names)


def clock_picture(rows: list[dict[str, str]], path: Path) -> None:
    """Return with deterministic actions against minutes of training, a line a run."""
    env_ids, labels = (list(dict.fromkeys(row[column] for row in rows)) for column in ("env_id", "label"))
    figure = matplotlib.figure.Figure(figsize=(1.4 + 3.6 * len(env_ids), 4), layout="constrained")
    handles = {}
    for axes, env_id in zip(figure.subplots(1, len(env_ids), squeeze=False)[0], env_ids, strict=True):
        runs = [row for row in rows if row["env_id"] == env_id]
        minutes = [m for m in after_minutes(rows) if any(row.get(f"steps after {m:g} min") for row in runs)]
        for row in runs:
            columns = [f"after {m:g} min" for m in minutes if row.get(f"steps after {m:g} min")]
            seconds, returns = ([float(row[f"{x} {name}"]) for name in columns] for x in ("seconds", "deterministic"))
            style = {"color": f"C{labels.index(row['label'])}"}
            (handles[row["label"]],) = axes.plot(np.divide(seconds, 60), returns, "o-", **style)
        axes.set(title=env_id, xlabel="minutes of training", ylabel="return, deterministic actions", xscale="log")
        axes.set_xticks(minutes, [f"{m:g}" for m in minutes])
        axes.minorticks_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def overview() -> str:
    """The table of README.md: totals on every environment, of the default, and of what one would do otherwise."""
    rows = [row for name in ("customisation", "default") for row in read_rows(RESULTS / f"{name}.csv")]
    rows = list({(row["env_id"], row["label"], row["seed"]): row for row in rows}.values())
    names = ["prior", "trained on, $r$ known", "KL PPO, best β", f"**{DEFAULT.split(',')[0]}**"]
    lines = [f"| | {' | '.join(names)} |", "|---" * 5 + "|"]
    for env_id in dict.fromkeys(setting.env_id for setting in (*customisation(), *default())):
        groups: dict[str, list[dict[str, str]]] = {}
        for row in (row for row in rows if row["env_id"] == env_id and "ω = 0.5" not in row["label"]):
            groups.setdefault(row["label"], []).append(row)
        if DEFAULT not in groups:
            continue
        further = [runs for label, runs in groups.items() if label.startswith("prior trained further")]
        kl = [runs for label, runs in groups.items() if label.startswith("KL PPO") and "with c" in label]
        best = [max(x, key=lambda runs: np.mean(totals(runs, "policy")), default=[]) for x in (further, kl)]
        ours = groups[DEFAULT]
        found = [totals(ours, "prior"), *(totals(runs, "policy") for runs in (*best, ours))]
        cells = [" / ".join(map(mean_and_interval, x)) if x[0] else "–" for x in found]
        cells[0] = " / ".join(f"{np.mean(x):.0f}" for x in found[0])  # of many evaluations of one policy
        lines.append(f"| {env_id.removesuffix('-v4')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def totals(runs: list[dict[str, str]], role: str) -> tuple[list[float], list[float]]:
    """The totals of runs, with sampled and with deterministic actions."""
    stochastic, deterministic = ([float(row[f"{role} {x} total"]) for row in runs] for x in CLOCK_COLUMNS[1:])
    return stochastic, deterministic


def picture(rows: list[dict[str, str]], path: Path) -> None:
    """Basic against add-on return, a point a run, an environment a panel; along the line the total is the prior's."""
    env_ids, labels = (list(dict.fromkeys(row[column] for row in rows)) for column in ("env_id", "label"))
    width = 2 if len(env_ids) in (2, 4) else 3
    height = -(-len(env_ids) // width)
    figure = matplotlib.figure.Figure(figsize=(4.2 * width, 3.6 * height + 0.6), layout="constrained")
    panels = np.ravel(figure.subplots(height, width, squeeze=False))
    handles = {}
    for axes in panels[len(env_ids) :]:
        axes.set_axis_off()
    for axes, env_id in zip(panels, env_ids, strict=False):
        runs = [row for row in rows if row["env_id"] == env_id]
        curve = []  # through the means, as omega' grows
        for i, label in enumerate(labels):
            points = [returns(row, "policy") for row in runs if row["label"] == label]
            if points:
                style = {"s": 24, "color": f"C{i % 10}", "marker": "osD^v<>P"[i // 10]}
                handles[label] = axes.scatter(*np.transpose(points), **style)
                if label.startswith("ω′"):
                    curve.append(np.mean(points, axis=0))
        if curve:
            axes.plot(*np.transpose(curve), color="gray", linewidth=0.8, zorder=0)
        shipped = (row for row in runs if row.get("prior stochastic total") and not prior_of(row))
        priors = {row["seed"]: returns(row, "prior") for row in shipped}
        if priors:
            prior = np.mean(list(priors.values()), axis=0)
            handles["prior"] = axes.scatter(*prior, s=90, color="black", marker="*", zorder=3)
            handles["total of the prior"] = axes.axline(prior, slope=-1, color="black", linewidth=0.7, linestyle=":")
        axes.set(title=env_id, xlabel="add-on return", ylabel="basic return")
        axes.locator_params(nbins=6)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def curves_picture(rows: list[dict[str, str]], path: Path) -> None:
    """Total return of the episodes of training, against environment steps and seconds, a line a run."""
    rows = [row for row in rows if row.get("curve")]
    env_ids, labels = (list(dict.fromkeys(row[column] for row in rows)) for column in ("env_id", "label"))
    figure = matplotlib.figure.Figure(figsize=(3.4 * len(env_ids), 6.4), layout="constrained")
    handles = {}
    for i, x_label in enumerate(("environment steps", "seconds")):
        for j, env_id in enumerate(env_ids):
            axes = figure.add_subplot(2, len(env_ids), i * len(env_ids) + j + 1)
            for row in (row for row in rows if row["env_id"] == env_id):
                curve = np.array([point.split("/") for point in row["curve"].split()], float)
                style = {"color": f"C{labels.index(row['label'])}", "linewidth": 1}
                (handles[row["label"]],) = axes.plot(curve[:, i], curve[:, 2], **style)
            axes.set(title=env_id, xlabel=x_label, ylabel="basic + add-on return")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)


def returns(row: dict[str, str], role: str) -> list[float]:
    """Add-on and basic return, with sampled actions, of the "prior" or the "policy" of a run."""
    return [float(row[f"{role} stochastic {column}"]) for column in ("addon", "basic")]


def insert(document: Path, name: str, table: str) -> None:
    """Replace what a document has between the table's markers, if it has them."""
    start, end = f"<!-- {name} from here -->\n", "<!-- to here -->"
    text = document.read_text() if document.exists() else ""
    if start in text:
        before, _, rest = text.partition(start)
        document.write_text(before + start + table + rest[rest.index(end) :])


def choose(settings: list[Setting], field: str, given: tuple[str, ...]) -> list[Setting]:
    """The settings whose field is among the given ones; all, if none is given."""
    known = dict.fromkeys(getattr(setting, field) for setting in settings)
    if unknown := [x for x in given if x not in known]:
        stop(f"the table has no {field} {unknown[0]!r}; it has: {'; '.join(known)}", 2)
    return [setting for setting in settings if not given or getattr(setting, field) in given]


def seeds_of(table: str, env_id: str, label: str) -> tuple[int, ...]:
    """Those that a row is run with, if none are given: tuning seeds are never reporting seeds.

    Nor are those that report what a rule was chosen after: those of other budgets are fresh.
    """
    if table == "entropy-tuning":
        return 21, 22
    first = 211 if label == BY_ACTIONS else 101 if table in OLDER and "3M steps" not in label else 206
    first = 216 if label == DEFAULT and env_id in FEW_ACTIONS else first
    return tuple(range(first, first + 5))


def run_missing(args: Args, wanted: list[tuple[Setting, int]], path: Path) -> list[dict[str, str]]:
    """Run what the table's CSV, and those beside it, lack, and add it there; returns all of the table's runs."""

    def is_missing(pair):
        setting, seed = pair
        return all((x["env_id"], x["label"], int(x["seed"])) != (setting.env_id, setting.label, seed) for x in rows)

    rows = read_rows(path)
    if reused := rows_of_other_tables(list(filter(is_missing, wanted)), path.parent):
        rows += reused
        write_rows(path, rows)
    missing = list(filter(is_missing, wanted)) if args.run else []
    failed = 0
    if missing:
        print(f"{len(missing)} runs to go, {args.jobs} at a time", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(run, setting, seed, args.smoke): (setting, seed) for setting, seed in missing}
        for job in as_completed(jobs):
            setting, seed = jobs[job]
            try:
                rows.append(job.result())
            except subprocess.CalledProcessError as error:
                print(f"{setting.env_id}, {setting.label}, seed {seed} failed: {error.stderr.strip()}", flush=True)
                failed += 1
                continue
            write_rows(path, rows)
            print(f"{setting.env_id}, {setting.label}, seed {seed}: done", flush=True)
    if failed:
        stop(f"{failed} runs failed; those that did not are in {path}, and the same command repeats the others", 1)
    return rows


def stop(message: str, exit_code: int) -> None:
    """End the program with one line; exit code 2: bad input, 1: runs failed."""
    print(f"reproduce.py: {message}", file=sys.stderr)
    sys.exit(exit_code)


def main(args: Args) -> None:
    """Run what is missing, then write table and picture."""
    out = RESULTS / "smoke" if args.smoke and args.out == RESULTS else args.out
    if args.jobs < 1:
        stop(f"--jobs is {args.jobs}; at least one run has to go on at a time", 2)
    settings = choose(choose(list(TABLES[args.table]()), "env_id", args.env_ids), "label", args.labels)
    if args.smoke:
        settings = [setting for setting in settings if setting.env_id == settings[0].env_id]
    pairs = [[(x, seed) for seed in args.seeds or seeds_of(args.table, x.env_id, x.label)] for x in settings]
    wanted = [pair for column in zip(*pairs, strict=True) for pair in column]  # all rows' first seeds, then the next
    wanted = wanted[: len(settings)] if args.smoke else wanted
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{args.table}.csv"
    rows = in_order(run_missing(args, wanted, path), args.table)
    if not rows:
        stop(f"{path} has no runs yet; leave out --no-run", 2)
    table = markdown(rows, args.table)
    if args.table == "clock":
        clock_picture(rows, out / "clock.png")
    elif have_addon(rows):
        picture(rows, out / f"{args.table}.png")
    if args.table == "residual-sac":
        curves_picture(rows, out / "residual-sac-curves.png")
    if out == RESULTS:
        insert(ROOT / "README.md", "overview", overview())
        insert(RESULTS / "README.md", args.table, table)
    else:
        (out / f"{args.table}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
