"""The weight of the prior and the policy's step find themselves: exact solutions in float64, and real runs."""

import json
import signal
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import (
    ROOT,
    SAC_SHORT,
    SHORT,
    Fork,
    read_metrics,
    read_policy,
    run_in,
    run_script,
    wait_for_rows,
    write_policy,
)
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

import residual_ppo
import residual_sac
import train_prior_ppo

GAMMA, ALPHA, OMEGA = 0.9, 0.5, 0.7
SLOW = ("--env-id", "InvertedPendulum-v4", "--num-envs", 8, "--num-steps", 16, "--num-minibatches", 4)


class System(NamedTuple):
    """x' = a x + b u + noise; r = -(q x² + rho u²) / 2 and r_R = -kappa (x - goal)² / 2."""

    a: float
    b: float
    noise: float
    q: float
    rho: float
    kappa: float
    goal: float


def random_system(seed):
    """Of any sort, the uncontrolled one unstable or not."""
    rng = np.random.default_rng(seed)
    return System(*rng.uniform([0.6, 0.3, 0.1, 0.2, 0.2, 0.5, 0.5], [1.2, 1, 0.4, 1, 1, 2, 2]))


def optimum(system, state_cost, goal, action_cost, gain=0.0):
    """(k, k0, h) of the optimal mean action k x + k0 for -(state_cost (x - goal)² + action_cost (u - gain x)²) / 2.

    h is minus the action value's curvature in u. By value iteration on V = -P x² / 2 + p x.
    """
    a, b, *_ = system
    curvature, slope = 0.0, 0.0
    for _ in range(2000):
        h = action_cost + GAMMA * curvature * b**2
        k, k0 = (action_cost * gain - GAMMA * curvature * a * b) / h, GAMMA * slope * b / h
        m, other = a + b * k, action_cost * (k - gain)
        slope = state_cost * goal - other * k0 - GAMMA * curvature * m * b * k0 + GAMMA * slope * m
        curvature = state_cost + other * (k - gain) + GAMMA * curvature * m**2
    return k, k0, h


def shift_by_weight(system):
    """The shift in nats of the optimum for r_R + omega' log pi, as a function of omega'; pi is soft-optimal for r."""
    gain, _, h = optimum(system, system.q, 0, system.rho)

    def shift(omega_prime):
        return shift_of(system, *optimum(system, system.kappa, system.goal, omega_prime * h / ALPHA, gain)[:2])

    return shift


def shift_of(system, k, k0):
    """A mean over where a policy is that always takes its mean action."""
    gain, _, h = optimum(system, system.q, 0, system.rho)
    m = system.a + system.b * k
    mean, var = system.b * k0 / (1 - m), system.noise**2 / (1 - m**2)
    return 0.5 * (((k - gain) * mean + k0) ** 2 + (k - gain) ** 2 * var) * h / ALPHA


def dual_ascent(shift, budget, start):
    """omega' after dual steps, each with the shift of its exact optimum, from a table of weights around the start."""
    weights, step = np.geomspace(0.2 * start, 12 * start, 200), jax.jit(residual_ppo.dual_step)
    curve = PchipInterpolator(np.log(weights), [shift(x) for x in weights])
    omega_prime = start
    for _ in range(5_000):
        omega_prime = float(step(omega_prime, float(curve(np.log(omega_prime))), budget, start))
    return omega_prime


@pytest.fixture
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("seed", range(2))
def test_the_dual_step_converges_to_the_weight_whose_optimum_keeps_the_budget(float64, seed):
    """From above and from below; the weight of a budget is found by Brent's method on exact solutions."""
    shift = shift_by_weight(random_system(seed))
    budget = shift(0.8)
    exact = brentq(lambda x: shift(x) - budget, 0.1, 5)
    assert exact == pytest.approx(0.8)
    for factor in (0.5, 3):
        assert dual_ascent(shift, budget, factor * exact) == pytest.approx(exact, rel=5e-3)


@pytest.mark.parametrize("seed", range(2))
def test_with_the_budget_of_the_true_optimum_it_finds_omega_times_alpha(float64, seed):
    """The prior is soft-optimal; the true optimum is that of omega r + r_R, which the dual step never sees."""
    system = random_system(seed)
    state_cost = OMEGA * system.q + system.kappa
    truth = optimum(system, state_cost, system.kappa * system.goal / state_cost, OMEGA * system.rho)
    shift, budget = shift_by_weight(system), shift_of(system, *truth[:2])
    assert shift(OMEGA * ALPHA) == pytest.approx(budget, rel=1e-9)
    assert dual_ascent(shift, budget, 2 * OMEGA * ALPHA) == pytest.approx(OMEGA * ALPHA, rel=5e-3)


