"""Measure how fast the scripts train, beside raw EnvPool stepping and beside Stable-Baselines3 and SBX.

    pip install -r requirements.txt -r requirements-bench.txt && python benchmark/throughput.py
    python benchmark/throughput.py --against ../other-checkout --rounds 20

Everything measured has a process of its own that waits until it is its turn; the turns alternate, over several rounds.
So whatever else the machine does falls on all alike, and ratios are taken within a round.  Peers that are not installed
are left out.  Writes benchmark/results/throughput.csv (every measurement), throughput.md (tables) and throughput.png;
with --against, only prints.
"""

import contextlib
import csv
import datetime
import importlib.util
import inspect
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("residual_ppo", "soft_ppo", "train_prior_ppo")


@dataclass(frozen=True)
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Hopper-v4", "Ant-v4")
    """environments; priors/ must have a prior for each"""
    num_envs: int = 64
    """parallel environments, in the scripts and in raw stepping"""
    rounds: int = 5
    """how often everything has its turn"""
    seconds: float = 3.0
    """length of a turn, rounded up to whole iterations"""
    only: tuple[str, ...] = ()
    """measure only what has one of these words in its name, and draw nothing; "raw", "training", "SBX", ..."""
    against: Path | None = None
    """measure only residual_ppo.py's training and update, here and in this other checkout, each with its own priors"""
    peers: bool = True
    """measure Stable-Baselines3 and SBX, where installed"""
    peer_envs: int = 8
    """subprocess environments of the peers"""
    start: bool = True
    """measure start-up and memory"""
    scale_env_id: str = "HalfCheetah-v4"
    """environment of the table over numbers of environments"""
    scale: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """numbers of environments of that table"""
    out: Path = ROOT / "benchmark" / "results"
    """folder of the results"""


class Row(NamedTuple):
    """One measurement."""

    env_id: str
    num_envs: int
    what: str
    round: int
    value: float
    unit: str


# ---------------------------------------------------------------------- what is measured, each in its own process


class Turns:
    """Answers each message from the connection with the speed of a loop that calls this after every iteration."""

    def __init__(self, connection: Connection, seconds: float, warm_up: int = 2):
        self.connection, self.seconds, self.left = connection, seconds, warm_up
        self.start, self.steps = 0.0, 0

    def __call__(self, steps: int) -> None:
        """Count an iteration of that many steps; return at the beginning of the next, when it is our turn."""
        if self.left:
            self.left -= 1
            if self.left:
                return
            self.connection.send("ready")
        else:
            self.steps += steps
            elapsed = time.perf_counter() - self.start
            if elapsed < self.seconds:
                return
            self.connection.send(self.steps / elapsed)
        if not self.connection.recv():
            raise SystemExit
        self.start, self.steps = time.perf_counter(), 0


def raw_stepping(connection: Connection, args: Args, env_id: str, num_envs: int) -> None:
    """EnvPool with random actions, through its Python interface, and nothing else."""
    import envpool

    pool = envpool.make(env_id, env_type="gymnasium", num_envs=num_envs, seed=1)
    space = pool.action_space
    actions = np.random.default_rng(1).uniform(space.low, space.high, (32, num_envs, *space.shape))
    pool.reset()
    turns = Turns(connection, args.seconds)
    while True:
        for action in actions:
            pool.step(action)
        turns(len(actions) * num_envs)


def script(
    connection: Connection, args: Args, env_id: str, num_envs: int, name: str, part: str, root: Path = ROOT
) -> None:
    """A script's own main up to its training loop, and then that loop (part "training") or a part of it.

    The parts "rollout" and "update" repeat the first that the loop asks for.  The part "training without logs" leaves
    out what is not learning: progress bar, logs, and checkpoints.  The script may be of another commit; it needs a
    train with the parameters update, args and log, and a rollout that ends in the parameters state and key.
    """
    import jax
    import rich.console

    sys.path.insert(0, str(root))
    module: ModuleType = importlib.import_module(name)
    module.CONSOLE = rich.console.Console(file=open(os.devnull, "w"), force_terminal=True, width=120)  # noqa: SIM115
    turns, train, rollout = Turns(connection, args.seconds), module.train, module.rollout

    def measure(*given, **_):
        arguments = inspect.signature(train).bind(*given).arguments
        batch_size, update = arguments["args"].num_envs * arguments["args"].num_steps, arguments["update"]

        def rollouts(*fixed_and_start):
            *fixed, env_state, key = fixed_and_start
            while True:
                env_state, _ = jax.block_until_ready(rollout(*fixed, env_state, key))
                turns(batch_size)

        def updates(*inputs):
            while True:
                jax.block_until_ready(update(*inputs))
                turns(batch_size)

        if part == "rollout":
            module.rollout = rollouts
        elif part == "update":
            arguments["update"] = updates
        else:
            log = (lambda *_: None) if part == "training without logs" else arguments["log"]
            arguments["log"] = lambda *given: (log(*given), turns(batch_size))
        train(**arguments)

    module.train = measure
    with tempfile.TemporaryDirectory() as folder:
        flags = {"env_id": env_id, "num_envs": num_envs, "runs_dir": Path(folder), "total_timesteps": 10**9}
        flags |= {"eval_episodes": 1, "progress": part == "training"}
        if name == "residual_ppo":
            flags |= {"prior": root / "priors" / f"{env_id}.safetensors", "num_steps": steps_of(num_envs)}
        if name == "train_prior_ppo":
            flags["export"] = Path(folder) / "prior.safetensors"
        given = module.check_args(module.Args(**flags))
        for step in ("choose_addon", "find_prior", "check_start", "check_export"):  # as the script's last lines do
            given = getattr(module, step, lambda x: x)(given)
        module.main(given, module.Run)


