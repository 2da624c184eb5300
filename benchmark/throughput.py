"""Measure how fast the scripts train, beside raw EnvPool stepping and beside Stable-Baselines3 and SBX.

    pip install -r requirements.txt -r requirements-bench.txt && python benchmark/throughput.py

Everything measured has a process of its own that waits until it is its turn; the turns alternate, over several rounds.
So whatever else the machine does falls on all alike, and ratios are taken within a round.  Peers that are not installed
are left out.  Writes benchmark/results/throughput.csv (every measurement), throughput.md (tables) and throughput.png.
"""

import contextlib
import csv
import datetime
import importlib.util
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


def take_turns(connection: Connection, seconds: float, iterate: Callable[[], int]) -> None:
    """Answer each message from the connection with the speed of iterate, which returns the steps that it did."""
    iterate()  # compiles
    connection.send("ready")
    while connection.recv():
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            steps += iterate()
        connection.send(steps / (time.perf_counter() - start))


class Turns:
    """The same for a loop that cannot be called step by step: to be called from it, after every iteration."""

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

    def iterate():
        for action in actions:
            pool.step(action)
        return len(actions) * num_envs

    take_turns(connection, args.seconds, iterate)


def script(connection: Connection, args: Args, env_id: str, num_envs: int, name: str, part: str) -> None:
    """A script's own main up to its training loop, and then that loop (part "training") or a part of it.

    The part "training without logs" leaves out what is not learning: progress bar, logs, and checkpoints.
    """
    import jax
    import rich.console

    sys.path.insert(0, str(ROOT))
    module: ModuleType = importlib.import_module(name)
    module.CONSOLE = rich.console.Console(file=open(os.devnull, "w"), force_terminal=True, width=120)  # noqa: SIM115
    train = module.train

    def measure(env, addon, actor, update, script_args, state, run_dir, after=None):
        batch_size = script_args.num_envs * script_args.num_steps
        turns = Turns(connection, args.seconds)
        if part == "training without logs":
            module.save_checkpoint = lambda *_: None
            module.RunLog.write = lambda *_: None
        if part.startswith("training"):
            return train(env, addon, actor, update, script_args, state, run_dir, after=lambda _: turns(batch_size))
        policy = jax.device_get(module.Policy(state.params["actor"], state.obs_stats))
        env_state, iteration = module.reset_env(env), 0
        env_state, transitions = module.rollout(env, addon, actor, script_args, policy, env_state, 0)
        data, spec = (state, transitions, env_state.obs), jax.sharding.PartitionSpec
        layouts = tuple(module.across_devices(x) for x in (spec(), spec(None, "data"), spec("data")))
        state, transitions, last_obs = jax.device_put(data, layouts)

        def rollout():
            nonlocal env_state, iteration
            iteration += 1
            result = module.rollout(env, addon, actor, script_args, policy, env_state, iteration)
            env_state, _ = jax.block_until_ready(result)
            return batch_size

        def one_update():
            jax.block_until_ready(update(state, transitions, last_obs))
            return batch_size

        return take_turns(connection, args.seconds, rollout if part == "rollout" else one_update)

    module.train = measure
    with tempfile.TemporaryDirectory() as folder:
        flags = {"env_id": env_id, "num_envs": num_envs, "runs_dir": Path(folder), "total_timesteps": 10**9}
        flags |= {"eval_episodes": 1, "progress": part != "training without logs"}
        if name == "residual_ppo":
            flags["prior"] = ROOT / "priors" / f"{env_id}.safetensors"
        if name == "train_prior_ppo":
            flags["export"] = Path(folder) / "prior.safetensors"
        module.main(module.Args(**flags))


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


