"""Residual SAC's equations against closed forms, NumPy and differences, and its runs on real MuJoCo.

What soft_sac.py has word for word, as the buffer and the steps of the optimisers, is tested here for both.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

import residual_sac
import soft_sac

GAMMA, ALPHA, OMEGA, ALPHA_HAT = 0.9, 0.5, 0.7, 0.3
OBS_DIM, ACTION_DIM = 3, 2
ARGS = residual_sac.Args(
    num_envs=2, num_steps=8, updates_per_step=0.25, batch_size=16, buffer_size=64, learning_starts=0, gamma=GAMMA,
    omega=1.0, omega_prime=0.2, alpha_hat=ALPHA_HAT, survival_reward=0.0, critic_hidden_sizes=(5, 4), prior=None,
)  # fmt: skip


KEY = residual_sac.seed_words(1, residual_sac.UPDATE)


@pytest.fixture
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


# --------------------------------------------------------------------------------- exact MDPs


def soft_optimum(probability, reward, temperature):
    """log pi (states, actions) of soft value iteration."""
    value = np.zeros(len(reward))
    for _ in range(500):
        q = reward + GAMMA * probability @ value
        value = temperature * logsumexp(q / temperature, axis=-1)
    return log_softmax(q / temperature, axis=-1)


@partial(jax.jit, static_argnames="bootstrap")
def residual_soft_fixed_point(addon_reward, prior_log_prob, weight, bootstrap=True):
    """log pi_theta of the fixed point of the script's target, exact in s' and a'; pi_theta maximises its soft value.

    weight (states, actions, states + 1, 2): probability of what follows, the last state terminal, cut by a time limit
    or not; bootstrap: a truncation does not count as a termination.
    """
    num_states = len(addon_reward)
    terminated = jnp.zeros(weight.shape, bool).at[:, :, -1].set(True)
    if not bootstrap:
        terminated = terminated.at[..., 1].set(True)

    def policy_of(q):
        return jax.nn.log_softmax((q + OMEGA * ALPHA * prior_log_prob) / ALPHA_HAT)

    def backup(_, q):
        log_prob = policy_of(q)
        twins = jnp.stack([q, q + 1])  # of which the smaller counts
        soft = residual_sac.residual_value(twins, prior_log_prob, log_prob, OMEGA * ALPHA, ALPHA_HAT)
        value = jnp.append((jnp.exp(log_prob) * soft).sum(-1), 1e3)  # that of the terminal state must not be looked at
        shape = weight.shape
        reward, after = addon_reward[..., None, None], value[:, None]
        target = residual_sac.bellman_target(
            jnp.broadcast_to(reward, shape), terminated, jnp.broadcast_to(after, shape), GAMMA
        )
        return (weight * target).sum((-2, -1))

    return policy_of(jax.lax.fori_loop(0, 500, backup, jnp.zeros((num_states, addon_reward.shape[1]))))


@pytest.mark.parametrize("seed", range(3))
def test_residual_fixed_point_has_the_soft_optimum_of_the_full_task(float64, seed):
    """That of omega r + r_R at alpha_hat, terminations included; not so if a truncation counts as one."""
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.full(7, 0.5), (6, 4))  # the last one is termination
    reward, addon_reward = rng.normal(size=(2, 6, 4))
    prior_log_prob = soft_optimum(probability[..., :-1], reward, ALPHA)
    expected = soft_optimum(probability[..., :-1], OMEGA * reward + addon_reward, ALPHA_HAT)
    cut = rng.uniform(0, 0.9, (6, 4, 1))
    weight = np.stack([probability * (1 - cut), probability * cut], -1)
    actual = residual_soft_fixed_point(addon_reward, prior_log_prob, weight)
    np.testing.assert_allclose(actual, expected, atol=1e-8)
    wrong = residual_soft_fixed_point(addon_reward, prior_log_prob, weight, bootstrap=False)
    assert np.abs(np.exp(wrong) - np.exp(expected)).max() > 0.02


@pytest.mark.parametrize("seed", range(3))
def test_policy_of_the_fixed_point_is_where_the_soft_value_is_greatest(float64, seed):
    """The soft value's mean, as a function of the policy's logits: its gradient is 0 there, and nowhere near."""
    rng = np.random.default_rng(seed)
    q, prior_log_prob = rng.normal(size=(2, 4)), log_softmax(rng.normal(size=4))

    def mean_soft_value(logits):
        log_prob = jax.nn.log_softmax(logits)
        soft = residual_sac.residual_value(q, prior_log_prob, log_prob, OMEGA * ALPHA, ALPHA_HAT)
        return (jnp.exp(log_prob) * soft).sum()

    best = (q.min(0) + OMEGA * ALPHA * prior_log_prob) / ALPHA_HAT
    np.testing.assert_allclose(jax.grad(mean_soft_value)(best), 0, atol=1e-12)
    np.testing.assert_allclose(mean_soft_value(best), ALPHA_HAT * logsumexp(best))
    others = best + rng.normal(size=(20, 4))
    assert (jax.vmap(mean_soft_value)(others) < mean_soft_value(best)).all()


# ------------------------------------------------------------------- networks, beside NumPy


def random_policy(seed, squash=True, state_dependent_std=True):
    """A policy of two hidden layers with random parameters and normaliser."""
    rng = np.random.default_rng(seed)
    actor = residual_sac.Actor(ACTION_DIM, (6, 5), "relu", state_dependent_std, squash)
    shapes = jax.eval_shape(actor.init, jax.random.PRNGKey(0), np.ones(OBS_DIM))
    params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape), shapes)
    stats = residual_sac.RunningStats(rng.normal(size=OBS_DIM), rng.uniform(0.5, 2, OBS_DIM), 1.0)
    return residual_sac.Policy(params, stats, actor)


def random_state(seed, squash=True, dtype=np.float64):
    """A state of SAC whose actor, critics and target critics are all random and different."""
    policy, rng = random_policy(seed, squash), np.random.default_rng(seed + 100)
    state = jax.eval_shape(lambda: residual_sac.init_sac_state(ARGS, ALPHA_HAT, policy.actor, OBS_DIM, KEY))
    state = jax.tree.map(lambda x: np.zeros(x.shape, dtype if x.dtype == jnp.float32 else x.dtype), state)

    def draw(tree):
        return jax.tree.map(lambda x: dtype(0.5 * rng.normal(size=x.shape)), tree)

    params = {"actor": jax.tree.map(dtype, policy.params), "critic": draw(state.params["critic"])}
    stats, target_params = jax.tree.map(dtype, policy.obs_stats), draw(state.target_params)
    return state.replace(params=params, target_params=target_params, obs_stats=stats, alpha=dtype(ALPHA_HAT))


def numpy_layers(params, name, x, layer_norm=False):
    """A network with ReLU, after layer normalisation or not, between layers; params: the layers by name."""
    layers = sorted(int(key.rpartition(".")[2]) for key in params if key.startswith(f"{name}."))
    for i in layers:
        x = x @ params[f"{name}.{i}"]["kernel"] + params[f"{name}.{i}"]["bias"]
        if layer_norm and i < layers[-1]:
            norm = params[f"{name}_norm.{i}"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
        x = np.maximum(x, 0) if i < layers[-1] else x
    return x


def numpy_normalise(obs, stats):
    return np.clip((obs - stats.mean) / np.sqrt(stats.var + 1e-8), -10, 10)


def numpy_gaussian(policy, obs):
    """Mean and log_std of a policy."""
    params, x = policy.params["params"], numpy_normalise(obs, policy.obs_stats)
    if not policy.actor.state_dependent_std:
        return numpy_layers(params, "actor_mean", x), params["actor_logstd"]
    with_std = params | {"actor_logstd.0": params["actor_mean.0"], "actor_logstd.2": params["actor_mean.2"]}
    with_std["actor_logstd.4"] = params["actor_logstd"]
    return numpy_layers(params, "actor_mean", x), np.clip(numpy_layers(with_std, "actor_logstd", x), -20, 2)


def numpy_log_prob(policy, obs, action):
    mean, log_std = numpy_gaussian(policy, obs)
    log_prob = (-0.5 * ((action - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    return log_prob - np.log(1 - np.tanh(action) ** 2).sum(-1) if policy.actor.squash else log_prob


def numpy_q(state, params, obs, action):
    """The smaller of the two critics' values."""
    bounded = np.tanh(action) if state.actor.squash else action
    x = np.concatenate([numpy_normalise(obs, state.obs_stats), bounded], -1)
    names, layer_norm = ("critic_1", "critic_2"), ARGS.layer_norm
    return np.minimum(*(numpy_layers(params["params"], name, x, layer_norm)[..., 0] for name in names))


