"""Soft and Residual DQN: exact optima of small MDPs in float64, and whole runs on real environments."""

import importlib.util
import json
import math
import re
import shutil
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tyro
from conftest import ROOT, read_metrics, read_policy, run_script, write_policy
from scipy.special import log_softmax, logsumexp, softmax

import enjoy
import mirror_descent_vi as vi
import residual_dqn
import soft_dqn

GAMMA, ALPHA, OMEGA, ALPHA_HAT = 0.9, 0.5, 0.7, 0.3
STATES, ACTIONS = 6, 4
SHORT = (
    "--num-envs", 8, "--num-steps", 16, "--total-timesteps", 1024, "--eval-episodes", 2, "--learning-starts", 220,
    "--updates-per-step", 0.0625, "--batch-size", 32,
)  # fmt: skip


@pytest.fixture
def float64():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


# --------------------------------------------------------------------------------- exact MDPs


def random_mdp(seed):
    """Probabilities (states, actions, states + 1), the last one of the end, and two rewards (states, actions)."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(STATES + 1, 0.5), (STATES, ACTIONS)), *rng.normal(size=(2, STATES, ACTIONS))


def soft_optimal_q(probability, reward, temperature):
    """Soft action values (states, actions), by soft value iteration in NumPy."""
    q = np.zeros_like(reward)
    for _ in range(400):
        value = temperature * logsumexp(q / temperature, axis=-1)
        q = reward + GAMMA * probability[..., :-1] @ value
    return q


def table(script, q):
    """A state whose network is the table q (states, actions): observations are one-hot states."""
    params = {"params": {"actor.0": {"kernel": jnp.asarray(q), "bias": jnp.zeros(q.shape[-1])}}}
    return script.DQNState(params, params, None, 0, 0, script.QNetwork(q.shape[-1], ()))


def backup(script, target, probability, reward):
    """The script's own target of a table q, as an exact expectation over what follows: a function of q."""
    num_states, num_actions, _ = probability.shape
    s, a, t = (x.ravel() for x in np.indices(probability.shape))
    terminated = t == num_states
    batch = script.Experience(  # an end has a last observation, too, which must not be looked at
        np.eye(num_states)[s], np.eye(num_actions)[a], reward[s, a], np.eye(num_states)[t % num_states], terminated
    )
    return jax.jit(lambda q: (probability * target(table(script, q), batch).reshape(probability.shape)).sum(-1))


def fixed_point(step, q):
    """Where 400 steps lead from q."""
    return np.asarray(jax.lax.fori_loop(0, 400, lambda _, q: step(q), q))


def residual_q(probability, addon_reward, prior_log_prob, omega_prime, alpha_hat):
    """Q_R of residual_dqn.py's target."""
    actor, params = residual_dqn.QNetwork(ACTIONS, ()), table(residual_dqn, prior_log_prob).params
    args = residual_dqn.Args(omega_prime=omega_prime, alpha_hat=alpha_hat, gamma=GAMMA)

    def target(state, batch):
        return residual_dqn.residual_dqn_target(args, residual_dqn.CategoricalPolicy(params, actor), state, batch)

    return fixed_point(backup(residual_dqn, target, probability, addon_reward), np.zeros_like(addon_reward))


def soft_backup(probability, reward, **flags):
    """That of soft_dqn.py's target."""
    args = soft_dqn.Args(gamma=GAMMA, **flags)
    return backup(soft_dqn, lambda *inputs: soft_dqn.soft_dqn_target(args, *inputs), probability, reward)


@pytest.mark.parametrize("seed", range(3))
def test_residual_fixed_point_is_the_soft_optimum_of_the_full_task(float64, seed):
    """Its policy is that of omega r + r_R at alpha_hat, and Q_R = Q - omega Q*, ends included."""
    probability, reward, addon_reward = random_mdp(seed)
    prior_q = soft_optimal_q(probability, reward, ALPHA)
    prior_log_prob = log_softmax(prior_q / ALPHA, axis=-1)
    full_q = soft_optimal_q(probability, OMEGA * reward + addon_reward, ALPHA_HAT)
    actual = residual_q(probability, addon_reward, prior_log_prob, OMEGA * ALPHA, ALPHA_HAT)
    np.testing.assert_allclose(actual, full_q - OMEGA * prior_q, atol=1e-8)
    logits = (actual + OMEGA * ALPHA * prior_log_prob) / ALPHA_HAT
    np.testing.assert_allclose(log_softmax(logits, -1), log_softmax(full_q / ALPHA_HAT, -1), atol=1e-8)


