# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "numpy>=2.0", "gymnasium>=1.1", "mujoco>=3.3", "imageio[ffmpeg]>=2.36",
#   "tyro>=0.9", "rich>=13.9", "safetensors>=0.5",
# ]
# ///
"""Watch, record and evaluate a policy in Gymnasium's own environment, in NumPy alone.

This file is also the reference reader of the policy file: read_policy and act are all that a robot needs of it.

    python enjoy.py priors/Ant-v4.safetensors --video ant.mp4
    python enjoy.py runs/<run> --against priors/Ant-v4.safetensors --deterministic
"""

import hashlib
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
import safetensors.numpy
import tyro


@dataclass(frozen=True)
class Args:
    path: tyro.conf.Positional[Path]
    """a policy file, or a run folder, which holds one"""
    against: Path | None = None
    """another policy, to play from the same seeds; beside the first one in the table, right of it in the video"""

    # episodes
    episodes: int = 10
    """how many to play"""
    seed: int = 1
    """seed of the first episode, of its environment and its noise; the next one's is 1 higher"""
    deterministic: bool = False
    """take mean actions instead of sampled ones"""
    env_id: str | None = None
    """another version of the environment, as Hopper-v5; if not given, the one that the policy file names"""
    addon: str | None = None
    """add-on task, "none" for a zero reward; if not given, the run's, for a policy file the environment's own"""
    addon_coef: float | None = None
    """factor on the add-on reward; if not given, the run's, for a policy file 1"""

    # output
    json: Path | None = None
    """write every episode to this new .json file"""
    window: bool = False
    """watch in Gymnasium's viewer"""
    video: Path | None = None
    """record the first episode to this new .mp4 or .gif file"""
    video_steps: int | None = None
    """record no more than so many steps"""
    video_size: tuple[int, int] = (480, 360)
    """width and height of the picture of one policy, in pixels"""
    video_fps: float = 20.0
    """about so many frames per second; a video plays at the robot's speed and leaves out steps between frames"""


