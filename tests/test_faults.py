"""What the world around a run can do to it costs one line, and nothing that could be saved."""

import errno
import json
import os
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.serialization
import numpy as np
import pytest
from conftest import PENDULUM, ROOT, read_metrics, run_main, run_script, start_script, wait_for_rows
from tensorboardX.proto.event_pb2 import Event

import residual_ppo
import soft_ppo
import soft_sac
import train_prior_ppo

HOPPER = ROOT / "priors" / "Hopper-v4.safetensors"


def logged_scalars(run_dir):
    """{(name, step): value} of all TensorBoard files."""
    logged = {}
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # records of length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            logged |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + length :]
    return logged


def test_terminal_without_unicode_and_jax_with_other_settings_change_nothing(tmp_path, runs):
    """A terminal of ASCII alone, double precision switched on, and NaNs that are errors, all at once."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1"}
    cheetah = ("--env-id", "HalfCheetah-v4", *PENDULUM[2:])
    flags = (*cheetah, "--num-evals", 2, "--export", "prior.safetensors", "--runs-dir", "runs")
    process = run_script("train_prior_ppo", *flags, cwd=tmp_path, env=environment)
    assert (process.returncode, process.stderr) == (0, "")
    assert "objective" in process.stdout
    assert (tmp_path / "prior.safetensors").exists()
    (run_dir,) = (tmp_path / "runs").iterdir()
    ours, theirs = (read_metrics(folder)[-1] for folder in (run_dir, runs["train_prior_ppo"].folder))
    assert float(ours["entropy"]) == pytest.approx(float(theirs["entropy"]), rel=1e-3)


def test_run_goes_on_when_nobody_reads_its_output(tmp_path):
    process = start_script("soft_ppo", *PENDULUM, "--runs-dir", tmp_path / "runs", cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0
    assert stderr == "standard output is closed; going on without it\n"
    assert list((tmp_path / "runs").glob("*/eval.json"))


def test_run_ended_by_sigterm_is_resumed_from_another_folder_and_its_logs_agree(tmp_path):
    work, elsewhere = tmp_path / "my work", tmp_path / "elsewhere"
    work.mkdir()
    elsewhere.mkdir()
    flags = (*PENDULUM, "--total-timesteps", 128 * 250, "--num-evals", 1, "--export", "prior.safetensors")
    process = start_script("train_prior_ppo", *flags, "--runs-dir", work / "runs", cwd=work)
    run_dir = wait_for_rows(process, work / "runs", 5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert re.fullmatch(r"train_prior_ppo\.py: SIGTERM: .*\n", stderr)
    done = int(flax.serialization.msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())["iteration"])
    assert 5 <= done == len(read_metrics(run_dir)) < 250

    command = shlex.split(stderr[stderr.index("python ") :])
    resumed = subprocess.run([sys.executable, *command[1:]], cwd=elsewhere, capture_output=True, text=True, timeout=400)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert (work / "prior.safetensors").exists()
    assert list(elsewhere.iterdir()) == []
    rows = {int(row["global_step"]): row for row in read_metrics(run_dir)}
    logged = logged_scalars(run_dir)
    assert {128 * done, 128 * 250} <= {step for _, step in logged} <= rows.keys()
    for (name, step), value in logged.items():
        assert value == pytest.approx(float(rows[step][name]), rel=1e-4)


def limit_file_size(size):
    """In a child process: a disk on which no file can grow beyond so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_ends_with_one_line_and_keeps_the_last_good_state(tmp_path):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    flags = (*PENDULUM, "--total-timesteps", 128 * 400, "--checkpoint-interval", 0, "--hidden-sizes", 8, 8)
    start = {"cwd": tmp_path, "env": environment, "preexec_fn": limit_file_size(20_000)}
    process = run_script("soft_ppo", *flags, "--runs-dir", "runs", **start)
    assert process.returncode == 1
    assert re.fullmatch(r"soft_ppo\.py: File too large.*\n", process.stderr)
    (run_dir,) = (tmp_path / "runs").iterdir()
    state = flax.serialization.msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())
    assert 5 < int(state["iteration"]) < 400
    assert not list(tmp_path.rglob("*.tmp"))


