"""Residual tree search is what its equations say, and where it can be exact, it is."""

import csv
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import ROOT, run_script, script_path

import residual_mcts as mcts

COUNTS = (4, 40, 6000)


@pytest.fixture(autouse=True)
def float64():
    """As main computes."""
    with jax.enable_x64(True):
        yield


def arrays(seed=0, states=4, actions=2):
    """P, r, r_R of a random MDP whose actions lead to two states each."""
    rng = np.random.default_rng(seed)
    transition = np.zeros((states, actions, states))
    for s, a in itertools.product(range(states), range(actions)):
        transition[s, a, rng.permutation(states)[:2]] = rng.dirichlet([2, 2])
    return transition, rng.normal(size=(states, actions)), rng.normal(size=(states, actions))


def world(ends=0.0, seed=0, gamma=0.7, **shape) -> mcts.World:
    """A random world, where action 0 ends the episode with a chance in state 0."""
    transition, reward, addon = arrays(seed, **shape)
    transition[0, 0] *= 1 - ends
    start = np.full(len(reward), 1 / len(reward))
    return mcts.make_world(transition, gamma, reward, addon, start, {"total": reward + addon, "mean r": reward})


def some_prior(like: mcts.World, seed=0) -> jax.Array:
    """A policy that is optimal for nothing."""
    logits = np.random.default_rng(seed).normal(size=like.reward.shape)
    return jax.nn.log_softmax(jnp.asarray(logits)).at[-1].set(0)


def problem(like: mcts.World, log_prior, omega_prime=0.3, alpha_hat=0.3) -> mcts.Problem:
    return mcts.Problem(like, log_prior, omega_prime, alpha_hat, omega_prime - alpha_hat)


def searched(kind, given: mcts.Problem, horizon=2, counts=COUNTS, seed=0) -> np.ndarray:
    """Q_R of a search at each state but the end, (states, counts, actions)."""
    roots = jnp.arange(len(given.world.addon) - 1, dtype=jnp.int32)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(roots))
    return np.asarray(mcts.plan(kind, counts, horizon, given, roots, keys))


def soft_optimum(transition, reward, gamma, temperature, horizon=2000):
    """Q* (states, actions) of maximum-entropy value iteration, in NumPy; where rows lack to 1, the rest is the end."""
    q = np.zeros_like(reward)
    for _ in range(horizon):
        best = q.max(-1, keepdims=True)
        value = best[:, 0] + temperature * np.log(np.exp((q - best) / temperature).sum(-1))
        q = reward + gamma * transition @ (value if _ else 0 * value)
    return q


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# ---------------------------------------------------------------------------------- equations


@pytest.mark.parametrize(("omega_prime", "alpha_hat"), [(0.2, 0.2), (0.14, 0.3)])
def test_exact_planning_with_a_soft_optimal_prior_is_the_optimum_of_the_full_task(omega_prime, alpha_hat):
    """Softmax of Q_R + omega' log pi against soft value iteration on omega r + r_R, omega = omega' / alpha."""
    (transition, reward, addon), alpha, gamma = arrays(1), 0.2, 0.7
    transition[0, 0] *= 0.6
    given = world(ends=0.4, seed=1)
    log_prior = mcts.make_prior(given, alpha, 0.0, (0,))
    np.testing.assert_allclose(
        np.exp(log_prior[:-1]), softmax(soft_optimum(transition, reward, gamma, alpha) / alpha), atol=1e-10
    )
    scores = mcts.residual_q(problem(given, log_prior, omega_prime, alpha_hat)) + omega_prime * log_prior
    full = soft_optimum(transition, omega_prime / alpha * reward + addon, gamma, alpha_hat)
    np.testing.assert_allclose(softmax(np.asarray(scores)[:-1] / alpha_hat), softmax(full / alpha_hat), atol=1e-10)


def test_planning_to_a_horizon_is_the_soft_optimum_of_so_many_steps():
    """On r_R + omega' log pi at alpha_hat, where the last step's log pi is the policy's alone."""
    given = world()
    log_prior = some_prior(given)
    transition, _, addon = arrays()
    log_pi = np.asarray(log_prior)[:-1]
    q = addon
    for horizon in range(1, 6):
        np.testing.assert_allclose(mcts.residual_q(problem(given, log_prior, 0.2, 0.5), horizon)[:-1], q, atol=1e-12)
        q = addon + 0.7 * transition @ (0.5 * np.log(np.exp((q + 0.2 * log_pi) / 0.5).sum(-1)))


