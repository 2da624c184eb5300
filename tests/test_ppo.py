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
ACTOR, CRITIC = residual_ppo.Actor(ACTION_DIM, (4,)), residual_ppo.Critic((4,))
PPO = {
    "num_envs": 8,
    "num_steps": 16,
    "num_minibatches": 4,
    "update_epochs": 3,
    "total_timesteps": 1280,
    "learning_rate": 3e-3,
    "target_kl": 1e9,
    "gamma": 0.99,
    "desired_kl": 0,
}
ARGS = residual_ppo.Args(**PPO, omega=0.5, omega_prime=0.2, alpha_hat=0.3, survival_reward=0.0)
KEY = residual_ppo.seed_words(1, residual_ppo.UPDATE)
gae = jax.jit(residual_ppo.gae)
discounted_sum = jax.jit(residual_ppo.discounted_sum, static_argnames="reverse")
merge_stats = jax.jit(residual_ppo.merge_stats)
jitted_ppo_update = jax.jit(residual_ppo.ppo_update, static_argnames=("loss", "args"))


def ppo_update(args, state, transitions, reward):
    """An iteration on a reward."""
    return jitted_ppo_update(residual_ppo.ppo_loss, args, state, transitions, reward, args.gamma, KEY)


@pytest.fixture
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def random_params(seed, scale=1.0):
    """Parameters of ACTOR and CRITIC, all of them random, in float32."""
    shapes = jax.eval_shape(lambda: residual_ppo.init_state(ARGS, ACTOR, OBS_DIM, KEY)).params
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(scale * rng.normal(size=x.shape)), shapes)


def to_float64(tree):
    """The tree with all arrays in float64."""
    return jax.tree.map(np.float64, tree)


