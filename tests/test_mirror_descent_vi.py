"""Mirror descent value iteration does what its paper says, and what NumPy, written out in loops, says."""

import csv
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import ROOT, run_script, script_path

import mirror_descent_vi as vi

EXACT, NOISY, SAMPLED = ("gaussian", 0.0), ("gaussian", 0.3), ("sampled", 0.0)


@pytest.fixture(autouse=True)
def float64():
    """As main computes."""
    with jax.enable_x64(True):
        yield


def one_of(mdps: vi.MDP, i: int = 0) -> vi.MDP:
    """An MDP of a batch."""
    return jax.tree.map(lambda x: jnp.array(x[i]), mdps)


def some_garnets(num_mdps=5, states=6, actions=3, gamma=0.9, seed=0) -> vi.MDP:
    return vi.garnets(np.random.default_rng(seed), (num_mdps, states, actions), 2, gamma)


STEP = jax.jit(vi.advance, static_argnums=(0, 1))
PRIOR = jax.jit(jax.vmap(vi.soft_prior, (0, None, None, 0, None)))
OPTIMUM = jax.jit(jax.vmap(vi.optimal_q, (0, None)))
STEPS = np.array([1, 2, 3, 5, 10, 50, 500])


def iterates(scheme, noise, lambda_, tau, count=60, gamma=0.9, start=None, mdp=None) -> list[vi.Iterate]:
    """Iterates 0, 1, ..., count on a Garnet."""
    mdp = one_of(some_garnets(gamma=gamma)) if mdp is None else mdp
    found = [vi.start_iterate(mdp, jnp.array(tau)) if start is None else start]
    weights = (jnp.array(lambda_), jnp.array(tau), jnp.array(noise[1]))
    for k in range(count):
        found.append(STEP(scheme, (noise[0], 2), mdp, jax.random.PRNGKey(7), weights, jnp.array(k), found[-1]))
    return [jax.device_get(x) for x in found]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# ---------------------------------------------------------------------------------- equations