def test_omega_prime_equal_to_alpha_hat_is_the_kl_objective(float64):
    """No policy has more of r_R - beta KL(policy || prior), values by linear systems, and the fixed point's has it."""
    probability, _, addon_reward = random_mdp(3)
    rng, beta = np.random.default_rng(4), 0.4
    prior_log_prob = log_softmax(rng.normal(size=(STATES, ACTIONS)), -1)
    q = residual_q(probability, addon_reward, prior_log_prob, beta, beta)
    best = log_softmax((q + beta * prior_log_prob) / beta, -1)

    def value(log_policy):
        policy = np.exp(log_policy)
        reward = (policy * (addon_reward - beta * (log_policy - prior_log_prob))).sum(-1)
        transition = np.einsum("sa,sat->st", policy, probability[..., :-1])
        return np.linalg.solve(np.eye(STATES) - GAMMA * transition, reward)

    np.testing.assert_allclose(value(best), beta * logsumexp((q + beta * prior_log_prob) / beta, axis=-1), atol=1e-8)
    for size in (1e-3, 0.1, 1):
        other = log_softmax(best + size * rng.normal(size=best.shape), -1)
        assert (value(other) < value(best)).all()


def test_without_munchausen_it_is_soft_q_learning(float64):
    probability, reward, _ = random_mdp(5)
    expected = soft_optimal_q(probability, reward, ALPHA)
    np.testing.assert_allclose(
        fixed_point(soft_backup(probability, reward, alpha=ALPHA), 0 * reward), expected, atol=1e-8
    )


def test_soft_q_learning_becomes_q_learning_as_alpha_falls_to_0(float64):
    """0 is value iteration with a maximum; above 0 values are higher, by gamma alpha log |A| / (1 - gamma) at most."""
    probability, reward, _ = random_mdp(6)
    expected = np.zeros_like(reward)
    for _ in range(400):
        expected = reward + GAMMA * probability[..., :-1] @ expected.max(-1)
    for alpha in (1.0, 0.1, 1e-3, 0.0):
        excess = fixed_point(soft_backup(probability, reward, alpha=alpha), 0 * reward) - expected
        assert (excess > -1e-12).all()
        assert excess.max() < GAMMA * alpha * math.log(ACTIONS) / (1 - GAMMA) + 1e-12


@pytest.mark.parametrize(("lambda_", "tau"), [(0.5, 0.0), (0.3, 0.2), (0.027, 0.003)])
def test_munchausen_is_mirror_descent(float64, lambda_, tau):
    """The same policies as mirror_descent_vi.py's MD-VI, step by step; alpha is lambda + tau, munchausen its share.

    Where episodes end, constants count, too: q_0 = 0 there is lambda log pi_0 here.
    """
    probability, reward, _ = random_mdp(7)
    alpha = lambda_ + tau
    flags = {"alpha": alpha, "munchausen": lambda_ / alpha, "munchausen_clip": 1e9}
    mdp = vi.MDP(jnp.array(probability[..., :-1]), jnp.array(reward), jnp.array(GAMMA))
    other, key = vi.start_iterate(mdp, jnp.array(tau)), jax.random.PRNGKey(0)
    weights, advance = tuple(map(jnp.array, (lambda_, tau, 0.0))), jax.jit(vi.advance, static_argnums=(0, 1))
    step, q = soft_backup(probability, reward, **flags), np.full_like(reward, -lambda_ * math.log(ACTIONS))
    for k in range(30):
        policy, q = softmax(q / alpha, -1), np.asarray(step(q))  # pi_{k+1} of q_k
        other = advance("mirror_descent", ("gaussian", 1), mdp, key, weights, jnp.array(k), other)
        np.testing.assert_allclose(policy, np.exp(other.log_policy), atol=1e-9)


def test_munchausen_reward_is_clipped(float64):
    q, alpha = np.array([3.0, 1.0, -4.0]), 0.5
    log_policy = log_softmax(q / alpha)
    for i, action in enumerate(np.eye(3)):
        expected = 0.9 * max(-2.5, alpha * log_policy[i])
        assert float(soft_dqn.munchausen_reward(q, action, alpha, 0.9, 2.5)) == pytest.approx(expected, abs=1e-12)


