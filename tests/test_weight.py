"""The weight of the prior and the policy's step find themselves: exact MDPs in float64, and real runs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from conftest import PENDULUM, read_metrics, read_policy, run_script, start_script, wait_for_rows, write_policy
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq
from scipy.special import log_softmax, logsumexp

import residual_ppo

STATES, ACTIONS, GAMMA = 6, 4, 0.9
ALPHA, OMEGA = 0.5, 0.7
SLOW = ("--env-id", "InvertedPendulum-v4", "--num-envs", 8, "--num-steps", 16, "--num-minibatches", 4)


def random_mdp(seed):
    """Transition probabilities (states, actions, states) without ends, basic and add-on reward (states, actions)."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(STATES, 0.5), (STATES, ACTIONS)), *rng.normal(size=(2, STATES, ACTIONS))


def soft_optimum(probability, reward, temperature):
    """log pi (states, actions) by soft value iteration."""
    value = np.zeros(STATES)
    for _ in range(200):
        q = reward + GAMMA * probability @ value
        value = temperature * logsumexp(q / temperature, axis=-1)
    return log_softmax(q / temperature, axis=-1)


def lost_per_step(probability, log_policy, log_prior):
    """How much less likely to the prior its own actions are made, in nats: a mean over where the policy is."""
    policy, prior = np.exp(log_policy), np.exp(log_prior)
    chain = np.einsum("sa,saz->sz", policy, probability)
    values, vectors = np.linalg.eig(chain.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    return stationary / stationary.sum() @ ((prior - policy) * log_prior).sum(-1)


def customised(mdp, log_prior, omega_prime, alpha_hat):
    """log pi of the optimum of r_RPG, given alpha_hat, or as a share of omega' where alpha_hat is None."""
    temperature = omega_prime / 3 if alpha_hat is None else alpha_hat
    return soft_optimum(mdp[0], mdp[2] + omega_prime * log_prior, temperature)


def lost_by_weight(mdp, log_prior, alpha_hat=None):
    """The nats that the exact optimum of omega' loses, between 1/20 and 20, a function of omega'."""
    weights = np.geomspace(0.05, 20, 120)
    lost = [lost_per_step(mdp[0], customised(mdp, log_prior, x, alpha_hat), log_prior) for x in weights]
    curve = PchipInterpolator(np.log(weights), lost)
    return lambda omega_prime: float(curve(np.log(omega_prime)))


def dual_ascent(lost, budget, start):
    """omega' after dual steps, each with the nats that its exact optimum loses."""
    omega_prime, step = start, jax.jit(residual_ppo.dual_step)
    for _ in range(6000):
        omega_prime = float(step(omega_prime, lost(omega_prime), budget, start))
    return omega_prime


@pytest.fixture
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("alpha_hat", [0.3, None])
@pytest.mark.parametrize("seed", range(2))
def test_the_dual_step_converges_to_the_weight_whose_optimum_keeps_the_budget(float64, seed, alpha_hat):
    """From above and from below; the weight of a budget is found by Brent's method on exact solutions."""
    mdp = random_mdp(seed)
    log_prior = soft_optimum(*mdp[:2], ALPHA)
    lost = lost_by_weight(mdp, log_prior, alpha_hat)
    budget = lost_per_step(mdp[0], customised(mdp, log_prior, 0.8, alpha_hat), log_prior)
    exact = brentq(lambda x: lost(x) - budget, 0.5, 1.6)
    assert exact == pytest.approx(0.8, rel=1e-3)
    for factor in (0.5, 3):
        assert dual_ascent(lost, budget, factor * exact) == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("seed", range(2))
def test_with_the_budget_of_the_true_optimum_it_finds_omega_times_alpha(float64, seed):
    """The prior is soft-optimal; the true optimum is that of omega r + r_R, which the dual step never sees."""
    mdp = random_mdp(seed)
    probability, basic, addon = mdp
    log_prior = soft_optimum(probability, basic, ALPHA)
    truth = soft_optimum(probability, OMEGA * basic + addon, 0.3)
    budget = lost_per_step(probability, truth, log_prior)
    found = dual_ascent(lost_by_weight(mdp, log_prior, 0.3), budget, 2 * OMEGA * ALPHA)
    assert found == pytest.approx(OMEGA * ALPHA, rel=5e-3)


def test_omega_prime_stays_within_its_bounds():
    weight = jnp.float32(1)
    for _ in range(200):
        weight = residual_ppo.dual_step(weight, 100.0, 1.0, 1.0)
    assert weight == 10
    for _ in range(200):
        weight = residual_ppo.dual_step(weight, -5.0, 1.0, 1.0)
    assert weight == pytest.approx(0.3)
    assert residual_ppo.dual_step(1.0, 50.0, 1.0, 1.0) == pytest.approx(np.exp(0.03))  # no more than a nat counts


def test_weights_start_at_the_spread_of_the_addon_reward_and_the_temperature_falls_to_0():
    """omega' at 0.3 omega deviations, alpha_hat a third, half of it at 35 %, none from 70 % on."""
    args = residual_ppo.Args(omega=0.5, num_envs=8, num_steps=16, total_timesteps=100 * 128)
    reward = np.random.default_rng(0).normal(2, 3, (16, 8)).astype(np.float32)
    valid = np.arange(128).reshape(16, 8) % 5 > 0

    def weights(iteration, omega_prime):
        state = SimpleNamespace(iteration=iteration, omega_prime=jnp.float32(omega_prime))
        return [float(x) for x in residual_ppo.falling_weights(args, state, reward, valid)]

    start = 0.3 * 0.5 * reward[valid].std()
    np.testing.assert_allclose(weights(0, [0, 0]), [start, start, start / 3], rtol=1e-5)
    np.testing.assert_allclose(weights(35, [0.6, 0.2]), [0.6, 0.2, 0.1], rtol=1e-5)
    assert weights(70, [0.6, 0.2])[2] == pytest.approx(0, abs=1e-7)
    assert weights(90, [0.6, 0.2])[2] == 0


def test_the_rate_moves_only_outside_half_and_twice_the_desired_kl():
    found = [float(residual_ppo.rate_step(jnp.float32(3e-4), kl, 0.04)) for kl in (0.019, 0.021, 0.079, 0.081)]
    np.testing.assert_allclose(found, [4.5e-4, 3e-4, 3e-4, 2e-4], rtol=1e-6)


@pytest.mark.parametrize("squash", [False, True])
def test_nats_lost_are_a_divergence_and_a_difference_of_entropies(squash):
    """Of two Gaussians, squashed or not, by quadrature over actions: KL(q||pi) + H(q) - H(pi)."""
    actor = residual_ppo.Actor(1, (), "tanh", False, squash)
    prior_params = actor.init(jax.random.PRNGKey(0), jnp.zeros(1))
    prior_params = jax.tree.map(jnp.zeros_like, prior_params)  # mean 0, deviation 1
    stats = residual_ppo.RunningStats(jnp.zeros(1), jnp.ones(1), jnp.float32(1))
    prior, obs = residual_ppo.Policy(prior_params, stats, actor), jnp.zeros((400_000, 1))
    mean, deviation = 0.6, 0.5
    action = mean + deviation * jax.random.normal(jax.random.PRNGKey(1), obs.shape)
    log_prob = residual_ppo.policy_log_prob(prior, obs, action)
    found = residual_ppo.nats_lost(prior, obs, log_prob, jax.random.PRNGKey(2)).mean()

    def log_density(u, mean, deviation):
        jacobian = np.log(1 - np.tanh(u) ** 2) if squash else 0
        return scipy.stats.norm(mean, deviation).logpdf(u) - jacobian

    def expected(f, mean, deviation):
        weight = scipy.stats.norm(mean, deviation).pdf
        return scipy.integrate.quad(lambda u: weight(u) * f(u), -6, 6)[0]

    kl = expected(lambda u: log_density(u, mean, deviation) - log_density(u, 0, 1), mean, deviation)
    entropies = [-expected(lambda u, x=x: log_density(u, *x), *x) for x in ((mean, deviation), (0, 1))]
    assert found == pytest.approx(kl + entropies[0] - entropies[1], abs=0.01)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, pendulum_prior):
    """A prior whose file names neither alpha nor survival reward."""
    path = tmp_path_factory.mktemp("stranger") / "prior.safetensors"
    return write_policy(path, pendulum_prior, alpha=None, survival_reward=None)


