"""A clone makes its demonstrations likeliest, whatever file they are in, and files that cannot be used are refused."""

import json

import h5py
import jax
import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, read_policy, run_script

import enjoy
import residual_ppo
import train_prior_bc as bc

MINARI = ROOT / "tests" / "minari" / "pendulum-random-v0"  # written by minari 0.5.4: 3 episodes of 6 random actions
SHORT = {"num_updates": 500, "eval_interval": 250, "hidden_sizes": (8,), "eval_episodes": 0, "held_out": 0.0}


def args(demonstrations, **flags):
    """Arguments without an evaluation."""
    return bc.Args(**({"demonstrations": demonstrations, "env_id": "Robot-v0"} | SHORT | flags))


def clone(demonstrations, **flags):
    """What main says, the clone as enjoy.py reads it, and the file."""
    said, number = [], len(list(demonstrations.parent.iterdir()))
    flags = {"export": demonstrations.parent / f"clone{number}.safetensors"} | flags
    bc.main(bc.check_clone_args(args(demonstrations, **flags)), said.append)
    return "\n".join(said), enjoy.read_policy(flags["export"]), flags["export"]


def linear_gaussian(rng, num_episodes, length):
    """Steps u = K s + b + std z of a policy with 3 observations, of different scales, and 2 actions; (K, b, std)."""
    truth = rng.normal(size=(2, 3)) / [1, 10, 0.1], rng.normal(size=2), np.array([0.2, 0.7])
    obs = rng.normal([0, 50, -0.3], [1, 10, 0.1], (num_episodes * length, 3)).astype(np.float32)
    u = obs @ truth[0].T + truth[1] + truth[2] * rng.normal(size=(len(obs), 2))
    return obs, u, truth


def arrays(obs, action, length):
    """The arrays of an .npz file whose episodes are so long."""
    last = np.arange(len(obs)) % length == length - 1
    return {"observations": obs, "actions": action, "terminations": np.zeros(len(obs), bool), "truncations": last}


def some_arrays(num_episodes=3, length=5):
    """The arrays of an .npz file, with bounds."""
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(num_episodes * length, 3)), rng.uniform(-2, 2, (num_episodes * length, 2))
    bounds = {"action_low": np.full(2, -2.0), "action_high": np.full(2, 2.0)}
    return arrays(obs.astype(np.float32), action.astype(np.float32), length) | bounds


def write_minari(path, content):
    """The same in Minari's layout, in one file; content as of some_arrays."""
    ends = np.flatnonzero(content["terminations"] | content["truncations"]) + 1
    low, high = content["action_low"].tolist(), content["action_high"].tolist()
    with h5py.File(path, "w") as file:
        file.attrs["action_space"] = json.dumps({"type": "Box", "low": low, "high": high})
        for i, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            for name in ("observations", "actions", "terminations", "truncations"):
                x = content[name][first:last]
                x = np.concatenate([x, x[-1:] + 1]) if name == "observations" else x  # the last one, after the end
                file[f"episode_{i}/{name}"] = x


