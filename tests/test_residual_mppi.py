"""residual_mppi.py: the weights are those of its objective, and its model is the environment."""

import dataclasses
import json

import gymnasium
import numpy as np
import pytest
import safetensors.numpy
import scipy.stats
import tyro
from conftest import ROOT, run_script

import enjoy
import residual_mppi

ENVS = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Swimmer-v4", "Hopper-v5", "Walker2d-v5")
PLANNING = residual_mppi.Args(
    omega_prime=0.1, temperature=0.1, survival_reward=5.0, horizon=2, tail=2, num_samples=8, threads=1, backup_steps=0
)
SCRIPT = "residual_q_learning/residual_mppi"


def prior_of(env_id):
    """The shipped prior of an environment, of any version."""
    return ROOT / "priors" / f"{env_id.partition('-')[0]}-v4.safetensors"


def open_model(env_id, threads=1):
    """An environment after 20 steps of noise, its model, and its policy."""
    model = residual_mppi.make_model(env_id, threads)
    env = model.env
    env.reset(seed=3)
    env.action_space.seed(3)
    for _ in range(20):
        obs, _, ended, _, _ = env.step(env.action_space.sample())
        if ended:
            obs, _ = env.reset()
    policy, _ = residual_mppi.read_prior(prior_of(env_id))
    return env, model, policy, obs


def next_action(env_id, threads=1, seed=0, **planning):
    """What is planned after 20 steps of noise."""
    env, model, policy, obs = open_model(env_id, threads)
    args = dataclasses.replace(PLANNING, **planning)
    _, addon = residual_mppi.named_task(env_id, None, 1.0)
    u = residual_mppi.plan_step(model, policy, addon, args, np.random.default_rng(seed))
    return residual_mppi.bounded(policy, u, env.action_space.low, env.action_space.high), obs, env, policy


def lq_samples(rng, num_samples, horizon, k):
    """s' = s + u from s_0 = 1, prior N(-s / 2, 0.8^2), r_R = -s'^2 / 2: actions, score parts, log g; and the quadratic.

    The quadratic is (A, b) of -u A u / 2 + b u, apart from a constant, of sum r_R and of sum log pi.
    """
    gain, std = 0.5, 0.8
    steps = np.tril(np.ones((horizon, horizon)))  # s_{t+1} = 1 + sum_{i <= t} u_i
    before = steps - np.eye(horizon)
    reward = steps.T @ steps, -steps.T @ np.ones(horizon)
    deviation = np.eye(horizon) + gain * before  # u_t + s_t / 2 = deviation u + 1 / 2
    log_prob = deviation.T @ deviation / std**2, -deviation.T @ np.full(horizon, gain) / std**2
    u = np.linalg.solve(deviation, k * std * rng.standard_normal((num_samples, horizon)).T - gain).T  # closed loop
    return u, reward, log_prob


@pytest.mark.parametrize(("omega_prime", "temperature", "k"), [(0.5, 0.5, 1.0), (1.0, 0.4, 1.3), (0.3, 0.6, 1.5)])
def test_weighted_mean_is_the_closed_form_on_a_linear_quadratic_problem(omega_prime, temperature, k):
    """With the division: max E[S] + lambda H; without: max E[S] - lambda KL(q || g). Both are Gaussians."""
    u, reward, log_prob = lq_samples(np.random.default_rng(0), 400_000, 3, k)

    def value(quadratic):
        return -0.5 * np.einsum("ki,ij,kj->k", u, quadratic[0], u) + u @ quadratic[1]

    score, log_g = value(reward) + omega_prime * value(log_prob), value(log_prob) / k**2
    for log_proposal, more in ((log_g, 0.0), (0 * log_g, temperature / k**2)):
        weights = residual_mppi.sample_weights(score, log_proposal, temperature)
        weight = omega_prime + more  # g is log pi's square over k^2
        mean = np.linalg.solve(reward[0] + weight * log_prob[0], reward[1] + weight * log_prob[1])
        np.testing.assert_allclose(weights @ u, mean, atol=0.02)
        covariance = temperature * np.linalg.inv(reward[0] + weight * log_prob[0])
        np.testing.assert_allclose((weights[:, None] * (u - mean)).T @ (u - mean), covariance, atol=0.03)