def test_result_of_enjoy_that_does_not_fit_on_the_disk_leaves_no_file(tmp_path):
    flags = (HOPPER, "--episodes", 1, "--json", tmp_path / "episodes.json")
    process = run_script("enjoy", *flags, preexec_fn=limit_file_size(100))
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_prior_is_published_where_there_are_no_hard_links_and_a_full_disk_leaves_nothing_of_it(tmp_path, monkeypatch):
    """As on a USB stick or a network's drive; the name that was claimed is given back."""

    def refuse(code):
        def function(*_, **__):
            raise OSError(code, os.strerror(code))

        return function

    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    monkeypatch.setattr(Path, "hardlink_to", refuse(errno.EPERM))
    export = tmp_path / "priors" / "prior.safetensors"
    train_prior_ppo.publish(HOPPER, export)
    assert export.read_bytes() == HOPPER.read_bytes()
    export.unlink()
    monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
    with pytest.raises(train_prior_ppo.StopRun, match="No space left on device; copy it yourself") as stop:
        train_prior_ppo.publish(HOPPER, export)
    assert stop.value.exit_code == 1
    assert str(HOPPER) in str(stop.value)
    assert list(export.parent.iterdir()) == []


def test_picture_that_cannot_be_drawn_names_its_size(tmp_path):
    """On a machine without a renderer, too."""
    process = run_script("enjoy", HOPPER, "--video", tmp_path / "a.mp4", "--video-size", 200_000, 100_000)
    assert process.returncode == 2
    assert re.fullmatch(
        r"enjoy\.py: --video cannot draw .*--video-size 200000 100000 .*smaller size.*\n", process.stderr
    )
    assert list(tmp_path.iterdir()) == []


def pasted(command, folder):
    """The words of a printed command, as a shell in a folder understands it."""
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], cwd=folder, capture_output=True, text=True)
    assert words.stderr == ""
    return words.stdout.splitlines()


@pytest.mark.parametrize("name", ["my work", "it's $HOME; & more"])
def test_printed_commands_can_be_pasted_whatever_the_folder_is_called(name, tmp_path, monkeypatch, capsys):
    """Those that go on with a run and that watch it; run folder and script are named relative to where one is."""
    work = tmp_path / name
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["../my scripts/residual_ppo.py"])
    args = residual_ppo.Args(env_id="Hopper-v4", runs_dir=Path("my runs"), prior=HOPPER, addon="none", progress=False)
    policy, info = residual_ppo.load_policy(HOPPER)
    args = residual_ppo.resolve_args(args, policy, info, residual_ppo.PPO_SCALES)
    simulator = residual_ppo.make_simulator("Hopper-v4", "{}", np.arange(2))
    state = residual_ppo.init_state(args, policy.actor, 11, residual_ppo.seed_words(1, residual_ppo.NETWORKS))
    run = residual_ppo.Run(args, simulator, residual_ppo.ADDON_TASKS["none"], state)
    run.interrupt(signal.SIGTERM, None)
    with pytest.raises(residual_ppo.StopRun) as stop, run:
        run.write(1, state, {"basic_return": 1.0, "entropy": 1.0, "episodes_seen": 1})
    _, _, command = str(stop.value).partition("continue with: ")
    assert pasted(command, work) == ["python", "../my scripts/residual_ppo.py", "--resume", str(run.folder)]
    assert (work / run.folder / "checkpoint.msgpack").exists()

    episodes = dict.fromkeys(("objective", "total", "basic", "addon", "quantity", "length"), np.ones(2))
    run.finish("–", {"prior": dict.fromkeys(residual_ppo.ACTIONS, episodes)})
    _, _, command = capsys.readouterr().out.partition("to watch it: ")
    _, player, folder, window = pasted(command, work)
    assert (work / player).samefile(ROOT / "enjoy.py")
    assert (work / folder).samefile(work / run.folder)
    assert window == "--window"


