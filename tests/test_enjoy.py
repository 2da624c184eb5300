"""enjoy.py reads policy files as they are meant, plays as the scripts do, and says what is wrong."""

import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import envpool
import imageio.v3
import numpy as np
import pytest
import safetensors.numpy
import tyro
from conftest import ROOT, run_script, start_script

import enjoy
import residual_ppo

HOPPER, SWIMMER = (ROOT / "priors" / f"{env}-v4.safetensors" for env in ("Hopper", "Swimmer"))
FORMS = [
    (activation, head, squash, hidden_sizes)
    for activation in ("tanh", "relu")
    for head in (False, True)
    for squash in (False, True)
    for hidden_sizes in ((), (8,), (16, 8))
]
LOW, HIGH = np.float32([-0.4, -2, 0]), np.float32([0.4, 1, 3])


def policy_contents(
    env_id="InvertedPendulum-v4", dims=(4, 1), hidden_sizes=(8,), activation="tanh", head=False, **more
):
    """Tensors and metadata of a random policy file."""
    rng, widths = np.random.default_rng(0), (dims[0], *hidden_sizes, dims[1])
    tensors = {"obs_mean": rng.normal(size=dims[0]), "obs_var": rng.uniform(0.1, 2, dims[0])}
    for i, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        tensors[f"actor_mean.{2 * i}.weight"] = rng.normal(size=(n_out, n_in))
        tensors[f"actor_mean.{2 * i}.bias"] = rng.normal(size=n_out)
    if head:
        tensors["actor_logstd.weight"] = 3 * rng.normal(size=(dims[1], widths[-2]))
        tensors["actor_logstd.bias"] = rng.normal(size=dims[1])
    else:
        tensors["actor_logstd"] = rng.normal(size=dims[1])
    metadata = {"env_id": env_id, "hidden_sizes": json.dumps(hidden_sizes), "activation": activation, "squash": "true"}
    return {name: x.astype(np.float32) for name, x in tensors.items()}, metadata | more


def write_policy(path, tensors, metadata):
    """Write a policy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors.numpy.save(tensors, metadata))
    return path


def write_run(folder, contents, **content):
    """Write what enjoy.py reads of a run folder."""
    write_policy(folder / "policy.safetensors", *contents)
    (folder / "args.json").write_text(json.dumps(content))
    return folder


def gaussian(tensors, obs, activation, obs_clip):
    """Mean and log standard deviation of a policy file, in float64, one observation at a time."""
    tensors = {name: array.astype(np.float64) for name, array in tensors.items()}
    depth = sum(name.startswith("actor_mean") for name in tensors) // 2
    means, log_stds = [], []
    for row in obs.astype(np.float64):
        x = [(o - m) / (v + 1e-8) ** 0.5 for o, m, v in zip(row, tensors["obs_mean"], tensors["obs_var"], strict=True)]
        x = np.array([max(-obs_clip, min(obs_clip, value)) for value in x])
        for i in range(depth):
            hidden, x = x, tensors[f"actor_mean.{2 * i}.weight"] @ x + tensors[f"actor_mean.{2 * i}.bias"]
            if i < depth - 1:
                x = np.tanh(x) if activation == "tanh" else np.where(x > 0, x, 0)
        means.append(x)
        if "actor_logstd" in tensors:
            log_stds.append(tensors["actor_logstd"])
        else:
            head = tensors["actor_logstd.weight"] @ hidden + tensors["actor_logstd.bias"]
            log_stds.append([max(-20, min(2, value)) for value in head])
    return np.array(means), np.array(log_stds)


def action_of(u, squash, low, high):
    """The action in the environment's units, in float64."""
    return (high + low) / 2 + np.tanh(u) * (high - low) / 2 if squash else np.maximum(low, np.minimum(high, u))


def enjoy_main(*flags):
    """Run enjoy.py in this process."""
    enjoy.main(tyro.cli(enjoy.Args, args=[str(flag) for flag in flags]))


def episodes(folder, *flags):
    """All that enjoy.py writes with --json."""
    path = folder / f"{len(list(folder.iterdir()))}.json"
    enjoy_main(*flags, "--json", path)
    return json.loads(path.read_text())


def column(content, name, policy=0):
    """What all episodes of a policy came to."""
    return np.array([episode[name] for episode in content["policies"][policy]["episodes"]])


# -------------------------------------------------------------------------------------- acting