def test_log_density_integrates_to_one_over_squashed_actions():
    a = np.linspace(-1, 1, 400_001)[1:-1]
    mean, log_std = np.array([0.4]), np.array([-0.3])
    density = np.exp(residual_mppi.log_density(np.arctanh(a)[:, None], mean, log_std, True))
    assert np.sum(density) * (a[1] - a[0]) == pytest.approx(1, abs=1e-4)


def test_score_is_the_discounted_sum_with_the_loss_of_an_end():
    imagined = residual_mppi.Imagined(
        u=None,
        addon=np.array([[1.0, 2, 3], [1, 2, 0]]),
        ended=np.array([[0, 0, 0], [0, 1, 0]]),
        log_prob=np.array([[-4.0, -6, 0], [-5, 0, 0]]),
        log_proposal=None,
    )
    first = 1 + 0.9 * 2 + 0.81 * 3 + 0.5 * (-4 - 0.9 * 6)
    second = 1 + 0.9 * (2 - 0.9 * 2 / 0.1) - 0.5 * 5
    np.testing.assert_allclose(residual_mppi.rollout_scores(imagined, 0.5, 2.0, 0.9), [first, second])


def test_greedy_ignores_the_priors_density():
    """Its score, whatever log pi is; and by the division also its weights, if all r_R are equal, of uniform q."""
    rng = np.random.default_rng(0)
    addon, log_prob = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    one, other = (
        residual_mppi.rollout_scores(residual_mppi.Imagined(None, addon, 0 * addon, x, None), 0.0, 5.0, 0.99)
        for x in (log_prob, -9 * log_prob)
    )
    np.testing.assert_array_equal(one, other)
    weights = residual_mppi.sample_weights(np.zeros(5), log_prob.sum(1), 0.1)
    np.testing.assert_allclose(weights * np.exp(log_prob.sum(1)), np.full(5, weights[0] * np.exp(log_prob[0].sum())))


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Ant-v4"])
def test_one_sample_without_noise_is_the_prior(env_id):
    action, obs, env, policy = next_action(env_id, noise_scale=0.0, num_samples=1)
    space = env.action_space
    expected = enjoy.act(enjoy.read_policy(prior_of(env_id)), obs.astype(np.float32), 0, space.low, space.high)
    np.testing.assert_allclose(action, expected, atol=1e-6)
    other = next_action(env_id, num_samples=1)[0]
    assert abs(action - other).max() > 0.01


def test_pairs_of_noise_cancel_where_all_weights_are_equal():
    """At a temperature that levels r_R, at omega' = lambda and H = 1, the plan is the prior's mean."""
    level = {"omega_prime": 1e9, "temperature": 1e9, "survival_reward": 0.0, "horizon": 1}
    planned, mean = (next_action("Hopper-v4", noise_scale=k, **level)[0] for k in (1.0, 0.0))
    np.testing.assert_allclose(planned, mean, atol=1e-5)


def test_same_seed_plans_the_same_with_any_number_of_threads():
    plans = [next_action("Ant-v4", threads)[0] for threads in (1, 2, 3)]
    np.testing.assert_array_equal(plans[0], plans[1])
    np.testing.assert_array_equal(plans[0], plans[2])
    assert abs(plans[0] - next_action("Ant-v4", seed=1)[0]).max() > 1e-3