def peer(connection: Connection, args: Args, env_id: str, num_envs: int, name: str) -> None:
    """PPO of Stable-Baselines3 or SBX: subprocess environments, 2048 steps an iteration, 10 epochs, minibatch 64."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv

    if name == "SBX":
        from sbx import PPO
    else:
        from stable_baselines3 import PPO
    turns = Turns(connection, args.seconds)

    class Pause(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            turns(2048 if self.num_timesteps else 0)

    envs = make_vec_env(env_id, num_envs, seed=1, vec_env_cls=SubprocVecEnv)
    model = PPO("MlpPolicy", envs, n_steps=2048 // num_envs, batch_size=64, n_epochs=10, device="cpu")
    try:
        model.learn(10**9, callback=Pause())
    finally:
        envs.close()


# ------------------------------------------------------------------------------------------------- measuring


def child(connection: Connection, log: Path, function: Callable, *rest: Any) -> None:
    """Run function in this process, its output to a file."""
    with open(log, "w") as file, contextlib.suppress(SystemExit):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        function(connection, *rest)


class Contestant:
    """A process that waits for its turn."""

    def __init__(self, folder: Path, what: str, function: Callable, *rest: Any):
        context = multiprocessing.get_context("spawn")
        self.what, self.log = what, folder / f"{what.replace(' ', '_')}.log"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=child, args=(theirs, self.log, function, *rest))
        self.process.start()
        theirs.close()
        self.receive()

    def receive(self) -> Any:
        """The process's next answer."""
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit(f"{self.what} failed:\n{self.log.read_text()[-2000:]}") from None

    def turn(self) -> float:
        """Steps per second."""
        self.connection.send(True)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self.connection.send(False)
        self.process.join(10)
        self.process.kill()


def compete(args: Args, env_id: str, num_envs: int, contestants: dict[str, tuple], rounds: int) -> list[Row]:
    """Let contestants, {what: (function, *its own arguments)}, alternate for some rounds."""
    rows, members = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for what, (function, *rest) in contestants.items():
                envs = args.peer_envs if function is peer else num_envs
                members.append(Contestant(Path(folder), what, function, args, env_id, envs, *rest))
                print(f"{env_id}: {what} is ready", flush=True)
            for i in range(rounds):
                speeds = {member.what: member.turn() for member in members}
                rows += [Row(env_id, num_envs, what, i, speed, "steps/s") for what, speed in speeds.items()]
                print(", ".join(f"{what} {speed:.0f}" for what, speed in speeds.items()), flush=True)
        finally:
            for member in members:
                member.close()
    return rows