def test_omega_prime_stays_within_its_bounds():
    weight = jnp.float32(1)
    for _ in range(200):
        weight = residual_ppo.dual_step(weight, 100.0, 1.0, 1.0)
    assert weight == 10
    for _ in range(200):
        weight = residual_ppo.dual_step(weight, -5.0, 1.0, 1.0)
    assert weight == pytest.approx(0.3)
    assert residual_ppo.dual_step(1.0, 50.0, 1.0, 1.0) == pytest.approx(np.exp(0.03))  # no more than a nat counts


def falling_weights(args, reward, valid, iteration, multiplier):
    """omega', alpha_hat, the multiplier and its start, as numbers."""
    state = SimpleNamespace(iteration=iteration, multiplier=jnp.float32(multiplier))
    return [float(x) for x in residual_ppo.falling_weights(args, state, reward, valid)]


@pytest.mark.parametrize("prior_alpha", [0, 1])
def test_weights_start_at_the_spread_of_the_addon_reward_and_the_temperature_falls_to_0(prior_alpha):
    """omega' at 0.3 deviations, 0.9 here, alpha_hat a third, half of it at 35 %, none from 70 % on.

    Where a nat is worth less in basic reward than that, omega alpha = 0.5 here, alpha has no say.
    """
    args = residual_ppo.Args(omega=0.5, num_envs=8, num_steps=16, total_timesteps=100 * 128, prior_alpha=prior_alpha)
    reward = np.random.default_rng(0).normal(2, 3, (16, 8)).astype(np.float32)
    valid = np.arange(128).reshape(16, 8) % 5 > 0
    start = 0.3 * reward[valid].std()
    weights = partial(falling_weights, args, reward, valid)
    np.testing.assert_allclose(weights(0, [0, 0]), [start, start / 3, start, start], rtol=1e-5)
    np.testing.assert_allclose(weights(35, [0.6, 0.8]), [0.6, 0.1, 0.6, 0.8], rtol=1e-5)
    assert weights(70, [0.6, 0.8])[1] == pytest.approx(0, abs=1e-7)
    assert weights(90, [0.6, 0.8])[1] == 0


