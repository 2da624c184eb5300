"""Short real runs that the tests share, and ways to start the scripts."""

import csv
import fcntl
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import forked
import jaxlib
import pytest
import safetensors
import safetensors.numpy

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_prior_ppo", "soft_ppo", "residual_ppo")
SAC_SCRIPTS = ("soft_sac", "residual_sac")
DQN_SCRIPTS = ("soft_dqn", "residual_dqn")
FOLDERS = ("", "residual_q_learning", "mirror_descent")  # of the scripts
BATCH = ("--num-envs", "8", "--num-steps", "16", "--num-minibatches", "4")
SHORT = (*BATCH, "--total-timesteps", "1024", "--eval-episodes", "2")  # 8 iterations of 128 steps
PENDULUM = ("--env-id", "InvertedPendulum-v4", *SHORT)
SAC_SHORT = (
    "--num-envs", "8", "--num-steps", "16", "--total-timesteps", "1024", "--eval-episodes", "2",
    "--learning-starts", "220", "--updates-per-step", "0.0625", "--batch-size", "32",
    "--critic-hidden-sizes", "16", "16",
)  # fmt: skip
SAC_PENDULUM = ("--env-id", "InvertedPendulum-v4", *SAC_SHORT, "--hidden-sizes", "32", "32")

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*forked.PACKAGES, "forked"])
FORKED_VARIABLES: dict[str, str] = {}  # those of the tests' beginning, which the process has that is forked
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # of pytest-xdist, which runs the test files in two processes


def pytest_configure() -> None:
    """Let all processes of this session share what they compile, and compile fast: their programs run only briefly."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and theirs, would ignore it
    if not IS_WORKER:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rpg-test-cache-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        add_xla_flag("--xla_cpu_use_fusion_emitters=false")  # which take longer to compile small programs
    FORKED_VARIABLES.update(early_variables())


def add_xla_flag(flag: str) -> None:
    """Set a flag of XLA beside those that are set, if the installed XLA has it, which would end the process else."""
    name = flag.removeprefix("--").partition("=")[0].encode()
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):  # where it is, on Linux and macOS
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(name) >= 0:
                os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def pytest_unconfigure() -> None:
    """Remove what was compiled."""
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def early_variables() -> dict[str, str]:
    """The environment's variables that have their say before a script begins, and so not in a fork."""
    return {name: x for name, x in os.environ.items() if name.startswith(("JAX_", "XLA_", "PYTHON"))}


class Run(NamedTuple):
    """A finished process and its run folder (None unless there is exactly one)."""

    process: subprocess.CompletedProcess
    folder: Path | None


def script_path(name: str) -> Path:
    """Where a script is, in whichever folder."""
    return next(path for folder in FOLDERS if (path := ROOT / folder / f"{name}.py").exists())


def run_main(script: ModuleType, args: Any) -> None:
    """What a script does with its arguments, in this process."""
    first, last = ("resumed_args", "check_args", "check_sac_args"), ("check_start", "find_prior", "check_export")
    for step in (*first, "choose_addon", *last):  # those that it has
        args = getattr(script, step, lambda args: args)(args)
    script.main(args, script.Run)


def start_script(name: str, *flags: object, **popen: object) -> subprocess.Popen:
    """Start a script in a process of its own."""
    command = [sys.executable, str(script_path(name)), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


class Fork:
    """A script in a fork of a process that has imported what it imports: of subprocess.Popen what tests ask for."""

    def __init__(self, name: str, *flags: object, cwd: Path | None = None):
        self.args, self.folder = [str(script_path(name)), *map(str, flags)], tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / what for what in ("stdout", "stderr")]
        play = (self.args[0], self.args[1:], str(cwd or Path.cwd()), dict(os.environ), *map(str, self.files))
        self.process = FORKS.Process(target=forked.play, args=play)
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 400) -> tuple[str, str]:
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return tuple(file.read_text() for file in self.files)

    @property
    def returncode(self) -> int:
        return self.process.exitcode


def run_script(name: str, *flags: object, **popen: object) -> subprocess.CompletedProcess:
    """Run a script to its end, in a fork, or else a process of its own."""
    forks = popen.keys() <= {"cwd"} and early_variables() == FORKED_VARIABLES
    process = (Fork if forks else start_script)(name, *flags, **popen)
    try:
        stdout, stderr = process.communicate(timeout=400)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_in(folder: Path, name: str, *flags: object) -> Run:
    """Run a script that succeeds, in a folder of its own."""
    folder.mkdir()
    process = run_script(name, *flags, "--runs-dir", folder / "runs", cwd=folder)
    assert process.returncode == 0, process.stderr
    (run_dir,) = (folder / "runs").iterdir()
    return Run(process, run_dir)


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(run_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


def wait_for_rows(process: "subprocess.Popen | Fork", runs_dir: Path, count: int) -> Path:
    """Wait until the only run in runs_dir has logged count iterations; return its folder."""
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        for path in runs_dir.glob("*/metrics.csv"):
            if path.read_bytes().count(b"\n") > count:
                return path.parent
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"{process.args} ended or hung before iteration {count}: {process.communicate()}")


def read_policy(path: Path) -> tuple[dict, dict[str, str]]:
    """Tensors and metadata of a policy file."""
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def write_policy(path: Path, source: Path, tensors: dict = {}, **metadata: str | None) -> Path:  # noqa: B006
    """Write source's policy as if by hand, without its digest, with other tensors and metadata (None: without it)."""
    before, metadata_before = read_policy(source)
    metadata = metadata_before | {"sha256": None} | metadata
    metadata = {name: text for name, text in metadata.items() if text is not None}
    safetensors.numpy.save_file(before | tensors, path, metadata)
    return path