@pytest.mark.parametrize("state_dependent", [False, True])
def test_likelihood_and_its_gradient_are_scipys(state_dependent):
    """In float64, the gradient by central differences, in three directions, of SciPy's density of a NumPy network."""
    rng = np.random.default_rng(1)
    obs, action = rng.normal(size=(7, 3)), rng.normal(size=(7, 2))
    shapes = {"actor_mean.0": (3, 4), "actor_mean.2": (4, 2)} | ({"actor_logstd": (4, 2)} if state_dependent else {})

    def draw():
        tree = {name: {"kernel": rng.normal(size=x), "bias": rng.normal(size=x[1])} for name, x in shapes.items()}
        return {"params": jax.tree.map(lambda x: 0.3 * x, {"actor_logstd": rng.normal(size=2)} | tree)}

    def scipys(params):
        p = params["params"]
        x = np.tanh(obs @ p["actor_mean.0"]["kernel"] + p["actor_mean.0"]["bias"])
        mean, log_std = x @ p["actor_mean.2"]["kernel"] + p["actor_mean.2"]["bias"], p["actor_logstd"]
        log_std = x @ log_std["kernel"] + log_std["bias"] if state_dependent else log_std
        return -scipy.stats.norm.logpdf(action, mean, np.exp(log_std)).sum(1).mean()

    params, actor = draw(), bc.Actor(2, (4,), "tanh", state_dependent)
    with jax.enable_x64(True):
        likelihood = jax.jit(jax.value_and_grad(bc.negative_log_likelihood), static_argnums=1)
        value, grads = jax.device_get(likelihood(params, actor, obs, action))
    assert float(value) == pytest.approx(scipys(params), rel=1e-12)
    for direction in (draw() for _ in range(3)):
        ahead, behind = (scipys(jax.tree.map(lambda p, d: p + e * d, params, direction)) for e in (1e-5, -1e-5))  # noqa: B023
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, direction)))
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("squash", [False, True])
def test_clone_of_a_linear_gaussian_policy_recovers_it(tmp_path, squash):
    """Its maximum likelihood is least squares; and the truth is within 4 standard errors of it."""
    obs, u, (weights, bias, std) = linear_gaussian(np.random.default_rng(2), 20, 200)
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 5.0])
    u = u / 3  # so that tanh does not saturate in float32
    content = arrays(obs, np.float32(low + (np.tanh(u) + 1) / 2 * (high - low) if squash else u), 200)
    np.savez(tmp_path / "demonstrations.npz", **content, action_low=low, action_high=high)
    flags = {"hidden_sizes": (), "num_updates": 3000, "learning_rate": 1e-2, "squash": squash}
    _, policy, _ = clone(tmp_path / "demonstrations.npz", **flags)
    design = np.c_[obs, np.ones(len(obs))].astype(np.float64)
    solution, residual, *_ = np.linalg.lstsq(design, u)
    log_std = 0.5 * np.log(residual / len(obs))
    mean, found_log_std = enjoy.mean_and_log_std(policy, obs)
    assert (np.abs(mean - design @ solution).max(0) < 0.1 * std / 3).all()
    assert found_log_std == pytest.approx(log_std, abs=0.02)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design))[:, None] * residual / len(obs))
    assert (np.abs(solution - np.c_[weights, bias].T / 3) < 4 * errors).all()
    assert found_log_std == pytest.approx(np.log(std / 3), abs=0.05)


