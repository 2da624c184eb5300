"""Updates over several devices and runs of several processes compute what one does, and a lost process stops all."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import BATCH, PENDULUM, ROOT, read_metrics, run_script, start_script, wait_for_rows

import residual_ppo

FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
LONG = ("--env-id", "InvertedPendulum-v4", *BATCH, "--total-timesteps", 128 * 5000, "--eval-episodes", 2)


def cluster_flags(num_processes):
    """The flags by which each process finds the others."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    common = ("--distributed", "--coordinator-address", address, "--num-processes", num_processes)
    return [(*common, "--process-id", i) for i in range(num_processes)]


def slurm_variables(num_processes):
    """What srun sets for each of the processes on this machine; JAX takes the port from the job's number."""
    common = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(num_processes)}
    return [common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(num_processes)]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, pendulum_prior):
    """The same run by one process, by one with four devices, and by two processes: {name: what recorder.py wrote}."""
    folder = tmp_path_factory.mktemp("devices")
    flags = ("--total-timesteps", 512, "--addon", "none", "--prior", pendulum_prior, "--learning-rate", 1e-3)
    flags = (*PENDULUM, *flags, "--omega-prime", 0.1, "--alpha-hat", 0.05)

    def start(name, *more_flags, **variables):
        out, runs_dir = folder / f"{name}.npz", folder / name.partition("-")[0]
        environment = os.environ | variables
        return start_script("tests/recorder", out, *flags, "--runs-dir", runs_dir, *more_flags, env=environment)

    def finish(*processes):
        for process in processes:
            _, stderr = process.communicate(timeout=400)
            assert process.returncode == 0, stderr

    finish(start("one"), start("four", XLA_FLAGS=FOUR_DEVICES))
    finish(*(start(f"two-{i}", "--distributed", **variables) for i, variables in enumerate(slurm_variables(2))))
    return {name: dict(np.load(folder / f"{name}.npz")) for name in ("one", "four", "two-0", "two-1")} | {
        f"{name} metrics": read_metrics(next((folder / name).iterdir())) for name in ("one", "two")
    }


def test_recorded_run_learns(recordings):
    states = recordings["one"]["states"]
    assert len(states) == 4
    assert np.isfinite(states).all()
    assert (np.abs(np.diff(states, axis=0)).max(1) > 1e-3).all()


@pytest.mark.parametrize("name", ["four", "two-0"])
def test_more_devices_compute_what_one_computes(recordings, name):
    """Up to rounding: parameters, optimiser, normaliser and returns, after each iteration of the whole loop."""
    np.testing.assert_allclose(recordings[name]["states"], recordings["one"]["states"], rtol=1e-3, atol=1e-4)


def test_processes_hold_the_same_state_after_every_iteration(recordings):
    np.testing.assert_array_equal(recordings["two-0"]["states"], recordings["two-1"]["states"])


@pytest.mark.parametrize(("name", "devices"), [("four", 4), ("two-0", 2)])
def test_devices_share_the_arithmetic_of_an_update(recordings, name, devices):
    assert recordings[name]["flops"] < 1.1 / devices * recordings["one"]["flops"]


def test_metrics_are_of_the_environments_of_all_processes(recordings):
    one, two = recordings["one metrics"], recordings["two metrics"]
    assert float(one[-1]["episode_length"]) > 1
    for name in ("global_step", "basic_return", "episode_length", "kl_to_prior", "entropy", "reward_scale"):
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], 1e-3, 1e-6), name


def test_environments_have_the_same_seeds_for_any_number_of_processes(recordings):
    shares = [recordings[name]["training_seeds"] for name in ("two-0", "two-1")]
    np.testing.assert_array_equal(np.concatenate(shares), recordings["one"]["training_seeds"])
    assert len(shares[0]) == len(shares[1])
    np.testing.assert_array_equal(recordings["one"]["training_seeds"], residual_ppo.env_seeds(1, 0, 8))
    for name in ("one", "two-0", "two-1"):  # two episodes of two policies, with sampled and deterministic actions
        np.testing.assert_array_equal(recordings[name]["eval_seeds"], np.tile(residual_ppo.env_seeds(1, 1, 2), 4))


def test_all_processes_evaluate(recordings):
    """None waits for another's evaluation in the barrier at the end of the run, whose patience is limited."""
    for name in ("one", "two-0", "two-1"):
        assert len(recordings[name]["evaluations"]) == 1
    np.testing.assert_array_equal(recordings["two-0"]["evaluations"], recordings["two-1"]["evaluations"])


def test_error_in_a_run_of_several_processes_is_shown(tmp_path):
    """And not taken for the loss of a process."""
    (tmp_path / "fails.py").write_text(f"""
import runpy, sys
import envpool

def make(*args, **kwargs):
    raise ValueError("the axle is\\nbroken")

envpool.make, sys.argv[0] = make, {str(ROOT / "soft_ppo.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    command = [sys.executable, "fails.py", *LONG, *cluster_flags(1)[0]]
    process = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1
    assert "stopped by ValueError: the axle is broken" in process.stderr


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_stops_the_other_and_the_run_can_be_resumed(tmp_path, lost):
    processes = [
        start_script("soft_ppo", *LONG, "--runs-dir", tmp_path / "runs", *cluster, cwd=tmp_path)
        for cluster in cluster_flags(2)
    ]
    run_dir = wait_for_rows(processes[0], tmp_path / "runs", 3)
    processes[lost].send_signal(signal.SIGKILL)
    stdout, stderr = processes[1 - lost].communicate(timeout=200)
    assert processes[1 - lost].returncode != 0
    assert "another" in stderr  # our line, or, if JAX's own watch over the coordinator is faster, JAX's
    processes[lost].communicate()
    if lost == 0:
        return
    assert processes[0].returncode == 1
    assert stderr.count("\n") == 1
    assert "another process was lost" in stderr
    assert str(run_dir.relative_to(tmp_path)) in stdout

    done = len(read_metrics(run_dir))
    resumed = start_script("soft_ppo", "--resume", run_dir, cwd=tmp_path)
    wait_for_rows(resumed, tmp_path / "runs", done + 2)
    resumed.kill()
    resumed.communicate()
    assert [int(row["global_step"]) for row in read_metrics(run_dir)[: done + 2]] == [
        128 * i for i in range(1, done + 3)
    ]


@pytest.mark.parametrize(
    ("flags", "xla_flags", "hint"),
    [
        (("--process-id", 0), "", "--distributed"),
        (("--distributed", "--coordinator-address", "somewhere"), "", "port"),
        (("--distributed",), "", "--coordinator-address"),
        (("--distributed", "--coordinator-address", "localhost:1", "--num-processes", 2), "", "--process-id"),
        (("--num-envs", 6, "--num-minibatches", 1), FOUR_DEVICES, "multiple"),
        (("--num-envs", 8, "--num-steps", 1, "--num-minibatches", 4), FOUR_DEVICES, "--num-minibatches"),
    ],
)
def test_what_cannot_be_split_or_met_ends_with_one_line(tmp_path, flags, xla_flags, hint):
    process = run_script("soft_ppo", *flags, cwd=tmp_path, env=os.environ | {"XLA_FLAGS": xla_flags})
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert hint in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_processes_with_different_flags_do_not_train_together(tmp_path):
    processes = [
        start_script("soft_ppo", *LONG, "--seed", i, "--runs-dir", tmp_path / "runs", *cluster, cwd=tmp_path)
        for i, cluster in enumerate(cluster_flags(2))
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 2
        assert "different flags" in stderr
    assert list(tmp_path.iterdir()) == []
