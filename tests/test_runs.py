"""The scripts run, learn and reproduce themselves on real MuJoCo, and EnvPool does what they rely on."""

import json
import struct
from functools import partial

import flax.serialization
import gymnasium
import imageio.v3
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import PENDULUM, SCRIPTS, read_metrics, run_script
from tensorboardX.proto.event_pb2 import Event

import residual_ppo
import soft_ppo

V4_AND_V5 = ("v4", "v5")
ENVS = [f"{task.env}-{version}" for task in residual_ppo.ADDON_TASKS.values() if task.env for version in V4_AND_V5]
NO_ADDON = residual_ppo.ADDON_TASKS["none"]


def numpy_mean(tensors, obs):
    """The mean action of a policy file, in float64."""
    x = np.clip((obs - tensors["obs_mean"]) / np.sqrt(tensors["obs_var"] + 1e-8), -10, 10)
    layers = sum(name.endswith(".weight") for name in tensors)
    for i in range(layers):
        x = x @ tensors[f"actor_mean.{2 * i}.weight"].T + tensors[f"actor_mean.{2 * i}.bias"]
        x = np.tanh(x) if i < layers - 1 else x
    return x


def without_clock(rows):
    """Rows of metrics.csv without the columns that tell the time."""
    return [{name: value for name, value in row.items() if name not in ("elapsed_s", "steps_per_s")} for row in rows]


def random_policy(env, scale=1.0):
    """A two-layer policy that is anything but neutral, with a deviation of 0.3."""
    actor = residual_ppo.Actor(env.action_dim, (16,))
    params = actor.init(jax.random.PRNGKey(0), jnp.zeros(env.obs_dim))["params"]
    kernel = scale * jax.random.normal(jax.random.PRNGKey(1), params["Dense_1"]["kernel"].shape)
    log_std = jnp.full(env.action_dim, jnp.log(0.3))
    params = params | {"log_std": log_std, "Dense_1": params["Dense_1"] | {"kernel": kernel}}
    stats = residual_ppo.RunningStats(jnp.zeros(env.obs_dim), jnp.ones(env.obs_dim), jnp.float32(1))
    return actor, residual_ppo.Policy({"params": params}, stats)


def play(env, addon, squash, actions):
    """Step with actions (num_steps, num_envs, action_dim): transitions, observations returned, and states."""
    step = jax.jit(partial(residual_ppo.env_step, env, addon, squash))
    state, states, transitions = residual_ppo.reset_env(env), [], []
    for action in actions:
        state, transition = step(state, jax.device_put(np.float32(action), jax.devices("cpu")[0]))
        states.append(jax.tree.map(np.array, state))
        transitions.append(jax.tree.map(np.array, transition))
    return jax.tree.map(lambda *x: np.stack(x), *transitions), np.stack([s.obs for s in states]), states


# ------------------------------------------------------------------------------------- short runs


