"""PPO's pieces against SciPy and plain NumPy loops; auto-reset steps, which are no transitions, must leave no trace."""

import dataclasses
from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from jax import lax

import residual_ppo
import soft_ppo

GAMMA, GAE_LAMBDA = 0.9, 0.8
OBS_DIM, ACTION_DIM = 2, 2
ACTOR, CRITIC = residual_ppo.Actor(ACTION_DIM, (4,)), residual_ppo.Critic((3,))
ARGS = residual_ppo.Args(
    num_envs=8,
    num_steps=16,
    num_minibatches=4,
    update_epochs=3,
    total_timesteps=1280,
    learning_rate=3e-3,
    target_kl=1e9,
)
gae = jax.jit(residual_ppo.gae)
discounted_returns = jax.jit(residual_ppo.discounted_returns)
merge_stats = jax.jit(residual_ppo.merge_stats)
ppo_update = partial(
    jax.jit(residual_ppo.ppo_update, static_argnames=("actor", "critic", "loss", "args")),
    ACTOR,
    CRITIC,
    residual_ppo.ppo_loss,
)


@pytest.fixture
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def random_params(seed, scale=1.0):
    """Parameters of ACTOR and CRITIC, all of them random, in float32."""
    shapes = jax.eval_shape(lambda: residual_ppo.init_state(ARGS, ACTOR, CRITIC, OBS_DIM)).params
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(scale * rng.normal(size=x.shape)), shapes)


def to_float64(tree):
    """The tree with all arrays in float64."""
    return jax.tree.map(np.float64, tree)


def numpy_network(params, obs):
    """Output of a network of one hidden layer, for observations (batch_size, obs_dim)."""
    hidden, out = params["params"]["Dense_0"], params["params"]["Dense_1"]
    return np.tanh(obs @ hidden["kernel"] + hidden["bias"]) @ out["kernel"] + out["bias"]


# ------------------------------------------------------------------------------- distribution


@pytest.mark.usefixtures("float64")
def test_gaussian_log_prob_is_that_of_scipy():
    """For deviations from e^-3 to e^2 and shapes that broadcast."""
    rng = np.random.default_rng(0)
    action, mean, log_std = rng.normal(size=(7, 5, 3)), rng.normal(size=(5, 3)), np.array([-3.0, 0.5, 2.0])
    expected = scipy.stats.norm.logpdf(action, mean, np.exp(log_std)).sum(-1)
    np.testing.assert_allclose(residual_ppo.gaussian_log_prob(action, mean, log_std), expected, rtol=1e-12)