@pytest.mark.parametrize("env_id", ENVS)
def test_observations_and_ends_of_states_are_gymnasiums(env_id):
    """On states far and near, also such that are unhealthy, and faster than what is clipped."""
    env, model, _, _ = open_model(env_id)
    env, rng, states, wanted, ended = env.unwrapped, np.random.default_rng(0), [], [], []
    for scale in np.tile((0.01, 0.3, 3.0, 20.0), 25):
        qpos = env.init_qpos + 0.2 * min(scale, 3) * rng.standard_normal(env.model.nq)
        env.set_state(qpos, scale * rng.standard_normal(env.model.nv))
        states.append(residual_mppi.present_state(model))
        wanted.append(env._get_obs())
        ended.append(getattr(env, "terminated", False) if "v4" in env_id else not getattr(env, "is_healthy", True))
    states = np.reshape(states, (10, 10, -1))
    found = residual_mppi.observations(model, states)
    np.testing.assert_array_equal(found, np.float32(wanted).reshape(10, 10, -1))
    np.testing.assert_array_equal(residual_mppi.terminated(model, states).ravel(), ended)
    assert 5 < sum(ended) < 95 or not hasattr(env, "is_healthy")


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Ant-v4"])
def test_model_foresees_the_environment_to_the_last_digits(env_id):
    env, model, _, _ = open_model(env_id)
    action = env.action_space.sample()
    state = residual_mppi.simulate_rollouts(model, residual_mppi.present_state(model)[None], action[None])
    env.step(action)
    np.testing.assert_allclose(state[0], residual_mppi.present_state(model), atol=1e-12)


def test_rollouts_count_nothing_after_an_end():
    """An Ant that stands at the rim of its healthy range falls out of it in the first steps."""
    env, model, policy, _ = open_model("Ant-v4")
    env = env.unwrapped
    qvel = np.zeros(env.model.nv)
    qvel[2] = 4.0
    env.set_state(np.concatenate((env.init_qpos[:2], [0.95], env.init_qpos[3:])), qvel)
    _, addon = residual_mppi.named_task("Ant-v4", None, 1.0)
    noise = residual_mppi.noise_pairs(np.random.default_rng(0), 4, 2, 8)
    imagined = residual_mppi.imagine(model, policy, addon, noise, dataclasses.replace(PLANNING, tail=4))
    np.testing.assert_array_equal(imagined.ended, [[1, 0, 0, 0, 0, 0]] * 4)
    assert (imagined.addon[:, 0] != 0).all()
    assert not imagined.addon[:, 1:].any()
    assert not imagined.log_prob[:, 1].any()


@pytest.mark.parametrize("push", [0.0, -4.0, 6.0])
def test_lifetime_is_how_long_the_prior_lives_in_gymnasium(push):
    """A Hopper that is turned forward, backward, or not; after two actions, side by side."""
    env, model, policy, _ = open_model("Hopper-v4")
    qpos, qvel = env.init_qpos.copy(), env.init_qvel.copy()
    qvel[2] = push  # rad/s
    actions, lengths = np.array([[0.3, -0.2, 0.1], [0.9, 0.9, 0.9]]), []
    for action in actions:
        env.set_state(qpos, qvel)
        length, ended = 0, False
        while not ended and length < 60:
            obs, _, ended, _, _ = env.step(action)
            mean, _ = enjoy.mean_and_log_std(enjoy.read_policy(prior_of("Hopper-v4")), obs.astype(np.float32))
            action, length = np.tanh(mean), length + 1
        lengths.append(length - ended)
    env.set_state(qpos, qvel)
    for steps in (0, 5, 60):
        found = residual_mppi.lifetimes(model, policy, np.arctanh(actions), steps)
        np.testing.assert_array_equal(found, np.minimum(lengths, steps))
    assert (min(lengths) < 60) == (push != 0)


