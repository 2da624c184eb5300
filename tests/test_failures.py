"""Bad input, damaged files, kills, interrupts and divergence end as documented, and leave nothing broken behind."""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
import safetensors.numpy
import tyro
from conftest import (
    PENDULUM,
    ROOT,
    SAC_SHORT,
    SCRIPTS,
    SHORT,
    Fork,
    read_metrics,
    read_policy,
    run_main,
    run_script,
    script_path,
    start_script,
    wait_for_rows,
    write_policy,
)

import residual_ppo
import train_prior_ppo

LONG = (*PENDULUM, "--total-timesteps", 128 * 150, "--checkpoint-interval", 0)


def stop_message(script, *flags, exit_code=2):
    """The message with which a script's main, called in this process, stops."""
    module = importlib.import_module(script)
    with pytest.raises(module.StopRun) as stop:
        run_main(module, tyro.cli(module.Args, args=[str(flag) for flag in flags]))
    assert stop.value.exit_code == exit_code
    message = str(stop.value)
    assert len(message) > 10
    assert "\n" not in message
    return message


def files(folder):
    """All that is in a folder, with contents."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def workplace(tmp_path, monkeypatch, prior):
    """An empty working directory beside a folder of good and bad input files."""
    inputs, work = tmp_path / "inputs", tmp_path / "work"
    inputs.mkdir()
    work.mkdir()
    (inputs / "good.safetensors").write_bytes(prior.read_bytes())
    (inputs / "half.safetensors").write_bytes(prior.read_bytes()[: prior.stat().st_size // 2])
    (inputs / "empty.safetensors").write_bytes(b"")
    narrow = {"actor_logstd": np.full(6, -60, np.float32)}
    write_policy(inputs / "narrow.safetensors", prior, narrow)
    write_policy(inputs / "no_alpha.safetensors", prior, alpha=None)
    write_policy(inputs / "alpha_0.safetensors", prior, alpha="0.0")
    (inputs / "file").write_text("in the way")
    (inputs / "folder").mkdir()
    monkeypatch.chdir(work)
    return tmp_path


GOOD = ("--prior", "../inputs/good.safetensors")
BAD_INPUT = {
    "unknown env": ("soft_ppo", ("--env-id", "Unicorn-v4"), "Unicorn-v4.*list_all_envs"),
    "pixels": ("soft_ppo", ("--env-id", "Pong-v5"), "observations of Pong-v5.*Box"),
    "discrete actions": ("soft_ppo", ("--env-id", "CartPole-v1"), "actions of CartPole-v1 are Discrete"),
    "Dict of matrices": ("train_prior_ppo", ("--env-id", "lane-keeping-v0"), r"lane-keeping-v0 are Box \(4, 1\)"),
    "env kwargs no JSON": ("soft_ppo", ("--env-kwargs", "healthy"), "--env-kwargs is a JSON object"),
    "env kwargs unknown": ("soft_ppo", ("--env-kwargs", '{"wings": 2}'), "wings"),
    "policy to start from missing": ("soft_ppo", ("--init-from", "gone.safetensors"), "gone.safetensors"),
    "Gymnasium's v3": ("residual_ppo", ("--env-id", "HalfCheetah-v3"), "HalfCheetah-v3"),
    "default prior missing": (
        "residual_ppo", ("--env-id", "Reacher-v4", "--addon", "none"), r"priors/Reacher-v4\.safetensors.*train_prior",
    ),
    "prior missing": ("residual_ppo", ("--prior", "gone.safetensors"), "gone.safetensors"),
    "prior is a folder": ("residual_ppo", ("--prior", "../inputs/folder"), "inputs/folder"),
    "prior cut in half": ("residual_ppo", ("--prior", "../inputs/half.safetensors"), "half.safetensors"),
    "prior empty": ("residual_ppo", ("--prior", "../inputs/empty.safetensors"), "empty.safetensors"),
    "prior of another env": ("residual_ppo", (*GOOD, "--env-id", "Walker2d-v4"), "HalfCheetah-v4.*Walker2d-v4"),
    "prior of no deviation": ("residual_ppo", ("--prior", "../inputs/narrow.safetensors"), "actor_logstd"),
    "prior without alpha": ("residual_sac", ("--prior", "../inputs/no_alpha.safetensors"), "alpha.*--omega-prime"),
    "prior with alpha 0": ("residual_sac", ("--prior", "../inputs/alpha_0.safetensors"), "alpha.*--omega-prime"),
    "alpha 0, only omega-prime": (
        "residual_ppo", ("--prior", "../inputs/alpha_0.safetensors", "--omega-prime", 0.1), "--alpha-hat",
    ),
    "alpha 0, only alpha-hat": (
        "residual_sac", ("--prior", "../inputs/alpha_0.safetensors", "--alpha-hat", 0.1), "--omega-prime",
    ),
    "hidden sizes not the prior's": ("residual_ppo", (*GOOD, "--hidden-sizes", 32, 32), "--no-init-from-prior"),
    "add-on unknown": ("residual_ppo", (*GOOD, "--addon", "fly"), "fly.*half-cheetah-front-foot"),
    "add-on of another env": ("residual_ppo", (*GOOD, "--addon", "ant-right"), "ant-right.*HalfCheetah-v4"),
    "env without add-on": ("residual_ppo", ("--env-id", "Reacher-v4"), "Reacher-v4"),
    "soft add-on of another env": ("soft_ppo", ("--addon", "ant-right"), "ant-right.*HalfCheetah-v4"),
    "batch does not split": ("soft_ppo", ("--num-envs", 3, "--num-steps", 5), "--num-minibatches"),
    "budget below an iteration": ("soft_ppo", ("--total-timesteps", 100), "--total-timesteps"),
    "budget 0": ("soft_ppo", ("--total-timesteps", 0), "--total-timesteps"),
    "no envs": ("soft_ppo", ("--num-envs", 0), "--num-envs"),
    "negative envs": ("soft_ppo", ("--num-envs", -8), "--num-envs"),
    "no steps": ("soft_ppo", ("--num-steps", 0), "--num-steps"),
    "no minibatches": ("soft_ppo", ("--num-minibatches", 0), "--num-minibatches"),
    "minibatches of one step": ("soft_ppo", ("--num-minibatches", 128), "--norm-adv.*--num-minibatches"),
    "no epochs": ("soft_ppo", ("--update-epochs", 0), "--update-epochs"),
    "no evaluation": ("soft_ppo", ("--eval-episodes", 0), "--eval-episodes"),
    "no snapshots": ("train_prior_ppo", ("--num-evals", 0), "--num-evals"),
    "layer of no width": ("soft_ppo", ("--hidden-sizes", 64, 0), "--hidden-sizes"),
    "negative alpha": ("soft_ppo", ("--alpha", -0.1), "--alpha"),
    "negative alpha of a prior": ("train_prior_ppo", ("--alpha", -0.1), "--alpha"),
    "negative alpha-hat": ("residual_ppo", (*GOOD, "--alpha-hat", -1), "--alpha-hat"),
    "negative omega": ("residual_ppo", (*GOOD, "--omega", -1), "--omega"),
    "negative omega-prime": ("residual_ppo", (*GOOD, "--omega-prime", -1), "--omega-prime"),
    "negative seed": ("soft_ppo", ("--seed", -1), "--seed"),
    "seed too large": ("soft_ppo", ("--seed", 2**40), "--seed"),
    "learning rate NaN": ("soft_ppo", ("--learning-rate", "nan"), "--learning-rate"),
    "learning rate infinite": ("soft_ppo", ("--learning-rate", "inf"), "--learning-rate"),
    "learning rate 0": ("soft_ppo", ("--learning-rate", 0), "--learning-rate"),
    "add-on coefficient NaN": ("residual_ppo", (*GOOD, "--addon-coef", "nan"), "--addon-coef"),
    "survival reward infinite": ("residual_ppo", (*GOOD, "--survival-reward", "inf"), "--survival-reward"),
    "gamma above 1": ("soft_ppo", ("--gamma", 1.1), "--gamma"),
    "gamma above 1 instead of the prior's": ("residual_ppo", (*GOOD, "--gamma", 1.1), "--gamma"),
    "no discount, yet survival rewarded": ("residual_ppo", (*GOOD, "--gamma", 1), "--gamma 1.*--survival-reward 0"),
    "alpha and ent-coef": ("train_prior_ppo", ("--alpha", 0.1, "--ent-coef", 0.01), "--alpha.*--ent-coef"),
    "export exists": ("train_prior_ppo", ("--export", "../inputs/good.safetensors"), "good.safetensors"),
    "export below a file": ("train_prior_ppo", ("--export", "../inputs/file/prior.safetensors"), "inputs/file"),
    "export is a folder": ("train_prior_ppo", ("--export", "../inputs/folder"), "inputs/folder"),
    "runs dir is a file": ("soft_ppo", ("--runs-dir", "../inputs/file"), "inputs/file"),
    "runs dir below a file": ("soft_ppo", ("--runs-dir", "../inputs/file/runs"), "inputs/file"),
    "resume with a flag": ("soft_ppo", ("--resume", "../inputs/folder", "--seed", 3), "--resume"),
    "resume nothing": ("soft_ppo", ("--resume", "gone"), "gone"),
    "resume no run": ("soft_ppo", ("--resume", "../inputs/folder"), "inputs/folder"),
    "resume a file": ("soft_ppo", ("--resume", "../inputs/file"), "inputs/file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_creates_nothing(case, workplace):
    script, flags, pattern = BAD_INPUT[case]
    short = () if "--resume" in flags else SAC_SHORT if script.endswith("sac") else SHORT
    # The case's flags come last, and the last of a flag's values counts.
    before = files(workplace)
    message = stop_message(script, *short, *flags)
    assert re.search(pattern, message), message
    assert files(workplace) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_flag_that_does_not_exist_ends_with_exit_code_2(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        tyro.cli(module.Args, args=["--learning-rat", "1"])
    assert stop.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_processes_that_fail_print_one_line_and_exit_with_2(workplace):
    commands = {
        "half.safetensors": ("residual_ppo", "--prior", "../inputs/half.safetensors"),
        "good.safetensors": ("train_prior_ppo", "--export", "../inputs/good.safetensors"),
    }
    before = files(workplace)
    with ThreadPoolExecutor(2) as pool:
        processes = dict(zip(commands, pool.map(lambda command: run_script(*command), commands.values()), strict=True))
    for word, process in processes.items():
        assert process.returncode == 2
        assert process.stdout == ""
        assert process.stderr.count("\n") == 1
        assert process.stderr.startswith(f"{commands[word][0]}.py: ")
        assert word in process.stderr
    assert files(workplace) == before


def test_platform_that_jax_lacks_ends_with_one_line(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}  # also where there is one
    process = run_script("soft_ppo", *PENDULUM, cwd=tmp_path, env=environment)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith("soft_ppo.py: ")
    assert "JAX_PLATFORMS" in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_default_prior_is_here_or_else_beside_the_script(workplace):
    """And what it says is known to be read: that its layers are not of width 32."""
    shipped = residual_ppo.default_prior("HalfCheetah-v4")
    assert shipped.samefile(ROOT / "priors" / "HalfCheetah-v4.safetensors")
    assert "(64, 64)" in stop_message("residual_ppo", *SHORT, "--hidden-sizes", 32, 32)
    here = workplace / "work" / "priors" / "HalfCheetah-v4.safetensors"
    here.parent.mkdir()
    here.write_bytes(b"another")
    assert residual_ppo.default_prior("HalfCheetah-v4").samefile(here)
    assert "cannot be used" in stop_message("residual_ppo", *SHORT)


# ---------------------------------------------------------------------------------- damaged priors


def as_if_by_hand(change):
    """A corruption that changes tensors or metadata of a file without digest."""

    @functools.wraps(change)
    def corrupt(rng, data, tensors, metadata):
        tensors, metadata = dict(tensors), {name: text for name, text in metadata.items() if name != "sha256"}
        change(rng, tensors, metadata)
        return safetensors.numpy.save(tensors, metadata)

    return corrupt


def truncate(rng, data, tensors, metadata):
    return data[: rng.integers(len(data))]


def flip_bits(rng, data, tensors, metadata):
    data = bytearray(data)
    for position in rng.choice(len(data), rng.integers(1, 9), replace=False):
        data[position] ^= 1 << rng.integers(8)
    return bytes(data)


def flip_bits_of_the_header(rng, data, tensors, metadata):
    header = 8 + int.from_bytes(data[:8], "little")
    return flip_bits(rng, data[:header], tensors, metadata) + data[header:]


def append(rng, data, tensors, metadata):
    return data + rng.bytes(rng.integers(1, 100))


def replace_by_noise(rng, data, tensors, metadata):
    return rng.bytes(rng.integers(10_000))


@as_if_by_hand
def wrong_shape(rng, tensors, metadata):
    name = rng.choice(sorted(tensors))
    shape = list(tensors[name].shape)
    shape[rng.integers(len(shape))] += rng.choice([-1, 1, 5])
    tensors[name] = np.ones(shape, np.float32)


@as_if_by_hand
def not_finite(rng, tensors, metadata):
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[rng.integers(tensors[name].size)] = rng.choice([np.nan, np.inf, -np.inf])


@as_if_by_hand
def negative_variance(rng, tensors, metadata):
    tensors["obs_var"] = tensors["obs_var"].copy()
    tensors["obs_var"][rng.integers(17)] = -rng.exponential()


@as_if_by_hand
def extreme_deviation(rng, tensors, metadata):
    tensors["actor_logstd"] = tensors["actor_logstd"].copy()
    tensors["actor_logstd"][rng.integers(6)] = rng.choice([-1, 1]) * rng.uniform(10.1, 100)


@as_if_by_hand
def wrong_dtype(rng, tensors, metadata):
    name = rng.choice(sorted(tensors))
    tensors[name] = tensors[name].astype(rng.choice(["float16", "float64", "int32", "int64", "uint8", "bool"]))


@as_if_by_hand
def wrong_tensors(rng, tensors, metadata):
    name = rng.choice(sorted(tensors))
    array = tensors[name] if rng.random() < 0.3 else tensors.pop(name)
    if rng.random() < 0.7:
        tensors[f"{name}.{rng.integers(10)}"] = array
    elif name in tensors:
        del tensors[name]


@as_if_by_hand
def missing_metadata(rng, tensors, metadata):
    del metadata[rng.choice(["env_id", "squash", "hidden_sizes", "activation"])]


WRONG_METADATA = {
    "env_id": ("", "Walker2d-v4", "halfcheetah-v4", "HalfCheetah"),
    "squash": ("", "True", "1", "none"),
    "hidden_sizes": ("", "64", "[64]", "[64, 64", "[64, -64]", "[64.0, 64.0]", '["64", "64"]', "[[64], 64]", "null"),
    "activation": ("", "gelu", "Tanh"),
    "alpha": ("", "nan", "inf", "-0.1", "0,1", "none"),
    "log_std": ("clip -20 2", ""),
    "gamma": ("", "nan", "1.1", "-0.1", "none"),
    "survival_reward": ("", "nan", "inf", "-inf", "none"),
    "obs_clip": ("", "nan", "0", "-1", "none"),
    "surprise": ("1",),
}
WRONG_METADATA["hidden_sizes"] += ("{}", "[3000000000000, 64]")  # the latter takes more memory than there is
wrong_entries = itertools.cycle((name, value) for name, values in WRONG_METADATA.items() for value in values)


@as_if_by_hand
def wrong_metadata(rng, tensors, metadata):
    name, value = next(wrong_entries)
    metadata[name] = value


CORRUPTIONS = (
    truncate, flip_bits, flip_bits_of_the_header, append, replace_by_noise, wrong_shape, not_finite, negative_variance,
    extreme_deviation, wrong_dtype, wrong_tensors, missing_metadata, wrong_metadata,
)  # fmt: skip


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.__name__)
def test_corrupt_priors_are_all_refused(corruption, prior, tmp_path):
    rng = np.random.default_rng(CORRUPTIONS.index(corruption))
    data, (tensors, metadata) = prior.read_bytes(), read_policy(prior)
    path = tmp_path / "prior.safetensors"
    path.write_bytes(data)
    residual_ppo.check_policy_file(path, "HalfCheetah-v4")
    for i in range(45):  # times 13 corruptions, some 600 files
        corrupt = corruption(rng, data, tensors, metadata)
        assert corrupt != data
        path.write_bytes(corrupt)
        try:
            residual_ppo.check_policy_file(path, "HalfCheetah-v4")
        except residual_ppo.StopRun as stop:
            assert stop.exit_code == 2
            assert "\n" not in str(stop)
            continue
        except Exception as error:
            pytest.fail(f"file {i} raised {error!r}")
        pytest.fail(f"file {i} was accepted: {read_policy(path)[1]}")


# -------------------------------------------------------------------------------- resuming, refused


@pytest.fixture
def unfinished(runs, tmp_path):
    """A copy of a short run of soft_ppo without its evaluation, as if killed at the end."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("args.json", "metrics.csv", "checkpoint.msgpack"):
        (run_dir / name).write_bytes((runs["soft_ppo"].folder / name).read_bytes())
    return run_dir


