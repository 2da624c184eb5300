"""What priors/measure.py measures of a prior, where the truth is known in closed form."""

import sys

import numpy as np
import pytest
import safetensors
from conftest import ROOT
from scipy.special import log_softmax, logsumexp

sys.path.insert(0, str(ROOT / "priors"))
import measure  # noqa: E402

NUM_STATES, NUM_ACTIONS, GAMMA, ALPHA = 7, 3, 0.9, 0.4


def deterministic_world(seed):
    """Next states (the last is terminal), rewards, and the soft-optimal log pi, each (states, actions)."""
    rng = np.random.default_rng(seed)
    next_state = rng.integers(NUM_STATES + 1, size=(NUM_STATES, NUM_ACTIONS))
    next_state[0, 0] = NUM_STATES  # at least one way to end an episode
    reward, value = rng.normal(-1, 1, (NUM_STATES, NUM_ACTIONS)), np.zeros(NUM_STATES + 1)
    for _ in range(500):
        q = reward + GAMMA * value[next_state]
        value[:-1] = ALPHA * logsumexp(q / ALPHA, axis=-1)
    return next_state, reward, log_softmax(q / ALPHA, axis=-1)


def episodes(world, behaviour, seed, num_steps=300, num_envs=40):
    """Reward, log pi of the soft-optimal policy, and ends, when behaviour (states, actions) is played."""
    next_state, reward, log_prob = world
    rng = np.random.default_rng(seed)
    state = np.arange(num_envs) % NUM_STATES
    columns = np.zeros((3, num_steps, num_envs))
    for t in range(num_steps):
        action = (behaviour[state].cumsum(-1) < rng.random((num_envs, 1))).sum(-1)
        after = next_state[state, action]
        columns[:, t] = reward[state, action], log_prob[state, action], after == NUM_STATES
        state = np.where(after == NUM_STATES, rng.integers(NUM_STATES, size=num_envs), after)
    return columns[0], columns[1], columns[2] == 1


@pytest.mark.parametrize("seed", range(4))
def test_measured_temperature_of_a_soft_optimal_policy_is_its_temperature(seed):
    """Whatever is played: along every episode, ends included, the shaping telescopes to V of its start."""
    world = deterministic_world(seed)
    other = np.random.default_rng(seed).dirichlet(np.ones(NUM_ACTIONS), NUM_STATES)
    plays = [episodes(world, np.exp(world[2]), 1), episodes(world, other, 2)]
    assert plays[0][2].any() and plays[1][2].any()
    assert measure.measured_temperature(plays, GAMMA) == pytest.approx(ALPHA, rel=1e-6)


def test_measured_temperature_is_in_the_unit_of_the_reward():
    """A policy that is soft-optimal for r is so for 3 r at three times the temperature."""
    world = deterministic_world(0)
    other = np.full((NUM_STATES, NUM_ACTIONS), 1 / NUM_ACTIONS)
    plays = [episodes(world, np.exp(world[2]), 1), episodes(world, other, 2)]
    scaled = [(3 * reward, log_prob, done) for reward, log_prob, done in plays]
    assert measure.measured_temperature(scaled, GAMMA) == pytest.approx(3 * ALPHA, rel=1e-6)


def test_measure_records_what_the_training_script_recorded(pendulum_prior, tmp_path):
    """The survival reward of the pendulum, 1 - alpha mean log pi, from other episodes; and the file stays whole."""
    path = tmp_path / "prior.safetensors"
    path.write_bytes(pendulum_prior.read_bytes())
    measure.main(measure.Args(path=path, num_envs=8))
    with safetensors.safe_open(pendulum_prior, "numpy") as before, safetensors.safe_open(path, "numpy") as after:
        old, new, names = before.metadata(), after.metadata(), list(before.keys())
        assert names == list(after.keys())
        assert all((before.get_tensor(name) == after.get_tensor(name)).all() for name in names)
    assert float(new["survival_reward"]) == pytest.approx(float(old["survival_reward"]), abs=0.05)
    assert np.isfinite(float(new["measured_alpha"]))
    assert {name: new[name] for name in ("alpha", "gamma", "env_id")} == {
        name: old[name] for name in ("alpha", "gamma", "env_id")
    }
    measure.rpg.load_policy(path)


def test_measuring_what_is_no_policy_changes_nothing(tmp_path, capsys):
    """One line, exit code 2, and the file as it was."""
    path = tmp_path / "prior.safetensors"
    path.write_bytes(b"no policy")
    with pytest.raises(SystemExit) as stop:
        measure.main(measure.Args(path=path))
    assert stop.value.code == 2
    assert "prior.safetensors is no policy file" in capsys.readouterr().err
    assert path.read_bytes() == b"no policy"