def test_without_a_spread_of_the_addon_reward_the_weight_is_one(tmp_path, stranger):
    process = run_script("residual_ppo", *PENDULUM, "--addon", "none", "--prior", stranger, "--runs-dir", tmp_path)
    assert process.returncode == 0, process.stderr
    (run_dir,) = tmp_path.iterdir()
    assert {float(row["omega_prime"]) for row in read_metrics(run_dir)} == {1}


def test_constants_stay_constant_and_the_rate_is_the_schedule_without_desired_kl(tmp_path, stranger):
    weights = ("--omega-prime", 0.2, "--alpha-hat", 0.1, "--desired-kl", 0, "--learning-rate", 1e-3)
    flags = (*PENDULUM, "--addon", "none", *weights, "--prior", stranger, "--runs-dir", tmp_path)
    assert run_script("residual_ppo", *flags).returncode == 0
    (run_dir,) = tmp_path.iterdir()
    rows = read_metrics(run_dir)
    assert {(row["omega_prime"], row["alpha_hat"]) for row in rows} == {("0.2", "0.1")}
    np.testing.assert_allclose([float(row["learning_rate"]) for row in rows], 1e-3 * (1 - np.arange(8) / 8), rtol=1e-5)


def test_a_foreign_prior_needs_no_flags_and_a_resumed_run_keeps_weight_and_rate(tmp_path, prior):
    """Half of a run, then the rest: omega' and the rate go on from where they were, neither from their start."""
    foreign = write_policy(tmp_path / "foreign.safetensors", prior, alpha=None, survival_reward=None)
    flags = ("--env-id", "HalfCheetah-v4", *SLOW[2:], "--total-timesteps", 12_800, "--checkpoint-interval", 0)
    flags = (*flags, "--eval-episodes", 1, "--prior", foreign, "--runs-dir", tmp_path / "runs", "--desired-kl", 1)
    process = start_script("residual_ppo", *flags)
    run_dir = wait_for_rows(process, tmp_path / "runs", 20)
    process.terminate()
    process.communicate(timeout=60)
    before = len(read_metrics(run_dir))
    assert 20 <= before < 100
    assert run_script("residual_ppo", "--resume", run_dir).returncode == 0
    rows = read_metrics(run_dir)
    weight, lost, rate = (np.array([float(x[k]) for x in rows]) for k in ("omega_prime", "nats_lost", "learning_rate"))
    assert len(rows) == 100
    expected = weight[:-1] * np.exp(0.03 * np.clip(lost[:-1] - 1, -1, 1))
    expected = np.clip(expected, 0.3 * weight[0], 10 * weight[0])
    np.testing.assert_allclose(weight[1:], expected, rtol=1e-4)
    assert rate[0] == pytest.approx(3e-5)
    assert rate[before] > 5 * rate[0]
    assert float(read_policy(run_dir / "policy.safetensors")[1]["alpha"]) == 0


@pytest.mark.parametrize(("before", "after", "said"), [(100, 69, True), (100, 71, False), (-100, -131, True)])
def test_a_prior_that_is_lost_is_said_with_the_flag_that_keeps_it(before, after, said):
    def evaluation(basic):
        names = ("objective", "total", "basic", "addon", "quantity", "length")
        return dict.fromkeys(("stochastic", "deterministic"), {name: np.full(3, float(basic)) for name in names})

    table = residual_ppo.results_table("x", {"prior": evaluation(before), "customised": evaluation(after)})
    assert ("--omega" in (table.caption or "")) == said
    assert residual_ppo.results_table("x", {"policy": evaluation(after)}).caption is None
