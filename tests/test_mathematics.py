"""The equations on small exact MDPs in float64: the scripts' functions against NumPy, autograd against differences.

An MDP is a tensor of transition probabilities (states, actions, states); what a row lacks to 1 is termination.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.special import log_softmax, logsumexp, rel_entr

import residual_ppo
import soft_ppo

NUM_STATES, NUM_ACTIONS = 6, 4
GAMMA = 0.9
ALPHA = 0.5  # of the prior
OMEGA, ALPHA_HAT = 0.7, 0.3  # of the customisation
OMEGA_PRIME = OMEGA * ALPHA
SURVIVAL_GAMMA, SURVIVAL_ALPHA = 0.95, 0.1  # of the MDPs in which the wrong actions end the episode
gae = jax.jit(residual_ppo.gae)


@pytest.fixture(autouse=True)
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def random_mdp(seed):
    """Transition probabilities with terminations, basic reward and add-on reward (states, actions)."""
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.full(NUM_STATES + 1, 0.5), (NUM_STATES, NUM_ACTIONS))[..., :-1]
    return probability, *rng.normal(size=(2, NUM_STATES, NUM_ACTIONS))


def soft_optimum(probability, reward, temperature, gamma=GAMMA):
    """log pi (..., states, actions) and V (..., states) of soft value iteration, for a batch of MDPs."""
    value = np.zeros(reward.shape[:-1])
    for _ in range(round(50 / (1 - gamma))):
        q = reward + gamma * (probability @ value[..., None, :, None])[..., 0]
        value = temperature * logsumexp(q / temperature, axis=-1)
    return log_softmax(q / temperature, axis=-1), value


def objective(probability, reward, policy, initial):
    """E[sum_t gamma^t reward(s_t, a_t)] from the initial distribution."""
    policy_probability = np.einsum("sa,saz->sz", policy, probability)
    return initial @ np.linalg.solve(np.eye(NUM_STATES) - GAMMA * policy_probability, (policy * reward).sum(-1))


def policy_gradient(probability, reward, policy, initial):
    """Policy gradient theorem for a table of logits: d(s) pi(a|s) (Q(s,a) - V(s)), d the discounted occupancy."""
    policy_probability = np.einsum("sa,saz->sz", policy, probability)
    occupancy = np.linalg.solve((np.eye(NUM_STATES) - GAMMA * policy_probability).T, initial)
    value = np.linalg.solve(np.eye(NUM_STATES) - GAMMA * policy_probability, (policy * reward).sum(-1))
    q = reward + GAMMA * probability @ value
    return occupancy[:, None] * policy * (q - value[:, None]), occupancy


def central_differences(function, x, step=1e-5):
    """Gradient of a scalar function of an array."""
    directions = step * np.eye(x.size).reshape(x.size, *x.shape)
    return np.array([(function(x + d) - function(x - d)) / (2 * step) for d in directions]).reshape(x.shape)


def softmax_policy(logits):
    """pi(a|s) and log pi(a|s) of a table of logits."""
    return np.exp(log_softmax(logits, axis=-1)), log_softmax(logits, axis=-1)


@pytest.mark.parametrize("seed", range(3))
def test_policy_gradient_on_soft_reward_is_the_gradient_of_the_maximum_entropy_objective(seed):
    """SPG is exact; an entropy bonus on top of it, or in its place, is not the gradient."""
    rng = np.random.default_rng(seed)
    probability, reward, _ = random_mdp(seed)
    logits, initial = rng.normal(size=(NUM_STATES, NUM_ACTIONS)), rng.dirichlet(np.ones(NUM_STATES))

    def maximum_entropy_objective(logits):
        policy, log_policy = softmax_policy(logits)
        entropy = -(policy * log_policy).sum(-1, keepdims=True)
        return objective(probability, reward + ALPHA * entropy, policy, initial)

    true_gradient = central_differences(maximum_entropy_objective, logits)
    policy, log_policy = softmax_policy(logits)
    soft_reward = np.asarray(soft_ppo.soft_reward(reward, log_policy, ALPHA))
    gradient, occupancy = policy_gradient(probability, soft_reward, policy, initial)
    np.testing.assert_allclose(gradient, true_gradient, atol=1e-8)

    def entropy_bonus(logits):
        policy, log_policy = softmax_policy(logits)
        return -ALPHA * occupancy @ (policy * log_policy).sum(-1)

    bonus_gradient = central_differences(entropy_bonus, logits)
    hard_gradient, _ = policy_gradient(probability, reward, policy, initial)
    for wrong_gradient in (gradient + bonus_gradient, hard_gradient + bonus_gradient):
        assert np.linalg.norm(wrong_gradient - true_gradient) > 0.05 * np.linalg.norm(true_gradient)


@jax.jit
def soft_value_iteration_by_gae(reward, temperature, weight, terminated, truncated):
    """log pi of soft value iteration whose backup is the script's gae of one step, for every (s, a, s', cut or not).

    weight, terminated, truncated: (states, actions, states + 1, 2); the last next state is the terminal one.
    """

    def q_of(value):
        next_value = jnp.append(value, 1e3)[:, None]  # the terminal state's value must not be looked at
        before, after, rewards = (
            jnp.broadcast_to(x, weight.shape).reshape(1, -1)
            for x in (value[:, None, None, None], next_value, reward[..., None, None])
        )
        flags = terminated.reshape(1, -1), truncated.reshape(1, -1)
        advantage = gae(rewards, jnp.concatenate([before, after]), *flags, GAMMA, 0.95)
        return ((advantage + before).reshape(weight.shape) * weight).sum((-2, -1))

    def backup(_, value):
        return temperature * jax.nn.logsumexp(q_of(value) / temperature, axis=-1)

    value = lax.fori_loop(0, 500, backup, jnp.zeros(NUM_STATES))
    return jax.nn.log_softmax(q_of(value) / temperature)


@pytest.mark.parametrize("seed", range(3))
def test_residual_optimum_equals_full_task_optimum_if_truncations_are_bootstrapped(seed):
    """r_R + omega' log pi has the optimum of omega r + r_R; not so if a truncation counts as a termination."""
    probability, reward, addon_reward = random_mdp(seed)
    prior_log_prob, _ = soft_optimum(probability, reward, ALPHA)
    full_task_optimum, _ = soft_optimum(probability, OMEGA * reward + addon_reward, ALPHA_HAT)

    cut = np.random.default_rng(seed).uniform(0, 0.9, (NUM_STATES, NUM_ACTIONS, 1))  # probability of a time limit
    weight = np.concatenate([probability, 1 - probability.sum(-1, keepdims=True)], -1)
    weight = np.stack([weight * (1 - cut), weight * cut], -1)
    terminated, truncated = np.zeros((2, *weight.shape), bool)
    terminated[:, :, -1] = truncated[..., 1] = True

    # The soft backup holds the entropy, so that alpha_hat is 0 in the reward.
    residual_reward = residual_ppo.residual_reward(addon_reward, prior_log_prob, 0.0, 0.0, OMEGA_PRIME, 0.0)
    right = soft_value_iteration_by_gae(residual_reward, ALPHA_HAT, weight, terminated, truncated)
    np.testing.assert_allclose(right, full_task_optimum, atol=1e-11)

    flags = terminated | truncated, truncated
    wrong = soft_value_iteration_by_gae(residual_reward, ALPHA_HAT, weight, *flags)
    wrong_full_task = soft_value_iteration_by_gae(OMEGA * reward + addon_reward, ALPHA_HAT, weight, *flags)
    for other in (full_task_optimum, wrong_full_task):
        assert np.abs(np.exp(wrong) - np.exp(other)).max() > 0.02