def test_a_small_wish_leaves_a_penalty_on_the_kl_divergence_to_a_prior_whose_alpha_is_known():
    """omega alpha = 2 a nat, of which the wish's start leaves 1.7, or all where it has no spread: r_R - 2 KL."""
    args = residual_ppo.Args(omega=0.5, num_envs=8, num_steps=16, total_timesteps=100 * 128, prior_alpha=4)
    reward, valid = np.float32([[-1.0, 1.0]]), np.ones((1, 2), bool)
    weights = partial(falling_weights, args)
    np.testing.assert_allclose(weights(reward, valid, 0, [0, 0]), [2, 1.8, 0.3, 0.3], rtol=1e-5)
    np.testing.assert_allclose(weights(reward, valid, 80, [0.1, 0.3]), [1.8, 1.7, 0.1, 0.3], rtol=1e-5)
    np.testing.assert_allclose(weights(0 * reward, valid, 0, [0, 0]), [2, 2, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("script", [residual_ppo, residual_sac])
def test_the_priors_alpha_is_the_files_unless_given(script):
    actor = SimpleNamespace(actor=SimpleNamespace(hidden_sizes=(8,)))
    resolve = partial(script.resolve_args, prior=actor, scales=(3.0, 1.0))
    for given, info, alpha in ((None, {"alpha": "0.2"}, 0.2), (0.5, {"alpha": "0.2"}, 0.5), (0.5, {}, 0.5)):
        args = resolve(script.Args(prior_alpha=given, omega=2.0), prior_info=info)
        assert (args.prior_alpha, args.omega_prime, args.alpha_hat) == pytest.approx((alpha, 6 * alpha, alpha))
    for given, info in ((None, {}), (0.0, {"alpha": "0.2"})):
        with pytest.raises(script.StopRun, match="--prior-alpha"):
            resolve(script.Args(prior_alpha=given), prior_info=info)


def test_the_rate_moves_only_outside_half_and_twice_the_desired_kl():
    found = [float(residual_ppo.rate_step(jnp.float32(3e-4), kl, 0.04)) for kl in (0.019, 0.021, 0.079, 0.081)]
    np.testing.assert_allclose(found, [4.5e-4, 3e-4, 3e-4, 2e-4], rtol=1e-6)


def test_shift_is_the_divergence_of_the_policy_with_the_priors_deviation():
    """By SciPy's quadrature, of one dimension of a network; the policy's own deviation has no part in it."""
    actor = residual_ppo.Actor(1, (3,))
    params = [actor.init(jax.random.PRNGKey(i), jnp.zeros(2)) for i in range(2)]
    for i, x in enumerate(params):
        x["params"]["actor_logstd"] = jnp.float32([-0.5 - i])
        x["params"]["actor_mean.2"]["bias"] = jnp.float32([0.3 * i])
    stats = residual_ppo.RunningStats(jnp.zeros(2), jnp.ones(2), jnp.float32(1))
    prior, policy = (residual_ppo.Policy(x, stats, actor) for x in params)
    obs = jnp.float32([[0.2, -1.0], [1.5, 0.4]])
    found = residual_ppo.mean_shift(policy, prior, obs)
    for x, row in zip(obs, found, strict=True):
        means = (float(residual_ppo.action_distribution(p, x)[0][0]) for p in (policy, prior))
        ours, pi = (scipy.stats.norm(mean, np.exp(-0.5)) for mean in means)
        assert row == pytest.approx(ours.expect(lambda u, pi=pi, ours=ours: ours.logpdf(u) - pi.logpdf(u)), rel=1e-4)


def test_without_alpha_and_a_spread_of_the_addon_reward_a_nat_costs_one():
    args = residual_ppo.Args(addon="none", num_envs=8, num_steps=16, total_timesteps=100 * 128, prior_alpha=0)
    found = falling_weights(args, np.zeros((16, 8), np.float32), np.ones((16, 8), bool), 0, [0, 0])
    np.testing.assert_allclose(found, [1, 1 / 3, 1, 0], rtol=1e-6)


def test_constants_stay_constant_and_the_rate_is_the_schedule_without_desired_kl(runs):
    """The prior of this run names no alpha: with a budget the Jacobian would not count."""
    run_dir = runs["residual_ppo plain"].folder
    rows = read_metrics(run_dir)
    assert {(row["omega_prime"], row["alpha_hat"]) for row in rows} == {("0.1", "0.05")}
    assert json.loads((run_dir / "args.json").read_text())["args"]["jacobian"]
    np.testing.assert_allclose([float(row["learning_rate"]) for row in rows], 3e-4 * (1 - np.arange(8) / 8), rtol=1e-5)


def snapshots_of(run_dir):
    """The last layer's biases of the snapshots in a run's checkpoint, (num_snapshots, action_dim)."""
    state = flax.serialization.msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())
    layers = state["snapshots"]["params"]["params"]
    return layers[max(name for name in layers if name.startswith("actor_mean"))]["bias"]


def test_a_foreign_prior_needs_no_flags_and_a_resumed_run_keeps_weight_rate_and_snapshots(tmp_path, prior):
    """Half of a run, then the rest: omega' and the rate go on from where they were, neither from their start."""
    foreign = write_policy(tmp_path / "foreign.safetensors", prior, alpha=None, survival_reward=None)
    flags = ("--env-id", "HalfCheetah-v4", *SLOW[2:], "--total-timesteps", 12_800, "--checkpoint-interval", 0)
    flags = (*flags, "--eval-episodes", 1, "--prior", foreign, "--runs-dir", tmp_path / "runs", "--desired-kl", 1)
    process = Fork("residual_ppo", *flags)
    run_dir = wait_for_rows(process, tmp_path / "runs", 20)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    before, taken = len(read_metrics(run_dir)), snapshots_of(run_dir)
    assert 20 <= before < 100
    assert run_script("residual_ppo", "--resume", run_dir).returncode == 0
    snapshots, done = snapshots_of(run_dir), before * 11 // 100
    np.testing.assert_array_equal(snapshots[:done], taken[:done])  # what was taken before is not lost
    assert done >= 2 and len(np.unique(snapshots, axis=0)) == 10
    rows = read_metrics(run_dir)
    weight, shift, rate = (
        np.array([float(x[k]) for x in rows]) for k in ("omega_prime", "mean_shift", "learning_rate")
    )
    assert len(rows) == 100
    expected = weight[:-1] * np.exp(0.03 * np.clip(shift[:-1] - 2, -1, 1))
    expected = np.clip(expected, 0.3 * weight[0], 10 * weight[0])
    np.testing.assert_allclose(weight[1:], expected, rtol=1e-4)
    assert rate[0] == pytest.approx(3e-5)
    assert rate[before] > 5 * rate[0]
    assert float(read_policy(run_dir / "policy.safetensors")[1]["alpha"]) == 0
    args = json.loads((run_dir / "args.json").read_text())["args"]
    assert (args["jacobian"], args["budget"]) == (False, 2)  # of six actions


def test_tanhs_jacobian_counts_where_the_prior_names_an_alpha(runs):
    args = json.loads((runs["residual_ppo"].folder / "args.json").read_text())["args"]
    assert args["omega_prime"] is None and args["jacobian"]


@pytest.mark.parametrize(("before", "after", "said"), [(100, 69, True), (100, 71, False), (-100, -131, True)])
def test_a_prior_that_is_lost_is_said_with_the_flag_that_keeps_it(before, after, said):
    def evaluation(basic):
        rest = dict.fromkeys(("objective", "total", "addon", "quantity", "length"), np.zeros(3))
        return dict.fromkeys(("stochastic", "deterministic"), rest | {"basic": np.full(3, float(basic))})

    table = residual_ppo.results_table("x", {"prior": evaluation(before), "customised": evaluation(after)})
    assert ("--omega" in (table.caption or "")) == said
    assert residual_ppo.results_table("x", {"policy": evaluation(after)}).caption is None


RUIN = {  # a prior that balances, with a policy's rate at which nothing stays
    "residual_ppo": (*SHORT, "--learning-rate", 1, "--desired-kl", 0),
    "residual_sac": (*SAC_SHORT, "--updates-per-step", 0.25, "--policy-lr", 1),
}


@pytest.mark.parametrize("script", RUIN)
def test_of_a_run_that_ruins_the_prior_the_prior_is_kept(script, tmp_path):
    flags = ("--env-id", "Hopper-v4", "--prior", ROOT / "priors" / "Hopper-v4.safetensors", *RUIN[script])
    last, kept = run_in(tmp_path / "0", script, *flags, "--num-snapshots", 0), run_in(tmp_path / "1", script, *flags)
    prior = read_policy(last.folder / "prior.safetensors")[0]
    for run, same in ((last, False), (kept, True)):
        policy, info = read_policy(run.folder / "policy.safetensors")
        assert all(np.array_equal(policy[name], prior[name]) for name in prior) == same
        assert not same or float(info["alpha"]) == 0.05  # the prior's, not the run's
        results = json.loads((run.folder / "eval.json").read_text())
        assert (results["prior"] == results["customised"]) == same
        assert ("kept is the best of the snapshots and the prior" in " ".join(run.process.stdout.split())) == same
    lost = json.loads((last.folder / "eval.json").read_text())
    assert results["last"] == lost["customised"]  # results are those of the last, kept
    assert "last" not in lost
    texts = (" ".join(run.process.stdout.split()).rpartition("; a larger --omega")[0] for run in (last, kept))
    captions = [text.rpartition(" fell ")[2] for text in texts]
    assert captions[0] and captions[0] == captions[1]  # what the last lost is said, kept or not
    ends = (read_metrics(run.folder)[-1]["entropy"] for run in (last, kept))
    assert len(set(ends)) == 1  # snapshots change nothing of the training
    assert len(np.unique(snapshots_of(kept.folder), axis=0)) > 2


def test_a_loss_that_no_action_alone_shows_is_said():
    """Of objectives about 0 one may be over 5 % lower in the mean of both actions, and in neither of them."""

    def evaluation(*objectives):
        names = ("objective", "total", "basic", "addon", "quantity", "length")
        return {a: dict.fromkeys(names, np.full(3, x)) for a, x in zip(residual_ppo.ACTIONS, objectives, strict=True)}

    results = {name: evaluation(*x) for name, x in {"prior": (-500, 600), "last": (-510, 590)}.items()}
    results["customised"] = evaluation(-500, 600)
    assert residual_ppo.results_table("x", results).caption.startswith("the objective fell; kept is")


@pytest.mark.parametrize(
    ("scores", "spread", "kept"),  # of the prior, two snapshots and the last policy; of one action's scores about them
    [
        ((100, 50, 300, 96), 1, 3),  # the last has not lost to the prior
        ((100, 50, 300, 94), 1, 2),
        ((100, 50, 300, 94), 9, 3),  # nor here, for all that four episodes say: a standard error is about 6
        ((100, 50, 300, 80), 9, 2),
        ((100, 98, 50, 94), 1, 0),
        ((-100, -250, -50, -104), 1, 3),
        ((-100, -250, -50, -106), 1, 2),
        ((-100, -101, -300, -106), 1, 0),
    ],
)
def test_a_run_that_ends_below_the_prior_keeps_the_best_of_its_snapshots_and_the_prior(scores, spread, kept):
    def play(policies, noise=0):
        """Policies are numbers here; with other noise the scores are 1 higher, so that none is reported by mistake."""
        objectives = {name: scores[x] + noise + np.array([-0.1, 0.1]) for name, x in policies.items()}
        actions = {"stochastic": -spread, "deterministic": spread}
        return {name: {a: {"objective": x + off} for a, off in actions.items()} for name, x in objectives.items()}

    policy, results = residual_ppo.best_if_lost(play, play({"prior": 0, "customised": 3}), [0, 1, 2, 3])
    means = {name: x["stochastic"]["objective"].mean() + spread for name, x in results.items()}
    last = {} if kept == 3 else {"last": scores[3]}
    assert (policy, means) == (kept, {"prior": scores[0]} | last | {"customised": scores[kept]})
    assert list(means) == ["prior", *last, "customised"]  # in the order of the table


@pytest.mark.parametrize("done", [0, 4])
def test_the_best_of_what_is_evaluated_is_kept(done, tmp_path):
    """Evaluated are what is offered and the policies after iterations 2 and 4 of four, which are numbers here."""
    played, saved = [], []

    def play(policies):
        played.append(policies["policy"])
        return {"policy": {"stochastic": {"objective": np.array([-1, 1]) - (policies["policy"] - 2.2) ** 2}}}

    args = train_prior_ppo.Args(num_envs=2, num_steps=5, total_timesteps=49, num_evals=2)
    state = SimpleNamespace(iteration=np.int32(done), policy=done)
    run = SimpleNamespace(folder=tmp_path, state=state, save_policy=lambda policy, *_: saved.append(policy))
    best, logged = train_prior_ppo.Snapshot(run, play, args, 0.1), []
    assert played == ([4] if done else [])
    best.offer(0)
    for iteration in range(1, 5):
        best.log(lambda i, *_: logged.append(i), iteration, SimpleNamespace(policy=iteration), {})
    assert (played[-3:], logged) == ([0, 2, 4], [1, 2, 3, 4])
    assert (best.policy, saved) == (2, [4, 2] if done else [0, 2])


@pytest.mark.parametrize(("iterations", "due"), [(40, [10, 20, 30]), (43, [10, 21, 32]), (2, [0, 1, 0]), (9, [4])])
def test_snapshots_end_equal_parts_of_a_run_but_the_last(iterations, due):
    """Policies are numbers here, those of the iteration, and 0 before it."""
    args = residual_ppo.Args(num_envs=2, num_steps=5, total_timesteps=10 * iterations, num_snapshots=len(due))

    @flax.struct.dataclass
    class State:
        snapshots: jax.Array
        policy: jax.Array = 0
        iteration: int = 0

    state = State(jnp.zeros(len(due), int))
    take = jax.jit(partial(residual_ppo.take_snapshot, args))
    for i in range(1, iterations + 1):
        state = take(state.replace(policy=i, iteration=i))
    assert state.snapshots.tolist() == due


@pytest.mark.parametrize(("env_id", "known"), [("Hopper-v4", "survival_reward"), ("MountainCarContinuous-v0", None)])
def test_survival_reward_is_measured_as_its_training_found_it_and_a_goal_is_no_fall(env_id, known):
    """The mountain car's mean reward is 1.3 a step, all of it paid at the goal."""
    prior, info = residual_ppo.load_policy(ROOT / "priors" / f"{env_id}.safetensors")
    simulator = residual_ppo.make_simulator(env_id, "{}", residual_ppo.env_seeds(3, residual_ppo.EVALUATION, 20))
    env = residual_ppo.make_env(simulator, residual_ppo.ADDON_TASKS["none"], prior.actor.squash)
    found = residual_ppo.measured_survival_reward(env, prior, float(info["alpha"]), 3)
    assert found == (pytest.approx(float(info[known]), abs=0.05) if known else 0)


def test_a_prior_that_names_no_survival_reward_gets_what_its_steps_are_worth(tmp_path, runs, pendulum_prior):
    """A step of the pendulum is worth 1, and no alpha says that log pi has a part of it; constants are the paper's."""
    foreign = write_policy(tmp_path / "foreign.safetensors", pendulum_prior, alpha=None, survival_reward=None)
    flags = ("--env-id", "InvertedPendulum-v4", *SHORT, "--addon", "none", "--prior", foreign)
    run = run_in(tmp_path / "run", "residual_ppo", *flags)
    assert "no survival reward, which is measured" in run.process.stdout
    for folder, expected in ((run.folder, 1), (runs["residual_ppo plain"].folder, 0)):
        assert {float(row["survival_reward"]) for row in read_metrics(folder)} == {expected}