def numpy_soft_value(policy, prior, state, params, obs, noise, omega_prime):
    """min Q + omega' log pi - alpha_hat log pi_theta of the policy's actions."""
    mean, log_std = numpy_gaussian(policy, obs)
    action = mean + np.exp(log_std) * noise
    value = numpy_q(state, params, obs, action) - float(state.alpha) * numpy_log_prob(policy, obs, action)
    return value + omega_prime * numpy_log_prob(prior, obs, action)


def value_with(prior, omega_prime):
    """The soft value that residual_sac_update makes its steps with."""

    def value(q, obs, action, log_prob, alpha):
        prior_log_prob = residual_sac.policy_log_prob(prior, obs, action)
        return residual_sac.residual_value(q, prior_log_prob, log_prob, omega_prime, alpha)

    return value


@pytest.mark.parametrize(("squash", "state_dependent_std"), [(True, True), (True, False), (False, False)])
def test_actor_gradient_is_that_of_the_soft_value_through_the_action(float64, squash, state_dependent_std):
    """Against central differences in NumPy: through Q, through log pi_theta and through the prior's log pi."""
    rng, omega_prime, step = np.random.default_rng(1), 0.6, 1e-6
    state, prior = random_state(1, squash), random_policy(2, squash, state_dependent_std)
    obs, noise = rng.normal(size=(9, OBS_DIM)), rng.normal(size=(9, ACTION_DIM))
    gradient = jax.jit(jax.grad(residual_sac.actor_loss), static_argnums=1)
    actual = gradient(state.params["actor"], value_with(prior, omega_prime), state, obs, noise)

    def loss(params):
        policy = state.policy.replace(params=params)
        return -numpy_soft_value(policy, prior, state, state.params["critic"], obs, noise, omega_prime).mean()

    leaves, structure = jax.tree.flatten(state.params["actor"])
    for i, leaf in enumerate(leaves):
        direction = rng.normal(size=leaf.shape)
        ends = [loss(structure.unflatten([*leaves[:i], leaf + s * direction, *leaves[i + 1 :]])) for s in (step, -step)]
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((jax.tree.leaves(actual)[i] * direction).sum(), expected, rtol=1e-5, atol=1e-8)