@pytest.mark.parametrize("script", SCRIPTS)
def test_resuming_a_completed_run_is_refused(script, runs):
    before = files(runs[script].folder)
    assert "complete" in stop_message(script, "--resume", runs[script].folder)
    assert files(runs[script].folder) == before


@pytest.mark.parametrize("script", ["train_prior_ppo", "residual_ppo"])
def test_resuming_with_another_script_is_refused(script, unfinished):
    assert f"{script}.py" in stop_message(script, "--resume", unfinished)


BROKEN_ARGS = (
    b"",
    b'{"args": {"seed"',
    b"{}",
    b"[]",
    b'{"args": []}',
    b'{"args": {"speed": 1}}',
    b"\xff",
    b'{"args": {"num_envs": "8"}}',
)


@pytest.mark.parametrize("content", BROKEN_ARGS)
def test_resuming_with_damaged_args_is_refused(content, unfinished):
    (unfinished / "args.json").write_bytes(content)
    before = files(unfinished)
    assert str(unfinished) in stop_message("soft_ppo", "--resume", unfinished)
    assert files(unfinished) == before


def test_resuming_with_a_damaged_checkpoint_is_refused(unfinished, runs):
    data = (unfinished / "checkpoint.msgpack").read_bytes()
    other = (runs["train_prior_ppo"].folder / "checkpoint.msgpack").read_bytes()
    rng = np.random.default_rng(0)
    cut = [data[: rng.integers(len(data))] for _ in range(5)]
    damaged = [b"", data[:1], data[:-1], data + b"x", other, rng.bytes(1000), *cut]
    for i, content in enumerate(damaged):
        run_dir = shutil.copytree(unfinished, unfinished.with_name(f"run_{i}"))  # this process keeps the lock of each
        (run_dir / "checkpoint.msgpack").write_bytes(content)
        before = files(run_dir)
        assert "the checkpoint in" in stop_message("soft_ppo", "--resume", run_dir)
        assert files(run_dir) == before


