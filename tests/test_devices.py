"""Updates over several devices compute what one does."""

import os

import jax
import numpy as np
import pytest
import tyro
from conftest import PENDULUM, start_script

import soft_ppo

FOUR_DEVICES = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"


@pytest.fixture(scope="module")
def recordings(tmp_path_factory, pendulum_prior):
    """The same run on one device and on four: {name: what recorder.py wrote}."""
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
    return {name: dict(np.load(folder / f"{name}.npz")) for name in ("one", "four")}


def test_recorded_run_learns(recordings):
    states = recordings["one"]["states"]
    assert len(states) == 4
    assert np.isfinite(states).all()
    assert (np.abs(np.diff(states, axis=0)).max(1) > 1e-3).all()


def test_more_devices_compute_what_one_computes(recordings):
    """Up to rounding: parameters, optimiser, normaliser and returns, after each iteration of the whole loop."""
    np.testing.assert_allclose(recordings["four"]["states"], recordings["one"]["states"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        recordings["four"]["evaluations"], recordings["one"]["evaluations"], rtol=1e-2, atol=1e-2
    )


def test_devices_share_the_arithmetic_of_an_update(recordings):
    assert recordings["four"]["flops"] < 1.1 / 4 * recordings["one"]["flops"]


@pytest.mark.parametrize(
    ("flags", "hint"),
    [(("--num-envs", 6), "--num-envs 6 .*4 devices"), (("--num-minibatches", 64), "--num-minibatches 64 on 4 devices")],
)
def test_what_cannot_be_split_is_refused(monkeypatch, flags, hint):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    args = tyro.cli(soft_ppo.Args, args=[*PENDULUM, *map(str, flags)])
    with pytest.raises(soft_ppo.StopRun, match=hint) as stop:
        soft_ppo.check_args(args)
    assert stop.value.exit_code == 2