def test_a_plan_that_ends_in_a_fall_is_left_for_a_sample_that_does_not():
    """A Hopper turned backward, which falls after the plan and after the prior's action alike."""
    env, model, policy, _ = open_model("Hopper-v4")
    _, addon = residual_mppi.named_task("Hopper-v4", None, 1.0)
    qvel = env.init_qvel.copy()
    qvel[2] = -4.4  # rad/s
    env.set_state(env.init_qpos, qvel)
    prior, _ = enjoy.mean_and_log_std(enjoy.read_policy(prior_of("Hopper-v4")), np.float32(env._get_obs()))
    settings = [dataclasses.replace(PLANNING, noise_scale=3, backup_steps=steps) for steps in (100, 0)]
    plans = [residual_mppi.plan_step(model, policy, addon, args, np.random.default_rng(0)) for args in settings]
    lived = residual_mppi.lifetimes(model, policy, np.stack((*plans, prior)), 100)
    assert lived[0] == 100 and max(lived[1:]) < 10


def test_log_pi_is_of_the_states_of_the_plan_or_of_those_that_are_reached():
    """Of the second action; the environment itself says which states these are."""
    env, model, policy, obs = open_model("HalfCheetah-v4")
    _, addon = residual_mppi.named_task("HalfCheetah-v4", None, 1.0)
    noise = residual_mppi.noise_pairs(np.random.default_rng(0), 2, 2, 6)
    settings = [dataclasses.replace(PLANNING, noise_scale=1.5, reached=reached) for reached in (False, True)]
    imagined = [residual_mppi.imagine(model, policy, addon, noise, args) for args in settings]
    u = imagined[0].u[0]
    np.testing.assert_array_equal(u, imagined[1].u[0])
    plan, _ = enjoy.mean_and_log_std(policy, obs.astype(np.float32))
    qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
    for first, found in zip((plan, u[0]), imagined, strict=True):
        env.set_state(qpos, qvel)
        after, *_ = env.step(np.tanh(first))
        mean, log_std = enjoy.mean_and_log_std(policy, after.astype(np.float32))
        expected = scipy.stats.norm.logpdf(u[1], mean, np.exp(log_std)).sum() - np.log(1 - np.tanh(u[1]) ** 2).sum()
        assert found.log_prob[0, 1] == pytest.approx(expected, abs=1e-3)
        if first is plan:
            np.testing.assert_allclose(u[1], mean + 1.5 * np.exp(log_std) * noise[0, 1], atol=1e-5)
            density = scipy.stats.norm.logpdf(noise[0]).sum(1) - 6 * np.log(1.5) - log_std.sum()
            jacobian = np.log(1 - np.tanh(u[:2]) ** 2).sum(1)
            np.testing.assert_allclose(found.log_proposal[0, :2], density - jacobian, atol=1e-3)
    assert abs(imagined[0].log_prob[0, 1] - imagined[1].log_prob[0, 1]) > 0.1