def test_log_prob_of_a_saturated_action_is_exact():
    """In float32, at |u| = 30, where tanh(u) is 1: as Gaussian and Jacobian have it in float64."""
    policy = jax.tree.map(np.float32, random_policy(3))
    obs = np.zeros((1, OBS_DIM), np.float32)
    mean, log_std = residual_sac.action_distribution(policy, obs)
    noise = (np.float32([[30, -30]]) - mean) / np.exp(log_std)
    action, log_prob = residual_sac.sample_action(policy, obs, noise)
    z, u = np.float64(noise), np.float64(action)
    log_det = 2 * (np.log(2) - np.abs(u))  # log(1 - tanh(u)^2) far out
    expected = (-0.5 * z**2 - np.float64(log_std) - 0.5 * np.log(2 * np.pi) - log_det).sum(-1)
    np.testing.assert_allclose(np.abs(action), 30, rtol=1e-5)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


def trajectories(rng, num_steps, num_envs):
    """Random transitions, as Env.step would return them, auto-reset steps included."""
    shape = (num_steps, num_envs)
    obs = rng.normal(size=(num_steps + 1, num_envs, OBS_DIM))
    action, rewards = rng.normal(size=(*shape, ACTION_DIM)), rng.normal(size=(2, *shape))
    ends, valid = rng.choice(3, p=[0.6, 0.2, 0.2], size=shape), np.ones(shape, bool)
    for t in range(1, num_steps):
        valid[t] = ~valid[t - 1] | (ends[t - 1] == 0)
        ends[t][~valid[t]] = 0
    columns = (obs, action, *rewards, ends == 1, ends == 2, valid)
    return residual_sac.Transitions(*(np.float32(x) if x.dtype == float else x for x in columns))