@pytest.mark.parametrize(("activation", "head", "squash", "hidden_sizes"), FORMS)
def test_all_forms_of_policies_act_as_computed_in_float64(activation, head, squash, hidden_sizes, tmp_path):
    obs = 3 * np.random.default_rng(1).normal(size=(50, 5)).astype(np.float32)
    noise = np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32)
    for obs_clip in ("10", "1.5", "inf"):
        more = {"activation": activation, "head": head, "squash": str(squash).lower(), "obs_clip": obs_clip}
        tensors, metadata = policy_contents("Some-v4", (5, 3), hidden_sizes, **more)
        policy = enjoy.read_policy(write_policy(tmp_path / "policy.safetensors", tensors, metadata))
        mean, log_std = gaussian(tensors, obs, activation, float(obs_clip))
        ours = enjoy.mean_and_log_std(policy, obs)
        assert {x.dtype for x in ours} == {np.dtype(np.float32)}
        np.testing.assert_allclose(ours[0], mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.broadcast_to(ours[1], mean.shape), log_std, rtol=1e-4, atol=1e-4)
        action = enjoy.act(policy, obs, noise, LOW, HIGH)
        assert action.dtype == np.float32
        assert ((action >= LOW) & (action <= HIGH)).all()
        expected = action_of(mean + np.exp(log_std) * noise, squash, LOW, HIGH)
        np.testing.assert_allclose(action, expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(enjoy.act(policy, obs, 0, LOW, HIGH), action_of(mean, squash, LOW, HIGH), atol=1e-3)
        np.testing.assert_allclose(enjoy.act(policy, obs[7], noise[7], LOW, HIGH), action[7], atol=1e-5)


def test_log_std_of_a_head_is_clipped():
    tensors, metadata = policy_contents(head=True)
    obs = np.zeros(4, np.float32)
    for bias, expected in ((1e3, 2), (-1e3, -20)):
        tensors["actor_logstd.bias"][:] = bias
        assert enjoy.mean_and_log_std(enjoy.check_policy(tensors, metadata), obs)[1] == expected


def test_absent_obs_clip_is_10():
    tensors, metadata = policy_contents()
    policies = [enjoy.check_policy(tensors, metadata | more) for more in ({}, {"obs_clip": "10"})]
    obs = np.full(4, 1e4, np.float32)
    assert enjoy.mean_and_log_std(policies[0], obs)[0] == enjoy.mean_and_log_std(policies[1], obs)[0]


def test_critic_and_every_known_key_are_accepted(tmp_path):
    tensors, metadata = policy_contents()
    keys = ("alpha", "gamma", "survival_reward", "measured_alpha", "returns", "training", "format")
    metadata |= dict.fromkeys(keys, "0.5")
    metadata["sha256"] = enjoy.policy_digest(tensors, metadata)
    tensors["critic.0.weight"] = np.zeros((3, 3), np.float32)
    assert enjoy.read_policy(write_policy(tmp_path / "p.safetensors", tensors, metadata)).env_id == metadata["env_id"]


@pytest.mark.parametrize("path", sorted((ROOT / "priors").glob("*-v4*.safetensors")), ids=lambda path: path.stem)
def test_actions_equal_the_scripts(path):
    policy = enjoy.read_policy(path)
    obs_dim, action_dim = policy.tensors["obs_mean"].size, policy.layers[-1][1].size
    rng = np.random.default_rng(0)
    obs = rng.normal(policy.tensors["obs_mean"], np.sqrt(policy.tensors["obs_var"]), (100, obs_dim)).astype(np.float32)
    noise = rng.normal(size=(100, action_dim)).astype(np.float32)
    low, high = -np.ones(action_dim, np.float32), np.ones(action_dim, np.float32)
    mean, log_std = residual_ppo.action_distribution(residual_ppo.load_policy(path)[0], obs)
    action = action_of(np.asarray(mean + np.exp(log_std) * noise), policy.squash, low, high)
    np.testing.assert_allclose(enjoy.mean_and_log_std(policy, obs)[0], mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(enjoy.act(policy, obs, noise, low, high), action, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- playing


def envpool_returns(path, noise_scale, num_envs=20):
    """Basic returns (num_envs,) of a policy's first episodes in EnvPool, and of its add-on task."""
    policy = enjoy.read_policy(path)
    _, addon = enjoy.find_task(policy.env_id, {}, enjoy.Args(path))
    pool = envpool.make(policy.env_id, env_type="gymnasium", num_envs=num_envs, seed=7)
    rng, low, high = np.random.default_rng(7), pool.action_space.low, pool.action_space.high
    (obs, _), running = pool.reset(), np.ones(num_envs, bool)
    basic, extra = np.zeros(num_envs), np.zeros(num_envs)
    while running.any():
        noise = noise_scale * rng.normal(size=(num_envs, *low.shape)).astype(np.float32)
        action = enjoy.act(policy, obs.astype(np.float32), noise, low.astype(np.float32), high.astype(np.float32))
        before, (obs, reward, terminated, truncated, _) = obs, pool.step(action.astype(np.float64))
        basic += running * reward
        extra += running * addon.reward(addon.quantity(before, action, obs))
        running &= ~(terminated | truncated)
    return basic, extra


@pytest.mark.parametrize(("path", "deterministic"), [(HOPPER, True), (SWIMMER, False)])
def test_returns_agree_with_envpool(path, deterministic, tmp_path):
    content = episodes(tmp_path, path, "--episodes", 4, *(["--deterministic"] if deterministic else []))
    pairs = zip(("basic", "addon"), envpool_returns(path, 0 if deterministic else 1), strict=True)
    for name, theirs in pairs:
        ours = column(content, name)
        error = np.sqrt(ours.var(ddof=1) / ours.size + theirs.var(ddof=1) / theirs.size)
        assert abs(ours.mean() - theirs.mean()) < 4 * error + 1e-3 * abs(theirs.mean())
        assert error < 0.01 * abs(theirs.mean())


def test_the_seed_decides_all_and_each_episode_has_its_own(tmp_path):
    path = write_policy(tmp_path / "policy" / "p.safetensors", *policy_contents("Hopper-v4", (11, 3)))
    folder = tmp_path / "json"
    folder.mkdir()
    once, again, later = (episodes(folder, path, "--episodes", 4, "--seed", seed)["policies"] for seed in (5, 5, 7))
    assert once == again
    assert [x["seed"] for x in once[0]["episodes"]] == [5, 6, 7, 8]
    assert once[0]["episodes"][2:] == later[0]["episodes"][:2]
    assert len({x["total"] for x in once[0]["episodes"]}) == 4


def test_noise_is_standard_normal_and_follows_from_the_seed():
    tensors, metadata = policy_contents("Hopper-v4", (11, 3), squash="false")
    policy = enjoy.check_policy({name: 0 * tensor for name, tensor in tensors.items()}, metadata)
    env, actions = enjoy.make_gymnasium("Hopper-v4", [policy], {}), {}
    step = env.step
    for seed in (*range(100), 0):
        before, played = actions.get(seed), []
        env.step = lambda action, played=played: played.append(action) or step(action)
        list(enjoy.play(env, policy, enjoy.ADDON_TASKS["none"], seed, False))
        actions[seed] = np.array(played)
    np.testing.assert_array_equal(before, actions[0])
    assert len({row[:3].tobytes() for row in actions.values()}) == 100
    noise = np.concatenate(list(actions.values()))  # clipped to [-1, 1], so a normal's 0.683 lie within
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert (np.abs(noise) < 1).mean() == pytest.approx(0.683, abs=0.02)


def test_policy_against_itself_has_identical_columns(tmp_path, capsys):
    path = write_policy(tmp_path / "p.safetensors", *policy_contents("Hopper-v4", (11, 3)))
    one, other = episodes(tmp_path, path, "--against", path, "--episodes", 3)["policies"]
    assert one == other
    cells = [line.split("±") for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert len(cells) == 5
    for line in cells:  # "label  mean", "std  mean", "std"
        assert line[0].split()[-1] == line[1].split()[-1]
        assert line[1].split()[0] == line[2].strip()


def test_json_holds_what_the_table_shows(tmp_path, capsys):
    path = write_policy(tmp_path / "p.safetensors", *policy_contents("Hopper-v4", (11, 3)))
    content = episodes(tmp_path, path, "--episodes", 3, "--addon-coef", 2, "--env-id", "Hopper-v5")
    settings = content["settings"]
    assert settings["path"] == content["policies"][0]["path"] == str(path)
    assert (settings["env_id"], settings["addon"], settings["addon_coef"]) == ("Hopper-v5", "hopper-height", 2)
    assert (settings["episodes"], settings["seed"], settings["deterministic"]) == (3, 1, False)
    assert content["quantity"] == "z (m)"
    basic, addon, total, quantity, length = (
        column(content, name) for name in ("basic", "addon", "total", "quantity", "length")
    )
    np.testing.assert_allclose(total, basic + addon)
    np.testing.assert_allclose(addon, 2 * 10 * (quantity - 1) * length)
    out = capsys.readouterr().out
    for x, digits in ((basic, 1), (addon, 1), (total, 1), (quantity, 3), (length, 1)):
        assert f"{x.mean():.{digits}f} ± {x.std():.{digits}f}" in out
    assert "\x1b" not in out
    assert "out of date" not in out


@pytest.mark.parametrize(
    ("args", "command", "flags", "task"),
    [
        ({"addon": "none", "addon_coef": 3.0}, "residual_ppo.py", (), ("none", 3)),
        ({"addon": "hopper-height", "addon_coef": 3.0}, "soft_ppo.py", (), ("hopper-height", 3)),
        ({"addon": None, "addon_coef": 0.5}, "a/residual_ppo.py --prior x__soft_ppo__1", (), ("hopper-height", 0.5)),
        ({}, "train_prior_ppo.py", (), ("hopper-height", 1)),
        ({"addon": "none", "addon_coef": 3.0}, "", ("--addon", "hopper-height"), ("hopper-height", 3)),
        ({"addon": None, "addon_coef": 3.0}, "", ("--addon-coef", "-2"), ("hopper-height", -2)),
    ],
)
def test_run_folder_says_what_its_task_was(args, command, flags, task, tmp_path):
    run_dir = write_run(tmp_path / "run", policy_contents("Hopper-v4", (11, 3)), args=args, command=command)
    settings = episodes(tmp_path, run_dir, "--episodes", 1, *flags)["settings"]
    assert (settings["addon"], settings["addon_coef"]) == task


def test_environment_without_add_on_task_has_none(tmp_path):
    path = write_policy(tmp_path / "p.safetensors", *policy_contents())
    content = episodes(tmp_path, path, "--episodes", 1)
    assert content["settings"]["addon"] == "none"
    assert column(content, "addon") == column(content, "quantity") == 0


# ----------------------------------------------------------------------------------- bad input


def damage(path):
    """Turn a bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def make_inputs(folder):
    """All files that the cases of bad input name."""
    tensors, metadata = policy_contents("Hopper-v4", (11, 3))
    hopper = (tensors, metadata | {"sha256": enjoy.policy_digest(tensors, metadata)})
    write_policy(folder / "good", *hopper)
    write_policy(folder / "ant", *policy_contents("Ant-v4", (27, 8)))
    damage(write_policy(folder / "damaged", *hopper))
    (folder / "half").write_bytes((folder / "good").read_bytes()[:1000])
    (folder / "text").write_text("not a policy")
    nan = tensors | {"actor_logstd": np.full(3, np.nan, np.float32)}
    write_policy(folder / "nan", nan, metadata)
    write_policy(folder / "negative", tensors | {"obs_var": -tensors["obs_var"]}, metadata)
    write_policy(folder / "shape", tensors | {"actor_mean.0.weight": np.zeros((8, 12), np.float32)}, metadata)
    write_policy(folder / "double", tensors | {"obs_mean": np.zeros(11)}, metadata)
    write_policy(folder / "both", tensors | {"actor_logstd.bias": np.zeros(3, np.float32)}, metadata)
    write_policy(folder / "missing", {k: v for k, v in tensors.items() if k != "obs_mean"}, metadata)
    changes = {"activation": "gelu", "squash": "yes", "hidden_sizes": "[0]", "obs_clip": "nan", "speed": "1"}
    for name, value in changes.items():
        write_policy(folder / name, tensors, metadata | {name: value})
    write_policy(folder / "no_env_id", tensors, {k: v for k, v in metadata.items() if k != "env_id"})
    write_policy(folder / "unicorn", tensors, metadata | {"env_id": "Unicorn-v4"})
    write_policy(folder / "old_version", tensors, metadata | {"env_id": "Hopper-v2"})
    write_run(folder / "run", hopper, args={"addon": "my-own", "addon_coef": 1.0})
    write_run(folder / "ant_run", hopper, args={"addon": "ant-right", "addon_coef": 1.0})
    (folder / "no_args").mkdir()
    write_policy(folder / "no_args" / "policy.safetensors", *hopper)
    (folder / "empty").mkdir()
    (folder / "old.mp4").write_text("old")
    (folder / "old.json").write_text("old")


BAD_INPUT = {
    "missing file": ("nowhere", "there is no policy nowhere"),
    "run without policy": ("empty", "not complete"),
    "run without args.json": ("no_args", "args.json cannot be used"),
    "run with an unknown task": ("run", "my-own"),
    "run with another environment's task": ("ant_run", "--addon one of hopper-height, hopper-upright, none"),
    "digest": ("damaged", "sha256"),
    "half a file": ("half", "cannot be used"),
    "no safetensors": ("text", "cannot be used"),
    "NaN": ("nan", "actor_logstd has impossible"),
    "negative variance": ("negative", "obs_var has impossible"),
    "shape": ("shape", r"actor_mean.0.weight is float32 (8, 12), not float32 (8, 11)"),
    "type": ("double", "obs_mean is float64"),
    "two deviations": ("both", "actor_logstd.bias"),
    "missing tensor": ("missing", "obs_mean"),
    "activation": ("activation", "gelu"),
    "squash": ("squash", "yes"),
    "hidden sizes": ("hidden_sizes", "[0]"),
    "clip": ("obs_clip", "nan"),
    "unknown key": ("speed", "speed"),
    "missing key": ("no_env_id", "env_id"),
    "unknown environment": ("unicorn", "Unicorn-v4"),
    "removed environment": ("old_version", "Hopper-v2"),
    "another environment": ("ant --env-id Hopper-v4", "a policy for Ant-v4 cannot play in Hopper-v4"),
    "other shapes": ("ant --env-id Ant-v5", "(105,)"),
    "module as environment": ("good --env-id os:Hopper-v4", "os:Hopper-v4"),
    "against another": ("good --against ant", "a policy for Ant-v4 cannot play in Hopper-v4"),
    "against nothing": ("good --against nowhere", "there is no policy nowhere"),
    "unknown task": ("good --addon fly", "fly is no add-on task"),
    "task of another environment": ("good --addon ant-right", "hopper-height, hopper-upright, none"),
    "coefficient": ("good --addon-coef nan", "--addon-coef"),
    "no episodes": ("good --episodes 0", "--episodes is 0"),
    "negative seed": ("good --seed -1", "--seed is -1"),
    "video exists": ("good --video old.mp4", "exists"),
    "json exists": ("good --json old.json", "exists"),
    "video folder": ("good --video nowhere/a.mp4", "the folder nowhere"),
    "json folder": ("good --json nowhere/a.json", "the folder nowhere"),
    "folder is a file": ("good --json text/a.json", "the folder text"),
    "video format": ("good --video a.avi", ".mp4 or .gif"),
    "json format": ("good --json a.txt", ".json"),
    "record format": ("good --record a.txt", "must end in .npz, or have no dot"),
    "record exists": ("good --record text", "exists"),
    "record name": ("good --record a+b-v0", "no name for a Minari dataset"),
    "record version": ("good --record hopper", "no name for a Minari dataset"),
    "odd size": ("good --video a.mp4 --video-size 101 100", "--video-size"),
    "no steps": ("good --video a.mp4 --video-steps 0", "--video-steps"),
    "no frames": ("good --video a.mp4 --video-fps nan", "--video-fps"),
    "no display": ("good --window", "--window needs a display"),
}  # fmt: skip


def files(folder):
    """Content of every file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with inputs, good and bad."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_creates_nothing(case, inputs, monkeypatch, capsys):
    flags, message = BAD_INPUT[case]
    monkeypatch.chdir(inputs)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    before = files(inputs)
    outputs = [] if "--json" in flags else ["--json", "new.json"]
    with pytest.raises(enjoy.StopRun) as stop:
        enjoy_main(*flags.split(), *outputs)
    assert stop.value.exit_code == 2
    assert message in str(stop.value)
    assert files(inputs) == before
    assert capsys.readouterr().out == ""


def test_processes_that_fail_print_one_line_and_exit_with_2(inputs):
    cases = {"sha256": ("damaged",), "cannot play": ("good", "--against", "ant")}
    with ThreadPoolExecutor(2) as pool:
        jobs = {text: pool.submit(run_script, "enjoy", *flags, cwd=inputs) for text, flags in cases.items()}
    for text, job in jobs.items():
        process = job.result()
        assert process.returncode == 2
        assert process.stdout == ""
        assert process.stderr.startswith("enjoy.py: ")
        assert process.stderr.count("\n") == 1
        assert text in process.stderr


def test_damaged_files_are_all_refused(tmp_path):
    rng, data = np.random.default_rng(0), HOPPER.read_bytes()
    for _ in range(100):
        corrupt = bytearray(data)
        corrupt[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "p").write_bytes(corrupt)
        with pytest.raises(enjoy.StopRun):
            enjoy.read_policy(tmp_path / "p")


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is not a signal there")
def test_ctrl_c_ends_with_one_line_and_leaves_nothing(tmp_path):
    process = start_script("enjoy", HOPPER, "--episodes", 10_000, "--json", tmp_path / "a.json", bufsize=0)
    assert process.stdout.readline().startswith("Hopper-v4")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "enjoy.py: interrupted\n"
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- video


class Clock:
    """In the renderer's place: its picture says what time it is, in steps of the environment."""

    model = SimpleNamespace(ncam=0)

    def update_scene(self, data, camera):
        """As mujoco.Renderer."""
        self.step = round(data.time / 0.04)

    def render(self):
        """As mujoco.Renderer."""
        return np.full((2, 1, 3), self.step)


@pytest.mark.parametrize("every", [1, 3])
def test_video_holds_each_policys_episode_and_who_ends_first_stays_still(every):
    tensors, metadata = policy_contents()
    still = {name: 0 * tensor for name, tensor in tensors.items()}  # falls slowly, by itself
    policies = [enjoy.check_policy(contents, metadata) for contents in (tensors, still)]
    envs = [enjoy.make_gymnasium("InvertedPendulum-v4", policies, {}) for _ in policies]

    def players():
        pairs = zip(envs, policies, strict=True)
        return [enjoy.play(env, policy, enjoy.ADDON_TASKS["none"], 1, True) for env, policy in pairs]

    short, long = (list(player)[-1].length for player in players())
    assert 3 <= short < long - 3
    frames = np.array(list(enjoy.video_frames(players(), envs, Clock(), every)))
    steps = np.arange(0, long + 1, every)
    np.testing.assert_array_equal(frames[:, 0, 0, 0], np.minimum(steps, short))
    np.testing.assert_array_equal(frames[:, 1, 1, 2], steps)


def test_gif_plays_at_the_robots_speed(tmp_path):
    video = tmp_path / "video.gif"
    flags = ("--video", video, "--video-size", 64, 48, "--video-steps", 40, "--episodes", 1)
    process = run_script("enjoy", HOPPER, *flags)
    if process.returncode == 2:  # a machine without a renderer
        pytest.skip(process.stderr)
    frames = imageio.v3.imread(video)
    assert len(frames) == 1 + 40 // 6  # a step is 8 ms, so six are nearest to a 20th of a second
    durations = [imageio.v3.immeta(video, index=i)["duration"] / 1000 for i in range(len(frames) - 1)]
    assert sum(durations) == pytest.approx(0.048 * (len(frames) - 1), abs=0.015)


@pytest.mark.parametrize(("suffix", "against"), [(".mp4", True), (".gif", False)])
def test_video_shows_an_episode_or_names_the_missing_package(suffix, against, tmp_path):
    path = write_policy(tmp_path / "p.safetensors", *policy_contents())
    tensors, metadata = policy_contents()
    still = {name: 0 * tensor for name, tensor in tensors.items()}  # falls slowly, by itself
    other = write_policy(tmp_path / "q.safetensors", still, metadata)
    video = tmp_path / f"video{suffix}"
    flags = ("--episodes", 1, "--deterministic", "--video", video, "--video-size", 64, 48, "--video-fps", 25)
    flags += ("--against", other) if against else ()
    process = run_script("enjoy", path, *flags, "--json", tmp_path / "a.json")
    if process.returncode == 2:  # a machine without a renderer
        assert "libegl1" in process.stderr
        assert not video.exists()
        return
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    content = json.loads((tmp_path / "a.json").read_text())
    lengths = [int(column(content, "length", i)[0]) for i in range(1 + against)]
    frames = imageio.v3.imread(video)[..., :3]
    assert frames.shape == (1 + max(lengths), 48, 64 * (1 + against), 3)  # dt is 0.04 s, so there is a frame each step
    assert frames.std() > 1
    for part in np.split(frames.astype(float), 1 + against, axis=2):
        assert np.abs(part[-1] - part[0]).max() > 30
    assert {path.name for path in tmp_path.iterdir()} == {"p.safetensors", "q.safetensors", "a.json", video.name}