@pytest.mark.parametrize("kind", mcts.TREE_POLICIES)
@pytest.mark.parametrize(("omega_prime", "alpha_hat"), [(0.3, 0.3), (0.5, 0.25), (0.0, 0.4)])
@pytest.mark.parametrize("ends", [0.0, 0.5])
def test_search_of_full_width_to_the_horizon_is_exact(kind, omega_prime, alpha_hat, ends):
    """To 1e-8, for any weights, with and without ends; and before it is full, it is not."""
    given = world(ends)
    given = problem(given, some_prior(given), omega_prime, alpha_hat)
    exact = np.asarray(mcts.residual_q(given, 2))[:-1, None]
    error = np.abs(searched(kind, given) - exact).max((0, 2))
    assert error[-1] < 1e-8
    assert error[0] > 0.01


def test_search_with_full_width_and_the_horizon_of_the_world_is_the_soft_optimum_of_the_full_task():
    """In a world that ends after three steps, nothing is cut off: states are (step, which), the last step ends."""
    rng, gamma, alpha = np.random.default_rng(5), 0.8, 0.5
    transition, reward = np.zeros((6, 2, 6)), rng.normal(size=(2, 6, 2))
    for s, a in itertools.product(range(4), range(2)):
        transition[s, a, 2 * (s // 2 + 1) :][:2] = rng.dirichlet([9, 9])
    given = mcts.make_world(transition, gamma, *reward, np.full(6, 1 / 6), {})
    log_prior = mcts.make_prior(given, alpha, 0.0, (0,))
    found = searched("uniform", problem(given, log_prior, alpha, alpha), 3, (20000,))[:, -1]
    full = soft_optimum(transition, reward.sum(0), gamma, alpha)
    policy = softmax((found + alpha * np.asarray(log_prior)[:-1]) / alpha)
    np.testing.assert_allclose(policy, softmax(full / alpha), atol=1e-8)
    assert np.abs(policy - np.exp(np.asarray(log_prior)[:-1])).max() > 0.1


def test_omega_prime_0_forgets_the_prior():
    """At full width two priors give the same values and policy; with a weight they do not."""
    given = world(0.5)
    for omega_prime, same in ((0.0, True), (0.3, False)):
        one, other = (searched("soft", problem(given, some_prior(given, x), omega_prime, 0.4))[:, -1] for x in (1, 2))
        assert (np.abs(one - other).max() < 1e-8) == same
    transition, _, addon = arrays()
    transition[0, 0] *= 0.5
    greedy = searched("soft", problem(given, some_prior(given), 0.0, 0.4))[:, -1]
    np.testing.assert_allclose(greedy, soft_optimum(transition, addon, 0.7, 0.4, horizon=2), atol=1e-8)


@pytest.mark.parametrize("kind", mcts.TREE_POLICIES)
def test_error_falls_with_simulations(kind):
    """On the road, mean over seeds of the root mean square error: each time by a tenth at least."""
    given = mcts.find_world(None, 0.8)
    given = problem(given, mcts.make_prior(given, 0.1, 0.0, (1,)), 0.1, 0.1)
    roots = jnp.asarray(np.flatnonzero(given.world.start)[::8], jnp.int32)
    keys = jax.random.split(jax.random.PRNGKey(3), len(roots))
    found = mcts.plan(kind, (3, 10, 30, 100, 300), 6, given, roots, keys)
    error = np.sqrt(((found - mcts.residual_q(given, 6)[roots][:, None]) ** 2).mean((0, 2)))
    assert len(roots) > 20
    assert (error[1:] < 0.9 * error[:-1]).all()
    assert error[-1] < 0.5 * error[0]


@pytest.mark.parametrize(("omega_prime", "alpha_hat"), [(0.3, 0.3), (0.9, 0.1), (0.1, 0.6)])
def test_a_rollout_is_in_the_mean_what_acting_as_the_prior_earns(omega_prime, alpha_hat):
    """The first simulation's value of the root; r_R + omega' log pi - alpha_hat log pi, by dynamic programming."""
    given = world(0.5)
    log_prior = some_prior(given)
    transition, _, addon = arrays()
    transition[0, 0] *= 0.5
    log_pi = np.asarray(log_prior)[:-1]
    value = np.zeros(len(log_pi))
    for _ in range(4):
        value = (np.exp(log_pi) * (addon + (omega_prime - alpha_hat) * log_pi + 0.7 * transition @ value)).sum(-1)
    problem_ = problem(given, log_prior, omega_prime, alpha_hat)
    keys = jax.random.split(jax.random.PRNGKey(0), 20000)
    for root in range(2):
        q = mcts.plan("soft", (1,), 4, problem_, jnp.full(len(keys), root, jnp.int32), keys)[:, 0]
        values = np.asarray(mcts.node_value(problem_, q, log_prior[root]))
        assert values.mean() == pytest.approx(value[root], abs=4.5 * values.std() / np.sqrt(len(keys)))
        policy = jax.nn.softmax((q + omega_prime * log_prior[root]) / alpha_hat)
        np.testing.assert_allclose(policy, np.broadcast_to(np.exp(log_pi[root]), policy.shape), atol=1e-10)


def test_the_papers_tree_policy_is_uniform_for_147_visits_and_the_soft_one_heeds_log_pi():
    given, q, log_prior = world(), jnp.array([0.5, 0.1, 0, 0, 0]), jnp.log(jnp.array([0.05, 0.8, 0.05, 0.05, 0.05]))
    given = problem(given, some_prior(given), 0.3, 0.2)
    scores = np.exp((np.asarray(q) + 0.3 * np.asarray(log_prior)) / 0.2)
    for visits in (2, 10, 147, 148, 10**6):
        for kind, scale in (("uniform", 5), ("soft", 1)):
            weight = min(1, scale / np.log(1 + visits))
            expected = weight / 5 + (1 - weight) * scores / scores.sum()
            found = mcts.mixture(kind, given, log_prior, q, jnp.array(visits))
            np.testing.assert_allclose(found, expected, rtol=1e-9)
            assert np.allclose(found, 0.2) == (kind == "uniform" and visits <= 147)
            np.testing.assert_allclose(mcts.mixture(kind, given, log_prior, q, jnp.array(1)), np.exp(log_prior))


def test_actions_without_a_chance_are_never_sampled():
    chances = jnp.array([0.0, 0.3, 0.0, 0.7, 0.0])
    uniforms = jnp.asarray([0.0, 0.1, 0.3 - 1e-6, 0.3 + 1e-6, 0.9, 1 - 2**-24], jnp.float32)
    np.testing.assert_array_equal(jax.vmap(mcts.sample, (None, 0))(chances, uniforms), [1, 1, 1, 3, 3, 3])


def test_searches_side_by_side_are_those_one_by_one():
    given = world(0.5)
    given = problem(given, some_prior(given))
    together = searched("soft", given, counts=(30, 60))
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    for root in range(4):
        alone, tree = mcts.search("soft", (30, 60), 2, given, jnp.int32(root), keys[root])
        np.testing.assert_allclose(alone, together[root], atol=1e-12)
        assert tree.visits[0] == 60


# ------------------------------------------------------------------------------------- worlds


def road_state(lane, speed, *cars):
    return int(np.ravel_multi_index((lane, speed, *cars), (3, 3, 5, 5, 5)))


def after(state, action):
    """{next state: chance}, None being the end."""
    road, num_states = mcts.find_world(None, 0.8), 3 * 3 * 5**3
    found = zip(np.asarray(road.successors[state, action]), np.asarray(road.chances[state, action]), strict=True)
    return {None if s == num_states else int(s): pytest.approx(p) for s, p in found if p > 0}


LEFT, IDLE, RIGHT, FASTER, SLOWER = range(5)


def test_road_moves_as_it_says():
    """Cars drive 2, 1, 1 cells a step, one's own speed is subtracted, and the car in one's own lane may brake."""
    assert after(road_state(0, 1, 2, 3, 3), IDLE) == {
        road_state(0, 1, 3, 3, 3): 0.8,
        road_state(0, 1, 2, 3, 3): 0.2,
    }
    assert after(road_state(1, 1, 0, 2, 4), FASTER) == {road_state(1, 2, 0, 1, 3): 0.8, None: 0.2}
    assert after(road_state(1, 2, 0, 1, 4), IDLE) == {None: 1.0}
    assert after(road_state(1, 1, 0, 2, 4), LEFT) == {None: 1.0}  # a car is beside
    assert after(road_state(1, 1, 0, 2, 4), RIGHT) == {road_state(2, 1, 1, 2, 4): 0.8, road_state(2, 1, 1, 2, 3): 0.2}
    assert after(road_state(2, 0, 0, 2, 2), RIGHT).keys() == after(road_state(2, 0, 0, 2, 2), SLOWER).keys()


def test_what_is_measured_is_what_episodes_bring():
    """Expected totals, crashes and mean lane against sampled episodes, in NumPy."""
    road, rng, length = mcts.find_world(None, 0.8), np.random.default_rng(0), 10
    policy = rng.dirichlet(np.ones(5), len(road.start))
    expected = {name: float(x[0]) for name, x in mcts.episodes(road, length, jnp.asarray(policy)[None]).items()}
    successors, chances, start = (np.asarray(x) for x in (road.successors, road.chances, road.start))
    measures, end, count = {name: np.asarray(x) for name, x in road.measures.items()}, len(start) - 1, 20000
    state, sums, steps = rng.choice(len(start), count, p=start), dict.fromkeys(measures, 0.0), 0
    for _ in range(length):
        action = (policy[state].cumsum(-1) < rng.random((count, 1))).sum(-1)
        inside, steps = state != end, steps + (state != end).sum()
        sums = {name: x + measures[name][state, action] * inside for name, x in sums.items()}
        pick = (chances[state, action].cumsum(-1) < rng.random((count, 1)) * (1 - 1e-12)).sum(-1)
        state = successors[state, action, pick]
    assert sums["total"].mean() == pytest.approx(expected["total"], abs=4.5 * sums["total"].std() / np.sqrt(count))
    assert (state == end).mean() == pytest.approx(expected["crashes"], abs=4.5 * 0.5 / np.sqrt(count))
    assert sums["mean lane"].sum() / steps == pytest.approx(expected["mean lane"], abs=0.02)


def test_planning_drives_on_the_right_without_forgetting_the_prior():
    """On the road: exact planning earns more than the prior and than greedy planning, and searches come near."""
    args = mcts.checked(mcts.Args(num_seeds=1, num_simulations=(100,)))
    found = {name: curves for name, _, curves in mcts.simulations(args)}
    total, lane = ({label: float(y[0, -1]) for label, (_, y) in found[x].items()} for x in ("total", "mean lane"))
    assert total["exact optimum"] > total["greedy, ω′ = 0"] + 2 > total["prior"] + 4
    for kind in mcts.TREE_POLICIES:
        assert total["exact optimum"] - 1.5 < total[f"search, {kind} tree policy"]
        assert lane[f"search, {kind} tree policy"] > 1.8 > 0.5 > lane["prior"]


# ------------------------------------------------------------------------------------- script


def mdp_file(path, **changes):
    """A good file for --mdp, with changes."""
    named = dict(zip(("P", "r", "r_R"), arrays(), strict=True)) | {"gamma": 0.9} | changes
    np.savez(path, **{name: x for name, x in named.items() if x is not None})
    return path


def test_run_writes_its_pictures_and_what_they_show(tmp_path):
    flags = ("--num-simulations", 4, 9, "--num-seeds", 2, "--horizon", 2, "--prior-errors", 0, 1)
    flags += ("--mdp", mdp_file(tmp_path / "mine.npz"), "--runs-dir", tmp_path / "runs")
    mcts.main(tyro.cli(mcts.Args, args=[*map(str, flags)]))
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"mine__residual_mcts__1__\d+\.\d{3}", run_dir.name)
    assert json.loads((run_dir / "args.json").read_text())["omega_prime"] == 0.1
    files = {f"{x}.{y}" for x in mcts.FIGURES for y in ("png", "csv")}
    assert {path.name for path in run_dir.iterdir()} == {"args.json"} | files
    for name in mcts.FIGURES:
        assert (run_dir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with (run_dir / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows and all(float(row["lowest"]) <= float(row["mean"]) <= float(row["highest"]) for row in rows)
        panels = ["ω′ = 0.1, α̂ = 0.1", "ω′ = 3 α, α̂ = α / 3"] if name == "errors" else ["add-on", "basic", "total"]
        assert list(dict.fromkeys(row["panel"] for row in rows)) == panels


def assert_refused(flags, expected, tmp_path):
    """main raises BadInput with one line that says what is wrong, and writes nothing."""
    with pytest.raises(mcts.BadInput) as stop:
        mcts.main(tyro.cli(mcts.Args, args=[*map(str, flags), "--runs-dir", str(tmp_path / "runs")]))
    assert re.search(expected, str(stop.value))
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "runs").exists()


GOOD_P = arrays()[0]
BAD_FILES = {
    "rows that sum to less than 1": ({"P": GOOD_P * 0.9}, "sum to 1"),
    "negative chances": ({"P": GOOD_P * 2 - np.eye(4)[:, None]}, "positive"),
    "NaN in P": ({"P": GOOD_P * np.nan}, "sum to 1"),
    "NaN in r": ({"r": np.full((4, 2), np.nan)}, "r and r_R be finite"),
    "infinite r_R": ({"r_R": np.full((4, 2), np.inf)}, "r and r_R be finite"),
    "shapes that differ": ({"r_R": np.zeros((4, 3))}, "shapes"),
    "P of two axes": ({"P": np.eye(4)}, "shapes"),
    "nothing in it": ({"P": np.zeros((0, 0, 0)), "r": np.zeros((0, 0)), "r_R": np.zeros((0, 0))}, "shapes"),
    "gamma too near to 1": ({"gamma": 0.99999}, "gamma from 0"),
    "gamma NaN": ({"gamma": np.nan}, "gamma from 0"),
    "gamma of many": ({"gamma": np.full(3, 0.9)}, "shapes"),
    "no r_R": ({"r_R": None}, "r_R is not a file"),
    "words for r": ({"r": np.full((4, 2), "much")}, "could not convert"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_mdp_is_refused_in_one_line(what, tmp_path):
    changes, expected = BAD_FILES[what]
    assert_refused(("--mdp", mdp_file(tmp_path / "bad.npz", **changes)), expected, tmp_path)


def test_damaged_file_is_refused_in_one_line(tmp_path):
    path = mdp_file(tmp_path / "bad.npz")
    for damage in (path.read_bytes()[:-40], b"PK\x03\x04", b"", path.read_bytes().replace(b"r_R", b"r_Q")):
        path.write_bytes(damage)
        assert_refused(("--mdp", path), "bad.npz cannot be used", tmp_path)


BAD_FLAGS = {
    "gamma 1": (("--gamma", 1), "--gamma is 1.0; it must be from 0 to 0.9999"),
    "gamma NaN": (("--gamma", "nan"), "--gamma"),
    "alpha 0": (("--alpha", 0), "--alpha is 0.0; it must be from 1e-06"),
    "alpha-hat 0": (("--alpha-hat", 0), "--alpha-hat"),
    "omega-prime negative": (("--omega-prime", -1), "--omega-prime"),
    "prior-error infinite": (("--prior-error", "inf"), "--prior-error is inf"),
    "a prior-error negative": (("--prior-errors", 0, -1), "--prior-errors"),
    "no prior-errors": (("--prior-errors",), "--prior-errors"),
    "no simulations": (("--num-simulations",), "--num-simulations"),
    "0 simulations": (("--num-simulations", 0, 10), "--num-simulations"),
    "descending simulations": (("--num-simulations", 10, 5), "must ascend"),
    "equal simulations": (("--num-simulations", 10, 10), "must ascend"),
    "no horizon": (("--horizon", 0), "--horizon"),
    "no seeds": (("--num-seeds", 0), "--num-seeds"),
    "seed negative": (("--seed", -1), "--seed"),
    "file missing": (("--mdp", "gone.npz"), "gone.npz"),
    "file of another kind": (("--mdp", ROOT / "README.md"), "README.md"),
}


@pytest.mark.parametrize("what", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(what, tmp_path):
    assert_refused(*BAD_FLAGS[what], tmp_path)


def test_command_line_ends_with_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for flags in (("--mdp", "file"), ("--runs-dir", "file")):
        process = run_script("residual_mcts", *flags, cwd=tmp_path)
        assert process.returncode == 2
        assert process.stderr.startswith("residual_mcts.py: ") and process.stderr.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_script_has_at_most_450_lines():
    assert script_path("residual_mcts").read_text().count("\n") <= 450