@pytest.mark.parametrize("name", SCRIPTS)
def test_args_json_tells_what_the_run_depends_on(runs, name):
    content = json.loads((runs[name].folder / "args.json").read_text())
    assert content["args"]["num_envs"] == 8
    assert content["args"]["total_timesteps"] == 1024
    assert {"jax", "flax", "envpool", "mujoco", "numpy"} <= content["packages"].keys()
    assert "git_commit" in content
    assert runs[name].folder.name.startswith(f"{content['args']['env_id']}__{name}__1__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_metrics_csv_has_one_row_per_iteration(runs, name):
    rows = read_metrics(runs[name].folder)
    assert list(rows[0])[:3] == ["global_step", "elapsed_s", "steps_per_s"]
    assert [row["global_step"] for row in rows] == [str(128 * i) for i in range(1, 9)]
    elapsed = [float(row["elapsed_s"]) for row in rows]
    assert elapsed == sorted(elapsed)
    assert all(np.isfinite(float(row[column])) for row in rows for column in ("entropy", "policy_loss", "value_loss"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_tensorboard_holds_the_metrics_of_metrics_csv(runs, name):
    (path,) = runs[name].folder.glob("events.out.tfevents.*")
    data, logged = path.read_bytes(), {}
    while data:  # records of length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        logged |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert logged["entropy", 1024] == pytest.approx(float(read_metrics(runs[name].folder)[-1]["entropy"]), rel=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_learning_curve_is_a_picture(runs, name):
    data = (runs[name].folder / "learning_curve.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5000


def test_video_shows_an_episode_or_names_the_missing_package(tmp_path):
    flags = (*PENDULUM, "--runs-dir", tmp_path / "runs", "--capture-video")
    process = run_script("soft_ppo", *flags)
    if process.returncode == 2:  # a machine without a renderer
        assert "libegl1" in process.stderr
        assert not (tmp_path / "runs").exists()
    else:
        (path,) = tmp_path.glob("runs/*/video.mp4")
        frames = imageio.v3.imread(path)  # (frames, height, width, 3)
        assert frames.shape[0] > 3
        assert frames.std() > 1


@pytest.mark.parametrize(
    ("name", "policies"),
    [("train_prior_ppo", {"prior"}), ("soft_ppo", {"policy"}), ("residual_ppo", {"prior", "customised"})],
)
def test_eval_json_holds_every_episode_of_each_policy(runs, name, policies):
    content = json.loads((runs[name].folder / "eval.json").read_text())
    assert content.keys() == policies
    for policy in policies:
        for actions in ("stochastic", "deterministic"):
            episodes = content[policy]["episodes"][actions]
            assert {len(column) for column in episodes.values()} == {2}
            assert np.isfinite(list(episodes.values())).all()
            assert {"basic", "addon", "total", "metric", "length"} <= episodes.keys()
            for name, column in episodes.items():
                assert content[policy]["mean"][actions][name] == pytest.approx(np.mean(column))
                assert content[policy]["std"][actions][name] == pytest.approx(np.std(column))


@pytest.mark.parametrize("name", SCRIPTS)
def test_output_without_a_terminal_is_plain_lines(runs, name):
    process = runs[name].process
    assert process.stderr == ""
    assert "Traceback" not in process.stdout
    assert not {"\x1b", "\r"} & set(process.stdout)
    assert any(line.startswith("100%") for line in process.stdout.splitlines())
    assert runs[name].folder.name in process.stdout.replace("\n", "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_unexpected_is_left_behind(runs, name):
    expected = {"args.json", "metrics.csv", "checkpoint.msgpack"}
    expected |= {"policy.safetensors", "eval.json", "learning_curve.png"}
    left = {path.name for path in runs[name].folder.iterdir()}
    assert {path for path in left if not path.startswith("events.out.tfevents.")} == expected
    outside = {path.name for path in runs[name].folder.parents[1].iterdir()}
    assert outside == ({"runs", "prior.safetensors"} if name == "train_prior_ppo" else {"runs"})


@pytest.mark.parametrize("name", ["soft_ppo", "residual_ppo"])
def test_policy_file_holds_the_parameters_of_the_last_checkpoint(runs, name):
    folder = runs[name].folder
    state = flax.serialization.msgpack_restore((folder / "checkpoint.msgpack").read_bytes())
    tensors = safetensors.numpy.load_file(folder / "policy.safetensors")
    params = state["params"]["actor"]["params"]
    assert state["iteration"] == 8
    np.testing.assert_array_equal(tensors["actor_logstd"], params["log_std"])
    np.testing.assert_array_equal(tensors["obs_mean"], state["obs_stats"]["mean"])
    np.testing.assert_array_equal(tensors["obs_var"], state["obs_stats"]["var"])
    for i in range(3):
        np.testing.assert_array_equal(tensors[f"actor_mean.{2 * i}.weight"], params[f"Dense_{i}"]["kernel"].T)
        np.testing.assert_array_equal(tensors[f"actor_mean.{2 * i}.bias"], params[f"Dense_{i}"]["bias"])


def test_exported_prior_is_the_run_s_policy(runs, prior):
    assert prior.read_bytes() == (runs["train_prior_ppo"].folder / "policy.safetensors").read_bytes()


def test_same_seed_gives_the_same_run_bit_by_bit(runs):
    first, again = runs["soft_ppo"].folder, runs["soft_ppo again"].folder
    assert without_clock(read_metrics(first)) == without_clock(read_metrics(again))
    assert (first / "checkpoint.msgpack").read_bytes() == (again / "checkpoint.msgpack").read_bytes()
    assert (first / "eval.json").read_bytes() == (again / "eval.json").read_bytes()


def test_another_seed_gives_another_run(runs):
    ours, theirs = (without_clock(read_metrics(runs[what].folder)) for what in ("soft_ppo", "soft_ppo seed 2"))
    assert all(ours[i]["policy_loss"] != theirs[i]["policy_loss"] for i in range(8))


def test_run_that_starts_from_the_prior_is_the_prior_before_it_learns(runs):
    rows = read_metrics(runs["residual_ppo"].folder)
    assert abs(float(rows[0]["kl_to_prior"])) < 1e-6
    assert abs(float(rows[-1]["kl_to_prior"])) > 1e-4


def test_run_from_scratch_is_not_the_prior(runs):
    assert abs(float(read_metrics(runs["residual_ppo from scratch"].folder)[0]["kl_to_prior"])) > 1e-3


def test_run_that_starts_from_the_prior_keeps_its_normaliser(runs, prior):
    before = safetensors.numpy.load_file(prior)
    after = safetensors.numpy.load_file(runs["residual_ppo"].folder / "policy.safetensors")
    np.testing.assert_array_equal(after["obs_mean"], before["obs_mean"])
    np.testing.assert_array_equal(after["obs_var"], before["obs_var"])
    assert (after["actor_mean.4.weight"] != before["actor_mean.4.weight"]).any()


# --------------------------------------------------------------------------------------- learning


def test_soft_ppo_learns_to_balance_the_pendulum(learning_runs):
    episodes = json.loads((learning_runs["soft_ppo"].folder / "eval.json").read_text())["policy"]["episodes"]
    assert np.mean(episodes["deterministic"]["basic"]) > 800


def test_residual_ppo_straightens_the_front_foot(learning_runs):
    content = json.loads((learning_runs["residual_ppo"].folder / "eval.json").read_text())
    angles = {policy: np.array(content[policy]["episodes"]["stochastic"]["metric"]) for policy in content}
    prior, customised = angles["prior"], angles["customised"]
    standard_error = np.sqrt(prior.var(ddof=1) / len(prior) + customised.var(ddof=1) / len(customised))
    assert prior.mean() - customised.mean() > 6 * standard_error
    assert customised.mean() < 0.8 * prior.mean()


def test_learned_policy_balances_as_well_in_gymnasium(learning_runs):
    tensors = safetensors.numpy.load_file(learning_runs["soft_ppo"].folder / "policy.safetensors")
    env = gymnasium.make("InvertedPendulum-v4")
    (obs, _), total, done = env.reset(seed=0), 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(3 * np.tanh(numpy_mean(tensors, obs)))
        total, done = total + reward, terminated or truncated
    assert total > 800


# ----------------------------------------------------------------------------------- policy files


@pytest.mark.parametrize("squash", [True, False])
def test_saved_policy_is_loaded_the_same(tmp_path, squash):
    env = residual_ppo.make_env("Hopper-v4", 2, 0)
    args = residual_ppo.Args(env_id="Hopper-v4", squash=squash)
    actor, policy = random_policy(env)
    path = tmp_path / "policy.safetensors"
    results = residual_ppo.evaluate(env, NO_ADDON, actor, squash, policy, 1.0, 0)
    residual_ppo.save_policy(path, actor, policy, args, 0.25, results)
    loaded_actor, loaded, metadata = residual_ppo.load_policy(path, env, args)
    with safetensors.safe_open(path, "numpy") as file:
        assert metadata == file.metadata()
    expected = {"env_id": "Hopper-v4", "squash": str(squash).lower(), "alpha": "0.25", "hidden_sizes": "[16]"}
    assert expected.items() <= metadata.items()
    assert loaded_actor == actor
    jax.tree.map(np.testing.assert_array_equal, loaded.params, policy.params)
    np.testing.assert_array_equal(loaded.obs_stats.mean, policy.obs_stats.mean)
    np.testing.assert_array_equal(loaded.obs_stats.var, policy.obs_stats.var)
    obs, action = jax.random.normal(jax.random.PRNGKey(2), (5, 11)), jax.random.normal(jax.random.PRNGKey(3), (5, 3))
    np.testing.assert_array_equal(
        residual_ppo.policy_log_prob(loaded_actor, loaded, squash, obs, action),
        residual_ppo.policy_log_prob(actor, policy, squash, obs, action),
    )


@pytest.mark.parametrize("script", [residual_ppo, soft_ppo], ids=["residual_ppo", "soft_ppo"])
@pytest.mark.parametrize("squash", [True, False])
def test_policy_file_written_with_numpy_has_the_documented_meaning(tmp_path, script, squash):
    rng = np.random.default_rng(0)
    widths, tensors = (17, 64, 64, 6), {}
    for i in range(3):
        tensors[f"actor_mean.{2 * i}.weight"] = rng.normal(0, 0.2, (widths[i + 1], widths[i]))
        tensors[f"actor_mean.{2 * i}.bias"] = rng.normal(0, 0.2, widths[i + 1])
    tensors |= {"obs_mean": rng.normal(0, 1, 17), "obs_var": rng.uniform(0.1, 4, 17)}
    tensors |= {"actor_logstd": rng.normal(-0.5, 0.3, 6)}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    critic = {"critic.0.weight": np.ones((3, 17), np.float32)}
    metadata = {"env_id": "HalfCheetah-v4", "squash": str(squash).lower()}
    metadata |= {"hidden_sizes": "[64, 64]", "activation": "tanh"}
    path = tmp_path / "policy.safetensors"
    safetensors.numpy.save_file(tensors | critic, path, metadata)
    env = script.make_env("HalfCheetah-v4", 2, 0)
    actor, policy, loaded_metadata = script.load_policy(path, env, script.Args(env_id="HalfCheetah-v4", squash=squash))
    assert loaded_metadata == metadata

    obs, action = rng.normal(0, 3, (50, 17)).astype(np.float32), rng.normal(0, 1.5, (50, 6)).astype(np.float32)
    exact = {name: np.float64(array) for name, array in tensors.items()}
    mean, log_std, u = numpy_mean(exact, np.float64(obs)), exact["actor_logstd"], np.float64(action)
    expected = (-0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    if squash:
        expected -= np.log1p(-(np.tanh(u) ** 2)).sum(-1)
    np.testing.assert_allclose(
        script.policy_log_prob(actor, policy, squash, obs, action), expected, rtol=2e-5, atol=2e-4
    )


def test_policy_of_soft_ppo_is_a_prior_for_residual_ppo(pendulum_prior, runs):
    args = json.loads((runs["residual_ppo from scratch"].folder / "args.json").read_text())["args"]
    assert args["prior"] == str(pendulum_prior)
    content = json.loads((runs["residual_ppo from scratch"].folder / "eval.json").read_text())
    assert np.mean(content["prior"]["episodes"]["deterministic"]["length"]) >= 1


# -------------------------------------------------------------------------- EnvPool and Gymnasium


def gymnasium_twin(env_id, obs):
    """Gymnasium's environment in the state that an observation of EnvPool's tells of, up to its place in the world."""
    twin = gymnasium.make(env_id).unwrapped
    twin.reset(seed=0)
    hidden = {"Ant": 2, "Humanoid": 2, "Swimmer": 2, "InvertedPendulum": 0}.get(env_id.rpartition("-")[0], 1)
    seen = twin.model.nq - hidden
    twin.set_state(np.concatenate([np.zeros(hidden), obs[:seen]]), obs[seen : seen + twin.model.nv])
    return twin, seen + twin.model.nv


@pytest.mark.parametrize("env_id", [*ENVS, "InvertedPendulum-v4", "InvertedPendulum-v5"])
def test_envpool_steps_as_gymnasium_does_from_the_same_state(env_id):
    env = residual_ppo.make_env(env_id, 1, 3)
    obs = env.pool.reset()[0][0]
    twin, state_dim = gymnasium_twin(env_id, obs)
    assert obs.shape == twin.observation_space.shape
    # Contacts of the free bodies amplify rounding quickly.
    steps, tolerance = (4, 5e-3) if env_id.startswith(("Ant", "Humanoid")) else (25, 1e-4)
    rng, compared = np.random.default_rng(0), 0
    for _ in range(steps):
        action = rng.uniform(env.low, env.high)
        obs, reward, terminated, truncated, _ = env.pool.step(action[None])
        twin_obs, twin_reward, twin_terminated, _, _ = twin.step(action)
        np.testing.assert_allclose(obs[0, :state_dim], twin_obs[:state_dim], atol=tolerance)
        np.testing.assert_allclose(reward[0], twin_reward, atol=tolerance)
        assert (terminated[0], truncated[0]) == (twin_terminated, False)
        compared += 1
        if twin_terminated:
            break
    assert compared >= 4


QUANTITIES = {
    "half-cheetah-front-foot": lambda data: (abs(data.joint("ffoot").qpos[0]), -10 * abs(data.joint("ffoot").qpos[0])),
    "hopper-height": lambda data: (data.qpos[1], 10 * (data.qpos[1] - 1)),
    "ant-right": lambda data: (-data.qvel[1], -data.qvel[1]),
    "swimmer-straight": lambda data: (abs(data.joint("motor1_rot").qpos[0]), -abs(data.joint("motor1_rot").qpos[0])),
    "walker-upright": lambda data: (abs(data.joint("rooty").qpos[0]), -10 * abs(data.joint("rooty").qpos[0])),
    "humanoid-right": lambda data: (-data.qvel[1], -data.qvel[1]),
}


def test_every_addon_task_is_checked_here():
    assert QUANTITIES.keys() == residual_ppo.ADDON_TASKS.keys() - {"none"}


@pytest.mark.parametrize("version", V4_AND_V5)
@pytest.mark.parametrize("name", QUANTITIES)
def test_addon_task_reads_the_quantity_it_names_from_the_simulation(name, version):
    task = residual_ppo.ADDON_TASKS[name]
    env = gymnasium.make(f"{task.env}-{version}").unwrapped
    env.reset(seed=1)
    env.action_space.seed(1)
    seen = []
    for _ in range(10):
        obs, *_ = env.step(env.action_space.sample())
        metric, reward = QUANTITIES[name](env.data)
        np.testing.assert_allclose(task.function(jnp.asarray(obs)), (reward, metric), rtol=1e-5, atol=1e-5)
        seen.append(metric)
    assert np.ptp(seen) > 1e-3
    if task.env == "Hopper":  # the joint's coordinate is the height above the ground
        env.set_state(env.data.qpos, env.data.qvel)
        assert env.data.body("torso").xpos[2] == pytest.approx(float(env.data.qpos[1]))


@pytest.mark.parametrize(("env_id", "squash"), [("Hopper-v4", True), ("Hopper-v5", False), ("Walker2d-v4", False)])
def test_evaluation_agrees_with_episodes_played_in_gymnasium(env_id, squash):
    env, task = residual_ppo.make_env(env_id, 100, 5), residual_ppo.choose_addon(None, env_id, 2.0)
    actor, policy = random_policy(env, scale=0.2)
    ours = residual_ppo.evaluate(env, task, actor, squash, policy, 0.5, 0)["deterministic"]
    act = jax.jit(lambda obs: actor.apply(policy.params, residual_ppo.normalise(obs, policy.obs_stats))[0])
    twin, theirs = gymnasium.make(env_id), {"basic": [], "addon": [], "metric": [], "length": []}
    for seed in range(60):
        (obs, _), done, basic, addon = twin.reset(seed=seed), False, [], []
        while not done:
            action = np.float64(act(np.float32(obs)))
            action = np.tanh(action) if squash else np.clip(action, -1, 1)
            obs, reward, terminated, truncated, _ = twin.step(action)
            done = terminated or truncated
            basic.append(reward)
            addon.append(task.function(obs))
        rewards, metrics = np.transpose(addon)
        episode = {"basic": sum(basic), "addon": 2 * rewards.sum(), "metric": metrics.mean(), "length": len(basic)}
        theirs = {name: [*column, episode[name]] for name, column in theirs.items()}
    for name, column in theirs.items():
        error = np.sqrt(np.var(ours[name]) / len(ours[name]) + np.var(column) / len(column))
        assert abs(ours[name].mean() - np.mean(column)) < 4.5 * error + 1e-3, name
    np.testing.assert_allclose(ours["objective"], 0.5 * ours["basic"] + ours["addon"])
    np.testing.assert_allclose(ours["total"], ours["basic"] + ours["addon"])


@pytest.fixture(scope="module")
def hopper_episodes():
    """Hopper-v4 under random actions: env_step's results over 150 steps in 6 environments, several episodes each."""
    task = residual_ppo.choose_addon(None, "Hopper-v4", 3.0)
    actions = np.random.default_rng(7).normal(0, 1, (150, 6, 3))
    result = play(residual_ppo.make_env("Hopper-v4", 6, 11), task, True, actions)
    assert result[0].terminated.sum() > 12
    return actions, *result


def test_step_after_an_end_is_marked_and_earns_nothing(hopper_episodes):
    _, transitions, _, _ = hopper_episodes
    done = transitions.terminated | transitions.truncated
    assert transitions.valid[0].all()
    np.testing.assert_array_equal(transitions.valid[1:], ~done[:-1])
    for column in (transitions.basic_reward, transitions.addon_reward, done):
        assert not column[~transitions.valid].any()
    assert (transitions.addon_reward[transitions.valid] != 0).all()


def test_step_after_an_end_ignores_its_action(hopper_episodes):
    actions, transitions, obs, _ = hopper_episodes
    others = np.where(transitions.valid[..., None], actions, -5 * actions)
    task = residual_ppo.choose_addon(None, "Hopper-v4", 3.0)
    _, same_obs, _ = play(residual_ppo.make_env("Hopper-v4", 6, 11), task, True, others)
    assert (others != actions).any()
    np.testing.assert_array_equal(same_obs, obs)
    others[3] = -actions[3]
    _, other_obs, _ = play(residual_ppo.make_env("Hopper-v4", 6, 11), task, True, others[:5])
    assert (other_obs[3] != obs[3]).any()


def test_observation_at_an_end_is_the_terminal_one(hopper_episodes):
    _, transitions, obs, _ = hopper_episodes
    healthy = (obs[..., 0] > 0.7) & (np.abs(obs[..., 1]) < 0.2)
    np.testing.assert_array_equal(~healthy, transitions.terminated)
    start = np.array([1.25] + [0] * 10)
    after_reset = obs[~transitions.valid]
    assert len(after_reset) > 10
    assert np.abs(after_reset - start).max() <= 5.001e-3


def test_observation_before_a_step_is_the_one_the_last_step_returned(hopper_episodes):
    _, transitions, obs, _ = hopper_episodes
    np.testing.assert_array_equal(transitions.obs[1:], obs[:-1])


def test_episode_sums_are_sums_over_valid_steps(hopper_episodes):
    _, transitions, obs, states = hopper_episodes
    height = np.where(transitions.valid, obs[..., 0], 0)
    columns = (transitions.basic_reward, transitions.addon_reward, height, transitions.valid)
    for env in range(6):
        ends = np.flatnonzero(transitions.terminated[:, env])
        start, end = ends[-2] + 1, ends[-1] + 1
        for column, finished, running in zip(columns, states[-1].finished, states[-1].running, strict=True):
            np.testing.assert_allclose(finished[env], np.float64(column[start:end, env]).sum(), rtol=1e-4)
            np.testing.assert_allclose(running[env], np.float64(column[end:, env]).sum(), rtol=1e-4, atol=1e-5)
        assert np.isnan(states[ends[0] - 1].finished.length[env])


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "InvertedPendulum-v4"])
def test_time_limit_of_1000_steps_truncates_and_does_not_terminate(env_id, learning_runs):
    env = residual_ppo.make_env(env_id, 2, 0)
    args = residual_ppo.Args(env_id=env_id, num_envs=2, num_steps=1002)
    actor, policy = random_policy(env)
    if env_id == "InvertedPendulum-v4":
        actor, policy, _ = residual_ppo.load_policy(learning_runs["soft_ppo"].folder / "policy.safetensors", env, args)
        policy.params["params"]["log_std"] -= 10
    state, transitions = residual_ppo.rollout(env, NO_ADDON, actor, args, policy, residual_ppo.reset_env(env), 0)
    truncated = np.zeros((1002, 2), bool)
    truncated[999] = True
    np.testing.assert_array_equal(transitions.truncated, truncated)
    assert not np.any(transitions.terminated)
    np.testing.assert_array_equal(transitions.valid[1:], ~truncated[:-1])
    np.testing.assert_array_equal(state.finished.length, 1000)


@pytest.mark.parametrize(("env_id", "bound"), [("Humanoid-v4", 0.4), ("InvertedPendulum-v4", 3), ("Pusher-v5", 2)])
@pytest.mark.parametrize("squash", [True, False])
def test_actions_fill_the_bounds_of_the_environment_and_no_more(env_id, bound, squash):
    env = residual_ppo.make_env(env_id, 1, 0)
    space = gymnasium.make(env_id).action_space
    np.testing.assert_array_equal(env.low, space.low)
    np.testing.assert_array_equal(env.high, space.high)
    raw = np.random.default_rng(0).normal(0, 5, (1000, env.action_dim)).astype(np.float32)
    actions = np.asarray(residual_ppo.env_action(raw, env.low, env.high, squash))
    assert (actions >= space.low).all()
    assert (actions <= space.high).all()
    np.testing.assert_allclose([actions.min(), actions.max()], [-bound, bound], rtol=1e-3)
    expected = bound * np.tanh(np.float64(raw)) if squash else np.clip(raw, -bound, bound)
    np.testing.assert_allclose(actions, expected, atol=1e-5)


@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize(
    ("env_id", "bound", "tolerance"), [("InvertedPendulum-v4", 3, 1e-6), ("Humanoid-v5", 0.4, 1e-3)]
)
def test_environment_receives_the_action_in_its_own_units(env_id, bound, tolerance, squash):
    env = residual_ppo.make_env(env_id, 1, 2)
    raw = np.random.default_rng(3).normal(0, 2 * bound, (2, 1, env.action_dim)).astype(np.float32)
    transitions, obs, _ = play(env, NO_ADDON, squash, raw)
    twin, state_dim = gymnasium_twin(env_id, np.float64(transitions.obs[0, 0]))
    for i in range(2):
        action = bound * np.tanh(raw[i, 0]) if squash else np.clip(raw[i, 0], -bound, bound)
        expected, reward, *_ = twin.step(action)
        np.testing.assert_allclose(obs[i, 0, :state_dim], expected[:state_dim], atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(transitions.basic_reward[i, 0], reward, atol=tolerance)


@pytest.mark.parametrize("squash", [True, False])
def test_pusher_is_charged_for_the_bounded_action(squash):
    env = residual_ppo.make_env("Pusher-v5", 1, 2)
    env.pool.reset()
    raw = np.float32([[-9, -1, -0.3, 0, 0.2, 1, 9]])
    action = np.asarray(residual_ppo.env_action(raw, env.low, env.high, squash), np.float64)
    *_, info = env.pool.step(action)
    expected = 2 * np.tanh(raw) if squash else np.clip(raw, -2, 2)
    assert info["reward_ctrl"][0] == pytest.approx(-0.1 * (np.float64(expected) ** 2).sum(), rel=1e-4)