def test_run_killed_before_its_first_checkpoint_is_not_resumed(unfinished):
    (unfinished / "checkpoint.msgpack").unlink()
    (unfinished / "metrics.csv").unlink()
    assert "start a new run" in stop_message("soft_ppo", "--resume", unfinished)
    assert [path.name for path in unfinished.iterdir()] == ["args.json"]


def test_discounted_returns_under_way_are_not_resumed_as_their_environments_start_anew(tmp_path):
    args = residual_ppo.Args(num_envs=4, num_steps=4, num_minibatches=2)
    template = residual_ppo.init_state(args, residual_ppo.Actor(2, (4,)), 3, residual_ppo.seed_words(1, 2))
    saved = jax.tree.map(lambda x: x + 1, template)
    (tmp_path / "checkpoint.msgpack").write_bytes(flax.serialization.to_bytes(jax.device_get(saved)))
    loaded = residual_ppo.load_checkpoint(tmp_path, template)
    np.testing.assert_array_equal(loaded.return_trace, np.zeros(4))
    jax.tree.map(np.testing.assert_array_equal, loaded.replace(return_trace=saved.return_trace), saved)


def test_export_that_appears_during_training_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """Nor is it written to while it is there; the run is not complete, but says where its prior is."""
    train, export = train_prior_ppo.train, tmp_path / "priors" / "prior.safetensors"

    def train_while_another_exports(*inputs, **more):
        export.parent.mkdir()
        export.write_bytes(b"of another run")
        return train(*inputs, **more)

    monkeypatch.setattr(train_prior_ppo, "train", train_while_another_exports)
    flags = (*PENDULUM, "--num-evals", 1, "--export", export, "--runs-dir", tmp_path / "runs")
    message = stop_message("train_prior_ppo", *flags, exit_code=1)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert str(run_dir / "policy.safetensors") in message
    assert str(export) in message
    assert export.read_bytes() == b"of another run"
    assert list(export.parent.iterdir()) == [export]
    assert not (run_dir / "eval.json").exists()
    assert "objective" not in capsys.readouterr().out
    residual_ppo.check_policy_file(run_dir / "policy.safetensors", "InvertedPendulum-v4")