class StopRun(Exception):
    """Ends the program with one line for the user; exit code 2: bad input, 1: diverged, 130: interrupted."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message.replace("\n", " "))
        self.exit_code = exit_code


# -------------------------------------------------------------------------------- add-on tasks


class AddonTask(NamedTuple):
    """An add-on reward, and the quantity of which it is a function, known from the observation that a step returns."""

    env: str  # the environment it is for, without the version
    label: str  # the quantity's name and unit
    quantity: Callable  # obs (..., obs_dim) -> (...)
    reward: Callable  # quantity (...) -> (...)
    coef: float = 1.0


# A task of your own is a line here. An environment's first task is its default.
ADDON_TASKS = {
    "half-cheetah-front-foot": AddonTask("HalfCheetah", "|θ| (rad)", lambda obs: abs(obs[..., 7]), lambda x: -10 * x),
    "hopper-height": AddonTask("Hopper", "z (m)", lambda obs: obs[..., 0], lambda z: 10 * (z - 1)),
    "ant-right": AddonTask("Ant", "-v_y (m/s)", lambda obs: -obs[..., 14], lambda v: v),
    "swimmer-straight": AddonTask("Swimmer", "|θ| (rad)", lambda obs: abs(obs[..., 1]), lambda x: -0.5 * x),
    "walker-upright": AddonTask("Walker2d", "|θ| (rad)", lambda obs: abs(obs[..., 1]), lambda x: -10 * x),
    "humanoid-right": AddonTask("Humanoid", "-v_y (m/s)", lambda obs: -obs[..., 23], lambda v: v),
    "none": AddonTask("", "–", lambda obs: 0 * obs[..., 0], lambda x: x),
}


def recorded_task(run_dir: Path) -> tuple[str | None, float]:
    """Name and coefficient of a run's add-on task, from its args.json; None: the environment's default task.

    Raises: StopRun if args.json is missing or damaged.
    """
    try:
        content = json.loads((run_dir / "args.json").read_text())
        name, coef = content["args"].get("addon"), float(content["args"].get("addon_coef", 1))
        if name is None and content.get("command", "").partition(".py")[0].endswith("soft_ppo"):
            name = "none"  # its default
        if not (name is None or name in ADDON_TASKS) or not math.isfinite(coef):
            raise ValueError(f"it has the unknown add-on task {coef} x {name!r}; add it to ADDON_TASKS")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StopRun(f"{run_dir / 'args.json'} cannot be used: {error}; or give the policy file itself") from None
    return name, coef


def find_task(path: Path, env_id: str, name: str | None, coef: float | None) -> tuple[str, AddonTask]:
    """An add-on task and its name: as named, else the run's, else the environment's default, else "none".

    Raises: StopRun if the environment has no such task.
    """
    run_name, run_coef = recorded_task(path) if path.is_dir() else (None, 1.0)
    env = env_id.rpartition("-v")[0]
    choices = [key for key, task in ADDON_TASKS.items() if task.env == env] + ["none"]
    name = name or run_name or choices[0]
    if name not in choices:
        raise StopRun(f"{name} is no add-on task for {env_id}; give --addon one of {', '.join(choices)}, or add yours")
    return name, ADDON_TASKS[name]._replace(coef=run_coef if coef is None else coef)


# -------------------------------------------------------------------------------- policy files


class NumpyPolicy(NamedTuple):
    """What a policy file holds."""

    env_id: str
    squash: bool  # the action is tanh(u), stretched to the bounds; else u, clipped to them
    activation: Callable  # after every layer but the last
    obs_clip: float  # bound of normalised observations
    layers: list[tuple[np.ndarray, np.ndarray]]  # weight (out, in) and bias (out,) of each
    tensors: dict[str, np.ndarray]  # all, float32, as named in the file


def policy_digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over all that a policy file says, to find damage."""
    digest = hashlib.sha256(json.dumps({**metadata, "sha256": ""}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    return digest.hexdigest()


def read_policy(path: Path) -> NumpyPolicy:
    """Read a policy file, or the one in a run folder; StopRun if it is missing, damaged or of an unknown kind."""
    file = path / "policy.safetensors" if path.is_dir() else path
    try:
        data = file.read_bytes()
        tensors = safetensors.numpy.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        return check_policy(tensors, metadata)
    except FileNotFoundError:
        hint = "the run is not complete" if path.is_dir() else "name a policy file or a run folder"
        raise StopRun(f"there is no policy {file}; {hint}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise StopRun(f"the policy {file} cannot be used: {error}") from None


def check_policy(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> NumpyPolicy:
    """Make a policy of a file's contents; ValueError says what is wrong with them."""
    tensors = {name: array for name, array in tensors.items() if not name.startswith("critic.")}
    required = {"env_id", "squash", "hidden_sizes", "activation"}
    optional = {"obs_clip", "alpha", "gamma", "survival_reward", "measured_alpha", "returns", "training"}
    if wrong := (required - metadata.keys()) | (metadata.keys() - required - optional - {"sha256", "format"}):
        raise ValueError(f"the metadata {sorted(wrong)} are missing or unknown")
    if metadata.get("sha256", digest := policy_digest(tensors, metadata)) != digest:
        raise ValueError("it is damaged (its sha256 does not match); copy or export it anew")
    if metadata["squash"] not in ("true", "false"):
        raise ValueError(f"its squash is {metadata['squash']}, neither true nor false")
    activations = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0)}
    if metadata["activation"] not in activations:
        raise ValueError(f"its activation is {metadata['activation']}, neither tanh nor relu")
    if not (obs_clip := float(metadata.get("obs_clip", 10))) > 0:
        raise ValueError(f"its obs_clip is {metadata['obs_clip']}, and must be above 0")
    hidden_sizes = json.loads(metadata["hidden_sizes"])
    if type(hidden_sizes) is not list or not all(type(size) is int and size > 0 for size in hidden_sizes):
        raise ValueError(f"its hidden_sizes are {metadata['hidden_sizes']}, not a list of widths")
    check_tensors(tensors, hidden_sizes)
    names = [f"actor_mean.{2 * i}" for i in range(len(hidden_sizes) + 1)]
    layers = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names]
    activation, squash = activations[metadata["activation"]], metadata["squash"] == "true"
    return NumpyPolicy(metadata["env_id"], squash, activation, obs_clip, layers, tensors)


def check_tensors(tensors: dict[str, np.ndarray], hidden_sizes: list[int]) -> None:
    """ValueError unless these are the tensors of a policy with such hidden layers, and sound."""
    last = 2 * len(hidden_sizes)
    if missing := {"obs_mean", f"actor_mean.{last}.bias"} - tensors.keys():
        raise ValueError(f"the tensors {sorted(missing)} are missing")
    widths = [tensors["obs_mean"].size, *hidden_sizes, tensors[f"actor_mean.{last}.bias"].size]
    shapes = {"obs_mean": (widths[0],), "obs_var": (widths[0],)}
    for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        shapes |= {f"actor_mean.{2 * i}.weight": (width_out, width_in), f"actor_mean.{2 * i}.bias": (width_out,)}
    if "actor_logstd" in tensors:
        shapes["actor_logstd"] = (widths[-1],)
    else:
        shapes |= {"actor_logstd.weight": (widths[-1], widths[-2]), "actor_logstd.bias": (widths[-1],)}
    if wrong := shapes.keys() ^ tensors.keys():
        raise ValueError(f"the tensors {sorted(wrong)} are missing or unknown")
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != np.float32:
            raise ValueError(f"{name} is {tensors[name].dtype} {tensors[name].shape}, not float32 {shape}")
        if not np.isfinite(tensors[name]).all() or (name == "obs_var" and (tensors[name] < 0).any()):
            raise ValueError(f"{name} has impossible entries (NaN, infinite, or a negative variance)")


# -------------------------------------------------------------------------------------- acting


def mean_and_log_std(policy: NumpyPolicy, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Gaussian over actions before squashing or clipping.

    Args: obs (..., obs_dim), float32. Returns: mean (..., action_dim); log_std (action_dim,) or (..., action_dim).
    """
    tensors = policy.tensors
    x = (obs - tensors["obs_mean"]) / np.sqrt(tensors["obs_var"] + 1e-8)
    x = np.clip(x, -policy.obs_clip, policy.obs_clip)
    for weight, bias in policy.layers[:-1]:
        x = policy.activation(x @ weight.T + bias)
    weight, bias = policy.layers[-1]
    mean = x @ weight.T + bias
    if "actor_logstd" in tensors:
        return mean, tensors["actor_logstd"]
    return mean, np.clip(x @ tensors["actor_logstd.weight"].T + tensors["actor_logstd.bias"], -20, 2)


def act(policy: NumpyPolicy, obs: np.ndarray, noise: Any, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The action in the environment's units, within its bounds low and high (action_dim,).

    Args: obs (..., obs_dim), float32; noise (..., action_dim), standard normal, or 0 for the mean action.
    Returns: (..., action_dim), float32.
    """
    mean, log_std = mean_and_log_std(policy, obs)
    action = mean + np.exp(log_std) * noise
    return low + (np.tanh(action) + 1) / 2 * (high - low) if policy.squash else np.clip(action, low, high)


class Episode(NamedTuple):
    """What an episode has come to."""

    seed: int
    basic: float  # sum of the environment's own reward
    addon: float  # sum of the add-on reward
    total: float
    quantity: float  # of the add-on task, mean over the steps
    length: int  # steps


def play(env: Any, policy: NumpyPolicy, addon: AddonTask, seed: int, deterministic: bool) -> Iterator[Episode]:
    """Play an episode, yielding what it has come to after the reset and after each step.

    Environment and noise follow from the seed, so two policies with the same seed meet the same luck.
    """
    rng = np.random.default_rng(seed)
    low, high = env.action_space.low, env.action_space.high
    obs, _ = env.reset(seed=seed)
    basic, bonus, quantity, length, done = 0.0, 0.0, 0.0, 0, False
    yield Episode(seed, basic, bonus, basic + bonus, quantity, length)
    while not done:
        noise = 0 if deterministic else rng.standard_normal(low.shape, np.float32)
        obs, reward, terminated, truncated, _ = env.step(act(policy, obs.astype(np.float32), noise, low, high))
        measured = float(addon.quantity(obs))
        basic, bonus = basic + float(reward), bonus + addon.coef * addon.reward(measured)
        quantity, length, done = quantity + measured, length + 1, terminated or truncated
        yield Episode(seed, basic, bonus, basic + bonus, quantity / length, length)


def play_all(env: Any, policies: list[NumpyPolicy], addon: AddonTask, args: Args) -> list[list[Episode]]:
    """All episodes of each policy."""
    results = [[] for _ in policies]
    with rich.progress.Progress(console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as progress:
        for seed in progress.track(range(args.seed, args.seed + args.episodes), description="episodes"):
            for policy, episodes in zip(policies, results, strict=True):
                *_, episode = play(env, policy, addon, seed, args.deterministic)
                episodes.append(episode)
    return results


# ---------------------------------------------------------------------- environments and video


NEEDS_EGL = "without a display, install EGL: apt-get install libegl1, and set MUJOCO_GL=egl"


def make_gymnasium(env_id: str, policies: list[NumpyPolicy], window: bool = False, video: bool = False) -> Any:
    """Gymnasium's environment; StopRun unless it exists, all policies are for it, and its window opens.

    The first one made decides how MuJoCo draws in this process: for a video, without a display if there is none.
    """
    if video and sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")
    import gymnasium

    warnings.filterwarnings("ignore", message=".*is out of date")  # who plays v4 knows
    warnings.filterwarnings("ignore", module="glfw")  # what it warns of ends in a StopRun
    if env_id not in gymnasium.registry:
        raise StopRun(f"Gymnasium has no environment {env_id!r}; give --env-id another version of the policy's own")
    for policy in policies:
        if policy.env_id.rpartition("-v")[0] != env_id.rpartition("-v")[0]:
            raise StopRun(f"a policy for {policy.env_id} cannot play in {env_id}; change --env-id or the policy")
    try:
        from mujoco.glfw import glfw

        if window and not glfw.init():  # Gymnasium would crash the process
            raise RuntimeError("--window needs a display, and there is none; --video FILE.mp4 needs none")
        env = gymnasium.make(env_id, render_mode="human" if window else None, disable_env_checker=True)
        env.reset()  # opens the window
    except Exception as error:  # every drawing library fails in its own way
        raise StopRun(f"Gymnasium cannot open {env_id} ({error}){f'; {NEEDS_EGL}' if video else ''}") from None
    for policy in policies:
        shapes = policy.tensors["obs_mean"].shape, policy.layers[-1][1].shape
        if shapes != (theirs := (env.observation_space.shape, env.action_space.shape)):
            what = f"observations and actions have shapes {theirs[0]} and {theirs[1]}"
            raise StopRun(f"{env_id}'s {what}, the policy's {shapes[0]} and {shapes[1]}; change --env-id or the policy")
    return env


def open_renderer(env: Any, size: tuple[int, int]) -> Any:
    """MuJoCo's renderer, of pictures with size (width, height); StopRun if nothing can be drawn on this machine."""
    import mujoco

    try:
        model = env.unwrapped.model
        model.vis.global_.offwidth, model.vis.global_.offheight = size
        renderer = mujoco.Renderer(model, *size[::-1])
        renderer.update_scene(env.unwrapped.data)
        renderer.render()
    except Exception as error:  # every drawing library fails in its own way
        raise StopRun(f"--video cannot draw ({error}); {NEEDS_EGL}") from None
    return renderer


def video_frames(players: list[Iterator], envs: list[Any], renderer: Any, every: int) -> Iterator[np.ndarray]:
    """A frame (height, width, 3) for each every-th step of players, which play in envs, side by side.

    Who has ended stays still on the last picture.
    """
    camera = 0 if renderer.model.ncam else -1  # the model's own, which follows the robot, else a free one
    for step, _ in enumerate(itertools.zip_longest(*players)):
        if step % every == 0:
            pictures = []
            for env in envs:
                renderer.update_scene(env.unwrapped.data, camera)
                pictures.append(renderer.render())
            yield np.hstack(pictures)


def record_video(policies: list[NumpyPolicy], addon: AddonTask, env_id: str, renderer: Any, args: Args) -> None:
    """Record the first episode of each policy, side by side."""
    import imageio

    envs = [make_gymnasium(env_id, policies) for _ in policies]
    pairs = zip(envs, policies, strict=True)
    players = [play(env, policy, addon, args.seed, args.deterministic) for env, policy in pairs]
    if args.video_steps is not None:
        players = [itertools.islice(player, args.video_steps + 1) for player in players]  # and the reset
    every = max(1, round(1 / (args.video_fps * envs[0].unwrapped.dt)))
    options = {"fps": 1 / (every * envs[0].unwrapped.dt), "macro_block_size": 1, "ffmpeg_log_level": "error"}
    if args.video.suffix == ".gif":
        palette = "split[a][b];[a]palettegen=max_colors=64[p];[b][p]paletteuse=dither=none:diff_mode=rectangle"
        gif = ["-filter_complex", palette, "-loop", "0", "-f", "gif"]
        options |= {"codec": "gif", "pixelformat": "pal8", "output_params": gif}
    temporary = args.video.with_name(args.video.name + ".tmp.mp4")  # imageio gives ffmpeg no other names
    try:
        with imageio.get_writer(temporary, format="FFMPEG", **options) as video:
            for frame in video_frames(players, envs, renderer, every):
                video.append_data(frame)
        os.replace(temporary, args.video)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------- main


CONSOLE = rich.console.Console(highlight=False, soft_wrap=True)


def results_table(results: list[list[Episode]], label: str, actions: str) -> rich.table.Table:
    """Mean ± standard deviation over the episodes of each policy; label names the add-on task's quantity."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    for header in ("policy", "against")[: len(results)]:
        table.add_column(f"{header}\n{actions}", justify="right", no_wrap=True)
    rows = {"basic": "return (basic)", "addon": "add-on", "total": "total", "quantity": label, "length": "length"}
    for name, title in rows.items():
        columns = [np.array([getattr(episode, name) for episode in episodes]) for episodes in results]
        digits = 3 if name == "quantity" else 1
        table.add_row(title, *[f"{x.mean():.{digits}f} ± {x.std():.{digits}f}" for x in columns])
    return table


def check_flags(args: Args) -> None:
    """StopRun if a flag cannot work, or would overwrite a file."""
    for name in ("episodes", "video_steps", "video_fps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise StopRun(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if args.seed < 0:
        raise StopRun(f"--seed is {args.seed}; it must not be negative")
    if args.addon_coef is not None and not math.isfinite(args.addon_coef):
        raise StopRun(f"--addon-coef is {args.addon_coef}; it must be a finite number")
    if min(args.video_size) < 2 or any(size % 2 for size in args.video_size):
        raise StopRun(f"--video-size is {args.video_size}; width and height must be even and above 0")
    for flag, path, suffixes in (("--video", args.video, (".mp4", ".gif")), ("--json", args.json, (".json",))):
        if path is None:
            continue
        if path.suffix not in suffixes:
            raise StopRun(f"{flag} is {path}; its name must end in {' or '.join(suffixes)}")
        if path.exists():
            raise StopRun(f"{flag} {path} exists; name a new file, or remove it")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise StopRun(f"{flag} cannot write to the folder {path.parent}; create it, or name another")


def main(args: Args) -> None:
    """Play, show and record."""
    check_flags(args)
    paths = [path for path in (args.path, args.against) if path]
    policies = [read_policy(path) for path in paths]
    env_id = args.env_id or policies[0].env_id
    task, addon = find_task(args.path, env_id, args.addon, args.addon_coef)
    env = make_gymnasium(env_id, policies, args.window, args.video is not None)
    renderer = open_renderer(env, args.video_size) if args.video else None

    CONSOLE.print(
        f"[bold]{env_id}[/bold], episodes: {args.episodes}, seed: {args.seed}, add-on: {addon.coef:g} x {task}"
    )
    for label, path in zip(("policy", "against"), paths, strict=False):
        CONSOLE.print(f"{label:8} {path}")
    results = play_all(env, policies, addon, args)
    env.close()
    CONSOLE.print(results_table(results, addon.label, "deterministic" if args.deterministic else "sampled"))
    if args.json:
        settings = vars(args) | {"env_id": env_id, "addon": task, "addon_coef": addon.coef}
        pairs = zip(paths, results, strict=True)
        played = [{"path": path, "episodes": [x._asdict() for x in episodes]} for path, episodes in pairs]
        content = {"settings": settings, "quantity": addon.label, "policies": played}
        args.json.write_text(json.dumps(content, indent=1, default=str))
        CONSOLE.print(f"every episode is in {args.json}")
    if args.video:
        CONSOLE.print("recording ...")  # which takes minutes without a GPU
        record_video(policies, addon, env_id, renderer, args)
        CONSOLE.print(f"the first episode is in {args.video}")


def end(message: str, exit_code: int) -> None:
    """End this process with one line."""
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except StopRun as error:
        end(str(error), error.exit_code)
    except OSError as error:  # as of a full disk
        end(str(error), 2)
    except KeyboardInterrupt:
        end("interrupted", 130)