def test_the_script_plays_and_writes_what_it_played(tmp_path):
    """Residual planning betters the prior's add-on reward; the prior is enjoy.py's, with deterministic actions."""
    flags = ("--env-id", "HalfCheetah-v4", "--seed", 61, "--max-steps", 60, "--threads", 1)
    done = run_script(SCRIPT, *flags, "--prior", prior_of("HalfCheetah-v4"), "--json", tmp_path / "played.json")
    assert done.returncode == 0, done.stderr
    players = json.loads((tmp_path / "played.json").read_text())["players"]
    prior, greedy, residual = (player["episodes"][0] for player in players)
    assert [player["name"] for player in players] == ["prior", "greedy", "residual"]
    assert residual["addon"] > prior["addon"]
    assert residual["total"] != greedy["total"]
    env, policy = gymnasium.make("HalfCheetah-v4"), enjoy.read_policy(prior_of("HalfCheetah-v4"))
    game = enjoy.play(env, policy, enjoy.ADDON_TASKS["half-cheetah-front-foot"], 61, True)
    episode = [next(game) for _ in range(61)][-1]
    assert prior["total"] == pytest.approx(episode.total, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--env-id", "Humanoid-v4"), "cannot be planned"),
        (("--env-id", "Hopper-v4", "--prior", ROOT / "priors" / "Ant-v4.safetensors"), "cannot play in"),
        (("--env-id", "Ant-v5", "--prior", ROOT / "priors" / "Ant-v4.safetensors"), "Ant only v4"),
        (("--num-samples", "0"), "--num-samples is 0"),
        (("--noise-scale", "nan"), "--noise-scale is nan"),
        (("--temperature", "0"), "--temperature is 0"),
        (("--tail", "-1"), "--tail is -1"),
        (("--backup-steps", "-1"), "--backup-steps is -1"),
        (("--gamma", "1"), "--gamma is 1.0"),
        (("--threads", "100000"), "from 1 to 256"),
        (("--omega-prime", "inf"), "--omega-prime is inf"),
        (("--addon", "moon"), "moon is no add-on task"),
        (("--prior", "nowhere.safetensors"), "no policy nowhere.safetensors"),
        (("--json", "played.txt"), "must end in .json"),
        (("--env-id", "Nothing-v4", "--prior", ROOT / "priors" / "Ant-v4.safetensors"), "cannot play in"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(flags, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(residual_mppi.StopRun, match=said) as stop:
        residual_mppi.main(tyro.cli(residual_mppi.Args, args=[str(x) for x in flags]))
    assert stop.value.exit_code == 2
    assert len(str(stop.value).splitlines()) == 1


def test_a_prior_is_read_as_enjoy_reads_it_and_a_bad_one_is_refused(tmp_path):
    """Of both forms of deviation; a file with a changed number, another kind, a misspelt key, without what it needs."""
    for name in ("Hopper-v4", "Hopper-v4-sac"):
        policy, info = residual_mppi.read_prior(ROOT / "priors" / f"{name}.safetensors")
        obs = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32)
        reference = enjoy.mean_and_log_std(enjoy.read_policy(ROOT / "priors" / f"{name}.safetensors"), obs)
        for ours, theirs in zip(residual_mppi.mean_and_log_std(policy, obs), reference, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    unsigned, path = {key: text for key, text in info.items() if key != "sha256"}, tmp_path / "prior.safetensors"
    first, last, mean = "actor_mean.0.bias", "actor_mean.4.bias", policy.tensors["obs_mean"]
    bad = {
        "it is damaged": ({"obs_mean": mean + 1}, info),
        "NaN or infinite": ({first: np.full_like(policy.tensors[first], np.nan)}, unsigned),
        "negative variance": ({"obs_var": -1 - mean**2}, unsigned),
        "broadcast": ({last: policy.layers[-1][1][1:]}, unsigned),
        "hidden_sizes say": ({first: policy.tensors[first][1:]}, unsigned),
        r"\['kind'\] are missing or unknown": ({}, unsigned | {"kind": "categorical"}),
        r"\['logstd'\] are missing or unknown": ({}, unsigned | {"logstd": "clip -1 1"}),
        "actor_mean.6.weight": ({}, unsigned | {"hidden_sizes": "[64, 64, 64]"}),
        "alpha or its survival_reward": ({}, unsigned | {"alpha": "-1"}),
        "could not convert": ({}, unsigned | {"survival_reward": "much"}),
        "log_std is 'tanh'": ({}, unsigned | {"log_std": "tanh"}),
    }
    for said, (tensors, metadata) in bad.items():
        safetensors.numpy.save_file(policy.tensors | tensors, path, metadata)
        with pytest.raises(residual_mppi.StopRun, match=said):
            residual_mppi.read_prior(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(residual_mppi.StopRun, match="cannot be used"):
        residual_mppi.read_prior(path)


def test_bad_input_prints_no_traceback():
    done = run_script(SCRIPT, "--num-samples", 0)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["residual_mppi.py: --num-samples is 0; it must be from 1 to 100000"]