def steps_of(num_envs: int) -> int:
    """Steps between two updates of residual_ppo.py: at least 2048 in all, and 32 in each environment."""
    return max(32, 2048 // num_envs)


def start_up(env_id: str, num_envs: int, cache: Path) -> tuple[float, float]:
    """Seconds from the start of residual_ppo.py's process to its first logged update, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env-id", env_id, "--num-envs", num_envs, "--num-steps", steps_of(num_envs)]
        flags += ["--total-timesteps", 10 * steps_of(num_envs) * num_envs]
        flags += ["--runs-dir", folder, "--no-progress"]
        command = [sys.executable, ROOT / "residual_ppo.py", *flags]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        start, first = time.perf_counter(), None
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, **output)
        while True:
            if first is None and any(path.stat().st_size for path in Path(folder).glob("*/metrics.csv")):
                first = time.perf_counter() - start
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or first is None:
            raise SystemExit(f"{' '.join(map(str, command))} failed")
        return first, usage.ru_maxrss / 1024


def measure(args: Args) -> list[Row]:
    """All measurements."""
    rows = []
    for env_id in args.env_ids:
        # soft_ppo.py's rollout, for its untrained policy moves as randomly as raw stepping does.
        contestants = {"raw stepping": (raw_stepping,), "rollout": (script, "soft_ppo", "rollout")}
        contestants |= {"update": (script, "residual_ppo", "update")}
        contestants |= {f"{name} training": (script, name, "training") for name in SCRIPTS}
        contestants["residual_ppo training without logs"] = (script, "residual_ppo", "training without logs")
        if args.peers:
            peers = {"SB3": "stable_baselines3", "SBX": "sbx"}
            contestants |= {n: (peer, n) for n, package in peers.items() if importlib.util.find_spec(package)}
        rows += compete(args, env_id, args.num_envs, chosen(args, contestants), args.rounds)
    for i in range(3 if args.start else 0):
        for env_id in args.env_ids:
            with tempfile.TemporaryDirectory() as cache:
                for what in ("cold", "cached"):
                    seconds, memory = start_up(env_id, args.num_envs, Path(cache))
                    rows.append(Row(env_id, args.num_envs, f"start {what}", i, seconds, "s"))
                    rows.append(Row(env_id, args.num_envs, f"memory {what}", i, memory, "MB"))
                    print(f"{env_id}: start {what} {seconds:.1f} s, {memory:.0f} MB", flush=True)
    for num_envs in args.scale:
        contestants = {"scale raw stepping": (raw_stepping,)}
        contestants |= {"scale residual_ppo training": (script, "residual_ppo", "training")}
        rows += compete(args, args.scale_env_id, num_envs, contestants, 3)
        with tempfile.TemporaryDirectory() as cache:
            _, memory = start_up(args.scale_env_id, num_envs, Path(cache))
        rows.append(Row(args.scale_env_id, num_envs, "scale memory", 0, memory, "MB"))
    return rows


def measure_against(args: Args) -> list[Row]:
    """Training and update of residual_ppo.py, here and in the other checkout."""
    rows, checkouts = [], {"here": ROOT, "there": args.against.resolve()}
    for env_id in args.env_ids:
        contestants = {
            f"{part} {where}": (script, "residual_ppo", part, root)
            for part in ("training", "update")
            for where, root in checkouts.items()
        }
        rows += compete(args, env_id, args.num_envs, chosen(args, contestants), args.rounds)
    return rows


def chosen(args: Args, contestants: dict[str, tuple]) -> dict[str, tuple]:
    """Those that --only names."""
    return {k: v for k, v in contestants.items() if not args.only or any(word in k for word in args.only)}


# --------------------------------------------------------------------------------------------------- report


Data = dict[tuple[str, int, str], np.ndarray]  # (env_id, num_envs, what) -> what was measured, over the rounds


def collect(rows: list[Row]) -> Data:
    """The measurements of each kind; none, (0,), of what was not measured."""
    data = defaultdict(lambda: np.zeros(0))
    for row in rows:
        key = row.env_id, row.num_envs, row.what
        data[key] = np.append(data[key], row.value)
    return data


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Median (lowest to highest)."""
    if not len(values):
        return "–"
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(data: Data, env_id: str, num_envs: int, what: str, other: str) -> np.ndarray:
    """Quotients within the rounds, where both were measured."""
    x, y = data[env_id, num_envs, what], data[env_id, num_envs, other]
    return x / y if len(x) and len(y) else np.zeros(0)


def table(*lines: list[str]) -> str:
    """A table in Markdown."""
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|---" * len(lines[0]) + "|", *text[1:]]) + "\n"


def ratio_table(args: Args, data: Data, pairs: dict[str, tuple[str, str]]) -> str:
    """Ratios, {label: (what, other)}, of every environment."""
    cells = {k: [spread(ratios(data, x, args.num_envs, *pair)) for x in args.env_ids] for k, pair in pairs.items()}
    return table(["ratio", *args.env_ids], *([label, *line] for label, line in cells.items()))


def value_table(args: Args, data: Data, title: str, lines: dict[str, tuple[str, int]]) -> str:
    """Measurements, {label: (what, digits)}, of every environment."""
    cells = {k: [spread(data[x, args.num_envs, what], n) for x in args.env_ids] for k, (what, n) in lines.items()}
    return table([title, *args.env_ids], *([label, *line] for label, line in cells.items()))


def scale_table(args: Args, data: Data) -> str:
    """Speed and memory over the number of environments."""
    lines, env_id = [], args.scale_env_id
    for n in args.scale:
        training, raw, memory = (
            data[env_id, n, f"scale {x}"] for x in ("residual_ppo training", "raw stepping", "memory")
        )
        numbers = [f"{np.median(x):.0f}" for x in (training, raw, memory)]
        lines.append([str(n), *numbers[:2], spread(training / raw), numbers[2]])
    return table([f"`--num-envs`, {env_id}", "training, steps/s", "raw stepping, steps/s", "ratio", "MB"], *lines)


def commit(root: Path) -> str:
    """What is checked out there, with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or "unknown"


def conditions(args: Args) -> str:
    """What, besides the scripts, the numbers depend on."""
    import jax

    commits = " against ".join(f"`{commit(root)}`" for root in (ROOT, args.against) if root)
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    return (
        f"{os.cpu_count()} cores of {model}, updates on {jax.devices()[0].device_kind}, Python "
        f"{platform.python_version()}, jax {jax.__version__}, commit {commits}, {datetime.date.today()}; "
        f"{args.num_envs} environments, {args.rounds} alternating rounds of {args.seconds:g} s: median (lowest to "
        f"highest) of the ratios within a round, resp. of steps per second.\n"
    )


def report(args: Args, rows: list[Row]) -> str:
    """The tables in Markdown, ratios first."""
    data, measured = collect(rows), list(dict.fromkeys(row.what for row in rows))
    if args.against:
        parts = [what.removesuffix(" here") for what in measured if what.endswith(" here")]
        pairs = {f"{part}, here ÷ there": (f"{part} here", f"{part} there") for part in parts}
        speeds = value_table(args, data, "steps per second", {what: (what, 0) for what in measured})
        return "\n".join([conditions(args), ratio_table(args, data, pairs), speeds])

    training = [f"{name} training" for name in SCRIPTS if f"{name} training" in measured]
    peers = [name for name in ("SBX", "SB3") if name in measured]
    pairs = {f"`{what.replace(' ', '.py`, ')} ÷ raw stepping": (what, "raw stepping") for what in training}
    pairs["rollout ÷ raw stepping"] = ("rollout", "raw stepping")
    with_logs, without = "residual_ppo training", "residual_ppo training without logs"
    pairs["training with logs and checkpoints ÷ without"] = (with_logs, without)
    pairs |= {f"`soft_ppo.py`, training ÷ {name} PPO": ("soft_ppo training", name) for name in peers}
    speeds = {what: (what, 0) for what in ("raw stepping", "rollout", "update", *training, *peers)}
    texts = [conditions(args), ratio_table(args, data, pairs), value_table(args, data, "steps per second", speeds)]
    start = {
        "process start to first update, s": ("start cold", 1),
        "the same with JAX's cache, s": ("start cached", 1),
        "peak memory, MB": ("memory cold", 0),
        "the same with JAX's cache, MB": ("memory cached", 0),
    }
    if args.start:
        texts.append(value_table(args, data, "`residual_ppo.py`", start))
    if args.scale:
        texts.append(scale_table(args, data))
    return "\n".join(texts)


def draw(args: Args, rows: list[Row], path: Path) -> None:
    """Speed relative to raw stepping, and speed over the number of environments."""
    import matplotlib.figure

    data, measured = collect(rows), {row.what for row in rows}
    shown = [what for what in ("rollout", *(f"{name} training" for name in SCRIPTS), "SBX", "SB3") if what in measured]
    figure = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, what in enumerate(shown):
        bars = [ratios(data, env_id, args.num_envs, what, "raw stepping") for env_id in args.env_ids]
        low, heights, high = np.transpose([np.quantile(x, (0, 0.5, 1)) for x in bars])
        x = np.arange(len(args.env_ids)) + (i - (len(shown) - 1) / 2) * 0.8 / len(shown)
        errors = heights - low, high - heights
        left.bar(x, heights, 0.75 / len(shown), yerr=errors, label=what, error_kw={"lw": 1})
    left.axhline(1, color="black", lw=1)
    left.set_xticks(np.arange(len(args.env_ids)), args.env_ids)
    left.set_ylabel("steps per second ÷ raw EnvPool stepping")
    left.margins(y=0.4)  # room for the legend
    left.legend(ncols=2, fontsize=8, loc="upper left")
    for what in ("raw stepping", "residual_ppo training"):
        speeds = [np.median(data[args.scale_env_id, n, f"scale {what}"]) for n in args.scale]
        right.plot(args.scale, speeds, "o-", label=what)
    right.set_xscale("log", base=2)
    right.set_xticks(args.scale, [str(n) for n in args.scale])
    right.set_xlabel(f"environments, {args.scale_env_id}")
    right.set_ylabel("steps per second")
    right.set_ylim(0)
    right.legend()
    figure.savefig(path, dpi=120)


def main(args: Args) -> None:
    """Measure and write the results."""
    if args.against:
        print(report(args, measure_against(args)))
        return
    rows = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "throughput.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(row._replace(value=f"{row.value:.6g}") for row in rows)
    text = report(args, rows)
    (args.out / "throughput.md").write_text(text)
    if args.scale and not args.only:
        draw(args, rows, args.out / "throughput.png")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