def deterministic_trajectories(rng, num_steps=60, num_envs=4):
    """A random deterministic MDP's next states (the terminal one last), and trajectories of random actions in it.

    Returns: next_state (states, actions); state (num_steps + 1, num_envs); action, terminated, truncated, valid.
    """
    next_state = rng.integers(NUM_STATES + 1, size=(NUM_STATES, NUM_ACTIONS))
    action = rng.integers(NUM_ACTIONS, size=(num_steps, num_envs))
    state = rng.integers(NUM_STATES, size=(num_steps + 1, num_envs))  # after a reset: a random one
    terminated, truncated = np.zeros((2, num_steps, num_envs), bool)
    valid = np.ones((num_steps, num_envs), bool)
    for env in range(num_envs):
        for t in range(num_steps):
            valid[t, env] = t == 0 or not (terminated | truncated)[t - 1, env]
            if valid[t, env]:
                state[t + 1, env] = next_state[state[t, env], action[t, env]]
                terminated[t, env] = state[t + 1, env] == NUM_STATES
                truncated[t, env] = rng.random() < 0.1
    state[:-1][~valid] = np.where(state[:-1] == NUM_STATES, 0, state[:-1])[~valid]
    return next_state, state, action, terminated, truncated, valid


@pytest.mark.parametrize("seed", range(3))
def test_shaping_hidden_in_log_pi_leaves_every_advantage_as_it_is(seed):
    """With a critic lower by omega V*, residual_reward has the advantages of omega r + r_R - alpha_hat log pi_theta."""
    rng = np.random.default_rng(seed)
    next_state, state, action, terminated, truncated, valid = deterministic_trajectories(rng)
    assert (terminated & valid).any() and (truncated & ~terminated).any() and (~valid).any()
    probability = np.eye(NUM_STATES + 1)[next_state][..., :-1]
    reward, addon_reward, logits = rng.normal(size=(3, NUM_STATES, NUM_ACTIONS))
    prior_log_prob, prior_value = soft_optimum(probability, reward, ALPHA)
    log_prob = log_softmax(logits, axis=-1)
    critic = rng.normal(size=NUM_STATES + 1)  # any critic will do

    visited = np.minimum(state[:-1], NUM_STATES - 1), action
    full_reward = OMEGA * reward + addon_reward - ALPHA_HAT * log_prob
    residual_reward = residual_ppo.residual_reward(addon_reward, prior_log_prob, log_prob, 0.0, OMEGA_PRIME, ALPHA_HAT)
    residual_critic = critic - OMEGA * np.append(prior_value, 7.0)
    ends = terminated, truncated
    full = gae(full_reward[visited], critic[state], *ends, GAMMA, 0.95)
    residual = gae(residual_reward[visited], residual_critic[state], *ends, GAMMA, 0.95)
    np.testing.assert_allclose(residual[valid], full[valid], atol=1e-12)

    ends = terminated | truncated, truncated
    full = gae(full_reward[visited], critic[state], *ends, GAMMA, 0.95)
    residual = gae(residual_reward[visited], residual_critic[state], *ends, GAMMA, 0.95)
    assert np.abs(residual - full)[truncated & ~terminated].max() > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_equal_omega_prime_and_alpha_hat_give_the_kl_regularised_objective(seed):
    """E[sum gamma^t (r_R + beta log pi - beta log pi_theta)] = E[sum gamma^t (r_R - beta KL(pi_theta||pi))]."""
    rng = np.random.default_rng(seed)
    beta = 0.4
    probability, _, addon_reward = random_mdp(seed)
    initial = rng.dirichlet(np.ones(NUM_STATES))
    policy, log_policy = softmax_policy(rng.normal(size=(NUM_STATES, NUM_ACTIONS)))
    prior, log_prior = softmax_policy(rng.normal(size=(NUM_STATES, NUM_ACTIONS)))
    reward = np.asarray(residual_ppo.residual_reward(addon_reward, log_prior, log_policy, 0.0, beta, beta))
    kl = rel_entr(policy, prior).sum(-1, keepdims=True)
    expected = objective(probability, addon_reward - beta * kl, policy, initial)
    np.testing.assert_allclose(objective(probability, reward, policy, initial), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_residual_q_learning_has_the_same_optimum(seed):
    """pi_hat of the fixed point of arXiv 2306.09526 is the soft optimum on residual_reward."""
    probability, reward, addon_reward = random_mdp(seed)
    prior_log_prob, _ = soft_optimum(probability, reward, ALPHA)
    q = np.zeros((NUM_STATES, NUM_ACTIONS))
    for _ in range(500):
        next_value = ALPHA_HAT * logsumexp((q + OMEGA_PRIME * prior_log_prob) / ALPHA_HAT, axis=-1)
        q = addon_reward + GAMMA * probability @ next_value
    residual_q_policy = log_softmax((q + OMEGA_PRIME * prior_log_prob) / ALPHA_HAT, axis=-1)

    residual_reward = residual_ppo.residual_reward(addon_reward, prior_log_prob, 0.0, 0.0, OMEGA_PRIME, 0.0)
    optimum, _ = soft_optimum(probability, np.asarray(residual_reward), ALPHA_HAT)
    np.testing.assert_allclose(residual_q_policy, optimum, atol=1e-12)


@pytest.mark.parametrize("reward_kind", ["soft", "residual"])
def test_no_gradient_flows_through_the_log_probabilities_of_the_reward(reward_kind):
    """They are numbers: the reward's gradient is exactly 0, that of the policy's log-probability is not."""
    rng = np.random.default_rng(0)
    obs, action, addon_reward = rng.normal(size=(8, 3)), rng.normal(size=(8, 2)), rng.normal(size=8)
    actor = residual_ppo.Actor(2, (4,))
    params = jax.jit(actor.init)(jax.random.PRNGKey(0), obs)
    stats = residual_ppo.RunningStats(np.zeros(3), np.ones(3), 1.0)

    def log_prob(params):
        return residual_ppo.policy_log_prob(residual_ppo.Policy(params, stats, actor), obs, action)

    def reward(params):
        if reward_kind == "soft":
            return soft_ppo.soft_reward(addon_reward, log_prob(params), 0.1)
        return residual_ppo.residual_reward(addon_reward, 2 * log_prob(params), log_prob(params), 0.0, 0.3, 0.1)

    reward_gradient, gradient = jax.jit(jax.jacrev(lambda p: (reward(p).sum(), log_prob(p).sum())))(params)
    assert all((g == 0).all() for g in jax.tree.leaves(reward_gradient))
    assert all((g != 0).any() for g in jax.tree.leaves(gradient))


# ---------------------------------------------------------------------------------- survival


class Worlds(NamedTuple):
    """Fifty random MDPs; leading axes (worlds, states, actions)."""

    endless: np.ndarray  # transition probabilities if no episode ended
    ending: np.ndarray  # and if a quarter of the actions, drawn at random, end the episode
    reward: np.ndarray
    addon_reward: np.ndarray


@pytest.fixture(scope="module")
def worlds():
    """Rewards that make it good to go on, and add-on rewards that are costs, as a survival term matters there."""
    rng = np.random.default_rng(0)
    shape = (50, 8, 4)
    endless = rng.dirichlet(np.full(shape[1], 0.5), shape)
    ending = endless * (rng.random(shape) >= 0.25)[..., None]
    return Worlds(endless, ending, rng.uniform(0.5, 1.5, shape), rng.uniform(-1.5, 0, shape))


def survival_optimum(probability, reward):
    """log pi of the soft optimum."""
    return soft_optimum(probability, reward, SURVIVAL_ALPHA, SURVIVAL_GAMMA)[0]


def residual_optimum(worlds, prior_log_prob, omega, survival_reward=0.0):
    """log pi of the soft optimum of r_R + omega' log pi and the termination reward, where episodes end."""
    terminated = worlds.ending.sum(-1) == 0
    end = residual_ppo.termination_reward(terminated, omega * survival_reward, SURVIVAL_GAMMA)
    weights = omega * SURVIVAL_ALPHA, 0.0
    reward = residual_ppo.residual_reward(worlds.addon_reward, prior_log_prob, 0.0, end, *weights)
    return survival_optimum(worlds.ending, np.asarray(reward))


def soft_value(worlds, omega, log_policy):
    """E[sum_t gamma^t (omega r + r_R - alpha_hat log pi)] where episodes end, from a uniform start; (worlds,)."""
    policy = np.exp(log_policy)
    policy_probability = np.einsum("wsa,wsaz->wsz", policy, worlds.ending)
    reward = (policy * (omega * worlds.reward + worlds.addon_reward - SURVIVAL_ALPHA * log_policy)).sum(-1)
    matrix = np.eye(reward.shape[1]) - SURVIVAL_GAMMA * policy_probability
    return np.linalg.solve(matrix, reward[..., None])[..., 0].mean(-1)


def survival_reward_of(probability, reward, log_policy):
    """c = mean r - alpha mean log pi over a policy's steps, episodes starting in any state; (worlds, 1, 1)."""
    policy = np.exp(log_policy)
    steps = np.einsum("wsa,wsaz->wsz", policy, probability)
    steps += (1 - steps.sum(-1, keepdims=True)) / steps.shape[-1]
    visits = np.linalg.matrix_power(steps, 4096)[:, 0]
    return (visits[..., None] * policy * (reward - SURVIVAL_ALPHA * log_policy)).sum((1, 2))[:, None, None]


@pytest.mark.parametrize("omega", [1.0, 2.0])
def test_termination_reward_restores_the_optimum_that_a_prior_blind_to_terminations_loses(worlds, omega):
    """The prior is soft-optimal in the same worlds but where no episode ends: its log pi knows nothing of an end.

    Without the term, the optimum of r_R + omega' log pi is, on the full task, far worse than the prior, as it ends the
    episodes; with it, its c from the prior's own steps, it is the full task's optimum to 1% in every world, to 0.1% in
    the mean.
    """
    prior = survival_optimum(worlds.endless, worlds.reward)
    survival_reward = survival_reward_of(worlds.endless, worlds.reward, prior)
    full, own, without, mended = (
        soft_value(worlds, omega, log_policy)
        for log_policy in (
            survival_optimum(worlds.ending, omega * worlds.reward + worlds.addon_reward),
            prior,
            residual_optimum(worlds, prior, omega),
            residual_optimum(worlds, prior, omega, survival_reward),
        )
    )
    assert np.mean(without < own) > 0.8
    assert without.mean() < 0.6 * own.mean() < 0.2 * full.mean()
    assert (mended > 0.99 * full).all()
    assert mended.mean() > 0.999 * full.mean()
    assert (mended < full + 1e-9).all()


@pytest.mark.parametrize("omega", [1.0, 2.0])
def test_termination_reward_costs_an_exactly_soft_optimal_prior_next_to_nothing(worlds, omega):
    """Which needs none: without it the optimum is the full task's, with it less by under a hundredth in the mean."""
    prior = survival_optimum(worlds.ending, worlds.reward)
    survival_reward = survival_reward_of(worlds.ending, worlds.reward, prior)
    full_optimum = survival_optimum(worlds.ending, omega * worlds.reward + worlds.addon_reward)
    without = residual_optimum(worlds, prior, omega)
    mended = residual_optimum(worlds, prior, omega, survival_reward)
    np.testing.assert_allclose(without, full_optimum, atol=1e-9)
    full, value = (soft_value(worlds, omega, log_policy) for log_policy in (full_optimum, mended))
    assert (survival_reward > 0.9).all()
    assert 0.99 * full.mean() < value.mean() < full.mean()


@pytest.mark.parametrize("omega", [1.0, 2.0])
def test_termination_reward_has_the_optimum_of_a_constant_per_step(worlds, omega):
    """omega c on every step, to 1e-9; where no episode ends, such a constant changes no optimum, elsewhere it does."""
    prior = survival_optimum(worlds.endless, worlds.reward)
    survival_reward = survival_reward_of(worlds.endless, worlds.reward, prior)
    reward = worlds.addon_reward + omega * SURVIVAL_ALPHA * prior
    endless, endless_constant, ending, ending_constant = (
        np.exp(survival_optimum(probability, reward + constant))
        for probability in (worlds.endless, worlds.ending)
        for constant in (0, omega * survival_reward)
    )
    np.testing.assert_allclose(endless_constant, endless, atol=1e-9)
    assert (np.abs(ending_constant - ending).max((1, 2)) > 0.1).all()
    actual = np.exp(residual_optimum(worlds, prior, omega, survival_reward))
    np.testing.assert_allclose(actual, ending_constant, atol=1e-9)