def test_tracking_that_cannot_start_is_said_before_there_is_a_run(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("no login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    args = soft_ppo.Args(env_id="InvertedPendulum-v4", runs_dir=tmp_path / "runs", track=True)
    with pytest.raises(soft_ppo.StopRun, match="wandb login") as stop:
        run_main(soft_ppo, args)
    assert stop.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_resumed_sac_refills_its_buffer_and_learns_at_once(tmp_path, sac_runs, capsys):
    """Interrupted in its last iterations, when the buffer, if it only grew again, would never reach learning_starts."""
    source, run_dir = sac_runs["soft_sac"].folder, tmp_path / "run"
    run_dir.mkdir()
    state = flax.serialization.msgpack_restore((source / "checkpoint.msgpack").read_bytes())
    state["iteration"] = state["iteration"] - 1
    (run_dir / "checkpoint.msgpack").write_bytes(flax.serialization.msgpack_serialize(state))
    for name in ("args.json", "metrics.csv"):
        (run_dir / name).write_bytes((source / name).read_bytes())
    run_main(soft_sac, soft_sac.Args(resume=run_dir))
    rows, before = read_metrics(run_dir), read_metrics(source)
    assert len(rows) == len(before)
    assert rows[:-1] == before[:-1]
    assert float(rows[-1]["value_loss"]) > 0
    assert float(rows[-1]["param_norm"]) != float(rows[-2]["param_norm"])


def test_flags_that_an_older_run_does_not_know_are_named(tmp_path, runs, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    content = json.loads((runs["soft_ppo"].folder / "args.json").read_text())
    del content["args"]["target_kl"]
    (run_dir / "args.json").write_text(json.dumps(content))
    args = soft_ppo.resumed_args(soft_ppo.Args(resume=run_dir))
    assert args.target_kl is None
    assert re.search(r"note .*older.*: target_kl\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("objective", "basic", "said"),
    [
        ((100, 100), (69, 100), "basic fell with stochastic actions from 100 to 69;"),
        ((100, 100), (100, 69), "basic fell with deterministic .* 100 to 69;"),
        ((100, 100), (69, 50), "with stochastic actions from 100 to 69, with deterministic actions from 100 to 50;"),
        ((96, 96), (71, 71), ""),
        ((94, 96), (71, 71), "objective fell with stochastic actions from 100 to 94; a larger --omega"),
        ((120, 94), (71, 71), "objective fell with deterministic actions from 100 to 94;"),
        ((50, 50), (69, 71), "basic fell with stochastic actions from 100 to 69;"),
    ],
)
def test_table_says_which_actions_have_lost_the_prior(objective, basic, said):
    def row(objective, basic):
        names = ("total", "addon", "quantity", "length")
        return {
            actions: dict.fromkeys(names, np.zeros(2)) | {"objective": x + np.array([-1, 1]), "basic": np.full(2, y)}
            for actions, x, y in zip(residual_ppo.ACTIONS, objective, basic, strict=True)
        }

    results = {"prior": row((100, 100), (100, 100)), "customised": row(objective, basic)}
    caption = residual_ppo.results_table("x", results).caption or ""
    assert bool(said) == bool(caption) and re.search(said, caption)


def test_a_run_says_once_that_it_loses_the_prior_when_all_environments_have_had_an_episode(tmp_path, capsys):
    args = residual_ppo.Args(env_id="Hopper-v4", runs_dir=tmp_path, num_envs=2, prior=HOPPER, progress=False)
    simulator = residual_ppo.make_simulator("Hopper-v4", "{}", np.arange(2))
    actor = residual_ppo.load_policy(HOPPER)[0].actor
    state = residual_ppo.init_state(args, actor, 11, residual_ppo.seed_words(1, residual_ppo.NETWORKS))
    said = []
    with residual_ppo.Run(args, simulator, residual_ppo.ADDON_TASKS["none"], state) as run:
        for iteration, (basic, seen) in enumerate([(0.0, 0), (900.0, 1), (1600.0, 2), (1400.0, 2), (1300.0, 2)], 1):
            metrics = {"basic_return": basic, "entropy": 1.0, "episodes_seen": seen}
            residual_ppo.log_kept(run.write, 3000.0, iteration, state, metrics)
            said.append("note     the basic return is below half" in capsys.readouterr().out)
    assert said == [False, False, False, True, False]
    kept = [float(row["kept_return"]) for row in read_metrics(run.folder)]
    np.testing.assert_allclose(kept, [np.nan, 0.3, 1600 / 3000, 1400 / 3000, 1300 / 3000], rtol=1e-5)


def test_prior_too_narrow_for_float32_is_refused_and_a_log_prob_that_is_not_finite_names_the_prior(tmp_path):
    args = residual_ppo.Args(env_id="Hopper-v4", runs_dir=tmp_path, prior=HOPPER, addon="none", progress=False)
    simulator = residual_ppo.make_simulator("Hopper-v4", "{}", np.arange(2))
    actor = residual_ppo.load_policy(HOPPER)[0].actor
    state = residual_ppo.init_state(args, actor, 11, residual_ppo.seed_words(1, residual_ppo.NETWORKS))
    run = residual_ppo.Run(args, simulator, residual_ppo.ADDON_TASKS["none"], state)
    good = {"basic_reward": 1.0, "addon_reward": 0.0, "kl_to_prior": 0.0, "episodes_seen": 0}
    with pytest.raises(residual_ppo.StopRun, match="log pi of the prior.*iteration 3"), run:
        run.write(3, state, good | {"kl_to_prior": np.inf, "policy_loss": np.nan})
    assert (run.folder / "checkpoint.msgpack").exists()