def numpy_network(params, obs, activation=np.tanh):
    """Output of the network of a policy file, for observations (batch_size, obs_dim)."""
    name = "actor_mean" if "actor_mean.0" in params["params"] else "critic"
    layers = {int(key.partition(".")[2]): layer for key, layer in params["params"].items() if key.startswith(name)}
    x = obs
    for i in sorted(layers):
        x = (activation(x) if i else x) @ layers[i]["kernel"] + layers[i]["bias"]
    return x


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
    policy = residual_ppo.Policy(params, stats, dataclasses.replace(ACTOR, squash=squash))
    log_prob = jax.jit(residual_ppo.policy_log_prob)(policy, obs, action)

    deviations = (np.float64(obs) - stats.mean) / np.sqrt(stats.var)
    assert (np.abs(deviations) > 10).any()
    mean = numpy_network(to_float64(params), np.clip(deviations, -10, 10))
    u = np.float64(action)
    expected = scipy.stats.norm.logpdf(u, mean, np.exp(np.float64(params["params"]["actor_logstd"])))
    expected = (expected + squash * 2 * np.log(np.cosh(u))).sum(-1)
    np.testing.assert_allclose(log_prob, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("obs_clip", [10.0, 3.0, np.inf])
@pytest.mark.parametrize("state_dependent_std", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_every_form_of_policy_is_that_of_numpy(activation, state_dependent_std, obs_clip):
    """Mean, log_std and log-probability, squashed or not; a deviation that depends on the state has -20 <= log <= 2."""
    rng = np.random.default_rng(2)
    actor = residual_ppo.Actor(3, (5, 4), activation, state_dependent_std, obs_clip=obs_clip)
    sizes = {"actor_mean.0": (OBS_DIM, 5), "actor_mean.2": (5, 4), "actor_mean.4": (4, 3), "actor_logstd": (4, 3)}
    params = {k: {"kernel": 0.3 * rng.normal(size=x), "bias": 0.3 * rng.normal(size=x[1])} for k, x in sizes.items()}
    if state_dependent_std:
        params["actor_logstd"] = {"kernel": 40 * rng.normal(size=(4, 3)), "bias": np.array([-8.0, -9.0, -10.0])}
    else:
        params["actor_logstd"] = np.array([-21.0, 0.5, 3.0])  # taken as it is
    params = {"params": params}
    shapes = jax.eval_shape(actor.init, jax.random.PRNGKey(0), np.zeros(OBS_DIM))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    stats = residual_ppo.RunningStats(np.array([5.0, -1.0]), np.array([4.0, 0.5]), 100.0)
    deviations = 8 * rng.normal(size=(64, OBS_DIM))
    obs = stats.mean + np.sqrt(stats.var + 1e-8) * deviations

    act = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}[activation]
    clipped = np.clip(deviations, -obs_clip, obs_clip)
    mean = numpy_network(params, clipped, act)
    if not state_dependent_std:
        log_std = np.broadcast_to(params["params"]["actor_logstd"], mean.shape)
    else:
        hidden = {"params": {k: params["params"][k] for k in ("actor_mean.0", "actor_mean.2")}}
        head = params["params"]["actor_logstd"]
        raw = act(numpy_network(hidden, clipped, act)) @ head["kernel"] + head["bias"]
        assert (raw < -20).any() and (raw > 2).any() and ((raw > -20) & (raw < 2)).any()
        log_std = np.clip(raw, -20, 2)
    other = 3 if obs_clip > 3 else 10  # a clip that is ignored, or another one, is seen
    assert np.abs(numpy_network(params, np.clip(deviations, -other, other), act) - mean).max() > 0.01

    u = mean + np.exp(log_std) * rng.normal(size=mean.shape)
    gaussian = scipy.stats.norm.logpdf(u, mean, np.exp(log_std)).sum(-1)
    for squash in (True, False):
        policy = residual_ppo.Policy(params, stats, dataclasses.replace(actor, squash=squash))
        ours = jax.jit(residual_ppo.action_distribution)(policy, obs)
        np.testing.assert_allclose(ours[0], mean, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(np.broadcast_to(ours[1], mean.shape), log_std, rtol=1e-10, atol=1e-12)
        expected = gaussian + squash * 2 * (np.logaddexp(u, -u) - np.log(2)).sum(-1)
        log_prob = jax.jit(residual_ppo.policy_log_prob)(policy, obs, u)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-6)  # a deviation of e^-21 magnifies rounding


@pytest.mark.usefixtures("float64")
def test_squashed_density_integrates_to_one():
    """Over the bounded actions a = tanh(u) in [-1, 1]; and it is asymmetric, so that no flat density passes."""
    params = to_float64(random_params(0)["actor"])["params"]
    last = params["actor_mean.2"]
    params = {"params": params | {"actor_mean.2": {"kernel": last["kernel"][:, :1], "bias": last["bias"][:1]}}}
    params["params"]["actor_logstd"] = np.log([0.6])
    stats = residual_ppo.RunningStats(np.zeros(OBS_DIM), np.ones(OBS_DIM), 1.0)
    policy = residual_ppo.Policy(params, stats, residual_ppo.Actor(1, (4,)))

    def density(a):
        obs, u = np.ones((a.size, OBS_DIM)), np.arctanh(a)[:, None]
        return np.exp(residual_ppo.policy_log_prob(policy, obs, u))

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
@pytest.mark.parametrize("reverse", [False, True])
def test_discounted_sum_is_a_sum_of_products_of_decays(reverse):
    """y_t = sum over k <= t of x_k prod_{k < j <= t} decay_j, the start before the first step; in reverse mirrored."""
    rng = np.random.default_rng(0)
    start, (x, decay) = rng.normal(size=3), rng.normal(size=(2, 7, 3))
    total = np.asarray(discounted_sum(start, x, decay, reverse=reverse))
    if reverse:
        total, x, decay = total[::-1], x[::-1], decay[::-1]
    for t in range(7):
        expected = start * decay[: t + 1].prod(0) + sum(x[k] * decay[k + 1 : t + 1].prod(0) for k in range(t + 1))
        np.testing.assert_allclose(total[t], expected, rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("seed", range(3))
def test_discounted_returns_sum_the_past_of_each_episode(seed):
    """As an update sums them, also for an episode that began in an earlier rollout; an auto-reset step has 0."""
    rng = np.random.default_rng(seed)
    terminated, truncated, valid = ragged_rollout(seed)
    reward = np.where(valid, rng.normal(size=valid.shape), 0)
    first = np.asarray(discounted_sum(np.zeros(valid.shape[1]), reward[:15], GAMMA * valid[:15]))
    second = discounted_sum(first[-1], reward[15:], GAMMA * valid[15:])
    total = np.concatenate([first, second])
    expected = np.zeros(valid.shape)
    for env, start, end in episodes(terminated | truncated, valid):
        for t in range(start, end + 1):
            expected[t, env] = sum(GAMMA ** (t - k) * reward[k, env] for k in range(start, t + 1))
    np.testing.assert_allclose(total, expected, atol=1e-12)


def test_merge_stats_equals_numpy_on_all_valid_data():
    """In float32, far from 0: mean 1000, deviation 1; the initial statistics weigh as 1e-4 of an observation."""
    rng = np.random.default_rng(0)
    stats = residual_ppo.init_state(ARGS, ACTOR, OBS_DIM, KEY).obs_stats
    seen = []
    for _ in range(60):
        data = np.float32(rng.normal([1000, -3], [1, 100], size=(8, 4, OBS_DIM)))
        valid = rng.random((8, 4)) < rng.random()
        seen.append(np.float64(data[valid]))
        stats = merge_stats(stats, np.where(valid[..., None], data, rng.choice([1e9, np.nan, np.inf])), valid)
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
    for garbage in (1e9, np.nan, np.inf):
        merged = merge_stats(stats, np.full((4, 2), garbage, np.float32), np.zeros(4, bool))
        jax.tree.map(np.testing.assert_array_equal, merged, stats)


# --------------------------------------------------------------------------------------- loss


def random_batch(seed, params, batch_size=48):
    """A batch in float64 whose ratios and values straddle the clipping range; a quarter is not valid."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(batch_size, OBS_DIM))
    mean, std = numpy_network(params["actor"], obs), np.exp(params["actor"]["params"]["actor_logstd"])
    action = mean + std * rng.normal(size=mean.shape)
    log_prob = scipy.stats.norm.logpdf(action, mean, std).sum(-1) + rng.normal(scale=0.3, size=batch_size)
    value = numpy_network(params["critic"], obs)[:, 0] + rng.normal(scale=0.3, size=batch_size)
    advantage, target = rng.normal(0.5, 2, batch_size), value + rng.normal(size=batch_size)
    valid = np.arange(batch_size) % 4 != 0
    return residual_ppo.Batch(obs, action, log_prob, advantage, value, target, valid)


def whole_minibatch(batch, norm_adv=True):
    """A batch as one minibatch, in its order, and its weights."""
    return jax.tree.map(lambda x: x[0], residual_ppo.make_minibatches(batch, np.arange(len(batch.valid)), 1, norm_adv))


def coefficients(loss, args):
    """Those that a loss takes."""
    names = ("clip_coef", "clip_vloss", "vf_coef", *(("ent_coef",) if loss is soft_ppo.entropy_bonus_loss else ()))
    return {name: getattr(args, name) for name in names}


def jitted_loss_and_gradient(loss):
    """(params, batch, weight, actor, critic, args) -> (loss, metrics), gradient."""

    def loss_and_gradient(params, batch, weight, actor, critic, args):
        compute = jax.value_and_grad(partial(loss, **coefficients(loss, args)), has_aux=True)
        return compute(params, batch, weight, actor, critic)

    return jax.jit(loss_and_gradient, static_argnums=(3, 4, 5))


def numpy_ppo_loss(params, batch, args):
    """Loss, ratios and values, sample by sample over the valid ones."""
    batch = residual_ppo.Batch(*(x[batch.valid] for x in batch))
    mean, std = numpy_network(params["actor"], batch.obs), np.exp(params["actor"]["params"]["actor_logstd"])
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
    loss_and_gradient = jitted_loss_and_gradient(residual_ppo.ppo_loss)
    (loss, metrics), gradient = loss_and_gradient(params, *whole_minibatch(batch, norm_adv), ACTOR, CRITIC, args)

    expected, ratio, value = numpy_ppo_loss(params, batch, args)
    drift = value - batch.value[batch.valid]
    assert all((x < -0.2).any() and (x > 0.2).any() and (abs(x) < 0.2).any() for x in (ratio - 1, drift))
    np.testing.assert_allclose(loss, expected, rtol=1e-7)
    np.testing.assert_allclose(metrics["policy_loss"] + 0.7 * metrics["value_loss"], expected, rtol=1e-7)
    np.testing.assert_allclose(metrics["approx_kl"], np.mean(ratio - 1 - np.log(ratio)), rtol=1e-8)
    np.testing.assert_allclose(metrics["clip_fraction"], np.mean(abs(ratio - 1) > 0.2), rtol=1e-10)

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
    batch = batch._replace(valid=batch.valid & (np.arange(48) < 36))
    order = np.concatenate([np.random.default_rng(9).permutation(36), np.arange(36, 48)])
    cut, weight = residual_ppo.make_minibatches(batch, order, 4, True)
    plain, plain_weight = residual_ppo.make_minibatches(batch, order, 4, False)
    np.testing.assert_array_equal(cut.valid.ravel(), batch.valid[order])
    valid = np.asarray(cut.valid)
    np.testing.assert_array_equal(cut.obs[valid], batch.obs[order][batch.valid[order]])
    np.testing.assert_array_equal(plain.advantage[valid], batch.advantage[order][batch.valid[order]])
    np.testing.assert_allclose(weight, valid / np.maximum(valid.sum(1, keepdims=True), 1), rtol=1e-15)
    np.testing.assert_array_equal(plain_weight, weight)
    assert not weight[3].any() and np.isfinite(cut.advantage[3]).all()
    for i in range(3):
        expected = scipy.stats.zscore(batch.advantage[order[12 * i : 12 * (i + 1)]][valid[i]])
        np.testing.assert_allclose(cut.advantage[i][valid[i]], expected, 1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("squash", [True, False])
def test_losses_of_the_parts_of_a_minibatch_add_up_to_that_of_the_whole(squash):
    """With their gradients and metrics, although the parts hold auto-reset steps in different numbers."""
    params, args, actor = to_float64(random_params(5, 0.5)), soft_ppo.Args(), dataclasses.replace(ACTOR, squash=squash)
    whole = whole_minibatch(random_batch(5, params))
    loss_and_gradient = jitted_loss_and_gradient(soft_ppo.entropy_bonus_loss)
    parts = [
        loss_and_gradient(params, *jax.tree.map(lambda x: x[cut], whole), actor, CRITIC, args)  # noqa: B023
        for cut in (slice(0, 5), slice(5, 48))
    ]
    expected = loss_and_gradient(params, *whole, actor, CRITIC, args)
    jax.tree.map(lambda x, *y: np.testing.assert_allclose(sum(y), x, atol=1e-12), expected, *parts)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("script", [residual_ppo, soft_ppo])
def test_what_an_auto_reset_step_holds_changes_neither_loss_nor_gradient(script):
    """Whatever it is: observation, action, log-probability, advantage, value and target."""
    loss = script.entropy_bonus_loss if script is soft_ppo else script.ppo_loss
    loss_and_gradient = jitted_loss_and_gradient(loss)
    params = to_float64(random_params(4, 0.5))
    batch = random_batch(4, params)
    rng = np.random.default_rng(5)
    *content, valid = batch
    garbage = [np.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 5 * rng.normal(size=x.shape)) for x in content]
    expected, actual = (
        loss_and_gradient(params, *whole_minibatch(x), ACTOR, CRITIC, script.Args())
        for x in (batch, residual_ppo.Batch(*garbage, valid))
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("garbage", [-100.0, np.inf, -np.inf, np.nan], ids=lambda x: f"{x:g}")
@pytest.mark.parametrize("script", [residual_ppo, soft_ppo])
def test_non_finite_numbers_of_auto_reset_steps_reach_neither_loss_nor_gradient(script, garbage):
    """In float32, where a log-ratio of 94 has an infinite exp, and 0 times it NaN: nor do they reach the metrics."""
    loss = script.entropy_bonus_loss if script is soft_ppo else script.ppo_loss
    loss_and_gradient = jitted_loss_and_gradient(loss)
    params = random_params(4, 0.5)
    batch = jax.tree.map(lambda x: x if x.dtype == bool else np.float32(x), random_batch(4, to_float64(params)))
    expected = loss_and_gradient(params, *whole_minibatch(batch), ACTOR, CRITIC, script.Args())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    for name in ("log_prob", "advantage", "value", "target"):
        garbage_batch = batch._replace(**{name: np.where(batch.valid, getattr(batch, name), np.float32(garbage))})
        actual = loss_and_gradient(params, *whole_minibatch(garbage_batch), ACTOR, CRITIC, script.Args())
        jax.tree.map(partial(np.testing.assert_array_equal, err_msg=name), actual, expected)


def bonus_and_gradient(params, batch, weight, actor, args):
    """What entropy_bonus_loss adds to ppo_loss, and the gradient of it for the actor."""

    def bonus(params):
        with_bonus, without = (
            loss(params, batch, weight, actor, CRITIC, **coefficients(loss, args))[0]
            for loss in (soft_ppo.entropy_bonus_loss, soft_ppo.ppo_loss)
        )
        return with_bonus - without

    value, gradient = jax.jit(jax.value_and_grad(bonus))(params)
    return value, gradient["actor"]["params"]


def squashed_entropy(mean, log_std):
    """SciPy's quadrature of -log density of a = tanh(u), u Gaussian, for each entry of mean and log_std."""
    mean, log_std = np.expand_dims(mean, -1), np.expand_dims(log_std, -1)

    def integrand(z):
        u = mean + np.exp(log_std) * z
        return -scipy.stats.norm.pdf(z) * (scipy.stats.norm.logpdf(z) - log_std + 2 * (np.logaddexp(u, -u) - np.log(2)))

    return scipy.integrate.fixed_quad(integrand, -9, 9, n=200)[0]


@pytest.mark.usefixtures("float64")
def test_entropy_bonus_of_a_gaussian_is_its_entropy():
    """Each log_std has a gradient of 1 nat, the mean none."""
    params, actor = to_float64(random_params(6, 0.5)), dataclasses.replace(ACTOR, squash=False)
    batch, weight = whole_minibatch(random_batch(6, params))
    value, gradient = bonus_and_gradient(params, batch, weight, actor, soft_ppo.Args(ent_coef=0.3))
    std = np.exp(params["actor"]["params"]["actor_logstd"])
    np.testing.assert_allclose(value, -0.3 * scipy.stats.norm.entropy(scale=std).sum(), rtol=1e-10)
    np.testing.assert_allclose(gradient.pop("actor_logstd"), [-0.3, -0.3], rtol=1e-10)
    assert all(np.abs(g).max() < 1e-12 for g in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("float64")
def test_entropy_bonus_of_a_squashed_gaussian_is_its_entropy():
    """Its value and its gradients for log_std and mean, against SciPy's integral of -log density."""
    params = to_float64(random_params(7, 0.5))
    obs = np.ones((4000, OBS_DIM))
    mean, log_std = numpy_network(params["actor"], obs)[0], params["actor"]["params"]["actor_logstd"]
    rng = np.random.default_rng(7)
    quantiles = scipy.stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    z = np.stack([rng.permutation(quantiles) for _ in range(ACTION_DIM)], -1)
    zeros = np.zeros(4000)
    batch = residual_ppo.Batch(obs, mean + np.exp(log_std) * z, *[zeros] * 4, zeros == 0)
    value, gradient = bonus_and_gradient(params, *whole_minibatch(batch), ACTOR, soft_ppo.Args(ent_coef=0.3))

    by_mean, by_log_std = (
        (squashed_entropy(mean + dm, log_std + ds) - squashed_entropy(mean - dm, log_std - ds)) / 2e-5
        for dm, ds in ((1e-5, 0), (0, 1e-5))
    )
    np.testing.assert_allclose(value, -0.3 * squashed_entropy(mean, log_std).sum(), atol=1e-3)
    np.testing.assert_allclose(gradient["actor_logstd"], -0.3 * by_log_std, atol=1e-3)
    np.testing.assert_allclose(gradient["actor_mean.2"]["bias"], -0.3 * by_mean, atol=1e-3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("squash", [True, False])
def test_entropy_bonus_of_a_state_dependent_deviation_is_the_mean_of_its_entropies(squash):
    """Over the observations of valid steps; its gradient for every parameter is that of the mean of SciPy's integrals.

    The gradient for the mean passes through the network's hidden layer, as does that for the deviation.
    """
    actor = residual_ppo.Actor(ACTION_DIM, (4,), state_dependent_std=True, squash=squash)
    rng = np.random.default_rng(10)
    shapes = jax.eval_shape(actor.init, jax.random.PRNGKey(0), np.zeros(OBS_DIM))
    actor_params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape), shapes)
    params = to_float64(random_params(10)) | {"actor": actor_params}
    num_obs, copies = 5, 4000

    def distribution(params, obs):
        hidden = {"params": {"actor_mean.0": params["params"]["actor_mean.0"]}}
        head = params["params"]["actor_logstd"]
        return numpy_network(params, obs), np.tanh(numpy_network(hidden, obs)) @ head["kernel"] + head["bias"]

    def mean_entropy(params, obs):
        mean, log_std = distribution(params, obs)
        entropy = squashed_entropy(mean, log_std) if squash else scipy.stats.norm.entropy(mean, np.exp(log_std))
        return entropy.sum(-1).mean()

    obs = rng.normal(size=(num_obs, OBS_DIM))
    quantiles = scipy.stats.norm.ppf((np.arange(copies) + 0.5) / copies)
    z = np.stack([[rng.permutation(quantiles) for _ in range(ACTION_DIM)] for _ in range(num_obs)])
    mean, log_std = (x[..., None] for x in distribution(actor_params, obs))
    action = np.moveaxis(mean + np.exp(log_std) * z, 1, 2).reshape(-1, ACTION_DIM)
    valid = np.repeat(np.arange(num_obs) > 0, copies)  # all but those of the first observation
    batch = residual_ppo.Batch(np.repeat(obs, copies, 0), action, *[np.zeros(len(action))] * 4, valid)
    value, gradient = bonus_and_gradient(params, *whole_minibatch(batch), actor, soft_ppo.Args(ent_coef=0.3))

    np.testing.assert_allclose(value, -0.3 * mean_entropy(actor_params, obs[1:]), atol=1e-3)
    flat, unflatten = jax.flatten_util.ravel_pytree(actor_params)
    up, down = (
        np.array([mean_entropy(to_float64(unflatten(flat + x)), obs[1:]) for x in sign * 1e-5 * np.eye(flat.size)])
        for sign in (1, -1)
    )
    assert np.abs(up - down).max() > 0.1 * 2e-5
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(gradient)[0], -0.3 * (up - down) / 2e-5, atol=1e-3)


# ------------------------------------------------------------------------------------- update


def random_rollout(seed, state):
    """Transitions of the state's policy, with terminations, truncations and auto-reset steps; a reward."""
    rng = np.random.default_rng(seed)
    terminated, truncated, valid = ragged_rollout(seed, ARGS.num_steps, ARGS.num_envs)
    assert terminated[-1].any() and (truncated & ~terminated)[:-1].any()
    obs = np.float32(rng.normal(size=(ARGS.num_steps + 1, ARGS.num_envs, OBS_DIM)))
    mean, log_std = ACTOR.apply(state.params["actor"], obs[:-1])
    action = np.asarray(mean + np.exp(log_std) * np.float32(rng.normal(size=mean.shape)))
    reward = np.float32(rng.normal(size=valid.shape) + action[..., 0])
    basic, addon = np.float32(rng.normal(size=(2, *valid.shape)))
    return residual_ppo.Transitions(obs, action, basic, addon, terminated, truncated, valid), reward


@pytest.fixture(scope="module")
def first_state():
    """A state before the first iteration."""
    return residual_ppo.init_state(ARGS, ACTOR, OBS_DIM, KEY).replace(params=random_params(8, 0.5))


@pytest.fixture(scope="module")
def other_policy():
    """A prior, with a normaliser of its own."""
    stats = residual_ppo.RunningStats(np.float32([0.5, -0.3]), np.float32([2, 0.5]), np.float32(50))
    return residual_ppo.Policy(random_params(11, 0.5)["actor"], stats, ACTOR)


def distance(state, other):
    """Largest difference between the parameters of two states."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), state.params, other.params)))


def assert_same(tree, other):
    """All arrays are equal to the bit, and finite."""
    jax.tree.map(np.testing.assert_array_equal, tree, other)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def soft_update(args, state, transitions):
    """soft_ppo's iteration on 0.7 r + r_R at temperature 0.2."""
    return soft_ppo.soft_update(soft_ppo.ppo_loss, 0.7, 0.2, args, state, transitions, KEY)


def residual_update(args, prior, state, transitions):
    """residual_ppo's iteration."""
    return residual_ppo.residual_update(args, prior, state, transitions, KEY)


def updates(prior):
    """The iterations of the scripts: (state, transitions) -> (state, metrics)."""
    from_scratch = dataclasses.replace(ARGS, init_from_prior=False)
    return {
        "soft": partial(soft_update, soft_ppo.Args(**PPO)),
        "residual": partial(residual_update, ARGS, prior),
        "residual from scratch": partial(residual_update, from_scratch, prior),
    }


def test_what_auto_reset_steps_hold_changes_nothing_in_an_update(first_state):
    """Neither their actions, however unlikely, and rewards, nor the last observation of a terminated episode."""
    transitions, reward = random_rollout(12, first_state)
    expected = ppo_update(ARGS, first_state, transitions, reward)
    valid, terminated = transitions.valid, transitions.terminated
    rng = np.random.default_rng(0)
    garbage = np.float32(rng.normal(scale=[3, 1e25], size=transitions.action.shape))
    action = np.where(valid[..., None], transitions.action, garbage)
    obs = transitions.obs.copy()
    obs[1:][terminated] = 5
    transitions = transitions._replace(obs=obs, action=action)
    for garbage in (1e6, np.nan, np.inf):
        update = ppo_update(ARGS, first_state, transitions, np.where(valid, reward, np.float32(garbage)))
        assert_same(update, expected)
    assert distance(expected[0], first_state) > 1e-3


@pytest.mark.parametrize("name", ["soft", "residual", "residual from scratch"])
def test_rewards_and_log_probabilities_of_auto_reset_steps_change_nothing_in_an_iteration(
    first_state, other_policy, name
):
    """Nor in its statistics and metrics: basic and add-on reward NaN, an action without any probability."""
    update = updates(other_policy)[name]
    transitions, _ = random_rollout(12, first_state)
    valid = transitions.valid
    expected = update(first_state, transitions)
    for garbage in (np.nan, np.inf):
        basic, addon = (np.where(valid, x, garbage) for x in (transitions.basic_reward, transitions.addon_reward))
        action = np.where(valid[..., None], transitions.action, np.float32(1e25))
        actual = update(first_state, transitions._replace(action=action, basic_reward=basic, addon_reward=addon))
        assert_same(actual, expected)


@pytest.mark.parametrize("name", ["soft", "residual", "residual from scratch"])
def test_an_infinite_last_observation_of_a_terminated_episode_changes_nothing(first_state, other_policy, name):
    """Hopper, Walker2d and Ant end an episode when their state is not finite; its value is not needed."""
    update = updates(other_policy)[name]
    transitions, _ = random_rollout(12, first_state)
    expected = update(first_state, transitions)
    obs = transitions.obs.copy()
    obs[1:][transitions.terminated] = [np.inf, -np.inf]
    assert_same(update(first_state, transitions._replace(obs=obs)), expected)


def test_update_does_not_depend_on_the_unit_of_the_reward(first_state):
    """A hundredfold reward teaches the same: the scale is the deviation of the whole reward's discounted returns."""
    transitions, reward = random_rollout(12, first_state)
    state, metrics = ppo_update(ARGS, first_state, transitions, reward)
    state_100, metrics_100 = ppo_update(ARGS, first_state, transitions, 100 * reward)
    returns = np.full(reward.shape, np.nan)
    for env, start, end in episodes(transitions.terminated | transitions.truncated, transitions.valid):
        for t in range(start, end + 1):
            returns[t, env] = sum(ARGS.gamma ** (t - k) * np.float64(reward[k, env]) for k in range(start, t + 1))
    np.testing.assert_allclose(metrics["reward_scale"], np.nanstd(returns), rtol=1e-4)
    np.testing.assert_allclose(state.return_trace, np.nan_to_num(returns[-1]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics_100["reward_scale"], 100 * metrics["reward_scale"], rtol=1e-4)
    assert distance(state_100, state) < 0.01 * distance(state, first_state)


@pytest.mark.parametrize("name", ["soft", "residual from scratch"])
def test_observation_normaliser_sees_each_transition_once(first_state, other_policy, name):
    """And not the last observation of an episode, on which no action is taken."""
    transitions, _ = random_rollout(12, first_state)
    state, _ = updates(other_policy)[name](first_state, transitions)
    seen = transitions.obs[:-1][transitions.valid]
    np.testing.assert_allclose(state.obs_stats.count, len(seen), rtol=1e-5)
    np.testing.assert_allclose(state.obs_stats.mean, seen.mean(0), atol=1e-5)
    np.testing.assert_allclose(state.obs_stats.var, seen.var(0), rtol=1e-4)


def test_a_policy_that_starts_as_the_prior_keeps_the_priors_normaliser(first_state, other_policy):
    """So that it changes by learning alone; and learn it does."""
    state = first_state.replace(obs_stats=other_policy.obs_stats)
    after, _ = updates(other_policy)["residual"](state, random_rollout(12, first_state)[0])
    jax.tree.map(np.testing.assert_array_equal, after.obs_stats, other_policy.obs_stats)
    assert distance(after, state) > 1e-3


@pytest.mark.parametrize("squash", [True, False])
def test_an_iteration_learns_from_its_reward_alone(first_state, other_policy, squash):
    """Which NumPy computes: omega r + r_R - alpha log pi_theta, and r_R + omega' log pi - alpha_hat log pi_theta.

    A termination costs omega times what survival earns in the future. Reported: entropy and KL.
    """
    actor = dataclasses.replace(ACTOR, squash=squash)
    state, prior = first_state.replace(actor=actor), other_policy.replace(actor=actor)
    transitions, _ = random_rollout(12, first_state)
    *_, valid = transitions

    def log_prob(policy):
        obs = (np.float64(transitions.obs[:-1]) - policy.obs_stats.mean) / np.sqrt(policy.obs_stats.var)
        params, u = to_float64(policy.params), np.float64(transitions.action)
        density = scipy.stats.norm.logpdf(u, numpy_network(params, obs), np.exp(params["params"]["actor_logstd"]))
        return (density + squash * 2 * np.log(np.cosh(u))).sum(-1)

    ours, priors = log_prob(state.policy), log_prob(prior)
    args = dataclasses.replace(ARGS, survival_reward=3.0)  # omega 0.5, omega' 0.2, alpha_hat 0.3
    residual_reward = transitions.addon_reward + 0.2 * priors - 0.3 * ours
    jacobian = squash * 2 * np.log(np.cosh(np.float64(transitions.action))).sum(-1)  # of tanh, less it all is of u
    plain_reward = transitions.addon_reward + 0.2 * (priors - jacobian) - 0.3 * (ours - jacobian)
    forgone = transitions.terminated * sum(3 * ARGS.gamma**t for t in range(1, 3000))
    soft_reward = 0.7 * transitions.basic_reward + transitions.addon_reward - 0.2 * ours
    cases = [
        (soft_update(soft_ppo.Args(**PPO), state, transitions), soft_reward),
        (residual_update(args, prior, state, transitions), residual_reward - 0.5 * forgone),
        (
            residual_update(dataclasses.replace(args, jacobian=False), prior, state, transitions),
            plain_reward - 0.5 * forgone,
        ),
    ]
    for (actual, metrics), reward in cases:
        expected, expected_metrics = ppo_update(ARGS, state, transitions, np.float32(reward))
        assert distance(expected, state) > 1e-3
        assert distance(actual, expected) < 0.01 * distance(expected, state)
        np.testing.assert_allclose(metrics["reward_scale"], expected_metrics["reward_scale"], rtol=1e-5)
        np.testing.assert_allclose(metrics["entropy"], -ours[valid].mean(), rtol=1e-4)
        if "kl_to_prior" in metrics:
            np.testing.assert_allclose(metrics["kl_to_prior"], (ours - priors)[valid].mean(), rtol=1e-4)


def test_the_rate_that_follows_the_kl_is_the_policys_and_the_critic_keeps_the_schedule(first_state):
    """In one gradient step from the same state: a tenth of the policy's step, the whole of the critic's."""
    rollout, one_step = random_rollout(12, first_state), dataclasses.replace(ARGS, update_epochs=1, num_minibatches=1)
    state = first_state.replace(policy_rate=jnp.float32(ARGS.learning_rate / 10))
    fixed, following = (
        ppo_update(dataclasses.replace(one_step, desired_kl=kl), state, *rollout)[0].params for kl in (0, 0.04)
    )
    for part, share in (("actor", 0.1), ("critic", 1)):
        steps = [jax.tree.map(jnp.subtract, params[part], state.params[part]) for params in (fixed, following)]
        for whole, found in zip(*map(jax.tree.leaves, steps), strict=True):
            np.testing.assert_allclose(found, share * whole, rtol=1e-3, atol=1e-6)
        assert max(float(abs(x).max()) for x in jax.tree.leaves(steps[0])) > 1e-3


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
        distance(ppo_update(ARGS, first_state.replace(iteration=np.int32(i)), *rollout)[0], first_state)
        for i in (0, 5, 10)
    )
    assert halfway == pytest.approx(first / 2, rel=0.1)
    assert end == 0


@pytest.mark.usefixtures("float64")
def test_discount_rises_by_the_recursion_of_its_paper():
    """1 - gamma is multiplied by one number in each iteration; no rise if it began above, and none to a lower one."""
    factor, gammas = (0.003 / 0.01) ** (1 / 50), [0.99]
    for _ in range(50):
        gammas.append(1 - factor * (1 - gammas[-1]))
    found = soft_ppo.discount(0.99, 0.997, np.arange(51) / 50)
    np.testing.assert_allclose(found, gammas, rtol=1e-12)
    assert {soft_ppo.discount(start, 0.95, share) for start in (0.95, 0.99, 1.0) for share in (0, 0.5)} == {0.95}


def test_an_iteration_has_the_discount_of_its_share_of_the_run(first_state):
    """0.9 at first, 0.99 halfway to 0.999, as if that number were constant; not one number in both."""
    transitions, _ = random_rollout(12, first_state)
    rising = soft_ppo.Args(**PPO | {"gamma": 0.999, "anneal_lr": False}, initial_gamma=0.9)
    updated = []
    for iteration, gamma in ((0, 0.9), (5, 0.99)):  # of 10
        state = first_state.replace(iteration=np.int32(iteration))
        constant = dataclasses.replace(rising, gamma=gamma, initial_gamma=1.0)
        updated += [soft_update(args, state, transitions)[0] for args in (rising, constant)]
    assert max(distance(*updated[:2]), distance(*updated[2:])) < 1e-6
    assert distance(updated[0], updated[2]) > 1e-3


def test_residual_update_finds_the_soft_optimum_of_a_bandit():
    """Where it is known: a Gaussian before squashing, its precision omega'/alpha_hat of the prior's plus the task's.

    r_R = -k/2 (u - m)^2 + (omega' - alpha_hat) log |det d tanh(u)/du| gives it, to a squashed policy.
    """
    k, m = 1.0, -0.5
    prior_mean, prior_std = 0.5, 0.8
    args = residual_ppo.Args(
        num_envs=256,
        num_steps=4,
        num_minibatches=4,
        update_epochs=5,
        total_timesteps=256 * 4 * 60,
        learning_rate=0.01,
        gamma=0.0,
        omega_prime=0.2,
        alpha_hat=0.5,
        survival_reward=0.0,
        init_from_prior=False,
    )
    actor = residual_ppo.Actor(1, ())
    prior_params = {"actor_mean.0": {"kernel": np.zeros((1, 1)), "bias": np.array([prior_mean])}}
    prior_params = {"params": prior_params | {"actor_logstd": np.log([prior_std])}}
    stats = residual_ppo.RunningStats(np.zeros(1), np.ones(1), 1.0)
    prior = jax.tree.map(jnp.float32, residual_ppo.Policy(prior_params, stats, actor))
    obs, no = jnp.zeros((args.num_steps + 1, args.num_envs, 1)), jnp.zeros((args.num_steps, args.num_envs), bool)

    def iteration(state, words):
        key, words = jax.random.split(residual_ppo.wrap_key(words))
        words = jax.random.key_data(words)
        mean, log_std = actor.apply(state.params["actor"], obs[:-1])
        u = mean + jnp.exp(log_std) * jax.random.normal(key, obs[:-1].shape)
        det = (args.omega_prime - args.alpha_hat) * 2 * jnp.log(jnp.cosh(u))
        addon_reward = (-k / 2 * (u - m) ** 2 - det)[..., 0]
        transitions = residual_ppo.Transitions(obs, u, addon_reward, addon_reward, no, no, ~no)
        return residual_ppo.residual_update(args, prior, state, transitions, words)

    state = residual_ppo.init_state(args, actor, 1, KEY)
    words = np.stack([residual_ppo.seed_words(0, residual_ppo.ROLLOUT, i) for i in range(60)])
    state, _ = jax.jit(partial(lax.scan, iteration))(state, words)
    mean, log_std = actor.apply(state.params["actor"], obs[0, 0])
    precision = (args.omega_prime / prior_std**2 + k) / args.alpha_hat
    expected = (args.omega_prime * prior_mean / prior_std**2 + k * m) / args.alpha_hat / precision
    assert mean[0] == pytest.approx(expected, abs=0.02)
    assert jnp.exp(log_std)[0] == pytest.approx(precision**-0.5, rel=0.02)