def start_up(env_id: str, num_envs: int, cache: Path) -> tuple[float, float]:
    """Seconds from the start of residual_ppo.py's process to its first logged update, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env-id", env_id, "--num-envs", num_envs, "--total-timesteps", 10 * 32 * num_envs]
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
        chosen = {k: v for k, v in contestants.items() if not args.only or any(word in k for word in args.only)}
        rows += compete(args, env_id, args.num_envs, chosen, args.rounds)
    for i in range(3 if args.start else 0):
        for env_id in args.env_ids:
            with tempfile.TemporaryDirectory() as cache:
                for what in ("cold", "cached"):
                    seconds, memory = start_up(env_id, args.num_envs, Path(cache))
                    rows.append(Row(env_id, args.num_envs, f"start {what}", i, seconds, "s"))
                    rows.append(Row(env_id, args.num_envs, f"memory {what}", i, memory, "MB"))
                    print(f"{env_id}: start {what} {seconds:.1f} s, {memory:.0f} MB", flush=True)
    for num_envs in args.scale:
        contestants = {
            "raw stepping": (raw_stepping,),
            "residual_ppo training": (script, "residual_ppo", "training"),
        }
        rows += [
            row._replace(what=f"scale {row.what}") for row in compete(args, args.scale_env_id, num_envs, contestants, 3)
        ]
        with tempfile.TemporaryDirectory() as cache:
            _, memory = start_up(args.scale_env_id, num_envs, Path(cache))
        rows.append(Row(args.scale_env_id, num_envs, "scale memory", 0, memory, "MB"))
    return rows


# --------------------------------------------------------------------------------------------------- report


def spread(values: list[float], digits: int = 2) -> str:
    """Median (lowest to highest)."""
    if not values:
        return "–"
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(args: Args, rows: list[Row]) -> str:
    """The tables in Markdown, ratios first."""
    import jax

    data = defaultdict(list)
    for row in rows:
        data[row.env_id, row.num_envs, row.what].append(row.value)
    training = [what for what in dict.fromkeys(row.what for row in rows) if what.endswith("training")]
    training = [what for what in training if not what.startswith("scale")]

    def ratios(env_id, what, other, num_envs=args.num_envs):
        pairs = zip(data[env_id, num_envs, what], data[env_id, num_envs, other], strict=not args.only)
        return spread([x / y for x, y in pairs])

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    lines = [
        f"{os.cpu_count()} cores of {model}, updates on {jax.devices()[0].device_kind}, Python "
        f"{platform.python_version()}, jax {jax.__version__}, commit `{git.stdout.strip()}`, {datetime.date.today()}; "
        f"{args.num_envs} environments, {args.rounds} alternating rounds of {args.seconds:g} s: median (lowest to "
        f"highest) of the ratios within a round, resp. of steps per second.",
        "",
        "| ratio | " + " | ".join(args.env_ids) + " |",
        "|---" * (len(args.env_ids) + 1) + "|",
    ]

    def line(label, cell):
        lines.append(f"| {label} | " + " | ".join(cell(env_id) for env_id in args.env_ids) + " |")

    for what in training:
        line(
            f"`{what.replace(' ', '.py`, ')} ÷ raw stepping",
            lambda env_id, what=what: ratios(env_id, what, "raw stepping"),
        )
    line("rollout ÷ raw stepping", lambda env_id: ratios(env_id, "rollout", "raw stepping"))
    with_logs, without = "residual_ppo training", "residual_ppo training without logs"
    line("training with logs and checkpoints ÷ without", lambda env_id: ratios(env_id, with_logs, without))
    peers = [name for name in ("SBX", "SB3") if any(row.what == name for row in rows)]
    for name in peers:
        line(
            f"`soft_ppo.py`, training ÷ {name} PPO", lambda env_id, name=name: ratios(env_id, "soft_ppo training", name)
        )

    lines += ["", "| steps per second | " + " | ".join(args.env_ids) + " |", "|---" * (len(args.env_ids) + 1) + "|"]
    for what in ("raw stepping", "rollout", "update", *training, *peers):
        line(what, lambda env_id, what=what: spread(data[env_id, args.num_envs, what], 0))
    if args.start:
        lines += [
            "",
            "| `residual_ppo.py` | " + " | ".join(args.env_ids) + " |",
            "|---" * (len(args.env_ids) + 1) + "|",
        ]
        line("process start to first update, s", lambda env_id: spread(data[env_id, args.num_envs, "start cold"], 1))
        line("the same with JAX's cache, s", lambda env_id: spread(data[env_id, args.num_envs, "start cached"], 1))
        line("peak memory, MB", lambda env_id: spread(data[env_id, args.num_envs, "memory cold"], 0))
        line("the same with JAX's cache, MB", lambda env_id: spread(data[env_id, args.num_envs, "memory cached"], 0))
    if args.scale:
        lines += ["", f"| `--num-envs`, {args.scale_env_id} | training, steps/s | raw stepping, steps/s | ratio | MB |"]
        lines += ["|---" * 5 + "|"]
        for n in args.scale:
            fast, raw = (data[args.scale_env_id, n, f"scale {x}"] for x in ("residual_ppo training", "raw stepping"))
            ratio = ratios(args.scale_env_id, "scale residual_ppo training", "scale raw stepping", n)
            memory = data[args.scale_env_id, n, "scale memory"][0]
            lines.append(f"| {n} | {np.median(fast):.0f} | {np.median(raw):.0f} | {ratio} | {memory:.0f} |")
    return "\n".join(lines) + "\n"


def draw(args: Args, rows: list[Row], path: Path) -> None:
    """Speed relative to raw stepping, and speed over the number of environments."""
    import matplotlib.figure

    data = defaultdict(list)
    for row in rows:
        data[row.env_id, row.num_envs, row.what].append(row.value)
    shown = (
        "rollout",
        "residual_ppo training",
        "soft_ppo training",
        "train_prior_ppo training",
        "SBX",
        "SB3",
    )
    shown = [what for what in shown if (args.env_ids[0], args.num_envs, what) in data]
    figure = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, what in enumerate(shown):
        heights, errors = [], []
        for env_id in args.env_ids:
            raw = np.array(data[env_id, args.num_envs, "raw stepping"])
            ratio = np.array(data[env_id, args.num_envs, what]) / raw
            heights.append(np.median(ratio))
            errors.append((np.median(ratio) - ratio.min(), ratio.max() - np.median(ratio)))
        x = np.arange(len(args.env_ids)) + (i - (len(shown) - 1) / 2) * 0.8 / len(shown)
        left.bar(x, heights, 0.75 / len(shown), yerr=np.transpose(errors), label=what, error_kw={"lw": 1})
    left.axhline(1, color="black", lw=1)
    left.set_xticks(np.arange(len(args.env_ids)), args.env_ids)
    left.set_ylabel("steps per second ÷ raw EnvPool stepping")
    left.set_ylim(0, 1.45)
    left.legend(ncols=2, fontsize=8, loc="upper left")
    for what, label in (
        ("scale raw stepping", "raw stepping"),
        ("scale residual_ppo training", "residual_ppo training"),
    ):
        speeds = [np.median(data[args.scale_env_id, n, what]) for n in args.scale]
        right.plot(args.scale, speeds, "o-", label=label)
    right.set_xscale("log", base=2)
    right.set_xticks(args.scale, [str(n) for n in args.scale])
    right.set_xlabel(f"environments, {args.scale_env_id}")
    right.set_ylabel("steps per second")
    right.set_ylim(0)
    right.legend()
    figure.savefig(path, dpi=120)


def main(args: Args) -> None:
    """Measure and write the results."""
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
