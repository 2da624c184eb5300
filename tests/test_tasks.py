"""Add-on tasks: what they are given, what a bad one ends in, and that a line means the same wherever it stands."""

import json
import re
import shutil

import envpool
import flax.serialization
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, run_main, run_script, script_path
from test_enjoy import policy_contents

import enjoy
import residual_ppo
import residual_sac
import soft_ppo
import soft_sac

HOPPER = ROOT / "priors" / "Hopper-v4.safetensors"
SHORT = {"num_envs": 8, "num_steps": 16, "eval_episodes": 1, "progress": False}  # 128 steps an iteration


def short_args(script, **more):
    """Arguments of a short run, whose task is "mine"."""
    flags = SHORT | {"env_id": "Hopper-v4", "total_timesteps": 1024, "addon": "mine"} | more
    if "residual" in script.__name__:
        flags = {"prior": HOPPER} | flags
    if script in (residual_sac, soft_sac):
        flags |= {"learning_starts": 500, "batch_size": 32, "critic_hidden_sizes": (8,), "layer_norm": False}
    else:
        flags |= {"num_minibatches": 4}
    return script.Args(**flags)


def play(env, actions):
    """Step with actions (num_steps, num_envs, action_dim) before squashing or clipping; the transitions, stacked."""
    step, state, transitions = jax.jit(env.step), env.reset(), []
    for action in actions:
        state, transition = step(state, action)
        transitions.append(jax.tree.map(np.array, transition))
    return jax.tree.map(lambda *x: np.stack(x), *transitions)


# --------------------------------------------------------------------------------------- bad tasks


def line(text, module):
    """The task that a line of ADDON_TASKS is, in a script or in enjoy.py."""
    return eval(text, vars(module))


def hopper(quantity, reward="lambda x: x"):
    """A line of ADDON_TASKS."""
    return f'AddonTask("Hopper", "x (m)", {quantity}, {reward})'


BAD = {
    "index out of range": (hopper("lambda s, a, t: t[..., 11]"), "IndexError: index 11"),
    "index of an action out of range": (hopper("lambda s, a, t: a[..., 3]"), "IndexError: index 3"),
    "index of the whole": (hopper("lambda s, a, t: t[7]"), "IndexError: index 7"),
    "index of the whole, in range": (hopper("lambda s, a, t: t[1]"), r"shape \(3, 11\)"),
    "no index": (hopper("lambda s, a, t: t"), r"shape \(2, 3, 11\)"),
    "sum over everything": (hopper("lambda s, a, t: (a**2).sum()"), r"shape \(\)"),
    "constant": (hopper("lambda s, a, t: t[..., 0]", "lambda x: 1.0"), r"shape \(\)"),
    "if": (hopper("lambda s, a, t: t[..., 0]", "lambda x: -1 if x > 1 else x"), "ValueError: The truth value"),
    "min": (hopper("lambda s, a, t: min(t[..., 0], 1)"), "ValueError: The truth value"),
    "float": (hopper("lambda s, a, t: float(t[..., 0])"), "TypeError: only"),
    "complex": (hopper("lambda s, a, t: t[..., 0] + 1j"), r"it is \(.*j\)"),
    "root of a negative": (hopper("lambda s, a, t: (t[..., 0] - 9) ** 0.5"), "it is nan"),
    "infinite": (hopper("lambda s, a, t: 1 / (0 * t[..., 0])"), "it is inf"),
    "no number": (hopper("lambda s, a, t: None"), "shape|NoneType"),
    "of two arguments": (hopper("lambda s, t: t[..., 0]"), "TypeError.*positional"),
    "unknown name": (hopper("lambda s, a, t: tourque(a)"), "NameError.*tourque"),
}
OF_NUMPY = hopper("lambda s, a, t: np.minimum(t[..., 0], 1)")
OF_JAX = hopper("lambda s, a, t: jnp.minimum(t[..., 0], 1)")


@pytest.fixture
def refusal(monkeypatch, tmp_path):
    """A function: the message with which a program stops because of a task; it leaves nothing behind."""

    def stop(module, text):
        monkeypatch.setitem(module.ADDON_TASKS, "mine", line(text, module))
        with pytest.raises(module.StopRun) as stop:
            if module is enjoy:
                enjoy.main(enjoy.Args(HOPPER, addon="mine", json=tmp_path / "new.json"))
            else:
                run_main(module, short_args(module, runs_dir=tmp_path))
        assert stop.value.exit_code == 2
        assert list(tmp_path.iterdir()) == []
        message = str(stop.value)
        assert message.startswith("the add-on task mine cannot be computed: ")
        assert "t[..., 3]" in message and "xp.minimum" in message
        assert "\n" not in message
        return message

    return stop