def once(name: str, make: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What make(folder) returns: called by the first test process that needs it, for which the others wait."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if IS_WORKER else root) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder.with_suffix(".pickle")
        if not made.exists():
            folder.mkdir()
            made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Run]:
    """A short run of each script, some of them twice: {what: Run}."""
    return once("runs", make_runs, tmp_path_factory)


def make_runs(folder: Path) -> dict[str, Run]:
    """The runs of the fixture of that name."""
    cheetah = ("--env-id", "HalfCheetah-v4", *SHORT)
    with ThreadPoolExecutor(2) as pool:

        def submit(what, name, *flags):
            return pool.submit(run_in, folder / what.replace(" ", "_"), name, *flags)

        last = ("--num-snapshots", 0)  # so short a run may end below its prior
        export = ("--num-evals", 2, "--export", "prior.safetensors")
        train_prior = submit("train_prior_ppo", "train_prior_ppo", *cheetah, *export)
        soft = submit("soft_ppo", "soft_ppo", *PENDULUM)
        form = ("--activation", "relu", "--state-dependent-std", "--hidden-sizes", 32, 16, "--gamma", 0.95)
        soft_relu = submit("soft_ppo relu", "soft_ppo", *PENDULUM, *form)
        prior = train_prior.result().folder.parents[1] / "prior.safetensors"
        soft_policy = soft.result().folder / "policy.safetensors"
        # Of an unknown temperature, and for v4, but customised in v5.
        plain_prior = folder / "plain.safetensors"
        write_policy(plain_prior, prior, squash="false", alpha=None, survival_reward=None)
        plain = ("--env-id", "HalfCheetah-v5", *SHORT, "--prior", plain_prior, "--gamma", 0.9)
        weights = ("--omega-prime", 0.1, "--alpha-hat", 0.05)
        jobs = {
            "train_prior_ppo": train_prior,
            "soft_ppo": soft,
            "residual_ppo": submit("residual_ppo", "residual_ppo", *cheetah, "--prior", prior, *last),
            "soft_ppo again": submit("soft_ppo again", "soft_ppo", *PENDULUM),
            "soft_ppo seed 2": submit("soft_ppo seed 2", "soft_ppo", *PENDULUM, "--seed", 2),
            "residual_ppo from scratch": submit(
                "residual_ppo from scratch", "residual_ppo", *PENDULUM, "--addon", "none", "--prior", soft_policy,
                "--no-init-from-prior",
            ),
            "residual_ppo plain": submit("residual_ppo plain", "residual_ppo", *plain, *weights, "--desired-kl", 0),
            "soft_ppo relu": soft_relu,
            "residual_ppo relu": submit(
                "residual_ppo relu", "residual_ppo", *PENDULUM, "--addon", "none", *weights, "--omega", 0.5,
                "--prior", soft_relu.result().folder / "policy.safetensors",
            ),
        }  # fmt: skip
        return {what: job.result() for what, job in jobs.items()}


@pytest.fixture(scope="session")
def prior(runs) -> Path:
    """The policy file of a barely trained prior for HalfCheetah-v4, alpha 0.1."""
    return runs["train_prior_ppo"].folder.parents[1] / "prior.safetensors"


@pytest.fixture(scope="session")
def pendulum_prior(runs) -> Path:
    """A policy file of soft_ppo for InvertedPendulum-v4."""
    return runs["soft_ppo"].folder / "policy.safetensors"


@pytest.fixture(scope="session")
def learning_runs(tmp_path_factory, prior) -> dict[str, Run]:
    """A run of soft_ppo and one of residual_ppo that are long enough to learn."""
    return once("learning", lambda folder: make_learning_runs(folder, prior), tmp_path_factory)


def make_learning_runs(folder: Path, prior: Path) -> dict[str, Run]:
    """The runs of the fixture of that name."""
    common = ("--num-envs", 16, "--learning-rate", 1e-3, "--eval-episodes", 8)
    soft = ("--env-id", "InvertedPendulum-v4", "--num-steps", 32, "--num-minibatches", 4, "--total-timesteps", 40_000)
    residual = ("--prior", prior, "--omega", 0.1, "--addon-coef", 3, "--num-steps", 64, "--total-timesteps", 30_000)
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            "soft_ppo": pool.submit(run_in, folder / "soft", "soft_ppo", *soft, *common),
            "residual_ppo": pool.submit(run_in, folder / "residual", "residual_ppo", *residual, *common),
        }
        return {what: job.result() for what, job in jobs.items()}


@pytest.fixture(scope="session")
def sac_runs(tmp_path_factory) -> dict[str, Run]:
    """A short run of soft_sac, and one of residual_sac with a shipped prior: {script: Run}."""
    return once("sac", make_sac_runs, tmp_path_factory)


def make_sac_runs(folder: Path) -> dict[str, Run]:
    """The runs of the fixture of that name."""
    flags = ("--env-id", "Hopper-v4", *SAC_SHORT, "--num-snapshots", 0)
    flags += ("--prior", ROOT / "priors" / "Hopper-v4.safetensors")
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            "soft_sac": pool.submit(run_in, folder / "soft", "soft_sac", *SAC_PENDULUM),
            "residual_sac": pool.submit(run_in, folder / "residual", "residual_sac", *flags),
        }
        return {name: job.result() for name, job in jobs.items()}