def test_soft_maximum_is_exact_where_exponentials_overflow(float64):
    q = np.array([[1e4, 1e4 - 1, -1e4], [-5e3, -5e3, -5e3]])
    for alpha in (1e-3, 1.0, 1e3):
        expected = alpha * logsumexp(q / alpha, axis=-1)
        np.testing.assert_allclose(soft_dqn.soft_maximum(q, alpha), expected, rtol=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_double_value_is_what_the_network_s_policy_is_worth_to_the_target_network(float64, alpha):
    """Beside the sum over actions in NumPy; never above the soft maximum, which it is where both networks agree."""
    q, online_q = np.random.default_rng(8).normal(size=(2, 50, ACTIONS))
    if alpha:
        log_policy = log_softmax(online_q / alpha, -1)
        expected = (np.exp(log_policy) * (q - alpha * log_policy)).sum(-1)
    else:
        expected = q[np.arange(50), online_q.argmax(-1)]
    actual = soft_dqn.double_value(q, online_q, alpha)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    assert (actual <= soft_dqn.soft_maximum(q, alpha) + 1e-12).all()
    np.testing.assert_allclose(soft_dqn.double_value(q, q, alpha), soft_dqn.soft_maximum(q, alpha), atol=1e-12)


# ---------------------------------------------------------------------------- policies and steps


@pytest.mark.parametrize(("ours", "theirs"), [((), ()), ((5, 4), (3, 6))])
def test_customised_policy_is_one_network_of_prior_and_residual(float64, ours, theirs):
    """softmax((Q_R + omega' log pi) / alpha_hat), beside the two networks in NumPy."""
    args = residual_dqn.Args(omega_prime=0.2, alpha_hat=0.7, hidden_sizes=ours)
    obs = np.random.default_rng(0).normal(size=(20, 3))
    networks = []
    for i, sizes in enumerate((ours, theirs)):
        actor = residual_dqn.QNetwork(ACTIONS, sizes, "tanh")
        params = actor.init(jax.random.PRNGKey(i), obs)
        networks.append((actor, jax.tree.map(lambda x, i=i: np.float64(x) + 0.1 * (i + 1), params)))  # biases, too
    (actor, params), prior = networks[0], residual_dqn.CategoricalPolicy(networks[1][1], networks[1][0])
    state = residual_dqn.DQNState(params, params, None, 0, 0, actor)
    policy = residual_dqn.customised_policy(args, prior, state)
    outputs = []
    for network, weights in networks:
        x, depth = obs, len(network.hidden_sizes)
        for j in range(depth + 1):
            layer = weights["params"][f"actor.{2 * j}"]
            x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
            x = np.tanh(x) if j < depth else x
        outputs.append(x)
    expected = log_softmax((outputs[0] + 0.2 * log_softmax(outputs[1], -1)) / 0.7, -1)
    actual = log_softmax(residual_dqn.action_logits(policy, obs), -1)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    assert policy.actor.hidden_sizes == tuple(a + b for a, b in zip(ours, theirs, strict=True))


def test_actions_are_sampled_as_the_logits_say_and_the_best_one_without_noise():
    logits = jnp.array([0.3, -1.0, 1.2])
    noise = jax.random.gumbel(jax.random.PRNGKey(0), (100_000, 3))
    share = np.asarray(soft_dqn.choose_action(logits, noise)).mean(0)
    deviation = np.sqrt(softmax(logits) * (1 - softmax(logits)) / 100_000)
    assert (np.abs(share - softmax(logits)) < 4.5 * deviation).all()
    np.testing.assert_array_equal(soft_dqn.choose_action(logits, 0 * noise[0]), [0, 0, 1])


def counting_env(num_envs=2):
    """Environments that count the steps of an episode of 5; action 1 pays 1; every other one terminates."""

    def reset():
        return np.zeros(num_envs, np.int32), np.zeros((num_envs, 1), np.float32)

    def step(count, action):
        count = jnp.where(count == 5, 0, count + 1)
        ends = (count == 5) & (jnp.arange(num_envs) % 2 == 0)
        return count, count[:, None].astype(jnp.float32), action[:, 1], ends, (count == 5) & ~ends

    low = np.zeros(2, np.float32)
    simulator = soft_dqn.Simulator(reset, step, 1, low, low + 1, jax.devices("cpu")[0], "counting")
    return soft_dqn.make_env(simulator, soft_dqn.DISCRETE_TASKS["none"], squash=False)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_share_epsilon_of_a_rollout_s_actions_is_uniform(epsilon):
    env, actor = counting_env(64), soft_dqn.QNetwork(2, ())
    params = {"params": {"actor.0": {"kernel": jnp.zeros((1, 2)), "bias": jnp.array([0.0, 2.0])}}}
    policy = soft_dqn.CategoricalPolicy(params, actor)
    key = soft_dqn.seed_words(1, soft_dqn.ROLLOUT)
    _, transitions = soft_dqn.rollout_categorical(env, 500, policy, epsilon, env.reset(), key)
    expected = epsilon / 2 + (1 - epsilon) * softmax([0, 2])[1]
    assert transitions.action.shape == (500, 64, 2)
    assert float(transitions.action[..., 1].mean()) == pytest.approx(expected, abs=0.01)
    np.testing.assert_array_equal(transitions.basic_reward, transitions.action[..., 1] * transitions.valid)


def test_learned_values_are_those_of_the_world_with_ends_and_time_limits():
    """Of the counting environments: 1 to go per step where an episode ends, and on and on where it is only cut."""
    args = soft_dqn.Args(
        num_envs=2, num_steps=8, total_timesteps=16 * 300, learning_starts=16, alpha=0.0, gamma=0.5, hidden_sizes=(32,),
        updates_per_step=1.0, learning_rate=5e-3, tau=0.05, start_e=1.0, end_e=1.0,
    )  # fmt: skip
    env, actor = counting_env(), soft_dqn.QNetwork(2, (32,))
    state = soft_dqn.init_dqn_state(args, actor, 1, soft_dqn.seed_words(1, soft_dqn.NETWORKS))
    policy_of, update = (lambda state: soft_dqn.soft_policy(args, state)), soft_dqn.soft_dqn_update
    logged = []
    state = soft_dqn.train_discrete(
        env, policy_of, lambda *x: update(args, *x), args, state, lambda i, s, metrics: logged.append((i, metrics))
    )
    q = np.asarray(actor.apply(state.params, np.arange(5, dtype=np.float32)[:, None]))
    # The two are one to the network: the last step's value is the mean of 0 and that of observation 5, never left.
    beyond = float(actor.apply(state.params, np.float32([[5]]))[0].max())
    value = beyond / 2
    for count in reversed(range(5)):
        expected = np.array([0, 1]) + 0.5 * value
        np.testing.assert_allclose(q[count], expected, atol=0.1)
        value = expected.max()
    assert [i for i, _ in logged] == list(range(1, 301))


# ------------------------------------------------------------------------------- tasks, simulators


def test_cart_pole_s_rewards_are_those_of_the_equations():
    """Played in Gymnasium's own CartPole: 1 - 10 |theta'| / 0.2095, and -|x'| / 2.4, of the state after the step."""
    env = gymnasium.make("CartPole-v1")
    obs, _ = env.reset(seed=3)
    basic, addon = soft_dqn.BASIC_TASKS["cart-pole-upright"], soft_dqn.DISCRETE_TASKS["cart-pole-centre"]
    for index in (0, 1, 1, 0, 1):
        before, (obs, *_) = obs, env.step(index)
        x, _, theta, _ = env.unwrapped.state
        seen = before, np.eye(2)[index], obs
        assert basic.reward(basic.quantity(*seen)) == pytest.approx(1 - 10 * abs(theta) / 0.2095, abs=1e-5)
        assert addon.reward(addon.quantity(*seen)) == pytest.approx(-abs(x) / 2.4, abs=1e-6)


def test_simulator_takes_one_hot_actions_and_gives_flat_observations_and_the_basic_reward():
    """EnvPool's own loop from the same seeds, on CartPole with its basic task, and on highway's table."""
    for env_id, basic in (("CartPole-v1", "cart-pole-upright"), ("highway-fast-v0", "own")):
        seeds = np.arange(5, 8)
        simulator = soft_dqn.make_discrete_simulator(env_id, "{}", basic, seeds)
        pool = soft_dqn.envpool.make(env_id, env_type="gymnasium", num_envs=3, seed=seeds.tolist())
        state, obs = simulator.reset()
        np.testing.assert_array_equal(obs, pool.reset()[0].reshape(3, -1))
        rng, num_actions = np.random.default_rng(0), len(simulator.low)
        for _ in range(8):
            action = rng.integers(0, num_actions, 3)
            state, *ours = jax.jit(simulator.step)(state, np.eye(num_actions, dtype=np.float32)[action])
            theirs = list(pool.step(action.astype(np.int32))[:4])
            theirs[0] = theirs[0].reshape(3, -1)
            if basic != "own":
                theirs[1] = 1 - 10 * np.abs(theirs[0][:, 2]) / 0.2095
            for x, y in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_highway_s_lane_and_speed_are_those_of_the_simulator():
    """Lane and speed read from the observation, scaled as EnvPool does, are what highway-env says of its vehicle."""
    pytest.importorskip("highway_env")
    env = gymnasium.make("highway-fast-v0")
    quantity, lanes = soft_dqn.DISCRETE_TASKS["highway-right"].quantity, set()
    speed = soft_dqn.DISCRETE_TASKS["highway-slow"].quantity
    for seed in range(4):
        obs, _ = env.reset(seed=seed)
        for action in (2, 2, 1, 0, 0):
            obs, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                break
            y = env.unwrapped.vehicle.position[1]  # in metres; a lane is 4 wide
            lane = float(quantity(None, None, obs.ravel()))
            assert lane == np.round(y / 4)
            np.testing.assert_allclose(speed(None, None, obs.ravel()), env.unwrapped.vehicle.velocity[0], rtol=1e-5)
            lanes.add(lane)
    assert lanes == {0, 1, 2}
    pool = soft_dqn.envpool.make("highway-fast-v0", env_type="gymnasium", num_envs=32, seed=1)
    first = pool.reset()[0].reshape(32, -1)
    assert set(3 * first[:, 2]) == lanes  # at the start nobody is between lanes
    np.testing.assert_allclose(first[:, 3], env.reset()[0][0, 3])  # both start at the same speed, on the same scale


# ------------------------------------------------------------------------------------- whole runs


def run_main(script, *flags):
    """What a script does with its flags, in this process."""
    args = tyro.cli(script.Args, args=[str(flag) for flag in flags])
    for step in ("resumed_dqn_args", "check_dqn_args", "choose_tasks", "find_categorical_prior"):
        args = getattr(script, step, lambda args: args)(args)
    script.main(args, script.DiscreteRun)


@pytest.fixture(scope="module")
def dqn_runs(tmp_path_factory):
    """A short run of soft_dqn.py on CartPole, and one of residual_dqn.py from its policy: {script: folder}."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("soft_dqn", "residual_dqn")}
    folder = folders["soft_dqn"]
    process = run_script("soft_dqn", *SHORT, "--hidden-sizes", 16, 16, "--runs-dir", folder / "runs", cwd=folder)
    assert (process.returncode, process.stderr) == (0, "")
    prior = next(folder.glob("runs/*/policy.safetensors"))
    flags = ("--prior", prior, "--learning-rate", 0.02, "--runs-dir", folders["residual_dqn"] / "runs")
    run_main(residual_dqn, *SHORT, *flags)
    return {name: next(folder.glob("runs/*")) for name, folder in folders.items()}


def test_runs_are_complete_and_learn_once_there_is_enough(dqn_runs):
    for name, folder in dqn_runs.items():
        rows = read_metrics(folder)
        assert [row["global_step"] for row in rows] == [str(128 * i) for i in range(1, 9)]
        learning = [float(row["value_loss"]) > 0 for row in rows]
        assert learning == [False] + 7 * [True]
        left = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents.")}
        expected = {"args.json", "metrics.csv", "checkpoint.msgpack", "policy.safetensors", "eval.json"}
        assert left == expected | ({"prior.safetensors"} if name == "residual_dqn" else set())


def test_log_has_nothing_to_show_before_the_first_episode_ends(tmp_path, caplog, capsys):
    """TensorBoard's writer would complain of NaN, the terminal show it; the row has it."""
    args = soft_dqn.Args(runs_dir=tmp_path, num_envs=2, alpha=0.1, addon="none", basic="own")
    simulator = soft_dqn.make_discrete_simulator("CartPole-v1", "{}", "own", np.arange(2))
    state = soft_dqn.init_dqn_state(args, soft_dqn.QNetwork(2, (4,)), 4, soft_dqn.seed_words(1, soft_dqn.NETWORKS))
    with soft_dqn.DiscreteRun(args, simulator, soft_dqn.DISCRETE_TASKS["none"], state) as run:
        run.write(1, state, {"basic_return": 0.0, "entropy": 0.5, "episodes_seen": 0})
    assert caplog.records == []
    assert re.search(r"steps/s  entropy 0.5$", capsys.readouterr().out, re.MULTILINE)
    assert read_metrics(run.folder)[0]["basic_return"] == "nan"


def test_a_run_says_once_that_it_loses_the_prior_and_keeps_the_columns_it_began_with(tmp_path, capsys):
    """Of soft_dqn.py's log, which is residual_dqn.py's word for word."""
    args = soft_dqn.Args(env_id="CartPole-v1", runs_dir=tmp_path, num_envs=2)
    simulator = soft_dqn.make_discrete_simulator("CartPole-v1", "{}", args.basic, np.arange(2))
    state = soft_dqn.init_dqn_state(args, soft_dqn.QNetwork(2, (4,)), 4, soft_dqn.seed_words(1, soft_dqn.NETWORKS))
    said = []
    with soft_dqn.DiscreteRun(args, simulator, soft_dqn.DISCRETE_TASKS["none"], state) as run:
        run.write(1, state, {"basic_return": 9.0, "gone": 2.0, "episodes_seen": 2})
        for iteration, (kept, seen) in enumerate([(0.4, 1), (0.6, 2), (0.4, 2), (0.3, 2)], 2):
            run.write(iteration, state, {"basic_return": 1.0, "kept_return": kept, "episodes_seen": seen})
            said.append("below half of the prior's" in capsys.readouterr().out)
    assert said == [False, False, True, False]
    assert [row["gone"] for row in read_metrics(run.folder)] == ["2", *["nan"] * 4]


def test_first_customised_policy_is_the_prior(dqn_runs):
    divergences = [float(row["kl_to_prior"]) for row in read_metrics(dqn_runs["residual_dqn"])]
    assert max(map(abs, divergences[:2])) < 1e-7 < 1e-6 < min(divergences[2:])
    content = json.loads((dqn_runs["residual_dqn"] / "eval.json").read_text())
    assert content.keys() == {"prior", "customised"}
    args = json.loads((dqn_runs["residual_dqn"] / "args.json").read_text())["args"]
    assert (args["omega_prime"], args["alpha_hat"], args["gamma"]) == (1.0, 1.0, 0.99)  # what the prior's file says


def test_policy_files_are_one_policy_in_jax_and_in_enjoy(dqn_runs):
    """Sampled and best actions; enjoy.py plays it on the rewards of the training; a customised policy is a prior."""
    obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    noise = np.random.default_rng(1).gumbel(size=(50, 2)).astype(np.float32)
    for folder in dqn_runs.values():
        path = folder / "policy.safetensors"
        residual_dqn.check_categorical_file(path, "CartPole-v1")
        policy, _ = residual_dqn.load_categorical(path)
        logits, theirs = residual_dqn.action_logits(policy, obs), enjoy.read_policy(path)
        for gumbel in (noise, 0 * noise):
            action = residual_dqn.choose_action(logits, gumbel)
            np.testing.assert_array_equal(enjoy.act_discrete(theirs, obs, gumbel), action)
    enjoy.main(enjoy.Args(path, episodes=2, json=path.with_name("played.json")))
    played = json.loads(path.with_name("played.json").read_text())
    assert (played["settings"]["basic"], played["settings"]["addon"]) == ("cart-pole-upright", "cart-pole-centre")
    assert all(-100 < x["basic"] < 100 and x["addon"] < 0 for x in played["policies"][0]["episodes"])


def test_categorical_snippets_of_the_readme_write_a_prior(tmp_path, monkeypatch):
    """CleanRL's actors, with NumPy in the place of PyTorch's tensors."""
    text = (ROOT / "priors" / "README.md").read_text()
    (code,) = re.findall(r"<!-- test: cleanrl-discrete -->\n```python\n(.*?)```", text, re.DOTALL)

    class Tensor(np.ndarray):
        def cpu(self):
            return self

        def numpy(self):
            return np.asarray(self)

    rng = np.random.default_rng(0)
    shapes = {
        "0.weight": (8, 4),
        "0.bias": (8,),
        "2.weight": (6, 8),
        "2.bias": (6,),
        "4.weight": (2, 6),
        "4.bias": (2,),
    }
    weights = {f"network.{name}": rng.normal(size=shape).view(Tensor) for name, shape in shapes.items()}
    network = type("Network", (), {"state_dict": lambda self: weights})()
    monkeypatch.chdir(tmp_path)
    exec(code, {"q_network": network, "alpha": 0.5})
    residual_dqn.check_categorical_file(tmp_path / "cartpole.safetensors", "CartPole-v1")
    policy, info = residual_dqn.load_categorical(tmp_path / "cartpole.safetensors")
    obs = rng.normal(size=(5, 4)).astype(np.float32)
    x = obs
    for i in (0, 2, 4):
        x = x @ weights[f"network.{i}.weight"].T + weights[f"network.{i}.bias"]
        x = np.maximum(x, 0) if i < 4 else x
    np.testing.assert_allclose(residual_dqn.action_logits(policy, obs), np.asarray(x) / 0.5, rtol=1e-4, atol=1e-4)
    assert info["alpha"] == "0.5"


def test_interrupted_run_goes_on_with_its_state(dqn_runs, tmp_path, monkeypatch):
    """The same rows bit by bit before and after the interruption, less what the environments' anew start changes."""
    train = soft_dqn.train_discrete

    def train_and_stop(*inputs):
        *inputs, log = inputs

        def log_and_stop(iteration, state, metrics):
            log(iteration, state, metrics)
            if iteration == 5:
                raise KeyboardInterrupt

        return train(*inputs, log_and_stop)

    with monkeypatch.context() as patch:
        patch.setattr(soft_dqn, "train_discrete", train_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run_main(soft_dqn, *SHORT, "--hidden-sizes", 16, 16, "--runs-dir", tmp_path / "runs")
    (interrupted,) = (tmp_path / "runs").iterdir()
    rows, whole = read_metrics(interrupted), read_metrics(dqn_runs["soft_dqn"])
    assert [{**row, "elapsed_s": 0} for row in rows] == [{**row, "elapsed_s": 0} for row in whole[:5]]
    run_dir = shutil.copytree(interrupted, tmp_path / "run")  # this process keeps the lock of the other
    run_main(soft_dqn, "--resume", run_dir)
    assert [row["global_step"] for row in read_metrics(run_dir)] == [row["global_step"] for row in whole]
    assert all(float(row["value_loss"]) > 0 for row in read_metrics(run_dir)[2:])
    assert (run_dir / "eval.json").exists()


GOOD = ROOT / "priors" / "CartPole-v1.safetensors"
CUT = "# A copy for a project of your own may end here; "
LEAN_RUN = """
class Run(contextlib.nullcontext):
    def __init__(self, args, simulator, task, state):
        self.args, self.state = args, state
        super().__init__(self)

    def write(self, iteration, state, metrics):
        print(iteration, float(metrics["total_return"]))

    def save_policy(self, policy, alpha, results):
        Path("policy.safetensors").write_bytes(categorical_bytes(policy, self.args, alpha, results, {}))

    def finish(self, quantity, results):
        print(quantity, *results)
"""


def test_a_copy_cut_at_its_line_customises_a_prior(tmp_path, monkeypatch, capsys):
    kept, _ = (ROOT / "residual_q_learning" / "residual_dqn.py").read_text().split(CUT)
    flags = "num_envs=2, num_steps=8, total_timesteps=64, learning_starts=32, eval_episodes=1, batch_size=4"
    call = f"main(Args(prior=Path({str(GOOD)!r}), basic='own', addon='cart-pole-centre', {flags}), Run)"
    (tmp_path / "my_dqn.py").write_text(f"{kept}{LEAN_RUN}\n\n{call}\n")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("my_dqn", tmp_path / "my_dqn.py")
    monkeypatch.setitem(sys.modules, "my_dqn", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    assert capsys.readouterr().out.splitlines()[-1] == "|x| (m) prior customised"
    residual_dqn.check_categorical_file(tmp_path / "policy.safetensors", "CartPole-v1")


BAD_INPUT = {
    "unknown env": (soft_dqn, ("--env-id", "Unicorn-v5"), "Unicorn-v5.*list_all_envs"),
    "continuous actions": (soft_dqn, ("--env-id", "Hopper-v4"), "Hopper-v4 has the actions Box"),
    "no whole gradient step": (soft_dqn, ("--updates-per-step", 0.001), "--updates-per-step"),
    "learning starts beyond the buffer": (soft_dqn, ("--buffer-size", 300), "--buffer"),
    "munchausen above 1": (soft_dqn, ("--munchausen", 1.1), "--munchausen"),
    "epsilon above 1": (soft_dqn, ("--start-e", 2), "--start-e"),
    "learning rate NaN": (soft_dqn, ("--learning-rate", "nan"), "--learning-rate"),
    "layer of no width": (soft_dqn, ("--hidden-sizes", 64, 0), "--hidden-sizes"),
    "add-on of another env": (soft_dqn, ("--addon", "highway-right"), "highway-right.*CartPole-v1"),
    "basic reward of another env": (soft_dqn, ("--basic", "fly"), "fly.*CartPole-v1.*cart-pole-upright"),
    "env without add-on": (residual_dqn, ("--env-id", "MountainCar-v0"), "no add-on task"),
    "prior missing": (residual_dqn, ("--prior", "gone.safetensors"), "gone.safetensors.*soft_dqn.py"),
    "prior of a Gaussian": (residual_dqn, ("--prior", ROOT / "priors" / "Ant-v4.safetensors"), "kind: categorical"),
    "prior of another env": (residual_dqn, ("--env-id", "LunarLander-v3", "--prior", GOOD), "CartPole-v1"),
    "another number of layers": (residual_dqn, ("--hidden-sizes", 8), "--hidden-sizes"),
    "resume what is not there": (soft_dqn, ("--resume", "gone"), "gone"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_leaves_nothing(what, tmp_path, monkeypatch):
    script, flags, pattern = BAD_INPUT[what]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(script.StopRun) as stop:
        run_main(script, *flags)
    assert stop.value.exit_code == 2
    assert re.search(pattern, str(stop.value)), stop.value
    assert "\n" not in str(stop.value)
    assert list(tmp_path.iterdir()) == []


def damaged_files(dqn_runs, folder):
    """What can be wrong with a policy file: {pattern of the message: file}."""
    good = dqn_runs["soft_dqn"] / "policy.safetensors"
    tensors, metadata = read_policy(good)
    files = {
        "sha256": {"metadata": metadata | {"gamma": "0.5"}},
        "wings": {"metadata": metadata | {"sha256": None, "wings": "2"}},
        "activation": {"metadata": metadata | {"sha256": None, "activation": "sine"}},
        "alpha": {"metadata": metadata | {"sha256": None, "alpha": "-1"}},
        "actor.4.bias": {"tensors": {"actor.4.bias": np.float32([np.nan, 0])}},
        "actor.2.weight": {"tensors": {"actor.2.weight": np.zeros((16, 3), np.float32)}},
    }
    found = {}
    for pattern, change in files.items():
        found[pattern] = path = folder / f"{pattern}.safetensors"
        if "tensors" in change:
            write_policy(path, good, change["tensors"])
        else:
            kept = {name: text for name, text in change["metadata"].items() if text is not None}
            path.write_bytes(safetensors.numpy.save(tensors, kept))
    return found


def test_damaged_policy_files_are_refused_by_both_readers(dqn_runs, tmp_path):
    for pattern, path in damaged_files(dqn_runs, tmp_path).items():
        with pytest.raises(residual_dqn.StopRun, match=pattern):
            residual_dqn.check_categorical_file(path, "CartPole-v1")
        with pytest.raises(enjoy.StopRun, match=pattern):
            enjoy.read_policy(path)


def test_enjoy_refuses_a_categorical_policy_where_actions_are_continuous(dqn_runs, tmp_path):
    path = write_policy(tmp_path / "p.safetensors", dqn_runs["soft_dqn"] / "policy.safetensors", env_id="Hopper-v4")
    with pytest.raises(enjoy.StopRun, match="change --env-id or the policy"):
        enjoy.main(enjoy.Args(path))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3", "highway-fast-v0"])
def test_shipped_priors_are_sound_and_play(env_id):
    path = ROOT / "priors" / f"{env_id}.safetensors"
    residual_dqn.check_categorical_file(path, env_id)
    policy, info = residual_dqn.load_categorical(path)
    simulator = residual_dqn.make_discrete_simulator(env_id, "{}", "own", np.arange(4))
    assert (simulator.obs_dim, len(simulator.low)) == (
        len(policy.params["params"]["actor.0"]["kernel"]), policy.actor.action_dim,
    )  # fmt: skip
    assert float(info["alpha"]) > 0
    training = json.loads(info["training"])
    assert training["args"]["env_id"] == env_id