@pytest.mark.parametrize("squash", [True, False])
def test_policy_log_prob_is_exact_even_where_tanh_saturates(squash):
    """In float32, against NumPy's float64: the squashed density gains -log(1 - tanh(u)^2) = 2 log cosh(u)."""
    rng = np.random.default_rng(1)
    params = random_params(1)["actor"]
    stats = residual_ppo.RunningStats(np.float32([5, -1]), np.float32([4, 0.01]), np.float32(100))
    obs = np.float32(stats.mean + np.sqrt(stats.var) * 8 * rng.normal(size=(64, OBS_DIM)))  # some are clipped
    action = np.float32(np.concatenate([rng.normal(size=(60, ACTION_DIM)), [[20, 20], [-20, -20], [20, 0], [-20, 9]]]))
    policy = residual_ppo.Policy(params, stats)
    log_prob = jax.jit(residual_ppo.policy_log_prob, static_argnums=(0, 2))(ACTOR, policy, squash, obs, action)

    deviations = (np.float64(obs) - stats.mean) / np.sqrt(stats.var)
    assert (np.abs(deviations) > 10).any()
    mean = numpy_network(to_float64(params), np.clip(deviations, -10, 10))
    u = np.float64(action)
    expected = scipy.stats.norm.logpdf(u, mean, np.exp(np.float64(params["params"]["log_std"])))
    expected = (expected + squash * 2 * np.log(np.cosh(u))).sum(-1)
    np.testing.assert_allclose(log_prob, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("float64")
def test_squashed_density_integrates_to_one():
    """Over the bounded actions a = tanh(u) in [-1, 1]; and it is asymmetric, so that no flat density passes."""
    params = to_float64(random_params(0)["actor"])["params"]
    last = params["Dense_1"]
    params = {"params": params | {"Dense_1": {"kernel": last["kernel"][:, :1], "bias": last["bias"][:1]}}}
    params["params"]["log_std"] = np.log([0.6])
    policy = residual_ppo.Policy(params, residual_ppo.RunningStats(np.zeros(OBS_DIM), np.ones(OBS_DIM), 1.0))

    def density(a):
        obs, u = np.ones((a.size, OBS_DIM)), np.arctanh(a)[:, None]
        return np.exp(residual_ppo.policy_log_prob(residual_ppo.Actor(1, (4,)), policy, True, obs, u))

    total, _ = scipy.integrate.fixed_quad(density, -1, 1, n=400)
    negative, _ = scipy.integrate.fixed_quad(density, -1, 0, n=400)
    mean = numpy_network(params, np.ones((1, OBS_DIM)))[0, 0]
    assert total == pytest.approx(1, abs=1e-6)
    assert negative == pytest.approx(scipy.stats.norm.cdf(0, mean, 0.6), abs=1e-6)


# ------------------------------------------------------------- advantages, returns, statistics


def ragged_rollout(seed, num_steps=40, num_envs=5):
    """terminated, truncated, valid (num_steps, num_envs): episodes of random length, an auto-reset step after each."""
    rng = np.random.default_rng(seed)
    terminated, truncated, valid = np.zeros((3, num_steps, num_envs), bool)
    done = rng.random(num_envs) < 0.5  # the rollout before may have ended with an episode
    for t in range(num_steps):
        valid[t] = ~done
        terminated[t], truncated[t] = valid[t] & (rng.random((2, num_envs)) < 0.1)  # both at once, too
        done = terminated[t] | truncated[t]
    return terminated, truncated, valid


def episodes(done, valid):
    """Each episode's environment, first step, and last step in the rollout."""
    for env in range(done.shape[1]):
        start = None
        for t in range(len(done)):
            if valid[t, env] and start is None:
                start = t
            if start is not None and (done[t, env] or t == len(done) - 1):
                yield env, start, t
                start = None


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("seed", range(5))
def test_gae_is_the_discounted_sum_of_td_errors_within_each_episode(seed):
    """Bootstrapped at truncations and at the end of the rollout, not at terminations; garbage of resets stays out."""
    rng = np.random.default_rng(seed)
    terminated, truncated, valid = ragged_rollout(seed)
    reward, value = rng.normal(size=valid.shape), rng.normal(size=(len(valid) + 1, valid.shape[1]))
    expected = np.full(valid.shape, np.nan)
    for env, start, end in episodes(terminated | truncated, valid):
        next_value = value[start + 1 : end + 2, env].copy()
        next_value[-1] *= not terminated[end, env]
        delta = reward[start : end + 1, env] + GAMMA * next_value - value[start : end + 1, env]
        for t in range(start, end + 1):
            expected[t, env] = sum((GAMMA * GAE_LAMBDA) ** (k - t) * delta[k - start] for k in range(t, end + 1))
    advantage = np.asarray(gae(reward, value, terminated, truncated, GAMMA, GAE_LAMBDA))
    assert np.array_equal(np.isfinite(expected), valid) and (~valid).any()
    np.testing.assert_allclose(advantage[valid], expected[valid], atol=1e-12)

    reward[~valid] = 1e6
    value[1:][terminated] = 1e6  # the terminal observation's value
    garbage_advantage = np.asarray(gae(reward, value, terminated, truncated, GAMMA, GAE_LAMBDA))
    np.testing.assert_array_equal(garbage_advantage[valid], advantage[valid])


def test_gae_of_a_hand_computed_case():
    """gamma = lambda = 0.5: under way, truncated, terminated, both; then truncated and terminated a step earlier."""
    reward = np.float32([[2] * 6, [3] * 6])
    value = np.float32([[4] * 6, [6] * 6, [10] * 6])
    terminated = np.array([[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0]], bool)
    truncated = np.array([[0, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0]], bool)
    advantage = gae(reward, value, terminated, truncated, 0.5, 0.5)
    # TD errors: 2 + 3 - 4 = 1, terminated 2 - 4 = -2; then 3 + 5 - 6 = 2, terminated 3 - 6 = -3.
    np.testing.assert_allclose(advantage[0], [1.5, 1.5, 0.25, 0.25, 1, -2])
    np.testing.assert_allclose(advantage[1, :4], [2, 2, -3, -3])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("seed", range(3))
def test_discounted_returns_sum_the_past_of_each_episode(seed):
    """Also for an episode that began in an earlier rollout, as the trace carries it over."""
    rng = np.random.default_rng(seed)
    terminated, truncated, valid = ragged_rollout(seed)
    done = terminated | truncated
    reward = np.where(valid, rng.normal(size=valid.shape), 0)
    trace, first = discounted_returns(np.zeros(done.shape[1]), reward[:15], done[:15], GAMMA)
    _, second = discounted_returns(trace, reward[15:], done[15:], GAMMA)
    total = np.concatenate([first, second])
    expected = np.zeros(valid.shape)
    for env, start, end in episodes(done, valid):
        for t in range(start, end + 1):
            expected[t, env] = sum(GAMMA ** (t - k) * reward[k, env] for k in range(start, t + 1))
    np.testing.assert_allclose(total, expected, atol=1e-12)


def test_merge_stats_equals_numpy_on_all_valid_data():
    """In float32, far from 0: mean 1000, deviation 1; the initial statistics weigh as 1e-4 of an observation."""
    rng = np.random.default_rng(0)
    stats = residual_ppo.init_state(ARGS, ACTOR, CRITIC, OBS_DIM).obs_stats
    seen = []
    for _ in range(60):
        data = np.float32(rng.normal([1000, -3], [1, 100], size=(8, 4, OBS_DIM)))
        valid = rng.random((8, 4)) < rng.random()
        seen.append(np.float64(data[valid]))
        stats = merge_stats(stats, np.where(valid[..., None], data, 1e9), valid)
    seen = np.concatenate(seen)
    count = len(seen) + 1e-4
    mean = seen.sum(0) / count
    var = (((seen - mean) ** 2).sum(0) + 1e-4 * (1 + mean**2)) / count
    np.testing.assert_allclose(stats.count, count, rtol=1e-6)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(stats.var, var, rtol=1e-3)


def test_merge_stats_of_nothing_valid_changes_nothing():
    """A rollout of auto-reset steps alone, and no NaN."""
    stats = residual_ppo.RunningStats(np.float32([3, -2]), np.float32([2, 5]), np.float32(7))
    merged = merge_stats(stats, np.full((4, 2), 1e9, np.float32), np.zeros(4, bool))
    jax.tree.map(np.testing.assert_array_equal, merged, stats)


# --------------------------------------------------------------------------------------- loss


def random_batch(seed, params, batch_size=48):
    """A batch in float64 whose ratios and values straddle the clipping range; a quarter is not valid."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(batch_size, OBS_DIM))
    mean, std = numpy_network(params["actor"], obs), np.exp(params["actor"]["params"]["log_std"])
    action = mean + std * rng.normal(size=mean.shape)
    log_prob = scipy.stats.norm.logpdf(action, mean, std).sum(-1) + rng.normal(scale=0.3, size=batch_size)
    value = numpy_network(params["critic"], obs)[:, 0] + rng.normal(scale=0.3, size=batch_size)
    advantage, target = rng.normal(0.5, 2, batch_size), value + rng.normal(size=batch_size)
    valid = np.where(np.arange(batch_size) % 4, 1.0, 0.0)
    return residual_ppo.Batch(obs, action, log_prob, advantage, value, target, valid)


def minibatches(batch, num_minibatches, norm_adv):
    """A batch cut into a list of minibatches, without changing its order."""
    cut = residual_ppo.make_minibatches(batch, np.arange(len(batch.weight)), num_minibatches, norm_adv)
    return [jax.tree.map(lambda x: x[i], cut) for i in range(num_minibatches)]  # noqa: B023


def numpy_ppo_loss(params, batch, args):
    """Loss, ratios and values, sample by sample over the valid ones."""
    batch = residual_ppo.Batch(*(x[batch.weight == 1] for x in batch))
    mean, std = numpy_network(params["actor"], batch.obs), np.exp(params["actor"]["params"]["log_std"])
    ratio = np.exp(scipy.stats.norm.logpdf(batch.action, mean, std).sum(-1) - batch.log_prob)
    value = numpy_network(params["critic"], batch.obs)[:, 0]
    advantage = scipy.stats.zscore(batch.advantage) if args.norm_adv else batch.advantage
    losses = []
    for i in range(len(ratio)):
        clipped = min(max(ratio[i], 1 - args.clip_coef), 1 + args.clip_coef)
        error = (value[i] - batch.target[i]) ** 2
        if args.clip_vloss:
            near = min(max(value[i], batch.value[i] - args.clip_coef), batch.value[i] + args.clip_coef)
            error = max(error, (near - batch.target[i]) ** 2)
        losses.append(-min(ratio[i] * advantage[i], clipped * advantage[i]) + args.vf_coef * 0.5 * error)
    return np.mean(losses), ratio, value


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo_loss_and_its_gradient_are_those_of_a_numpy_loop(norm_adv, clip_vloss):
    """With part of the ratios and values clipped, on either side; its gradient by central differences."""
    args = residual_ppo.Args(norm_adv=norm_adv, clip_vloss=clip_vloss, clip_coef=0.2, vf_coef=0.7)
    params = to_float64(random_params(3, 0.5))
    batch = random_batch(3, params)
    (minibatch,) = minibatches(batch, 1, norm_adv)
    loss_and_gradient = jax.jit(jax.value_and_grad(residual_ppo.ppo_loss, has_aux=True), static_argnums=(2, 3, 4))
    (loss, metrics), gradient = loss_and_gradient(params, minibatch, ACTOR, CRITIC, args)

    expected, ratio, value = numpy_ppo_loss(params, batch, args)
    drift = value - batch.value[batch.weight == 1]
    assert all((x < -0.2).any() and (x > 0.2).any() and (abs(x) < 0.2).any() for x in (ratio - 1, drift))
    np.testing.assert_allclose(loss, expected, rtol=1e-7)
    np.testing.assert_allclose(metrics.approx_kl, np.mean(ratio - 1 - np.log(ratio)), rtol=1e-8)
    np.testing.assert_allclose(metrics.clip_fraction, np.mean(abs(ratio - 1) > 0.2), rtol=1e-10)

    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    steps = 1e-6 * np.eye(flat.size)
    up, down = (
        np.array([numpy_ppo_loss(to_float64(unflatten(flat + sign * step)), batch, args)[0] for step in steps])
        for sign in (1, -1)
    )
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(gradient)[0], (up - down) / 2e-6, atol=1e-7)


@pytest.mark.usefixtures("float64")
def test_minibatches_hold_each_transition_once_and_are_normalised_each_by_itself():
    """Advantages over the valid transitions alone; a minibatch of auto-reset steps has no weight, and no NaN."""
    batch = random_batch(9, to_float64(random_params(9)))
    batch = batch._replace(weight=np.where(np.arange(48) < 36, batch.weight, 0))
    order = np.concatenate([np.random.default_rng(9).permutation(36), np.arange(36, 48)])
    cut = residual_ppo.make_minibatches(batch, order, 4, True)
    np.testing.assert_array_equal(cut.obs.reshape(48, -1), batch.obs[order])
    np.testing.assert_allclose(cut.weight.sum(1), [1, 1, 1, 0])
    assert (cut.advantage[3] * cut.weight[3] == 0).all()
    for i in range(3):
        part = order[12 * i : 12 * (i + 1)]
        valid = batch.weight[part] == 1
        np.testing.assert_allclose(cut.advantage[i][valid], scipy.stats.zscore(batch.advantage[part][valid]), 1e-6)
    assert (residual_ppo.make_minibatches(batch, order, 4, False).advantage.ravel() == batch.advantage[order]).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("squash", [True, False])
def test_losses_of_the_parts_of_a_minibatch_add_up_to_that_of_the_whole(squash):
    """With their gradients and metrics, although the parts hold auto-reset steps in different numbers."""
    params = to_float64(random_params(5, 0.5))
    (whole,) = minibatches(random_batch(5, params), 1, True)
    loss_and_gradient = jax.jit(jax.value_and_grad(soft_ppo.entropy_bonus_loss, has_aux=True), static_argnums=(2, 3, 4))
    parts = [
        loss_and_gradient(params, jax.tree.map(lambda x: x[cut], whole), ACTOR, CRITIC, soft_ppo.Args(squash=squash))  # noqa: B023
        for cut in (slice(0, 5), slice(5, 48))
    ]
    expected = loss_and_gradient(params, whole, ACTOR, CRITIC, soft_ppo.Args(squash=squash))
    jax.tree.map(lambda x, *y: np.testing.assert_allclose(sum(y), x, atol=1e-12), expected, *parts)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("script", [residual_ppo, soft_ppo])
def test_what_an_auto_reset_step_holds_changes_neither_loss_nor_gradient(script):
    """Whatever it is: observation, action, log-probability, advantage, value and target."""
    loss = script.entropy_bonus_loss if script is soft_ppo else script.ppo_loss
    loss_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(2, 3, 4))
    params = to_float64(random_params(4, 0.5))
    batch = random_batch(4, params)
    rng = np.random.default_rng(5)
    *content, valid = batch
    garbage = [
        np.where((valid == 1).reshape(-1, *[1] * (x.ndim - 1)), x, 5 * rng.normal(size=x.shape)) for x in content
    ]
    expected, actual = (
        loss_and_gradient(params, *minibatches(x, 1, True), ACTOR, CRITIC, script.Args())
        for x in (batch, residual_ppo.Batch(*garbage, valid))
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def bonus_and_gradient(params, batch, args):
    """What entropy_bonus_loss adds to ppo_loss, and the gradient of it for the actor."""

    def bonus(params):
        with_bonus, _ = soft_ppo.entropy_bonus_loss(params, batch, ACTOR, CRITIC, args)
        return with_bonus - soft_ppo.ppo_loss(params, batch, ACTOR, CRITIC, args)[0]

    value, gradient = jax.jit(jax.value_and_grad(bonus))(params)
    return value, gradient["actor"]["params"]


@pytest.mark.usefixtures("float64")
def test_entropy_bonus_of_a_gaussian_is_its_entropy():
    """Each log_std has a gradient of 1 nat, the mean none."""
    params = to_float64(random_params(6, 0.5))
    args = soft_ppo.Args(squash=False, ent_coef=0.3)
    value, gradient = bonus_and_gradient(params, *minibatches(random_batch(6, params), 1, True), args)
    std = np.exp(params["actor"]["params"]["log_std"])
    np.testing.assert_allclose(value, -0.3 * scipy.stats.norm.entropy(scale=std).sum(), rtol=1e-10)
    np.testing.assert_allclose(gradient.pop("log_std"), [-0.3, -0.3], rtol=1e-10)
    assert all(np.abs(g).max() < 1e-12 for g in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("float64")
def test_entropy_bonus_of_a_squashed_gaussian_is_its_entropy():
    """Its value and its gradients for log_std and mean, against SciPy's integral of -log density."""
    params = to_float64(random_params(7, 0.5))
    actor_params = params["actor"]["params"]
    obs = np.ones((4000, OBS_DIM))
    mean, log_std = numpy_network(params["actor"], obs)[0], actor_params["log_std"]
    rng = np.random.default_rng(7)
    quantiles = scipy.stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    z = np.stack([rng.permutation(quantiles) for _ in range(ACTION_DIM)], -1)
    zeros = np.zeros(4000)
    batch = residual_ppo.Batch(obs, mean + np.exp(log_std) * z, zeros, zeros, zeros, zeros, np.full(4000, 1 / 4000))
    value, gradient = bonus_and_gradient(params, batch, soft_ppo.Args(squash=True, ent_coef=0.3))

    def entropy(mean, log_std):
        """Of a = tanh(u), for one dimension."""

        def integrand(z):
            log_density = scipy.stats.norm.logpdf(z) - log_std + 2 * np.log(np.cosh(mean + np.exp(log_std) * z))
            return -scipy.stats.norm.pdf(z) * log_density

        return scipy.integrate.fixed_quad(integrand, -9, 9, n=200)[0]

    by_mean, by_log_std = (
        [(entropy(*(x + step)) - entropy(*(x - step))) / 2e-5 for x in np.stack([mean, log_std], -1)]
        for step in 1e-5 * np.eye(2)
    )
    np.testing.assert_allclose(value, -0.3 * sum(map(entropy, mean, log_std)), atol=1e-3)
    np.testing.assert_allclose(gradient["log_std"], -0.3 * np.array(by_log_std), atol=1e-3)
    np.testing.assert_allclose(gradient["Dense_1"]["bias"], -0.3 * np.array(by_mean), atol=1e-3)


# ------------------------------------------------------------------------------------- update


def random_rollout(seed, state):
    """Transitions of the state's policy, with terminations, truncations and auto-reset steps; last_obs; a reward."""
    rng = np.random.default_rng(seed)
    terminated, truncated, valid = ragged_rollout(seed, ARGS.num_steps, ARGS.num_envs)
    assert terminated[-1].any() and (truncated & ~terminated)[:-1].any()
    obs = np.float32(rng.normal(size=(ARGS.num_steps + 1, ARGS.num_envs, OBS_DIM)))
    mean, log_std = ACTOR.apply(state.params["actor"], obs[:-1])
    action = np.asarray(mean + np.exp(log_std) * np.float32(rng.normal(size=mean.shape)))
    reward = np.float32(rng.normal(size=valid.shape) + action[..., 0])
    unused = np.zeros_like(reward)
    transitions = residual_ppo.Transitions(obs[:-1], action, unused, unused, terminated, truncated, valid)
    return transitions, obs[-1], reward


@pytest.fixture(scope="module")
def first_state():
    """A state before the first iteration."""
    return residual_ppo.init_state(ARGS, ACTOR, CRITIC, OBS_DIM)._replace(params=random_params(8, 0.5))


def distance(state, other):
    """Largest difference between the parameters of two states."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), state.params, other.params)))


def test_what_auto_reset_steps_hold_changes_nothing_in_an_update(first_state):
    """Neither their actions and rewards, nor the last observation of a terminated episode."""
    transitions, last_obs, reward = random_rollout(12, first_state)
    expected = ppo_update(ARGS, first_state, transitions, last_obs, reward)
    garbage = np.float32(np.random.default_rng(0).normal(scale=3, size=transitions.action.shape))
    valid = transitions.valid
    action = np.where(valid[..., None], transitions.action, garbage)
    last_obs = np.where(transitions.terminated[-1, :, None], 5, last_obs)
    transitions = transitions._replace(action=action)
    update = ppo_update(ARGS, first_state, transitions, last_obs, np.where(valid, reward, np.nan))
    assert distance(expected[0], first_state) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, update, expected)


def test_update_does_not_depend_on_the_unit_of_the_reward(first_state):
    """A hundredfold reward teaches the same: the scale is the deviation of the whole reward's discounted returns."""
    transitions, last_obs, reward = random_rollout(12, first_state)
    state, metrics = ppo_update(ARGS, first_state, transitions, last_obs, reward)
    state_100, metrics_100 = ppo_update(ARGS, first_state, transitions, last_obs, 100 * reward)
    done = transitions.terminated | transitions.truncated
    _, returns = discounted_returns(np.zeros(ARGS.num_envs), reward * transitions.valid, done, ARGS.gamma)
    np.testing.assert_allclose(metrics["reward_scale"], np.std(returns[transitions.valid]), rtol=1e-4)
    np.testing.assert_allclose(metrics_100["reward_scale"], 100 * metrics["reward_scale"], rtol=1e-4)
    assert distance(state_100, state) < 0.01 * distance(state, first_state)


def test_observation_normaliser_sees_each_transition_once(first_state):
    """And not the last observation of an episode, on which no action is taken."""
    transitions, last_obs, reward = random_rollout(12, first_state)
    state, _ = ppo_update(ARGS, first_state, transitions, last_obs, reward)
    seen = transitions.obs[transitions.valid]
    np.testing.assert_allclose(state.obs_stats.count, len(seen), rtol=1e-5)
    np.testing.assert_allclose(state.obs_stats.mean, seen.mean(0), atol=1e-5)
    np.testing.assert_allclose(state.obs_stats.var, seen.var(0), rtol=1e-4)


def test_target_kl_ends_the_update_after_the_epoch_that_exceeds_it(first_state):
    """A tiny one leaves one epoch of the three that the huge one of ARGS lets happen."""
    rollout = random_rollout(12, first_state)
    three_epochs, _ = ppo_update(ARGS, first_state, *rollout)
    one_epoch, _ = ppo_update(dataclasses.replace(ARGS, update_epochs=1, target_kl=None), first_state, *rollout)
    stopped, _ = ppo_update(dataclasses.replace(ARGS, target_kl=1e-9), first_state, *rollout)
    assert distance(stopped, one_epoch) == 0
    assert distance(three_epochs, one_epoch) > 1e-3


def test_learning_rate_falls_linearly_to_zero(first_state):
    """Halfway the parameters move about half as far as at first; after the last iteration they would not move."""
    rollout = random_rollout(12, first_state)
    first, halfway, end = (
        distance(ppo_update(ARGS, first_state._replace(iteration=np.int32(i)), *rollout)[0], first_state)
        for i in (0, 5, 10)
    )
    assert halfway == pytest.approx(first / 2, rel=0.1)
    assert end == 0


def test_residual_update_finds_the_soft_optimum_of_a_bandit():
    """Where it is known: a Gaussian before squashing, its precision omega'/alpha_hat of the prior's plus the task's.

    r_R = -k/2 (u - m)^2 + (omega' - alpha_hat) log |det d tanh(u)/du| gives it, to a squashed policy.
    """
    omega_prime, alpha_hat, k, m = 0.2, 0.5, 1.0, -0.5
    prior_mean, prior_std = 0.5, 0.8
    args = residual_ppo.Args(
        num_envs=256,
        num_steps=4,
        num_minibatches=4,
        update_epochs=5,
        total_timesteps=256 * 4 * 60,
        learning_rate=0.01,
        gamma=0.0,
        init_from_prior=False,
    )
    actor, critic = residual_ppo.Actor(1, ()), residual_ppo.Critic(())
    prior_params = {"Dense_0": {"kernel": np.zeros((1, 1)), "bias": np.array([prior_mean])}}
    prior_params = {"params": prior_params | {"log_std": np.log([prior_std])}}
    stats = residual_ppo.RunningStats(np.zeros(1), np.ones(1), 1.0)
    prior = jax.tree.map(jnp.float32, residual_ppo.Policy(prior_params, stats))
    obs, no = jnp.zeros((args.num_steps, args.num_envs, 1)), jnp.zeros((args.num_steps, args.num_envs), bool)

    def iteration(state, key):
        mean, log_std = actor.apply(state.params["actor"], obs)
        u = mean + jnp.exp(log_std) * jax.random.normal(key, obs.shape)
        addon_reward = (-k / 2 * (u - m) ** 2 - (omega_prime - alpha_hat) * 2 * jnp.log(jnp.cosh(u)))[..., 0]
        transitions = residual_ppo.Transitions(obs, u, addon_reward, addon_reward, no, no, ~no)
        return residual_ppo.residual_update(
            actor, critic, actor, omega_prime, alpha_hat, args, prior, state, transitions, obs[0]
        )

    state = residual_ppo.init_state(args, actor, critic, 1)
    state, _ = jax.jit(partial(lax.scan, iteration))(state, jax.random.split(jax.random.PRNGKey(0), 60))
    mean, log_std = actor.apply(state.params["actor"], obs[0, 0])
    precision = (omega_prime / prior_std**2 + k) / alpha_hat
    assert mean[0] == pytest.approx((omega_prime * prior_mean / prior_std**2 + k * m) / alpha_hat / precision, abs=0.02)
    assert jnp.exp(log_std)[0] == pytest.approx(precision**-0.5, rel=0.02)