@pytest.mark.parametrize(("lambda_", "tau"), [(0.5, 0.2), (2.0, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_mirror_descent_is_its_equations_in_plain_loops(lambda_, tau):
    """Policies and q-values against loops over states and actions, with the same errors."""
    mdp = one_of(some_garnets())
    found = iterates("mirror_descent", NOISY, lambda_, tau, 25)
    num_states, num_actions = mdp.reward.shape
    q, policy = np.zeros((num_states, num_actions)), np.full((num_states, num_actions), 1 / num_actions)
    for k in range(25):
        error = found[k + 1].error_sum - found[k].error_sum
        new, value = np.zeros_like(policy), np.zeros(num_states)
        for s in range(num_states):
            if lambda_ + tau == 0:
                new[s, np.argmax(q[s])] = 1.0
                if k == 0:
                    new[s] = 1 / num_actions
            else:
                scores = [
                    policy[s, a] ** (lambda_ / (lambda_ + tau)) * np.exp(q[s, a] / (lambda_ + tau))
                    for a in range(num_actions)
                ]
                new[s] = np.array(scores) / sum(scores)
            for a in range(num_actions):
                if new[s, a] > 0:
                    value[s] += new[s, a] * (
                        q[s, a] - lambda_ * np.log(new[s, a] / policy[s, a] if lambda_ else 1) - tau * np.log(new[s, a])
                    )
        for s in range(num_states):
            for a in range(num_actions):
                backup = sum(mdp.transition[s, a, t] * value[t] for t in range(num_states))
                q[s, a] = mdp.reward[s, a] + mdp.gamma * backup + error[s, a]
        policy = new
        np.testing.assert_allclose(np.exp(found[k + 1].log_policy), policy, atol=1e-11)
        np.testing.assert_allclose(found[k + 1].q, q, atol=1e-10)


@pytest.mark.parametrize("noise", [NOISY, SAMPLED])
@pytest.mark.parametrize(("lambda_", "tau"), [(0.5, 0.2), (2.0, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_dual_averaging_has_the_policies_of_mirror_descent(noise, lambda_, tau):
    ours, theirs = (iterates(scheme, noise, lambda_, tau) for scheme in ("mirror_descent", "dual_averaging"))
    assert max(np.abs(x.error_sum).max() for x in ours) > 0.1
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.exp(x.log_policy), np.exp(y.log_policy), atol=1e-10)
        np.testing.assert_allclose(x.q, y.q, atol=1e-10)


@pytest.mark.parametrize(("lambda_", "tau"), [(0.5, 0.2), (2.0, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_munchausen_value_iteration_is_mirror_descent(lambda_, tau):
    """From q_0 + lambda log pi_0, its q is MD-VI's q + lambda log pi."""
    ours = iterates("mirror_descent", NOISY, lambda_, tau)
    start = vi.start_iterate(one_of(some_garnets()), jnp.array(tau))
    theirs = iterates("munchausen", NOISY, lambda_, tau, start=start._replace(q=start.q + lambda_ * start.log_policy))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.exp(x.log_policy), np.exp(y.log_policy), atol=1e-10)
        if lambda_:
            np.testing.assert_allclose(x.q + lambda_ * x.log_policy, y.q, atol=1e-9)


def test_munchausen_and_conservative_value_iteration_are_as_their_papers_write_them():
    """With alpha = lambda / (lambda + tau) and temperature lambda + tau; in NumPy, without log-sum-exp."""
    mdp, lambda_, tau = one_of(some_garnets()), 0.5, 0.2
    found = iterates("munchausen", NOISY, lambda_, tau, 30)
    alpha, total = lambda_ / (lambda_ + tau), lambda_ + tau
    munchausen = conservative = np.zeros_like(mdp.reward)
    for before, after in zip(found, found[1:], strict=False):
        error = after.error_sum - before.error_sum
        policy = softmax(munchausen / total)
        value = (policy * (munchausen - total * np.log(policy))).sum(-1)
        munchausen = mdp.reward + alpha * total * np.log(policy) + mdp.gamma * mdp.transition @ value + error
        value = total * np.log(np.exp(conservative / total).sum(-1))
        gap = conservative - value[:, None]
        conservative = mdp.reward + alpha * gap + mdp.gamma * mdp.transition @ value + error
        np.testing.assert_allclose(after.q, munchausen, atol=1e-10)
        np.testing.assert_allclose(after.q, conservative, atol=1e-10)


def test_policy_is_the_softmax_of_the_average_of_all_q_values():
    """Without entropy: temperature lambda / k on the plain average; with it: tau on a moving average."""
    plain = iterates("mirror_descent", NOISY, 2.0, 0.0)
    for k in range(1, len(plain)):
        average = np.mean([x.q for x in plain[:k]], axis=0)
        np.testing.assert_allclose(np.exp(plain[k].log_policy), softmax(average * k / 2.0), atol=1e-10)
    with_entropy, h, beta = iterates("mirror_descent", NOISY, 0.5, 0.2), 0.0, 0.5 / 0.7
    for before, after in zip(with_entropy, with_entropy[1:], strict=False):
        h = beta * h + (1 - beta) * before.q
        np.testing.assert_allclose(np.exp(after.log_policy), softmax(h / 0.2), atol=1e-10)


def test_mirror_descent_without_weights_is_value_iteration():
    mdp, q = one_of(some_garnets()), 0.0
    for before, after in zip(*(lambda x: (x, x[1:]))(iterates("mirror_descent", NOISY, 0.0, 0.0)), strict=False):
        backup = mdp.reward + mdp.gamma * mdp.transition @ before.q.max(-1)
        q = backup + (after.error_sum - before.error_sum)
        np.testing.assert_allclose(after.q, q, atol=1e-12)


@pytest.mark.parametrize("scheme", vi.SCHEMES)
def test_small_weights_have_the_limits_of_none(scheme):
    """A tenth of the weight, a tenth of the difference: to soft value iteration, value iteration, MD-VI(1, 0)."""
    for fixed, small in (((0.0, 0.5), (1.0, 0.0)), ((0.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (0.0, 1.0))):
        limit = iterates(scheme, EXACT, *fixed, 12)[-1]
        gaps = []
        for weight in (1e-3, 1e-4):
            pair = [x + weight * y for x, y in zip(fixed, small, strict=True)]
            gaps.append(
                np.abs(np.exp(iterates(scheme, EXACT, *pair, 12)[-1].log_policy) - np.exp(limit.log_policy)).max()
            )
        assert gaps[0] < 0.1
        assert gaps[1] <= 0.2 * gaps[0]


def test_a_small_kl_penalty_alone_still_averages():
    """With tau = 0 the limit of small lambda is no value iteration: its policy is greedy in the average of all q."""
    small, none = (iterates("mirror_descent", NOISY, x, 0.0) for x in (1e-6, 0.0))
    greedy = [np.argmax(np.mean([x.q for x in small[:k]], axis=0), axis=-1) for k in range(2, 61)]
    np.testing.assert_array_equal([x.log_policy.argmax(-1) for x in small[2:]], greedy)
    assert any((x.log_policy.argmax(-1) != y.log_policy.argmax(-1)).any() for x, y in zip(small, none, strict=True))


def test_soft_maximum_stays_exact_where_exponentials_would_overflow():
    x = jnp.array([[1e4, 1e4 - 1e-3, -1e6]])
    for temperature in (1e-3, 1.0, 1e3):
        value, log_policy = vi.soft_greedy(x, jnp.array(temperature))
        shifted = np.exp((np.array(x[0], np.longdouble) - 1e4) / temperature)
        assert value[0] == pytest.approx(1e4 + temperature * float(np.log(shifted.sum())), rel=1e-14)
        np.testing.assert_allclose(
            np.exp(log_policy[0]), (shifted / shifted.sum()).astype(float), rtol=1e-6, atol=1e-300
        )


def test_at_temperature_0_the_best_actions_share():
    value, log_policy = vi.soft_greedy(jnp.array([[1.0, 3.0, 3.0, 2.0]]), jnp.zeros(()))
    assert value[0] == 3
    np.testing.assert_allclose(np.exp(log_policy[0]), [0, 0.5, 0.5, 0])


# ------------------------------------------------------------------------------------- errors


def test_schemes_see_the_same_draws():
    """Normal errors are equal; samples are of the same next states, so that equal values have equal errors."""
    errors = [iterates(x, NOISY, 0.5, 0.2, 5)[-1].error_sum for x in vi.SCHEMES]
    errors += [iterates("mirror_descent", NOISY, 0.0, 0.0, 5)[-1].error_sum]
    for error in errors[1:]:
        np.testing.assert_array_equal(error, errors[0])


def test_sampled_backups_are_right_in_the_mean_with_the_variance_of_their_samples():
    mdp, value = one_of(some_garnets()), jnp.arange(6.0) ** 2
    keys = jax.random.split(jax.random.PRNGKey(0), 4000)
    errors = jax.vmap(lambda key: vi.evaluation_error(("sampled", 4), 0.0, key, mdp, value))(keys)
    variance = mdp.gamma**2 * (mdp.transition @ value**2 - (mdp.transition @ value) ** 2) / 4
    assert variance.max() > 1
    assert np.abs(errors.mean(0) / np.sqrt(np.maximum(variance, 1e-9) / 4000)).max() < 4.5
    np.testing.assert_allclose(errors.var(0), variance, rtol=0.25, atol=1e-3)


def test_sample_past_the_last_state_is_the_end_and_worth_nothing():
    mdp = vi.MDP(jnp.zeros((2, 1, 2)), jnp.zeros((2, 1)), jnp.array(0.9))
    error = vi.evaluation_error(("sampled", 3), 0.0, jax.random.PRNGKey(0), mdp, jnp.array([5.0, 7.0]))
    np.testing.assert_array_equal(error, 0)


# -------------------------------------------------------------------------- losses and bounds


@pytest.mark.parametrize("tau", [0.0, 0.4])
@pytest.mark.parametrize("gamma", [0.5, 0.9999])
def test_policy_evaluation_is_a_linear_system(tau, gamma):
    mdp = one_of(some_garnets(gamma=gamma))
    policy = softmax(np.random.default_rng(1).normal(size=mdp.reward.shape))
    size = policy.size
    entropy_later = np.zeros((6, 3))
    matrix = np.eye(size)
    for s in range(6):
        for a in range(3):
            for t in range(6):
                entropy_later[s, a] -= gamma * mdp.transition[s, a, t] * tau * (policy[t] @ np.log(policy[t]))
                for b in range(3):
                    matrix[3 * s + a, 3 * t + b] -= gamma * mdp.transition[s, a, t] * policy[t, b]
    expected = np.linalg.solve(matrix, np.ravel(mdp.reward + entropy_later)).reshape(6, 3)
    np.testing.assert_allclose(vi.evaluate_policy(mdp, jnp.log(policy), tau), expected, rtol=1e-9)


@pytest.mark.parametrize("tau", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.9999])
def test_optimal_q_solves_the_optimality_equation(tau, gamma):
    mdps = some_garnets(gamma=gamma)
    for mdp, q in zip((one_of(mdps, i) for i in range(5)), OPTIMUM(mdps, tau), strict=True):
        value = q.max(-1)
        if tau > 0:
            value = value + tau * np.log(np.exp((q - q.max(-1, keepdims=True)) / tau).sum(-1))
        residual = q - (mdp.reward + gamma * mdp.transition @ value)
        assert np.abs(residual).max() < 1e-11 * (1 + np.abs(q).max())


def random_losses_and_bounds(count, seed=0):
    """On Garnets of random discount, with errors of random kind and scale: losses, bounds and weights."""
    rng = np.random.default_rng(seed)
    records = []
    for noise, regular in ((x, y) for x in ("gaussian", "sampled") for y in (False, True)):
        for _ in range(count // 20):
            mdps = vi.garnets(rng, (5, 6, 3), 2, 0.0)
            mdps = mdps._replace(gamma=1 - 10 ** rng.uniform(-3, -0.05, 5))
            lambdas = np.append(10 ** rng.uniform(-3, 3, 3), 0.0)
            taus = 10 ** rng.uniform(-3, 1.5, 4) if regular else np.zeros(4)
            keys = jax.random.split(jax.random.PRNGKey(rng.integers(2**31)), 5)
            weights = (lambdas, taus, 10 ** rng.uniform(-3, 1, 4))
            record = vi.iterate_scheme("mirror_descent", (noise, 1), STEPS, mdps, keys, weights)
            averages = np.broadcast_to(((taus == 0) & (lambdas > 0))[:, None, None], record["loss"].shape)
            records.append((np.where(averages, record["loss"], record["regularised_loss"]), record["bound"], averages))
    return (np.array(x) for x in zip(*records, strict=True))


def test_bounds_are_never_crossed():
    """On 100 random Garnets; both theorems, and value iteration."""
    loss, bound, averages = random_losses_and_bounds(100)
    assert loss.shape[0] * loss.shape[2] == 100
    assert (loss <= bound).all()
    assert (loss >= -1e-9).all()
    assert averages.any()
    assert (loss > 0.05 * bound)[~averages].any()
    assert (loss > 0.05 * bound)[averages].any()


@pytest.mark.parametrize(("lambda_", "tau"), [(1.5, 0.0), (1.5, 0.5), (0.0, 0.5), (0.0, 0.0)])
def test_bounds_are_computed_from_all_errors(lambda_, tau):
    """Against sums over the errors of each step, as the theorems write them."""
    mdp, k = one_of(some_garnets()), 30
    found = iterates("mirror_descent", NOISY, lambda_, tau, k)
    errors = [after.error_sum - before.error_sum for before, after in zip(found, found[1:], strict=False)]
    gamma, r_max, beta = 0.9, np.abs(mdp.reward).max(), lambda_ / (lambda_ + tau) if lambda_ else 0.0
    if lambda_ and not tau:
        v_max = max(r_max / (1 - gamma), *(np.abs(x.q).max() for x in found)) + lambda_ * np.log(3) / (1 - gamma)
        expected = 2 / (1 - gamma) * np.abs(np.mean(errors, axis=0)).max() + 4 / (1 - gamma) * v_max / k
        bound = vi.averaged_bound(mdp, found[k], k, lambda_)
    else:
        expected, v_max = 0.0, (r_max + tau * np.log(3)) / (1 - gamma)
        for j in range(k):
            moving = sum((1 - beta) * beta ** (j - i) * errors[i - 1] for i in range(1, j + 1))
            expected += gamma ** (k - 1 - j) * (2 / (1 - gamma) * np.abs(moving).max() + 2 * v_max * beta**j)
        bound = vi.discounted_bound(mdp, found[k])
    assert float(bound) == pytest.approx(expected, rel=1e-10)


def test_errors_average_under_a_kl_penalty_and_accumulate_without():
    """Ten times the iterations: MD-VI's loss falls fivefold at least, value iteration's does not halve."""
    mdps, keys = some_garnets(), jax.random.split(jax.random.PRNGKey(0), 5)
    weights = (np.array([0.0, 0.0, 1.0, 10.0]), np.zeros(4), np.ones(4))
    loss = np.asarray(vi.iterate_scheme("mirror_descent", ("gaussian", 1), STEPS, mdps, keys, weights)["loss"]).mean(1)
    assert loss[0, 6] > 0.5 * loss[0, 5]
    assert (loss[2:, 6] < 0.2 * loss[2:, 5]).all()
    assert (loss[2:, 6] < 0.05 * loss[0, 6]).all()


EXTREMES = (0.0, 1e-3, 1.0, 1e3)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.9999])
def test_losses_and_bounds_stay_finite_for_all_weights(gamma):
    mdps, keys = some_garnets(gamma=gamma), jax.random.split(jax.random.PRNGKey(0), 5)
    for lambda_ in EXTREMES:
        weights = (np.full(4, lambda_), np.array(EXTREMES), np.ones(4))
        for x in vi.iterate_scheme("mirror_descent", ("gaussian", 1), STEPS, mdps, keys, weights).values():
            assert np.isfinite(x).all()


@pytest.mark.parametrize("scheme", vi.SCHEMES)
def test_policies_are_distributions_for_all_weights(scheme):
    for lambda_ in EXTREMES:
        for tau in EXTREMES:
            last = iterates(scheme, NOISY, lambda_, tau, 40, gamma=0.9999)[-1]
            assert np.isfinite(last.q).all()
            np.testing.assert_allclose(np.exp(last.log_policy).sum(-1), 1, rtol=1e-9)


# ------------------------------------------------------------------------------ customisation


KEYS = np.array([[0, i] for i in range(5)], np.uint32)


def test_residual_optimum_is_that_of_the_full_task():
    """r_R + omega' log pi has the soft-optimal policy of omega r + r_R, if the prior is soft-optimal."""
    alpha, alpha_hat, omega, mdps = 0.3, 0.2, 0.7, some_garnets()
    addon = np.random.default_rng(0).normal(size=mdps.reward.shape)
    log_prior = PRIOR(mdps, alpha, 600, KEYS, 0.0)
    customise = jax.jit(jax.vmap(vi.customise, (0, 0, 0, None, None, None, None)))
    full = mdps._replace(reward=omega * mdps.reward + addon)
    expected = softmax(np.asarray(OPTIMUM(full, alpha_hat)) / alpha_hat)
    found = np.exp(customise(mdps, addon, log_prior, 0.0, alpha, omega * alpha, alpha_hat))
    np.testing.assert_allclose(found, expected, atol=1e-10)
    unlike = np.exp(customise(mdps, addon, log_prior, 0.0, alpha, 0.0, alpha_hat))
    assert np.abs(unlike - expected).max() > 0.1


def test_a_soft_optimal_prior_loses_nothing_and_an_inexact_one_does():
    """At omega' = alpha_hat = alpha; the prior after one iteration is the softmax of the reward."""
    mdps, alpha = some_garnets(), 0.1
    addon = np.random.default_rng(0).normal(size=mdps.reward.shape)
    exact, early, noisy = (PRIOR(mdps, alpha, n, KEYS, scale) for n, scale in ((600, 0.0), (1, 0.0), (600, 0.3)))
    np.testing.assert_allclose(np.exp(early), softmax(mdps.reward / alpha), atol=1e-12)
    lost = [
        np.asarray(vi.customisation_losses(mdps, addon, prior, np.zeros(5), alpha, np.array([alpha]), alpha))
        for prior in (exact, early, noisy)
    ]
    assert np.abs(lost[0]).max() < 1e-9
    assert min(lost[1].max(), lost[2].max()) > 0.1
    assert min(lost[1].min(), lost[2].min()) > -1e-9


def test_survival_reward_is_the_mean_soft_value_per_step():
    """c = mean r - alpha mean log pi over the prior's discounted steps is (1 - gamma) mean V*, if nothing ends."""
    mdps, alpha = some_garnets(), 0.3
    mdp, log_prior = one_of(mdps), np.asarray(PRIOR(mdps, alpha, 600, KEYS, 0.0))[0]
    chance, total, policy = np.full(6, 1 / 6), 0.0, np.exp(log_prior)
    for t in range(400):
        total += 0.1 * 0.9**t * chance @ (policy * (mdp.reward - alpha * log_prior)).sum(-1)
        chance = np.einsum("s,sa,sat->t", chance, policy, mdp.transition)
    assert 0.1 * float(vi.mean_soft_value(mdp, log_prior, alpha)) == pytest.approx(float(total), rel=1e-9)


def test_prior_that_knows_no_fall_needs_the_survival_reward():
    """Without it the customised policy falls; with it next to nothing of the optimum is lost, in every world."""
    alpha, none = 0.1, np.zeros(5)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        safe = vi.garnets(rng, (5, 6, 3), 2, 0.95)
        safe = safe._replace(reward=1 + safe.reward / 2)
        addon, falls = rng.uniform(-1.5, 0, (5, 6, 3)), rng.random((5, 6, 3)) < [0, 0.2, 0.2]
        falls[:, 0, 1] = True
        risky = safe._replace(transition=np.where(falls[..., None], 0, safe.transition))
        blind, wise = (PRIOR(x, alpha, 600, KEYS, 0.0) for x in (safe, risky))
        c = 0.05 * jax.vmap(vi.mean_soft_value, (0, 0, None))(safe, blind, alpha)
        lost = [
            np.asarray(vi.customisation_losses(risky, addon, prior, constant, alpha, np.array([alpha]), alpha))
            for prior, constant in ((blind, none), (blind, c), (wise, none), (wise, c))
        ]
        assert lost[0].min() > 4
        assert np.abs(lost[1]).max() < 0.2
        assert np.abs(lost[2]).max() < 1e-9
        assert lost[3].max() < 1.0


# ------------------------------------------------------------------------------------- script


def test_garnets_branch_as_told_and_rewards_are_at_most_1():
    mdps = vi.garnets(np.random.default_rng(0), (4, 7, 3), 3, 0.9)
    np.testing.assert_allclose(mdps.transition.sum(-1), 1)
    assert ((mdps.transition > 0).sum(-1) == 3).all()
    assert 0.8 < np.abs(mdps.reward).max() <= 1
    assert len({tuple(row) for row in np.argsort(-mdps.transition)[..., 0].reshape(4, -1)}) == 4


def test_on_a_chain_the_optimum_walks_to_the_larger_reward_from_where_it_is_worth_it():
    worlds = jax.tree.map(lambda *x: np.stack(x), *(vi.chain(20, gamma) for gamma in (0.5, 0.99)))
    near, far = np.asarray(OPTIMUM(worlds, 0.0)).argmax(-1)
    assert (far == 1).all()
    assert near[0] == 0 and near[-1] == 1 and (np.diff(near) >= 0).all()


def test_run_writes_its_pictures_and_what_they_show(tmp_path):
    flags = "--num-mdps 1 --num-states 5 --num-actions 2 --num-iterations 12 --lambdas 0 1 --taus 0 --noise sampled"
    vi.main(tyro.cli(vi.Args, args=[*flags.split(), "--runs-dir", str(tmp_path)]))
    (run_dir,) = tmp_path.iterdir()
    assert re.fullmatch(r"garnet__mirror_descent_vi__1__\d+\.\d{3}", run_dir.name)
    assert json.loads((run_dir / "args.json").read_text())["num_states"] == 5
    names = {"losses", "averaging", "bounds", "heatmap", "residual", "behaviour"}
    assert {path.name for path in run_dir.iterdir()} == {"args.json"} | {
        f"{x}.{y}" for x in names for y in ("png", "csv")
    }
    for name in names:
        assert (run_dir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with (run_dir / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows and all(np.isfinite(float(row[x])) for row in rows for x in ("x", "mean"))
        assert all(float(row["quantile_10"]) <= float(row["quantile_90"]) for row in rows)


def mdp_file(path, **changes):
    """A good file for --mdp, with changes."""
    mdp = one_of(some_garnets())
    arrays = {"P": np.array(mdp.transition), "r": np.array(mdp.reward), "gamma": 0.9} | changes
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return path


def test_mdp_of_a_file_is_iterated_at_its_discount(tmp_path):
    path = mdp_file(tmp_path / "mine.npz", gamma=0.7)
    args = vi.Args(mdp=path, num_mdps=5, num_iterations=7, noise_scale=0.0)
    _, record = vi.run_grid(args, [(0.0, 0.0)] * 4)
    assert record["bound"][0, 0, 0] == pytest.approx(2 * np.abs(vi.load_mdp(path).reward).max() / 0.3)


GOOD_P = np.array(some_garnets().transition[0])
BAD_FILES = {
    "rows that sum to less than 1": ({"P": GOOD_P * 0.9}, "sum to 1"),
    "negative chances": ({"P": GOOD_P * 2 - np.eye(6)[:, None]}, "positive"),
    "NaN in P": ({"P": GOOD_P * np.nan}, "sum to 1"),
    "NaN in r": ({"r": np.full((6, 3), np.nan)}, "r be finite"),
    "infinite r": ({"r": np.full((6, 3), np.inf)}, "r be finite"),
    "shapes that differ": ({"r": np.zeros((6, 2))}, "shapes"),
    "P of two axes": ({"P": np.eye(6)}, "shapes"),
    "nothing in it": ({"P": np.zeros((0, 0, 0)), "r": np.zeros((0, 0))}, "shapes"),
    "gamma 1": ({"gamma": 1.0}, "gamma.*below 1"),
    "gamma NaN": ({"gamma": np.nan}, "gamma.*below 1"),
    "gamma of many": ({"gamma": np.full(3, 0.9)}, "shapes"),
    "no r": ({"r": None}, "r is not a file"),
    "words for r": ({"r": np.full((6, 3), "much")}, "could not convert"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_mdp_is_refused_in_one_line(what, tmp_path):
    changes, expected = BAD_FILES[what]
    assert_refused(("--mdp", mdp_file(tmp_path / "bad.npz", **changes)), expected, tmp_path)


def assert_refused(flags, expected, tmp_path):
    """main raises BadInput with one line that says what is wrong, and writes nothing."""
    with pytest.raises(vi.BadInput) as stop:
        vi.main(tyro.cli(vi.Args, args=[*map(str, flags), "--runs-dir", str(tmp_path / "runs")]))
    assert re.search(expected, str(stop.value))
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "runs").exists()


BAD_FLAGS = {
    "gamma 1": (("--gamma", 1), "--gamma is 1.0; it must be from 0 to 0.999999999"),
    "gamma negative": (("--gamma", -0.1), "--gamma"),
    "gamma NaN": (("--gamma", "nan"), "--gamma"),
    "lambda negative": (("--lambdas", 1, -1), "--lambdas is -1"),
    "lambda NaN": (("--lambdas", "nan"), "--lambdas is nan"),
    "tau infinite": (("--taus", "inf"), "--taus is inf"),
    "no iterations": (("--num-iterations", 0), "--num-iterations"),
    "no MDPs": (("--num-mdps", 0), "--num-mdps"),
    "no samples": (("--num-samples", 0), "--num-samples"),
    "noise negative": (("--noise-scale", -1), "--noise-scale"),
    "seed negative": (("--seed", -1), "--seed"),
    "more branches than states": (("--branching", 31), "--branching.*--num-states"),
    "no lambdas": (("--lambdas",), "--lambdas"),
    "file missing": (("--mdp", "gone.npz"), "gone.npz"),
    "file of another kind": (("--mdp", ROOT / "README.md"), "README.md"),
}


@pytest.mark.parametrize("what", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(what, tmp_path):
    assert_refused(*BAD_FLAGS[what], tmp_path)


def test_command_line_ends_with_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for flags in (("--gamma", "1"), ("--runs-dir", "file")):
        process = run_script("mirror_descent_vi", *flags, cwd=tmp_path)
        assert process.returncode == 2
        assert process.stderr.startswith("mirror_descent_vi.py: ") and process.stderr.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_script_has_at_most_450_lines():
    assert script_path("mirror_descent_vi").read_text().count("\n") <= 450


def test_benchmark_measures_the_same_iterations_in_numpy():
    """Its loop's losses and bounds, with other random numbers: means over many MDPs are near."""
    sys.path.insert(0, str(ROOT / "benchmark"))
    import dynamic_programming

    mdps, keys = vi.garnets(np.random.default_rng(0), (40, 6, 3), 2, 0.9), jax.random.split(jax.random.PRNGKey(0), 40)
    weights = (np.ones(1), np.zeros(1), np.ones(1))
    ours = vi.iterate_scheme("mirror_descent", ("gaussian", 1), np.array([5, 20]), mdps, keys, weights)
    loss, bound = np.transpose(dynamic_programming.numpy_loop(mdps, 40, np.array([5, 20])))
    assert loss.mean() == pytest.approx(np.asarray(ours["loss"])[0, :, 1].mean(), rel=0.3)
    assert bound.mean() == pytest.approx(np.asarray(ours["bound"])[0, :, 1].mean(), rel=0.1)
