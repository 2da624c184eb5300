"""A script can be adopted: cut at its line and continued by CONTRIBUTING.md's few lines, or given another simulator."""

import ast
import importlib.util
import re
import sys

import gymnasium
import jax
import numpy as np
import pytest
import safetensors
from conftest import ROOT

import residual_ppo

PATHS = {name: ROOT / f"{name}.py" for name in ("train_prior_ppo", "soft_ppo", "residual_ppo")}
PATHS |= {name: ROOT / "residual_q_learning" / f"{name}.py" for name in ("soft_sac", "residual_sac")}
CUT = re.compile("(?m)^# A copy for a project of your own may end here.*$")
SHORT = {"num_envs": 8, "num_steps": 32, "eval_episodes": 2, "progress": False}


def load(path):
    """Import a file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_names(nodes):
    """All names that are read anywhere in them, and are no local variable's."""
    names = [x for node in nodes for x in ast.walk(node) if isinstance(x, ast.Name)]
    return {x.id for x in names if isinstance(x.ctx, ast.Load)} - {x.id for x in names if isinstance(x.ctx, ast.Store)}


@pytest.mark.parametrize("name", PATHS)
def test_what_a_copy_keeps_needs_nothing_of_what_it_cuts(name):
    kept, below = (ast.parse(part).body for part in CUT.split(PATHS[name].read_text()))
    defined = {node.name for node in below if hasattr(node, "name")}
    defined |= {node.targets[0].id for node in below if isinstance(node, ast.Assign)}
    assert {"Run", "CONSOLE", "stop"} <= defined
    assert not read_names(kept) & defined
    assert {"main", "train" if "ppo" in name else "train_off_policy", "evaluate", "policy_bytes"} <= {
        node.name for node in kept if isinstance(node, ast.FunctionDef)
    }


def substitute():
    """The lines of CONTRIBUTING.md that stand for what a copy cuts, for each script."""
    (block,) = re.findall(r"```python\n(class Run\(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert sum(bool(line) for line in block.splitlines()) <= 15
    return block


@pytest.mark.parametrize("name", ["residual_ppo", "soft_sac"])
def test_cut_copy_with_the_lines_of_contributing_md_trains_and_leaves_a_policy(name, tmp_path, monkeypatch, capsys):
    lines, call = substitute().rsplit("\n\n", 1)
    path = tmp_path / f"cut_{name}.py"
    path.write_text(CUT.split(PATHS[name].read_text())[0] + lines)
    module, arguments = load(path), SHORT | {"env_id": "HalfCheetah-v4", "total_timesteps": 512}
    if name == "residual_ppo":
        assert call.strip() == (
            'main(Args(prior=Path("priors/HalfCheetah-v4.safetensors"), addon="half-cheetah-front-foot"), Run)'
        )
        arguments |= {"prior": ROOT / "priors" / "HalfCheetah-v4.safetensors", "addon": "half-cheetah-front-foot"}
    else:
        arguments |= {"learning_starts": 300, "updates_per_step": 1 / 32, "batch_size": 32}
    monkeypatch.chdir(tmp_path)
    module.main(module.Args(**arguments), module.Run)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:2] == ["1", "2"]
    residual_ppo.check_policy_file(tmp_path / "policy.safetensors", "HalfCheetah-v4")


def with_simulator(name, example, folder):
    """A copy of a script whose make_simulator is an example's."""
    source = PATHS[name].read_text()
    (node,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "make_simulator")
    lines = source.splitlines()
    lines[node.lineno - 1 : node.end_lineno] = (ROOT / "examples" / f"{example}.py").read_text().splitlines()
    path = folder / f"{name}_{example}.py"
    path.write_text("\n".join(lines) + "\n")
    return load(path)


@pytest.mark.parametrize("example", ["jax_pendulum", "gymnasium_vector"])
def test_another_simulator_trains_a_prior_and_customises_it(example, tmp_path, capsys):
    flags = SHORT | {"env_id": "Mine-v0", "num_minibatches": 4, "runs_dir": tmp_path / "runs"}
    script = with_simulator("train_prior_ppo", example, tmp_path)
    args = script.Args(**flags, total_timesteps=2048, num_evals=1, export=tmp_path / "prior.safetensors")
    script.main(script.check_export(script.check_args(args)), script.Run)
    script = with_simulator("residual_ppo", example, tmp_path)
    args = script.Args(**flags, total_timesteps=1024, addon="none", prior=tmp_path / "prior.safetensors")
    script.main(script.find_prior(script.choose_addon(script.check_args(args))), script.Run)
    with safetensors.safe_open(next((tmp_path / "runs").glob("*residual*/policy.safetensors")), "numpy") as file:
        assert f'"simulator": "{example.split("_vector")[0]}"' in file.metadata()["training"]
    assert "objective" in capsys.readouterr().out


@pytest.mark.parametrize("example", ["jax_pendulum", "gymnasium_vector"])
def test_the_step_after_an_end_is_no_transition_and_begins_the_next_episode(example, tmp_path):
    script = with_simulator("residual_ppo", example, tmp_path)
    simulator = script.make_simulator("Mine-v0", "{}", np.arange(3))
    env, length = script.make_env(simulator, script.ADDON_TASKS["none"], False), 200 if "jax" in example else 100
    step, state, valid, obs = jax.jit(env.step), env.reset(), [], []
    for _ in range(length + 2):
        state, transition = step(state, np.zeros((3, len(simulator.low)), np.float32))
        valid.append(np.asarray(transition.valid))
        obs.append(np.asarray(state.obs))
    valid, obs = np.array(valid), np.array(obs)
    assert (valid.sum(0) == length + 1).all()
    assert not valid[length].any()  # the last observation comes at length - 1, the next episode's first one at length
    if "jax" in example:
        angle = np.unwrap(np.arctan2(obs[..., 1], obs[..., 0]), axis=0)
        moved = np.abs(np.diff(angle, axis=0) - 0.05 * obs[1:, :, 2])
        assert np.argmax(moved, axis=0).tolist() == [length - 1] * 3
        assert np.abs(obs[length, :, 2]).max() <= 1
    else:  # without acceleration a point stays where it is
        np.testing.assert_array_equal(obs[:length], np.broadcast_to(obs[0], obs[:length].shape))
        assert (obs[length, :, :2] != obs[0, :, :2]).all()


def test_jax_pendulum_moves_as_gymnasium_s(tmp_path):
    script = with_simulator("residual_ppo", "jax_pendulum", tmp_path)
    simulator = script.make_simulator("Pendulum-v1", "{}", np.arange(4))
    state, obs = simulator.reset()
    assert np.abs(obs[:, 2]).max() <= 1
    envs = [gymnasium.make("Pendulum-v1").unwrapped for _ in obs]
    for env, (cos, sin, speed) in zip(envs, np.asarray(obs), strict=True):
        env.reset()
        env.state = np.array([np.arctan2(sin, cos), speed])
    for action in np.random.default_rng(0).uniform(-2, 2, (50, 4, 1)).astype(np.float32):
        state, obs, reward, terminated, truncated = jax.jit(simulator.step)(state, action)
        theirs = [env.step(a) for env, a in zip(envs, action, strict=True)]
        np.testing.assert_allclose(obs, [x[0] for x in theirs], atol=2e-3)
        np.testing.assert_allclose(reward, [x[1] for x in theirs], atol=2e-2)
        assert not np.any(terminated | truncated)
