"""Where everything runs if there is an accelerator, which a second CPU device stands for (see two_devices.py)."""

import json
import os

import pytest
from conftest import run_script


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two_devices.py says of each script."""
    folder = tmp_path_factory.mktemp("two")
    process = run_script("tests/two_devices", folder, cwd=folder, env=os.environ)  # no fork: it sets JAX's variables
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "said.json").read_text())


UPDATES = {"train_prior_ppo": "soft_update", "soft_ppo": "soft_update", "residual_ppo": "residual_update"}
UPDATES |= {"soft_sac": "soft_sac_update", "residual_sac": "residual_sac_update"}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_run_on_the_accelerator_and_environments_on_the_host(said, name):
    """What passes between the two is asked for: two_devices.py would have failed else."""
    where = said[name]
    assert where[UPDATES[name]] == [1]
    assert where["rollout"] == where["first_episodes"] == [0]


@pytest.mark.parametrize("name", ["residual_ppo", "residual_sac"])
def test_prior_is_moved_to_the_accelerator_once_a_run(said, name):
    assert len(said[name]["priors"]) == len(said[name]["compiled"])


@pytest.mark.parametrize("name", ["residual_ppo", "soft_sac"])
def test_another_seed_compiles_nothing_anew_but_what_names_envpool_s_environments(said, name):
    """EnvPool writes their address into the programs that step them, which no other run can use."""
    first, second = said[name]["compiled"]
    assert {UPDATES[name], "init_state" if name == "residual_ppo" else "init_sac_state"} < set(first)
    assert set(second) == {"first_episodes", "rollout"}