def test_npz_and_minari_read_the_same(tmp_path):
    """Also compressed; a Minari file's episodes are in the order of their numbers: 10 follows 9."""
    content = some_arrays(12)
    np.savez_compressed(tmp_path / "same.npz", **content)
    write_minari(tmp_path / "same.hdf5", content)
    one, other = bc.read_demonstrations(tmp_path / "same.npz"), bc.read_demonstrations(tmp_path / "same.hdf5")
    for ours, theirs in zip(one[:3], other[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(one.bounds, other.bounds)
    np.testing.assert_array_equal(one.obs, content["observations"])
    np.testing.assert_array_equal(one.episode, np.repeat(np.arange(12), 5))


@pytest.mark.parametrize("path", [MINARI, MINARI / "data", MINARI / "data" / "main_data.hdf5"])
def test_a_dataset_that_minari_wrote_is_read(path):
    data = bc.read_demonstrations(path)
    assert data.obs.shape == (18, 3) and data.action.shape == (18, 1)
    np.testing.assert_array_equal(data.episode, np.repeat([0, 1, 2], 6))
    np.testing.assert_array_equal(data.bounds, [[-2], [2]])
    angle, torque = np.arctan2(data.obs[:, 1], data.obs[:, 0]), data.action[:, 0]  # Pendulum's equation of motion
    speed = data.obs[:, 2] + 0.05 * (15 * np.sin(angle) + 3 * torque)
    np.testing.assert_allclose(data.obs[1:, 2].reshape(-1)[:5], speed[:5], atol=1e-5)


def changed(**changes):
    """The arrays of a good file with some changed: {name: array, or a function of it; None: absent}."""
    content = some_arrays()
    for name, x in changes.items():
        content[name] = x(content[name].copy()) if callable(x) else x
    return {name: x for name, x in content.items() if x is not None}


def with_nan(x):
    x[3, 1] = np.nan
    return x


BAD = {
    "ragged": (changed(actions=lambda x: x[:-1]), "differ in length"),
    "empty": (
        changed(**dict.fromkeys(list(some_arrays())[:4], lambda x: x[:0])),
        "no",
    ),
    "NaN": (changed(observations=with_nan), "episode 0 have entries that are NaN"),
    "infinite in float32": (changed(actions=lambda x: np.float64(x) * 1e300), "infinite"),
    "without a name": (changed(truncations=None), "truncations"),
    "images": (changed(observations=lambda x: x[:, None]), "observations of episode 0 are float32 (5, 1, 3)"),
    "scalar actions": (changed(actions=lambda x: x[:, 0]), "actions of episode 0 are float32 (5,)"),
    "text": (changed(actions=lambda x: x.astype(str)), "actions of episode 0 are <U"),
    "objects": (changed(actions=lambda x: x.astype(object)), "allow_pickle"),
    "unclosed": (changed(truncations=lambda x: x & (np.arange(15) < 14)), "its last episode does not end"),
    "no end": (changed(truncations=lambda x: 0 * x), "no complete episode"),
    "one bound": (changed(action_high=None), "action_high"),
    "bounds upside down": (changed(action_low=np.full(2, 3.0)), "lower bounds"),
    "bounds of another size": (changed(action_low=np.full(3, -2.0)), "broadcast"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_npz_is_one_line(case, tmp_path):
    content, words = BAD[case]
    np.savez(tmp_path / "bad.npz", **content)
    refused(tmp_path / "bad.npz", words)


def refused(path, *words):
    """Assert that a file is refused as bad input, in one line with these words, and that nothing is written."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(bc.StopRun) as stopped:
        bc.main(args(path, export=path.parent / "clone.safetensors"), print)
    assert stopped.value.exit_code == 2
    assert "\n" not in str(stopped.value)
    assert [word for word in (path.name, *words) if word not in str(stopped.value)] == []
    assert sorted(path.parent.iterdir()) == before


def test_a_truncated_or_foreign_file_is_one_line(tmp_path):
    np.savez(tmp_path / "good.npz", **some_arrays())
    write_minari(tmp_path / "good.hdf5", some_arrays())
    for name in ("good.npz", "good.hdf5"):
        data = (tmp_path / name).read_bytes()
        for size in (0, 100, len(data) // 2, len(data) - 30):
            (tmp_path / f"short-{name}").write_bytes(data[:size])
            refused(tmp_path / f"short-{name}")
    np.save(tmp_path / "alone.npy", np.zeros(3))
    refused(tmp_path / "alone.npy")
    refused(tmp_path / "absent.npz", "enjoy.py --record")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "Minari dataset in HDF5")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("observations", lambda x: np.concatenate([x, x]), "observations of episode 2"),
        ("observations", lambda x: x[:-2], "observations of episode 2"),
        ("actions", with_nan, "actions of episode 2 have entries that are NaN"),
        ("terminations", lambda x: ~x, "episode 2 are not true on its last step alone"),
        ("truncations", lambda x: 0 * x, "episode 2 are not true on its last step alone"),
        ("actions", None, "actions"),
        ("observations", {"image": 1}, "observations"),
    ],
)  # fmt: skip
def test_a_bad_minari_episode_is_one_line(name, change, words, tmp_path):
    """As one that was recorded without its end, or whose observations are a dictionary."""
    write_minari(tmp_path / "bad.hdf5", some_arrays())
    with h5py.File(tmp_path / "bad.hdf5", "a") as file:
        before = file[f"episode_2/{name}"][()]
        del file[f"episode_2/{name}"]
        if isinstance(change, dict):
            file[f"episode_2/{name}/image"] = before
        elif change:
            file[f"episode_2/{name}"] = change(before)
    refused(tmp_path / "bad.hdf5", words)


def test_whole_episodes_are_held_out():
    episode = np.repeat(np.arange(20), np.arange(1, 21))
    for share, expected in ((0.1, 2), (0.5, 10), (0.001, 1), (0.0, 0)):
        held = bc.held_out_steps(args(None, held_out=share), episode)
        assert len({*episode[held]}) == expected
        assert not {*episode[held]} & {*episode[~held]}
    assert not bc.held_out_steps(args(None, held_out=0.1), np.zeros(50, int)).any()


def test_an_input_that_never_changed_changes_nothing(tmp_path):
    """Also when it does, later: the network of such an input was never trained."""
    content = changed(observations=lambda x: np.c_[x, np.full(len(x), 7.1)])
    np.savez(tmp_path / "demonstrations.npz", **content)
    _, policy, _ = clone(tmp_path / "demonstrations.npz")
    obs = content["observations"].astype(np.float32)
    moved = obs + np.float32([0, 0, 0, 50])
    assert enjoy.mean_and_log_std(policy, moved)[0] == pytest.approx(enjoy.mean_and_log_std(policy, obs)[0], abs=1e-3)
    assert np.ptp(enjoy.mean_and_log_std(policy, obs)[0]) > 0.1


@pytest.mark.parametrize("state_dependent_std", [False, True])
def test_mean_actions_stop_at_the_floor_and_are_said(tmp_path, state_dependent_std):
    obs = np.random.default_rng(3).normal(size=(400, 3)).astype(np.float32)
    np.savez(tmp_path / "mean.npz", **arrays(obs, np.tanh(obs[:, :2] / 2), 100), action_low=[-1], action_high=[1])
    flags = {"num_updates": 3000, "learning_rate": 1e-2, "min_std": 0.3, "state_dependent_std": state_dependent_std}
    said, policy, _ = clone(tmp_path / "mean.npz", **flags)
    assert enjoy.mean_and_log_std(policy, obs)[1] == pytest.approx(np.log(0.3), abs=0.02)
    assert "deviation at --min-std" in said
    noisy = np.tanh(obs[:, :2] / 2 + np.random.default_rng(4).normal(size=(400, 2)))
    np.savez(tmp_path / "sampled.npz", **arrays(obs, noisy, 100), action_low=[-1], action_high=[1])
    assert "deviation at --min-std" not in clone(tmp_path / "sampled.npz", **flags)[0]


def test_actions_at_the_bounds_are_clipped_and_their_share_is_said(tmp_path):
    """And no other is moved: atanh is exact to float32's rounding within the bounds."""
    low, high = np.array([-2.0, 0.0]), np.array([2.0, 5.0])
    u = np.float32([[0.3, -7.0], [-3.0, 2.0]])
    back, clipped = bc.unsquash(low + (np.tanh(np.float64(u)) + 1) / 2 * (high - low), low, high)
    assert back == pytest.approx(u, rel=1e-6) and not clipped.any()
    back, clipped = bc.unsquash(np.array([[2.0, 0.0], [9.0, 2.5]]), low, high)
    assert np.tanh(np.float64(back)) == pytest.approx(np.array([[1 - 1e-6, 1e-6 - 1], [1 - 1e-6, 0]]), abs=1e-9)
    assert clipped.tolist() == [[True, True], [True, False]]
    content = changed(actions=lambda x: np.where(np.arange(15)[:, None] < 3, 2, x))
    np.savez(tmp_path / "clipped.npz", **content)
    assert "20.00% of the actions' entries are at a bound" in clone(tmp_path / "clipped.npz")[0]


def test_squashing_needs_bounds(tmp_path):
    np.savez(tmp_path / "unbounded.npz", **changed(action_low=None, action_high=None))
    refused(tmp_path / "unbounded.npz", "--no-squash")
    assert not clone(tmp_path / "unbounded.npz", squash=False)[1].squash


def test_demonstrations_of_another_environment_are_refused(tmp_path):
    np.savez(tmp_path / "demonstrations.npz", **some_arrays())
    for env_id, words in (("Hopper-v4", "11 and 3"), ("Reacher-v4", "2"), ("Nowhere-v0", "EnvPool has no Nowhere-v0")):
        with pytest.raises(bc.StopRun, match=words):
            bc.main(args(tmp_path / "demonstrations.npz", env_id=env_id, eval_episodes=1), print)


FORMS = [{}, {"squash": False}, {"state_dependent_std": True, "activation": "relu", "hidden_sizes": (6, 5)}]


@pytest.mark.parametrize("form", FORMS)
def test_the_file_is_a_prior_without_alpha_that_says_how_it_was_made(form, tmp_path):
    np.savez(tmp_path / "demonstrations.npz", **some_arrays())
    _, _, file = clone(tmp_path / "demonstrations.npz", **form)
    residual_ppo.check_policy_file(file, "Robot-v0")
    tensors, metadata = read_policy(file)
    assert not metadata.keys() & {"alpha", "gamma", "survival_reward", "measured_alpha"}
    assert ("actor_logstd.weight" in tensors) == ("log_std" in metadata) == form.get("state_dependent_std", False)
    training = json.loads(metadata["training"])
    assert training["args"]["demonstrations"] == str(tmp_path / "demonstrations.npz")
    with pytest.raises(bc.StopRun, match="exists"):
        clone(tmp_path / "demonstrations.npz", export=file)


def test_holding_out_measures_and_only_early_stopping_changes_the_clone(tmp_path):
    """Which is trained on all episodes; where a few were memorised, it is said, and stopping is earlier."""
    rng = np.random.default_rng(5)
    obs = rng.normal(size=(60, 8)).astype(np.float32)
    np.savez(tmp_path / "few.npz", **arrays(obs, rng.uniform(-1, 1, (60, 2)), 20), action_low=[-1], action_high=[1])
    flags = {"hidden_sizes": (64,), "learning_rate": 1e-2}
    files = [clone(tmp_path / "few.npz", **flags)[2]]
    said, _, file = clone(tmp_path / "few.npz", **flags, held_out=0.3)
    files.append(file)
    files.append(clone(tmp_path / "few.npz", **flags, held_out=0.3, early_stopping=True, eval_interval=10)[2])
    assert "too few demonstrations" in said
    (plain, measured, stopped), (_, metadata, _) = zip(*(read_policy(file) for file in files), strict=True)
    assert all((plain[name] == measured[name]).all() for name in plain)
    assert not (plain["actor_mean.0.weight"] == stopped["actor_mean.0.weight"]).all()
    log_prob = json.loads(metadata["training"])["median_log_prob"]
    assert log_prob["fit"] > log_prob["held out"] + 1
    updates = [json.loads(read_policy(file)[1]["training"])["args"]["num_updates"] for file in files]
    assert updates[:2] == [500, 500] and updates[2] < 500


def test_what_enjoy_records_is_what_was_played(tmp_path):
    """Rewards add up to its returns, episodes are as long; and a clone of it plays in EnvPool."""
    file, prior = tmp_path / "demonstrations.npz", ROOT / "priors" / "Hopper-v4.safetensors"
    flags = ("--episodes", 3, "--seed", 5, "--json", tmp_path / "played.json", "--record", file)
    recorded = run_script("enjoy", prior, *flags)
    assert recorded.returncode == 0, recorded.stderr
    episodes = json.loads((tmp_path / "played.json").read_text())["policies"][0]["episodes"]
    data, content = bc.read_demonstrations(file), np.load(file)
    assert np.bincount(data.episode).tolist() == [episode["length"] for episode in episodes]
    basic = np.bincount(data.episode, content["rewards"])
    assert basic == pytest.approx([episode["basic"] for episode in episodes], rel=1e-6)
    noise = np.random.default_rng(5).standard_normal((len(data.obs), 3), np.float32)
    first = data.episode == 0
    expected = enjoy.act(enjoy.read_policy(prior), data.obs[first], noise[first], *data.bounds)
    assert data.action[first] == pytest.approx(expected, abs=1e-5)

    flags = ("--env-id", "Hopper-v4", "--demonstrations", file, "--num-updates", 500, "--eval-episodes", 2)
    process = run_script("train_prior_bc", *flags, "--export", tmp_path / "clone.safetensors")
    assert process.returncode == 0, process.stderr
    assert "return with stochastic actions" in process.stdout
    assert "stochastic" in read_policy(tmp_path / "clone.safetensors")[1]["returns"]


def test_a_minari_dataset_that_enjoy_records_is_what_minari_and_the_clone_read(tmp_path):
    """Episode by episode what the .npz file of the same seed has, and the last observations, which that has not."""
    minari = pytest.importorskip("minari")
    for name in ("played.npz", "played-v0"):
        flags = ("--episodes", 2, "--seed", 5, "--record", tmp_path / name)
        recorded = run_script("enjoy", ROOT / "priors" / "Hopper-v4.safetensors", *flags)
        assert recorded.returncode == 0, recorded.stderr
    npz, dataset = (bc.read_demonstrations(tmp_path / name) for name in ("played.npz", "played-v0"))
    assert all((np.asarray(x) == y).all() for x, y in zip(npz, dataset, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        loaded = minari.load_dataset("played-v0")
    assert loaded.spec.env_spec.id == "Hopper-v4" and loaded.total_steps == len(npz.obs)
    for number, episode in enumerate(loaded):
        assert (episode.observations[:-1] == npz.obs[npz.episode == number]).all()
        assert len(episode.observations) == len(episode.actions) + 1
    assert sum(path.name.startswith("tmp") for path in tmp_path.iterdir()) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_updates": 100}, "--num-updates is 100"),
        ({"held_out": 1.0}, "--held-out is 1.0"),
        ({"min_std": 0.0}, "--min-std is 0.0"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"hidden_sizes": (8, 0)}, "--hidden-sizes"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, words):
    with pytest.raises(bc.StopRun, match=words):
        bc.check_clone_args(args(None, **flags))