def test_targets_of_what_is_stored_are_those_of_a_loop_over_the_trajectories(monkeypatch):
    """Terminations earn the survival term and have no future, truncations have one, auto-reset steps do not occur."""
    args = dataclasses.replace(ARGS, omega=0.5, survival_reward=2.0, num_steps=16, num_envs=3)
    rng = np.random.default_rng(5)
    state, prior = random_state(4, dtype=np.float32), jax.tree.map(np.float32, random_policy(5, True, False))
    transitions = trajectories(rng, 16, 3)
    assert (transitions.terminated & transitions.valid).any()
    assert (transitions.truncated & transitions.valid).any()
    assert (~transitions.valid).any()
    monkeypatch.setattr(residual_sac, "learn", lambda step, args, state, buffer, key: (state, {}))
    update = jax.jit(residual_sac.residual_sac_update.__wrapped__, static_argnums=0)
    _, buffer, _ = update(args, prior, state, residual_sac.empty_buffer(args, OBS_DIM, ACTION_DIM), transitions, KEY)
    stored = int(buffer.count)
    assert stored == transitions.valid.sum()
    noise = np.float32(rng.normal(size=(64, ACTION_DIM)))
    target = jax.jit(residual_sac.critic_target, static_argnums=(0, 1))
    actual, _ = target(value_with(prior, args.omega_prime), GAMMA, state, buffer.data, noise)

    expected = []
    for t in range(16):
        for env in range(3):
            if not transitions.valid[t, env]:
                continue
            reward = transitions.addon_reward[t, env]
            if transitions.terminated[t, env]:
                expected.append(reward - 0.5 * GAMMA * 2.0 / (1 - GAMMA))
                continue
            obs, z = transitions.obs[t + 1, env][None], noise[len(expected)][None]
            value = numpy_soft_value(state.policy, prior, state, state.target_params, obs, z, args.omega_prime)
            expected.append(reward + GAMMA * value[0])
    np.testing.assert_allclose(actual[:stored], expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- the ring


def test_ring_keeps_the_latest_transitions_and_no_auto_reset_step():
    """Against a list, over several turns of a ring that no iteration's length divides."""
    args, rng, kept = dataclasses.replace(ARGS, buffer_size=37), np.random.default_rng(0), []
    buffer, place = residual_sac.empty_buffer(args, OBS_DIM, ACTION_DIM), 0
    ring = [None] * 37
    store = jax.jit(residual_sac.store)
    for _ in range(9):
        transitions = trajectories(rng, 5, 4)
        columns = (transitions.obs[:-1], transitions.action, transitions.addon_reward, transitions.obs[1:])
        buffer = store(buffer, residual_sac.Experience(*columns, transitions.terminated), transitions.valid)
        for t in range(5):
            for env in range(4):
                if transitions.valid[t, env]:
                    ring[place % 37] = [x[t, env] for x in (*columns, transitions.terminated)]
                    place += 1
                    kept.append(columns[0][t, env])
        assert int(buffer.count) == place
        for i, row in enumerate(ring[: min(place, 37)]):
            for ours, theirs in zip(buffer.data, row, strict=True):
                np.testing.assert_array_equal(ours[i], theirs)
    assert place > 2 * 37
    latest = {tuple(row) for row in np.stack(kept[-37:])}
    assert {tuple(row) for row in np.asarray(buffer.data.obs)} == latest


def test_batches_are_drawn_from_all_that_was_stored_once_learning_starts():
    """From a ring that holds 1, 2, 3, 4, 5 and is empty beyond; at 4 transitions nothing is learned."""
    args = dataclasses.replace(ARGS, learning_starts=5, updates_per_step=1.0)
    buffer = residual_sac.empty_buffer(args, OBS_DIM, ACTION_DIM)
    data = buffer.data._replace(reward=buffer.data.reward.at[:5].set(np.arange(1, 6)))

    def step(state, batch, noise):
        share = {str(i): (batch.reward == i).mean() for i in range(6)}
        return state.replace(num_updates=state.num_updates + 1), share

    learn = jax.jit(partial(residual_sac.learn, step, args))
    for count in (4, 5):
        state, metrics = learn(random_state(0, dtype=np.float32), residual_sac.Buffer(data, np.int32(count)), KEY)
        share = [float(metrics[str(i)]) for i in range(6)]
        np.testing.assert_allclose(share[1:], 0.2 if count == 5 else 0, atol=0.1 if count == 5 else 0)
        assert share[0] == 0
        assert (int(state.num_updates), int(state.iteration)) == (16 if count == 5 else 0, 1)


# ---------------------------------------------------------------------------------------- steps


def test_policy_and_target_critics_move_when_they_are_due():
    """Each policy_frequency and target_network_frequency steps, the latter by tau; the critics move at every step."""
    args = dataclasses.replace(ARGS, policy_frequency=3, target_network_frequency=2, tau=0.3)
    state = random_state(7, dtype=np.float32)
    prior, rng = jax.tree.map(np.float32, random_policy(8)), np.random.default_rng(9)
    transitions = trajectories(rng, 16, 1)
    columns = (transitions.obs[:-1], transitions.action, transitions.addon_reward, transitions.obs[1:])
    batch = jax.tree.map(lambda x: x[:, 0], residual_sac.Experience(*columns, transitions.terminated))
    step = jax.jit(partial(residual_sac.gradient_step, value_with(prior, 0.2), args))
    moved = []
    late = state.replace(iteration=np.int32(0.75 * (args.total_timesteps // 16)))  # when a quarter of the rates is left
    early_and_late = [step(x, batch, np.zeros((2, 16, ACTION_DIM), np.float32))[0].params for x in (state, late)]
    for before, early, late in zip(*map(jax.tree.leaves, (state.params, *early_and_late)), strict=True):
        np.testing.assert_allclose(late - before, 0.25 * (early - before), rtol=0.05, atol=1e-6)
    for _ in range(6):
        after, metrics = step(state, batch, np.float32(rng.normal(size=(2, 16, ACTION_DIM))))
        trees = [(state.params[name], after.params[name]) for name in ("critic", "actor")]
        trees.append((state.target_params, after.target_params))
        moved.append([any((a != b).any() for a, b in zip(*map(jax.tree.leaves, pair), strict=True)) for pair in trees])
        if moved[-1][2]:
            expected = jax.tree.map(lambda t, p: 0.7 * t + 0.3 * p, state.target_params, after.params["critic"])
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.target_params, expected)
        assert np.isfinite(float(metrics["value_loss"]))
        state = after
    assert np.transpose(moved).tolist() == [[True] * 6, [True, False, False] * 2, [True, False] * 3]


def test_without_the_prior_it_is_soft_sac_on_the_addon_reward_alone():
    """omega' = 0, omega = 0: three iterations of each script end with the same networks."""
    args = dataclasses.replace(ARGS, omega=0.0, omega_prime=0.0, init_from_prior=False)
    names = {field.name for field in dataclasses.fields(soft_sac.Args)}
    same = {name: x for name, x in vars(args).items() if name in names and name not in ("addon", "hidden_sizes")}
    soft_args, prior = soft_sac.Args(**same, alpha=ALPHA_HAT), jax.tree.map(np.float32, random_policy(8))
    start = ours = theirs = random_state(0, dtype=np.float32)
    buffers = (script.empty_buffer(args, OBS_DIM, ACTION_DIM) for script in (residual_sac, soft_sac))
    our_buffer, their_buffer = buffers
    for seed in range(3):
        transitions = trajectories(np.random.default_rng(seed), 8, 2)
        ours, our_buffer, _ = residual_sac.residual_sac_update(args, prior, ours, our_buffer, transitions, KEY)
        theirs, their_buffer, _ = soft_sac.soft_sac_update(soft_args, theirs, their_buffer, transitions, KEY)
    for before, a, b in zip(*map(jax.tree.leaves, (start.params, ours.params, theirs.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert (a != before).any()


# ---------------------------------------------------------------------------- bandits, closed form


class Quadratic(nn.Module):
    """Two critics that are polynomials in a single action, so that a quadratic reward is learned exactly."""

    @nn.compact
    def __call__(self, obs, action):
        features = jnp.concatenate([action, action**2], -1)
        return jnp.stack([nn.Dense(1, name=name)(features)[..., 0] for name in ("one", "two")])


BANDIT = {
    "num_envs": 8, "num_steps": 16, "updates_per_step": 1.0, "batch_size": 64, "buffer_size": 512,
    "total_timesteps": 512, "learning_starts": 0, "q_lr": 0.02, "policy_lr": 0.004, "gamma": 0.9,
    "anneal_lr": False,
}  # fmt: skip


def play_bandit(script, update, args, alpha, curvature, slope, iterations=40):
    """The Gaussian (mean, deviation) that is learned where u earns slope u - curvature u^2 / 2; and the state."""
    actor, critic = script.Actor(1, (), "relu", state_dependent_std=False, squash=False), Quadratic()
    inputs = jax.random.PRNGKey(0), np.zeros(1), np.zeros(1)
    shapes = {"actor": jax.eval_shape(actor.init, *inputs[:2]), "critic": jax.eval_shape(critic.init, *inputs)}
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    opt_state = {name: script.ADAM.init(x) for name, x in params.items()}
    stats = script.RunningStats(jnp.zeros(1), jnp.ones(1), jnp.float32(1))
    rest = (stats, jnp.float32(alpha), jnp.int32(0), jnp.int32(0), actor, critic)
    state = script.SACState(params, params["critic"], opt_state, *rest)
    buffer, rng = script.empty_buffer(args, 1, 1), np.random.default_rng(0)
    flags = np.ones((16, 8), bool), np.zeros((16, 8), bool), np.ones((16, 8), bool)
    for i in range(iterations):
        action = np.float32(rng.uniform(-3, 3, (16, 8, 1)))
        reward = (slope * action - curvature * action**2 / 2)[..., 0]
        transitions = script.Transitions(np.zeros((17, 8, 1), np.float32), action, 0 * reward, reward, *flags)
        state, buffer, _ = update(state, buffer, transitions, script.seed_words(0, script.UPDATE, i))
    params = state.params["actor"]["params"]
    return float(params["actor_mean.0"]["bias"][0]), float(np.exp(params["actor_logstd"][0])), state


def test_customised_bandit_is_the_product_of_prior_and_addon_reward():
    """pi_theta ~ exp((r_R + omega' log pi) / alpha_hat): for a Gaussian prior and quadratic r_R a known Gaussian."""
    omega_prime, prior_mean, prior_std, curvature, slope = 0.5, -1.0, 0.5, 1.0, 1.5
    args = residual_sac.Args(**BANDIT, omega=1.0, omega_prime=omega_prime, alpha_hat=ALPHA_HAT, survival_reward=0.0)
    actor = residual_sac.Actor(1, (), "relu", state_dependent_std=False, squash=False)
    layer = {"kernel": np.zeros((1, 1), np.float32), "bias": np.float32([prior_mean])}
    params = {"params": {"actor_mean.0": layer, "actor_logstd": np.log(np.float32([prior_std]))}}
    stats = residual_sac.RunningStats(np.zeros(1, np.float32), np.ones(1, np.float32), np.float32(1))
    update = partial(residual_sac.residual_sac_update, args, residual_sac.Policy(params, stats, actor))
    mean, deviation, _ = play_bandit(residual_sac, update, args, ALPHA_HAT, curvature, slope)
    precision = curvature + omega_prime / prior_std**2
    assert mean == pytest.approx((slope + omega_prime * prior_mean / prior_std**2) / precision, abs=0.02)
    assert deviation == pytest.approx((ALPHA_HAT / precision) ** 0.5, rel=0.05)


def test_soft_bandit_finds_the_softmax_of_the_reward_and_the_temperature_of_the_target_entropy():
    """pi_theta ~ exp(r / alpha): for a quadratic r a Gaussian of variance alpha / curvature, from 10 alpha."""
    deviation = np.exp(-0.5 * np.log(2 * np.pi * np.e))  # of a Gaussian of entropy 0
    args = soft_sac.Args(**BANDIT, alpha=20 * deviation**2, auto_alpha=True, target_entropy=0.0)
    update = partial(soft_sac.soft_sac_update, args)
    mean, actual, state = play_bandit(soft_sac, update, args, args.alpha, 2.0, 1.5, iterations=60)
    assert mean == pytest.approx(0.75, abs=0.02)
    assert actual == pytest.approx(deviation, rel=0.05)
    assert float(state.alpha) == pytest.approx(2 * deviation**2, rel=0.1)


@pytest.mark.parametrize(("entropy", "expected"), [(-2.5, 1.05127), (-3.0, 1.10517), (-9.0, 1.10517), (5.0, 0.904837)])
def test_temperature_rises_while_the_entropy_is_below_its_target(entropy, expected):
    """By the factor exp(0.1 error), the error at most 1 nat."""
    assert float(soft_sac.adapted_temperature(2.0, entropy, -2.0, 0.1)) == pytest.approx(2 * expected, rel=1e-4)