@pytest.mark.parametrize("module", [residual_ppo, enjoy], ids=lambda module: module.__name__)
@pytest.mark.parametrize("case", BAD)
def test_bad_task_ends_with_one_line_before_there_is_a_run(case, module, refusal):
    text, pattern = BAD[case]
    assert re.search(pattern, message := refusal(module, text)), message


@pytest.mark.parametrize(("module", "text"), [(residual_ppo, OF_NUMPY), (enjoy, OF_JAX)], ids=["training", "enjoy"])
def test_functions_of_the_other_program_s_arrays_are_refused(module, text, refusal):
    refusal(module, text)


@pytest.mark.parametrize("module", [soft_ppo, residual_sac, soft_sac], ids=lambda module: module.__name__)
def test_every_script_tries_its_task_first(module, refusal):
    assert "IndexError: index 11" in refusal(module, BAD["index out of range"][0])


def test_line_added_to_a_copy_of_a_script_is_tried_before_the_run(tmp_path):
    """As a user would: a process, one line on the terminal, and no folder."""
    text, mark = script_path("soft_ppo").read_text(), "ADDON_TASKS = {\n"
    assert text.count(mark) == 1
    (tmp_path / "mine.py").write_text(text.replace(mark, f'{mark}    "mine": {BAD["index out of range"][0]},\n'))
    process = run_script(tmp_path / "mine", "--env-id", "Hopper-v4", "--addon", "mine", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (2, "")
    assert re.fullmatch(r"mine\.py: the add-on task mine cannot be computed: IndexError: .*\n", process.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


# ------------------------------------------------------------- rewards that turn bad on the way


def counting_simulator(env_id, env_kwargs, seeds):
    """In EnvPool's place, with Hopper's dimensions: the observation's first entry counts the steps, up to a limit."""

    def obs(count):
        return jnp.zeros((len(seeds), 11)).at[:, 0].set(count)

    def step(count, action):
        no = jnp.zeros(len(seeds), bool)
        return count + 1, obs(count + 1), jnp.ones(len(seeds)), no, no | (count + 1 == 60)

    bounds = -np.ones(3, np.float32), np.ones(3, np.float32)
    return residual_ppo.Simulator(
        lambda: (jnp.int32(0), np.asarray(obs(0))), step, 11, *bounds, jax.devices("cpu")[0], "counts"
    )


@pytest.mark.parametrize(
    ("script", "value"),
    [(residual_ppo, "xp.nan"), (residual_sac, "-xp.inf"), (soft_sac, "xp.inf")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_reward_that_is_not_finite_names_task_and_quantity_in_its_iteration(script, value, monkeypatch, tmp_path):
    """Its first bad step is the 40th, in the third iteration of 16; the state of the second is kept."""
    monkeypatch.setattr(script, "make_simulator", counting_simulator)
    reward = f"lambda x: xp.where(x == 40, {value}, x)"
    monkeypatch.setitem(script.ADDON_TASKS, "mine", line(hopper("lambda s, a, t: t[..., 0]", reward), script))
    with pytest.raises(script.StopRun) as stop:
        run_main(script, short_args(script, runs_dir=tmp_path))
    assert stop.value.exit_code == 1
    message = str(stop.value)
    assert re.search(r"the add-on task mine.* x \(m\).*iteration 3;", message), message
    assert "learning rate" not in message
    (run_dir,) = tmp_path.iterdir()
    assert str(run_dir) in message
    assert flax.serialization.msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())["iteration"] == 2


def test_reward_that_is_not_finite_in_an_episode_names_quantity_and_step(monkeypatch, tmp_path):
    text = hopper("lambda s, a, t: t[..., 0]", "lambda x: xp.where(x < 1.2, xp.nan, x)")
    monkeypatch.setitem(enjoy.ADDON_TASKS, "mine", line(text, enjoy))
    with pytest.raises(enjoy.StopRun, match=r"add-on reward on x \(m\) is nan in step \d+") as stop:
        enjoy.main(enjoy.Args(HOPPER, addon="mine", json=tmp_path / "new.json"))
    assert stop.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------- what a task is given


def fingerprint(obs_dim, action_dim, concatenate):
    """A quantity that changes when s, a and t are exchanged, or any of their entries changes; its weights."""
    weights = np.random.default_rng(0).uniform(0.5, 2, 2 * obs_dim + action_dim).astype(np.float32)
    return lambda s, a, t: concatenate([s, a, t], axis=-1) @ weights, np.float64(weights)


@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize(("env_id", "bound", "steps"), [("InvertedPendulum-v4", 3, 30), ("Pusher-v5", 2, 10)])
def test_task_is_given_what_the_simulator_had(env_id, bound, steps, squash):
    """Its observations before and after the step, and the action that it took: as in the same trajectory in EnvPool."""
    seeds, rng = np.arange(4) + 10, np.random.default_rng(1)
    simulator = residual_ppo.make_simulator(env_id, "{}", seeds)
    quantity, weights = fingerprint(simulator.obs_dim, len(simulator.low), jnp.concatenate)
    task = residual_ppo.AddonTask("", "", quantity, lambda x: 2 - x, coef=3.0)
    env = residual_ppo.make_env(simulator, task, squash)
    raw = rng.normal(0, 2, (steps, 4, env.action_dim)).astype(np.float32)
    ours = play(env, raw)

    pool = envpool.make(env_id, env_type="gymnasium", num_envs=4, seed=seeds.tolist())
    obs, done, ended = pool.reset()[0], np.zeros(4, bool), 0
    for i, u in enumerate(np.float64(raw)):
        action, before = bound * np.tanh(u) if squash else np.clip(u, -bound, bound), obs
        obs, _, terminated, truncated, _ = pool.step(action)
        expected = 3 * (2 - np.concatenate([before, action, obs], axis=-1) @ weights)
        np.testing.assert_allclose(ours.addon_reward[i], np.where(done, 0, expected), rtol=1e-3, atol=1e-3)
        done = terminated | truncated
        ended += done.sum()
    assert ended > 4 or env_id == "Pusher-v5"


@pytest.mark.parametrize("squash", ["true", "false"])
def test_player_gives_a_task_what_gymnasium_had(squash):
    """The same of enjoy.py, in a pendulum, whose actions are bounded by 3."""
    seen = []

    class Recorded(gymnasium.Wrapper):
        def reset(self, **options):
            self.obs, info = super().reset(**options)
            return self.obs, info

        def step(self, action):
            obs, *others = super().step(action)
            seen.append(np.concatenate([self.obs, action, obs]))
            self.obs = obs
            return obs, *others

    tensors, metadata = policy_contents()
    policy = enjoy.check_policy(tensors | {"actor_logstd": np.float32([2])}, metadata | {"squash": squash})
    quantity, weights = fingerprint(4, 1, np.concatenate)
    task = enjoy.AddonTask("", "", quantity, lambda x: 2 - x, coef=3.0)
    *_, episode = enjoy.play(Recorded(gymnasium.make("InvertedPendulum-v4")), policy, task, 1, False)
    actions, quantities = np.array(seen)[:, 4], seen @ weights
    assert 3 < len(seen) == episode.length
    assert 2.9 < np.abs(actions).max() <= 3
    np.testing.assert_allclose(episode.quantity, quantities.mean(), rtol=1e-4)
    np.testing.assert_allclose(episode.addon, 3 * (2 - quantities).sum(), rtol=1e-4)


@pytest.mark.parametrize(("name", "squash"), [("half-cheetah-energy", True), ("ant-energy", False)])
def test_energy_of_an_episode_is_that_of_its_actions(name, squash):
    """A tenth of the sum of their squares, over 1000 steps; those of the next episode do not count."""
    task = residual_ppo.ADDON_TASKS[name]._replace(coef=2.5)
    env = residual_ppo.make_env(residual_ppo.make_simulator(f"{task.env}-v4", KWARGS[name], np.arange(2)), task, squash)
    rng = np.random.default_rng(2)
    raw = rng.normal(0, 1, (1005, 2, env.action_dim)).astype(np.float32)
    state, transitions = jax.jit(lambda state: jax.lax.scan(env.step, state, raw))(env.reset())
    actions = np.float64(np.tanh(raw) if squash else np.clip(raw, -1, 1))[:1000]
    energy = (actions**2).sum((0, 2))
    assert np.asarray(transitions.truncated)[999].all()
    np.testing.assert_allclose(state.finished["addon"], -0.1 * 2.5 * energy, rtol=1e-5)
    np.testing.assert_allclose(state.finished["quantity"], energy, rtol=1e-5)


KWARGS = {"half-cheetah-energy": "{}", "ant-energy": '{"terminate_when_unhealthy": false}'}


def test_line_is_met_where_highway_env_s_rectangles_intersect():
    """For cars anywhere about a goal, either way round, the judge is highway-env's own test of polygons."""
    highway_env = pytest.importorskip("highway_env")
    rng, apart = np.random.default_rng(5), np.zeros(2)
    goal, heading = rng.uniform(-20, 20, (1000, 2)), rng.uniform(-np.pi, np.pi, 1000)
    place = goal + rng.uniform([-6, -8], [6, 8], (1000, 2))
    t = np.zeros((1000, 18), np.float32)
    t[:, :2], t[:, 6:8], t[:, 4], t[:, 5] = place / 100, goal / 100, np.cos(heading), np.sin(heading)

    def meets(car, centre):
        line = highway_env.vehicle.objects.Obstacle(None, centre, np.pi / 2)
        line.LENGTH, line.WIDTH = 8, 0.1
        return highway_env.utils.are_polygons_intersecting(car.polygon(), line.polygon(), apart, apart)[0]

    cars = [highway_env.vehicle.kinematics.Vehicle(None, *pose) for pose in zip(place, heading, strict=True)]
    expected = [meets(car, x - [2, 0]) or meets(car, x + [2, 0]) for car, x in zip(cars, goal, strict=True)]
    task = enjoy.ADDON_TASKS["parking-lines"]
    quantity = task.quantity(None, None, t)
    assert 200 < sum(expected) < 800
    np.testing.assert_array_equal(quantity, expected)
    np.testing.assert_array_equal(task.reward(quantity), -np.float64(expected))


def test_dict_of_vectors_is_one_observation_in_the_order_of_names():
    """In training and in enjoy.py; parking's reward is that of its observation, less 5 where the car hits a wall."""
    seeds = np.arange(4)
    simulator = residual_ppo.make_simulator("parking-v0", '{"duration": 20}', seeds)
    pool = envpool.make("parking-v0", env_type="gymnasium", num_envs=4, seed=seeds.tolist(), duration=20)
    player = enjoy.EnvPoolEnv("parking-v0", {"duration": 20})
    (state, obs), theirs, seen = simulator.reset(), pool.reset()[0], [player.reset(seed=2)[0]]
    step, names = jax.jit(simulator.step), ("achieved_goal", "desired_goal", "observation")
    assert (simulator.obs_dim,) == player.observation_space.shape == (18,)
    np.testing.assert_allclose(seen[0], obs[2], rtol=1e-6)
    actions, ends, done = np.random.default_rng(6).uniform([0.2, -1], 1, (100, 4, 2)), 0, np.zeros(4, bool)
    for action in np.float32(actions):
        state, obs, reward, terminated, truncated = step(state, action)
        theirs, _, ended, late, info = pool.step(action)
        np.testing.assert_allclose(obs, np.concatenate([theirs[name] for name in names], -1), rtol=1e-6)
        np.testing.assert_array_equal((terminated, truncated), (ended, late))
        distance = np.asarray(abs(obs[:, :6] - obs[:, 6:12])) @ [1, 0.3, 0, 0, 0.02, 0.02]
        np.testing.assert_allclose(reward[~done], (-(distance**0.5) - 5 * info["crashed"])[~done], rtol=1e-4)
        ends, done = ends + (ended & info["crashed"]).sum(), ended | late
        if len(seen) < 10:
            seen.append(player.step(action[2])[0])
            np.testing.assert_allclose(seen[-1], obs[2], rtol=1e-6)
    assert ends > 2


def test_share_of_left_actions_of_an_episode_is_that_of_its_actions():
    """On the mountain car, -0.1 for each."""
    task = residual_ppo.ADDON_TASKS["mountain-car-right"]
    env = residual_ppo.make_env(residual_ppo.make_simulator("MountainCarContinuous-v0", "{}", np.arange(2)), task, True)
    raw = np.random.default_rng(7).normal(0.3, 1, (999, 2, 1)).astype(np.float32)
    state, transitions = jax.jit(lambda state: jax.lax.scan(env.step, state, raw))(env.reset())
    assert np.asarray(transitions.truncated)[998].all()
    left = (raw < 0).sum((0, 2))
    assert (left > 300).all() and (left < 450).all()
    np.testing.assert_array_equal(state.finished["quantity"], left)
    np.testing.assert_allclose(state.finished["addon"], -0.1 * left, rtol=1e-5)


# --------------------------------------------------------------------------- which task is played


def reorder(module, monkeypatch):
    """ADDON_TASKS in the opposite order, by which the environments' default tasks are others."""
    monkeypatch.setattr(module, "ADDON_TASKS", dict(reversed(module.ADDON_TASKS.items())))


def test_resumed_run_keeps_its_task_when_the_tasks_are_reordered(tmp_path, monkeypatch):
    """Its name and coefficient are in args.json, and in the policy file, which enjoy.py plays with them, too."""
    train, tasks = residual_ppo.train, []

    def interrupted_train(env, update, args, state, log):
        def log_and_stop(iteration, state, metrics):
            log(iteration, state, metrics)
            raise KeyboardInterrupt

        return train(env, update, args, state, log_and_stop)

    def run(args):
        with monkeypatch.context() as patch:
            make_env = residual_ppo.make_env
            patch.setattr(residual_ppo, "make_env", lambda *x: tasks.append(x[1]) or make_env(*x))
            run_main(residual_ppo, args)

    flags = {"env_id": "HalfCheetah-v4", "addon": "default", "addon_coef": 2.5, "total_timesteps": 256}
    flags |= {"prior": ROOT / "priors" / "HalfCheetah-v4.safetensors", "runs_dir": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(residual_ppo, "train", interrupted_train)
        run(short_args(residual_ppo, **flags))
    (interrupted,) = tmp_path.iterdir()
    recorded = json.loads((interrupted / "args.json").read_text())["args"]
    assert (recorded["addon"], recorded["addon_coef"]) == ("half-cheetah-front-foot", 2.5)

    for module in (residual_ppo, enjoy):
        reorder(module, monkeypatch)
        assert next(key for key, x in module.ADDON_TASKS.items() if x.env == "HalfCheetah") == "half-cheetah-energy"
    run_dir = shutil.copytree(interrupted, tmp_path / "run")  # this process keeps the lock of the other
    run(residual_ppo.Args(resume=run_dir))
    assert (run_dir / "eval.json").exists()
    assert len(tasks) == 5  # of prior and training, of both when it is resumed, and of the customised policy
    assert {(task.label, task.coef) for task in tasks} == {("|θ| (rad)", 2.5)}

    path = run_dir / "policy.safetensors"
    for played in (run_dir, path):
        name, task = enjoy.find_task("HalfCheetah-v4", enjoy.recorded_args(played), enjoy.Args(played))
        assert (name, task.coef) == ("half-cheetah-front-foot", 2.5)
    monkeypatch.delitem(enjoy.ADDON_TASKS, "half-cheetah-front-foot")
    for played in (run_dir, path):
        with pytest.raises(enjoy.StopRun, match="half-cheetah-front-foot is no add-on task that is known here") as stop:
            enjoy.main(enjoy.Args(played, episodes=1))
        assert stop.value.exit_code == 2


@pytest.mark.parametrize("addon", ["none", "None"])
def test_no_task_is_no_task(addon):
    args = residual_ppo.choose_addon(residual_ppo.Args(env_id="HalfCheetah-v4", addon=addon))
    assert args.addon == "none"
    assert enjoy.find_task("HalfCheetah-v4", {}, enjoy.Args(HOPPER, addon=addon))[0] == "none"


# ---------------------------------------------------------------- a line in training and in enjoy.py


LINES = {
    "clip": hopper("lambda s, a, t: t[..., 0].clip(0, 1)"),
    "xp.clip": hopper("lambda s, a, t: xp.clip(t[..., 0], 0, 1)"),
    "xp.minimum": hopper("lambda s, a, t: xp.minimum(t[..., 0], 1)", "lambda x: -(x**2)"),
    "xp.where": hopper("lambda s, a, t: t[..., 0] - s[..., 0]", "lambda x: xp.where(x > 0.5, 1, -x)"),
    "xp.linalg": hopper("lambda s, a, t: xp.linalg.norm(a, axis=-1)"),
    "a comparison": hopper("lambda s, a, t: t[..., 0]", "lambda x: x > 0"),
    "integers": hopper("lambda s, a, t: xp.sign(a).astype(int).sum(-1)", "lambda x: x // 2"),
    "a root": hopper("lambda s, a, t: abs(t[..., 0]) ** 0.5", "lambda x: xp.exp(-x)"),
}


@pytest.mark.parametrize("name", [*residual_ppo.ADDON_TASKS, *LINES])
def test_line_means_the_same_in_training_and_in_the_player(name):
    """For random s, a and t, quantity and reward are equal to the precision of float32."""
    rng = np.random.default_rng(3)
    s, a, t = (rng.normal(0, 0.2, (2000, size)).astype(np.float32) for size in (376, 17, 376))
    numbers = []
    for module in (residual_ppo, enjoy):
        task = line(LINES[name], module) if name in LINES else module.ADDON_TASKS[name]
        inputs = (s, a, t) if module is enjoy else jax.device_put((s, a, t))
        quantity = task.quantity(*inputs)
        assert isinstance(quantity, np.ndarray if module is enjoy else jax.Array)
        numbers.append((quantity, task.reward(quantity)))
    for ours, theirs in zip(*numbers, strict=True):
        assert ours.shape == theirs.shape == (2000,)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert len(np.unique(numbers[0][1])) > 1 or name == "none"