def test_prior_is_published_to_a_new_folder(tmp_path, prior):
    export = tmp_path / "a" / "b" / "prior.safetensors"
    train_prior_ppo.publish(prior, export)
    assert export.read_bytes() == prior.read_bytes()
    assert list(export.parent.iterdir()) == [export]


# ------------------------------------------------------------------------- kills, interrupts, NaN


def iteration_of(run_dir):
    """The iteration of a run's checkpoint."""
    return int(flax.serialization.msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())["iteration"])


def assert_complete(run_dir, iterations):
    """The run has its evaluation and policy, and each iteration once in metrics.csv."""
    assert [int(row["global_step"]) for row in read_metrics(run_dir)] == [128 * i for i in range(1, iterations + 1)]
    assert iteration_of(run_dir) == iterations
    assert (run_dir / "eval.json").exists()
    assert (run_dir / "learning_curve.png").exists()
    assert all(np.isfinite(array).all() for array in read_policy(run_dir / "policy.safetensors")[0].values())


def kill(process):
    """kill -9"""
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL


def test_run_killed_during_start_up_leaves_nothing_to_resume(tmp_path):
    process = start_script("soft_ppo", *LONG, "--runs-dir", tmp_path / "runs", cwd=tmp_path)
    try:
        process.wait(0.3)
    except subprocess.TimeoutExpired:
        kill(process)
    assert list(tmp_path.iterdir()) == []
    assert "runs" in stop_message("soft_ppo", "--resume", tmp_path / "runs")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run killed early, its rows then, and the process that tried to resume it while it was alive."""
    folder = tmp_path_factory.mktemp("killed")
    flags = (*LONG, "--num-evals", 5, "--export", folder / "prior.safetensors", "--runs-dir", folder / "runs")
    process = Fork("train_prior_ppo", *flags, cwd=folder)
    run_dir = wait_for_rows(process, folder / "runs", 3)
    process.send_signal(signal.SIGSTOP)
    before = files(run_dir)
    second = run_script("train_prior_ppo", "--resume", run_dir, cwd=folder)
    assert files(run_dir) == before
    kill(process)
    return run_dir, read_metrics(run_dir), second


def test_second_process_cannot_go_on_with_a_run_under_way(killed):
    run_dir, _, second = killed
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert "another process" in second.stderr
    assert str(run_dir) in second.stderr


def test_run_killed_twice_is_resumed_and_completes(killed):
    run_dir, rows, _ = killed
    tmp_path = run_dir.parents[1]
    early = iteration_of(run_dir)
    assert 2 <= early < 150

    process = Fork("train_prior_ppo", "--resume", run_dir, cwd=tmp_path)
    wait_for_rows(process, tmp_path / "runs", max(60, early + 10))
    kill(process)
    middle = iteration_of(run_dir)
    assert early < middle < 150
    assert not (run_dir / "eval.json").exists()
    (run_dir / "checkpoint.msgpack.tmp").write_bytes(b"as if killed while writing")
    assert read_metrics(run_dir)[:early] == rows[:early]

    process = run_script("train_prior_ppo", "--resume", run_dir, cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert_complete(run_dir, 150)
    assert read_metrics(run_dir)[:early] == rows[:early]
    elapsed = [float(row["elapsed_s"]) for row in read_metrics(run_dir)]
    assert elapsed == sorted(elapsed)
    assert (tmp_path / "prior.safetensors").read_bytes() == (run_dir / "policy.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_run_interrupted_by_ctrl_c_tells_how_to_resume_and_does(tmp_path, pendulum_prior, runs):
    """With its own copy of the prior, and the arguments resolved at the start, whatever has become of the file."""
    prior = tmp_path / "prior.safetensors"
    write_policy(prior, pendulum_prior, gamma="0.9")
    its_bytes = prior.read_bytes()
    flags = (*PENDULUM, "--addon", "none", "--prior", prior, "--omega", 0.5, "--total-timesteps", 128 * 150)
    process = start_script("residual_ppo", *flags, "--runs-dir", "runs", cwd=tmp_path, start_new_session=True)
    run_dir = wait_for_rows(process, tmp_path / "runs", 5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 130
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    done = iteration_of(run_dir)
    assert 5 <= done < 150
    assert len(read_metrics(run_dir)) == done

    write_policy(prior, runs["soft_ppo seed 2"].folder / "policy.safetensors", alpha="0.7", gamma="0.5")
    command = shlex.split(stderr[stderr.index("python ") :])
    assert command[0] == "python"
    assert Path(command[1]).samefile(script_path("residual_ppo"))
    resumed = run_script("residual_ppo", *command[2:], cwd=tmp_path)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert_complete(run_dir, 150)

    weights = {line for line in stdout.splitlines() if line.startswith("weights")}
    assert len(weights) == 1
    assert weights <= set(resumed.stdout.splitlines())
    assert "note     gamma" not in resumed.stdout
    assert f"prior    runs/{run_dir.name}/prior.safetensors" in resumed.stdout
    assert (run_dir / "prior.safetensors").read_bytes() == its_bytes
    tensors, metadata = read_policy(run_dir / "policy.safetensors")
    np.testing.assert_array_equal(tensors["obs_mean"], read_policy(pendulum_prior)[0]["obs_mean"])
    texts = ((run_dir / "args.json").read_text(), metadata["training"])
    args, resumed_args = (json.loads(text)["args"] for text in texts)
    expected = {"omega": 0.5, "gamma": 0.9}
    expected |= {"survival_reward": float(read_policy(pendulum_prior)[1]["survival_reward"])}
    assert {name: args[name] for name in expected} == pytest.approx(expected)
    assert (args["omega_prime"], args["alpha_hat"], args["budget"]) == (None, None, 0.5)  # of one action
    assert args["hidden_sizes"] == [64, 64]
    assert {name for name in args if args[name] != resumed_args[name]} == {"resume", "prior"}


def test_run_of_residual_ppo_is_resumed_without_the_original_prior(tmp_path, runs, monkeypatch):
    """A run killed at its end, so that nothing but the evaluation is left to do."""
    source, run_dir = runs["residual_ppo"].folder, tmp_path / "run"
    run_dir.mkdir()
    for name in ("metrics.csv", "checkpoint.msgpack", "prior.safetensors"):
        (run_dir / name).write_bytes((source / name).read_bytes())
    content = json.loads((source / "args.json").read_text())
    content["args"]["prior"] = str(tmp_path / "gone.safetensors")
    (run_dir / "args.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    run_main(residual_ppo, residual_ppo.Args(resume=run_dir))
    ours, theirs = (json.loads((folder / "eval.json").read_text()) for folder in (run_dir, source))
    assert ours == theirs


def test_prior_whose_training_ended_before_its_last_evaluation_is_evaluated_on_resuming(tmp_path, runs, monkeypatch):
    """By Ctrl-C or a crash after the last iteration; the only snapshot there would be is not lost."""
    source, run_dir = runs["train_prior_ppo"].folder, tmp_path / "run"
    run_dir.mkdir()
    for name in ("metrics.csv", "checkpoint.msgpack"):
        (run_dir / name).write_bytes((source / name).read_bytes())
    content = json.loads((source / "args.json").read_text())
    content["args"] |= {"num_evals": 1, "export": str(tmp_path / "prior.safetensors")}
    (run_dir / "args.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    run_main(train_prior_ppo, train_prior_ppo.Args(resume=run_dir))
    assert (run_dir / "eval.json").exists()
    state = flax.serialization.msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())
    exported = read_policy(tmp_path / "prior.safetensors")[0]["actor_logstd"]
    np.testing.assert_array_equal(exported, state["params"]["actor"]["params"]["actor_logstd"])


def test_run_that_diverges_stops_with_its_last_finite_state(tmp_path):
    flags = (*PENDULUM, "--learning-rate", 1e30, "--runs-dir", tmp_path / "runs")
    message = stop_message("soft_ppo", *flags, exit_code=1)
    assert "finite" in message
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert str(run_dir) in message
    assert not (run_dir / "eval.json").exists()
    assert not (run_dir / "policy.safetensors").exists()
    state = flax.serialization.msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(state))


@pytest.mark.parametrize(("script", "flags"), [("residual_ppo", SHORT), ("residual_sac", SAC_SHORT)])
def test_no_discount_goes_without_survival_reward_and_no_git_goes_without_commit(
    script, flags, pendulum_prior, tmp_path, monkeypatch
):
    """Both in one run: gamma = 1, as the message above advises, and a PATH on which there is no git."""
    flags = ("--env-id", "InvertedPendulum-v4", "--addon", "none", "--prior", pendulum_prior, *flags)
    flags += ("--gamma", 1, "--survival-reward", 0, "--runs-dir", tmp_path / "runs")
    monkeypatch.setenv("PATH", str(tmp_path))
    module = importlib.import_module(script)
    run_main(module, tyro.cli(module.Args, args=[str(flag) for flag in flags]))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert json.loads((run_dir / "args.json").read_text())["git_commit"] is None
    assert json.loads((run_dir / "eval.json").read_text())["customised"]["episodes"]["stochastic"]["total"]


def new_run(args):
    """A run of residual_ppo.py that does not train."""
    simulator = residual_ppo.make_simulator("Hopper-v4", "{}", np.arange(1))
    state = residual_ppo.init_state(args, residual_ppo.Actor(3, (4,)), 11, residual_ppo.seed_words(1, 2))
    return residual_ppo.Run(args, simulator, residual_ppo.ADDON_TASKS["none"], state)


def test_runs_begun_in_the_same_second_get_folders_of_their_own(tmp_path):
    args = residual_ppo.Args(env_id="Hopper-v4", runs_dir=tmp_path)
    with new_run(args) as first, new_run(args) as second:
        assert first.folder != second.folder
    assert all((run.folder / "args.json").exists() for run in (first, second))


def test_run_of_a_version_that_logged_other_metrics_is_resumed_with_the_columns_it_began_with(tmp_path):
    args = residual_ppo.Args(env_id="Hopper-v4", runs_dir=tmp_path, num_envs=2, num_steps=2, total_timesteps=8)
    with new_run(args) as run:
        state = run.state.replace(iteration=np.int32(1))
        run.write(1, state, {"basic_return": 1.0, "gone": 2.0, "episodes_seen": 2})
    resumed = shutil.copytree(run.folder, tmp_path / "resumed")  # the first is this process's
    with new_run(dataclasses.replace(args, resume=resumed)) as run:
        run.write(2, state, {"basic_return": 3.0, "kept_return": 0.9, "episodes_seen": 2})
    rows = read_metrics(run.folder)
    assert [row["basic_return"] for row in rows] == ["1", "3"] and [row["gone"] for row in rows] == ["2", "nan"]
    residual_ppo.plot_learning_curve(run.folder)
    assert (run.folder / "learning_curve.png").stat().st_size > 5000


def test_run_folder_belongs_to_one_process_at_a_time(tmp_path):
    (tmp_path / "prior").write_bytes(b"a prior")
    args = residual_ppo.Args(env_id="Hopper-v4", runs_dir=tmp_path / "runs", prior=tmp_path / "prior")
    with new_run(args) as run:
        assert (run.folder / "prior.safetensors").read_bytes() == b"a prior"
    with pytest.raises(residual_ppo.StopRun, match="another process"):
        new_run(dataclasses.replace(args, resume=run.folder))
