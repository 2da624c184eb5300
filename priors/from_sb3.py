"""Turn a model of Stable-Baselines3, sb3-contrib or SBX into a policy file that residual_ppo.py takes as a prior.

    python priors/from_sb3.py model.zip --env-id Hopper-v4 --export hopper.safetensors --vecnormalize vecnormalize.pkl

PPO, A2C, SAC, TRPO, TQC, and SBX's PPO, SAC and TQC, of any version. None of these packages is needed, nor PyTorch:
the file is read, not loaded. Its pickles are taken as descriptions (read_pickle), so no code that is in them is run.
"""

import base64
import contextlib
import io
import json
import math
import os
import pickletools
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gymnasium
import numpy as np
import safetensors.numpy
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import enjoy  # noqa: E402


@dataclass(frozen=True)
class Args:
    model: Annotated[Path, tyro.conf.Positional]
    """the model, as model.save wrote it (.zip)"""
    env_id: str
    """the Gymnasium environment that the model was trained in; for a v2 or v3, give v4"""
    export: Path
    """the policy file to write"""
    vecnormalize: Path | None = None
    """the statistics of VecNormalize, if the model was trained with it (.pkl)"""
    alpha: float | None = None
    """temperature to record; default: SAC's and TQC's entropy coefficient, and none for the others, whose entropy bonus
    is in units of normalised advantages"""
    drop_inputs: tuple[str, ...] = ()
    """observed numbers of the model that --env-id does not have, as 27:111=0 or 111=0.5: index or range, counted from
    0, the end not included, and the value to hold it at. Without a value, its mean in training (0 without
    --vecnormalize). Ant-v3 in Ant-v4: 27:111"""
    rescaled_actions: bool = False
    """the model acted through a wrapper that stretches its bounds linearly to the environment's, as RescaleAction"""


class Stop(Exception):
    """Ends the program with one line for the user; exit code 2: bad input, 1: a fault of the environment."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


# ------------------------------------------------------------------------------ reading pickles


class Made:
    """An object that a pickle describes: what would be called, with which arguments, and what would be set on it."""

    def __init__(self, name: str, args: tuple = ()):
        self.name, self.args = name, args
        self.state: Any = None
        self.items: dict = {}


MARK = Made("mark")
EMPTY = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
EMPTY |= {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
            "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES",
            "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}  # fmt: skip


def read_pickle(data: bytes) -> Any:
    """What a pickle describes: plain values as they are, all else as Made. Nothing is imported, called or executed.

    Raises: some Exception if the pickle is damaged.
    """
    stack, memo = [], {}
    for opcode, argument, _ in pickletools.genops(data):
        follow(opcode.name, argument, stack, memo)
    return stack.pop()


def pop_to_mark(stack: list) -> list:
    """What lies above the last mark of the stack; both are taken from it."""
    start = len(stack) - 1 - stack[::-1].index(MARK)
    above = stack[start + 1 :]
    del stack[start:]
    return above


def follow(name: str, argument: Any, stack: list, memo: dict) -> None:
    """Follow one opcode of a pickle, where an object is to be made by making a Made."""
    match name:
        case "PROTO" | "FRAME" | "STOP":
            pass
        case "MARK":
            stack.append(MARK)
        case "GLOBAL" | "STACK_GLOBAL":
            qualified = argument.split(" ") if argument else [stack.pop(), stack.pop()][::-1]
            stack.append(Made(".".join(qualified)))
        case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
            _, args = name == "NEWOBJ_EX" and stack.pop(), stack.pop()
            stack.append(Made(stack.pop().name, args))
        case "BUILD":
            state = stack.pop()
            stack[-1].state = state
        case "BINPERSID":
            stack.append(Made("persistent", stack.pop()))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        case "TUPLE" | "LIST" | "FROZENSET":
            above = pop_to_mark(stack)
            stack.append(tuple(above) if name == "TUPLE" else above)
        case "SETITEM" | "SETITEMS" | "DICT":
            above = pop_to_mark(stack) if name != "SETITEM" else [stack.pop(), stack.pop()][::-1]
            target = {} if name == "DICT" else stack.pop()
            items = target.items if isinstance(target, Made) else target
            # other keys are no names; hashing a deep tuple would overflow the C stack
            items.update((k, v) for k, v in zip(above[::2], above[1::2], strict=True) if isinstance(k, str))
            stack.append(target)
        case "APPEND" | "APPENDS" | "ADDITEMS":
            above = pop_to_mark(stack) if name != "APPEND" else [stack.pop()]
            if isinstance(stack[-1], list):
                stack[-1].extend(above)
        case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        case "GET" | "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "POP":
            stack.pop()
        case "POP_MARK":
            pop_to_mark(stack)
        case "DUP":
            stack.append(stack[-1])
        case _ if name in EMPTY:
            stack.append(EMPTY[name]())
        case _ if name in LITERALS:
            stack.append(argument)
        case _:
            raise ValueError(f"a pickle of a kind that is not read ({name})")


# ------------------------------------------------------------------------------ arrays in pickles


DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2"}  # torch.FloatStorage


def as_array(node: Any) -> np.ndarray:
    """The numbers that a pickle of Python, NumPy or JAX describes; ValueError if it describes something else."""
    if isinstance(node, bool | int | float):
        return np.asarray(node, np.float64)
    kind = node.name.rpartition(".")[2] if isinstance(node, Made) else type(node).__name__
    if kind == "_reconstruct_array":  # JAX's, around NumPy's
        _, shape, dtype, fortran, data = node.args[2]
    elif kind == "_reconstruct":
        _, shape, dtype, fortran, data = node.state
    elif kind == "_frombuffer":
        data, dtype, shape, fortran = (*node.args[:3], node.args[3] == "F")
    elif kind == "scalar":
        (dtype, data), shape, fortran = node.args, (), False
    else:
        raise ValueError(f"a {kind} where numbers should be")
    if isinstance(data, Made) and data.name == "_codecs.encode":  # how protocol 2 writes bytes
        data = data.args[0].encode("latin1")
    code, byte_order = dtype.args[0], dtype.state[1] if dtype.state else "="
    if dtype.name != "numpy.dtype" or code not in DTYPES:
        raise ValueError(f"an array of {dtype.name} {str(code)[:9]}, not of numbers")
    flat = np.frombuffer(data, np.dtype(code).newbyteorder(byte_order if byte_order in "<>" else "="))
    return flat.reshape(shape, order="F" if fortran else "C")


def as_dict(node: Any) -> dict:
    """The entries of a dict, or of what stands for one; ValueError if there are none."""
    if isinstance(node, Made):
        frozen = node.state.get("_dict") if isinstance(node.state, dict) else None  # Flax's FrozenDict
        node = node.items if frozen is None else frozen
    if not isinstance(node, dict):
        raise ValueError(f"a {type(node).__name__} where named entries should be")
    return node


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a state_dict that torch.save wrote; some Exception if it is damaged."""
    if not data.startswith(b"PK"):
        raise ValueError(
            "its tensors are in the format of PyTorch before 1.6; load it there and save it with a later one"
        )
    archive = zipfile.ZipFile(io.BytesIO(data))
    root = next(name for name in archive.namelist() if name.endswith("data.pkl")).removesuffix("data.pkl")
    order = "<"
    if f"{root}byteorder" in archive.namelist() and member(archive, f"{root}byteorder") == b"big":
        order = ">"
    nodes = as_dict(read_pickle(member(archive, f"{root}data.pkl")))
    tensors = {}
    for name, node in nodes.items():
        if not isinstance(node, Made) or not node.name.startswith("torch._utils._rebuild_"):
            continue
        node = node.args[0] if node.name.endswith("_parameter") else node
        storage, offset, shape, strides, *_ = node.args
        _, kind, key, *_ = storage.args
        code = STORAGES.get(kind.name.removeprefix("torch.").removesuffix("Storage"))
        if code is None:
            continue  # as a count of batches; what is needed and missing is named later
        flat = np.frombuffer(member(archive, f"{root}data/{key}"), order + code)
        if math.prod(shape) > flat.size or min((offset, *shape, *strides)) < 0:
            raise ValueError(f"its tensor {name} is larger than what is stored of it")
        index = np.asarray(offset)
        for size, stride in zip(shape, strides, strict=True):
            index = index[..., None] + stride * np.arange(size)
        tensors[name] = flat[index]
    return tensors


def member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file of a zip archive; ValueError if it is too large for a policy."""
    if archive.getinfo(name).file_size > 2**30:
        raise ValueError(f"its {name} would be larger than 1 GiB")
    return archive.read(name)


# ------------------------------------------------------------------------------ models


class Model(NamedTuple):
    """What is needed of a saved model."""

    source: str
    squash: bool
    activation: str
    layers: list[tuple[np.ndarray, np.ndarray]]  # weight (out, in), bias (out,); the last gives the mean
    log_std: tuple[np.ndarray, ...]  # (action_dim,), or weight and bias that give it from the last hidden layer
    low: np.ndarray  # (action_dim,), bounds of the actions, as the model knows them
    high: np.ndarray
    obs_dim: int
    alpha: float | None  # the entropy coefficient
    gamma: float
    num_timesteps: int
    normalised: bool  # trained with VecNormalize; of SAC and TQC it is not known


POLICIES = {
    "stable_baselines3.common.policies.ActorCriticPolicy": ("stable-baselines3", ""),
    "stable_baselines3.sac.policies.SACPolicy": ("stable-baselines3", "SAC"),
    "sb3_contrib.tqc.policies.TQCPolicy": ("sb3-contrib", "TQC"),
    "sbx.ppo.policies.PPOPolicy": ("sbx", "PPO"),
    "sbx.sac.policies.SACPolicy": ("sbx", "SAC"),
    "sbx.tqc.policies.TQCPolicy": ("sbx", "TQC"),
}
REFUSED = {
    "Simba": "Simba's actor has layer norms and shortcuts",
    "Cnn": "it sees images (CNN)",
    "MultiInput": "it has a dictionary of observations",
    "crossq": "CrossQ's actor has batch norms",
    "td3": "TD3's and DDPG's actor is deterministic and has no log pi",
    "ddpg": "DDPG's actor is deterministic and has no log pi",
    "dqn": "DQN's actions are discrete",
    "qrdqn": "QR-DQN's actions are discrete",
    "recurrent": "it is recurrent",
    "maskable": "its actions are masked and discrete",
    "ars": "ARS's actor is deterministic and has no log pi",
}
ACTIVATIONS = {name.lower(): name.lower() for name in ("Tanh", "ReLU", "ELU", "SiLU")} | {"swish": "silu"}


def saved(data: dict, name: str) -> Any:
    """An attribute of a model, from the JSON of its zip; what is pickled there is read as read_pickle does."""
    value = data.get(name)
    pickled = isinstance(value, dict) and ":serialized:" in value
    return read_pickle(base64.b64decode(value[":serialized:"])) if pickled else value


def find_algorithm(data: dict) -> tuple[str, str]:
    """The package and the algorithm of a model; Stop unless its policy is a diagonal Gaussian of an MLP."""
    policy = saved(data, "policy_class").name
    if policy not in POLICIES:
        why = next((why for part, why in REFUSED.items() if part in policy), "a policy class of someone's own")
        raise Stop(f"it cannot be a prior: {why} ({policy}); PPO, A2C, SAC, TRPO and TQC with an MlpPolicy can")
    package, algorithm = POLICIES[policy]
    if not algorithm:
        algorithm = "PPO" if "clip_range" in data else "TRPO" if "cg_max_steps" in data else "A2C"
        package = "sb3-contrib" if algorithm == "TRPO" else package
    for what in ("observation", "action"):
        if (kind := saved(data, f"{what}_space").name.rpartition(".")[2]) != "Box":
            raise Stop(f"it cannot be a prior: its {what}s are {kind}; only vectors of numbers (Box) can be read")
    kwargs = saved(data, "policy_kwargs") or {}
    if data.get("use_sde") or kwargs.get("squash_output"):
        raise Stop(
            "it cannot be a prior: it explores with gSDE, which is no diagonal Gaussian; train with use_sde=False"
        )
    extractor = getattr(kwargs.get("features_extractor_class"), "name", "FlattenExtractor")
    if not extractor.endswith("FlattenExtractor"):
        raise Stop(f"it cannot be a prior: it has the feature extractor {extractor}; only plain MLPs can be read")
    return package, algorithm


def torch_network(tensors: dict[str, np.ndarray], squash: bool) -> tuple[list, tuple]:
    """Layers and log_std of a Model, from the state_dict of a policy of PyTorch; Stop if there is more in it."""
    if squash:
        bodies, mean, deviation, others = ["actor.latent_pi."], "actor.mu", "actor.log_std", "critic"
    else:
        bodies, mean, deviation = ["mlp_extractor.shared_net.", "mlp_extractor.policy_net."], "action_net", "log_std"
        others = ("mlp_extractor.value_net.", "value_net.")
    names = []
    for body in bodies:
        numbers = {name[len(body) :].partition(".")[0] for name in tensors if name.startswith(body)}
        names += [f"{body}{2 * i}" for i in range(len(numbers))]
    linears = [f"{name}.{part}" for name in [*names, mean] for part in ("weight", "bias")]
    log_std = [f"{deviation}.weight", f"{deviation}.bias"] if squash else [deviation]
    odd = {name for name in tensors.keys() ^ {*linears, *log_std} if not name.startswith(others)}
    if odd:
        shown = ", ".join(sorted(odd)[:3])
        raise Stop(
            f"it cannot be a prior: {shown} are missing, or no part of linear layers; only plain MLPs can be read"
        )
    arrays = [tensors[name] for name in linears]
    return list(zip(arrays[::2], arrays[1::2], strict=True)), tuple(tensors[name] for name in log_std)


def flax_network(params: dict, squash: bool) -> tuple[list, tuple]:
    """Layers and log_std of a Model, from the parameters of a policy of SBX; Stop if there is more in them."""
    names = [f"Dense_{i}" for i in range(sum(name.startswith("Dense_") for name in params))]
    if odd := params.keys() ^ {*names, *([] if squash else ["log_std"])}:
        raise Stop(f"it cannot be a prior: it has {', '.join(sorted(odd)[:3])}; only plain MLPs can be read")
    layers = [(as_array(params[name]["kernel"]).T, as_array(params[name]["bias"])) for name in names]
    return (layers[:-1], layers[-1]) if squash else (layers, (as_array(params["log_std"]),))


def entropy_coefficient(data: dict, variables: dict[str, np.ndarray]) -> float | None:
    """SAC's and TQC's, learned or set; None if the file does not say."""
    if isinstance(data.get("ent_coef_state"), dict):  # SBX's
        variables = {k: as_array(v) for k, v in as_dict(saved(data, "ent_coef_state").state["params"]).items()}
    if "log_ent_coef" in variables:
        return float(np.exp(np.ravel(variables["log_ent_coef"])[0]))
    given = saved(data, "ent_coef_init" if "ent_coef_init" in data else "ent_coef")
    return None if given is None or isinstance(given, str) else float(as_array(given))


def load_model(path: Path) -> Model:
    """Read a model; Stop if it cannot be a prior, some other Exception if it is damaged."""
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    data = json.loads(member(archive, "data"))
    package, algorithm = find_algorithm(data)
    squash = algorithm in ("SAC", "TQC")
    if package == "sbx":
        policy = saved(data, "policy").state
        layers, log_std = flax_network(as_dict(as_dict(policy["actor_state"].state["params"])["params"]), squash)
        function, variables = policy["activation_fn"], {}
        named = function.state if isinstance(function.state, dict) else {}
        activation = named.get("function_name") or named.get("__name__") or function.name
    else:
        layers, log_std = torch_network(read_tensors(member(archive, "policy.pth")), squash)
        variables = "pytorch_variables.pth" in names and read_tensors(member(archive, "pytorch_variables.pth")) or {}
        function = (saved(data, "policy_kwargs") or {}).get("activation_fn")
        activation = getattr(function, "name", "ReLU" if squash else "Tanh")
    kind = activation.rpartition(".")[2].lower()
    if kind not in ACTIVATIONS and len(layers) > 1:
        raise Stop(f"it cannot be a prior: its activation is {activation}; only tanh, ReLU, ELU and SiLU can be read")
    action, obs = (saved(data, f"{what}_space").state for what in ("action", "observation"))
    low, high, shape = as_array(action["low"]), as_array(action["high"]), as_array(obs["low"]).shape
    if len(shape) != 1 or low.ndim != 1:
        raise Stop(f"it cannot be a prior: its observations are {shape}, its actions {low.shape}; both must be vectors")
    version = member(archive, "_stable_baselines3_version") if "_stable_baselines3_version" in names else b"unknown"
    return Model(
        source=f"{package} {algorithm} (stable-baselines3 {re.sub(r'[^ -~]', '', version.decode())[:20].strip()})",
        squash=squash,
        activation=ACTIVATIONS.get(kind, "tanh"),
        layers=layers,
        log_std=log_std,
        low=low,
        high=high,
        obs_dim=shape[0],
        alpha=entropy_coefficient(data, variables) if squash else None,
        gamma=float(as_array(saved(data, "gamma"))),
        num_timesteps=int(as_array(saved(data, "num_timesteps"))),
        normalised=not squash and data.get("_last_original_obs") is not None,
    )


class Statistics(NamedTuple):
    """What VecNormalize does to observations, as a policy file says it, and to rewards."""

    mean: np.ndarray
    var: np.ndarray
    clip: float
    reward_scale: float  # rewards were divided by it


def load_statistics(path: Path | None, obs_dim: int) -> Statistics:
    """Read what VecNormalize.save wrote; without a file, what changes nothing. Some Exception if it is damaged."""
    nothing = Statistics(np.zeros(obs_dim), np.ones(obs_dim), math.inf, 1.0)
    if path is None:
        return nothing
    made = read_pickle(path.read_bytes())
    if not isinstance(made, Made) or made.name.rpartition(".")[2] != "VecNormalize":
        raise ValueError(f"it is a {getattr(made, 'name', type(made).__name__)}, no VecNormalize")
    state, (epsilon, clip) = made.state, (float(as_array(made.state[name])) for name in ("epsilon", "clip_obs"))
    scale = 1.0
    if state["norm_reward"]:
        scale = float(np.sqrt(as_array(state["ret_rms"].state["var"]) + epsilon))
    if not state["norm_obs"]:
        return nothing._replace(reward_scale=scale)
    mean, var = (as_array(state["obs_rms"].state[name]) for name in ("mean", "var"))
    if mean.shape != (obs_dim,) or var.shape != (obs_dim,):
        raise ValueError(f"it is for {mean.size} observed numbers, and the model sees {obs_dim}")
    # a reader adds 1e-8 where VecNormalize adds epsilon
    return Statistics(mean, var + (epsilon - 1e-8), clip, scale)


# ------------------------------------------------------------------------------ the environment


def env_bounds(env_id: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Number of observed numbers, and bounds of the actions (action_dim,), of one of Gymnasium's environments."""
    name, _, version = env_id.rpartition("-v")
    newer = [x for x in gymnasium.registry if x.startswith(f"{name}-v") and version.isdecimal()]
    newer = sorted(x for x in newer if x.rpartition("-v")[2].isdecimal() and int(x.rpartition("-v")[2]) > int(version))
    if name and version in ("2", "3") and newer:
        newer = [x for x in newer if x.rpartition("-v")[2] in "45"] or newer
        raise Stop(f"--env-id {env_id} is no longer in Gymnasium; give {' or '.join(newer)}, the same robot")
    try:
        env = gymnasium.make(env_id)
    except Exception as error:  # an environment can raise anything
        raise Stop(f"--env-id {env_id} cannot be made ({in_short(error)}); name one of Gymnasium's") from None
    obs, action = env.observation_space, env.action_space
    env.close()
    for what, space in (("observations", obs), ("actions", action)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise Stop(f"--env-id {env_id} has the {what} {space}, which are no vectors; name the model's own")
    return obs.shape[0], action.low, action.high


def parse_drops(texts: tuple[str, ...], mean: np.ndarray) -> dict[int, float]:
    """--drop-inputs as {index: value at which it is held}; Stop if it cannot be read, or is beyond mean's shape."""
    drops = {}
    for text in texts:
        found = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?(?:=([-+.\deE]{1,30}))?", text, re.ASCII)
        start, end = (int(found[1]), int(found[2] or int(found[1]) + 1)) if found else (0, 0)
        try:
            value = float(found[3]) if found and found[3] else None
        except ValueError:
            value = math.nan
        if not 0 <= start < end <= len(mean) or (value is not None and not math.isfinite(value)):
            raise Stop(f"--drop-inputs {text} is no range as 27:111 or 27:111=0 within the {len(mean)} inputs from 0")
        drops |= {i: float(mean[i]) if value is None else value for i in range(start, end)}
    return drops


def fold_inputs(model: Model, statistics: Statistics, drops: dict[int, float]) -> tuple[Model, Statistics]:
    """Leave out inputs that are constant: what each would add to the first layer becomes part of its bias."""
    index = np.array(sorted(drops), int)
    kept = np.setdiff1d(np.arange(model.obs_dim), index)
    mean, var, clip, _ = statistics
    value = (np.array([drops[i] for i in index]) - mean[index]) / np.sqrt(var[index] + 1e-8)
    (weight, bias), *rest = model.layers
    first = (weight[:, kept], bias + weight[:, index].astype(np.float64) @ np.clip(value, -clip, clip))
    model = model._replace(layers=[first, *rest], obs_dim=len(kept))
    return model, statistics._replace(mean=mean[kept], var=var[kept])


def fold_rescaling(model: Model, low: np.ndarray, high: np.ndarray) -> Model:
    """Stretch the model's bounds linearly to the environment's; a squashed action is relative to them anyway."""
    if model.squash:
        return model._replace(low=low, high=high)
    scale = (high - low) / (model.high - model.low)
    *rest, (weight, bias) = model.layers
    last = (scale[:, None] * weight, low + scale * (bias - model.low))
    return model._replace(layers=[*rest, last], log_std=(model.log_std[0] + np.log(scale),), low=low, high=high)


def fit_environment(model: Model, statistics: Statistics, args: Args) -> tuple[Model, Statistics]:
    """The model with the environment's inputs and bounds; Stop if it has others."""
    obs_dim, low, high = env_bounds(args.env_id)
    if args.drop_inputs:
        model, statistics = fold_inputs(model, statistics, parse_drops(args.drop_inputs, statistics.mean))
    if model.obs_dim != obs_dim:
        hint = "name the model's own --env-id"
        if model.obs_dim > obs_dim:
            hint += f", or leave constant ones out; if they are the last: --drop-inputs {obs_dim}:{model.obs_dim}"
        raise Stop(f"it sees {model.obs_dim} numbers, and {args.env_id} has {obs_dim}; {hint}")
    if len(model.low) != len(low):
        raise Stop(f"it has {len(model.low)} actions, and {args.env_id} {len(low)}; name the model's own --env-id")
    if args.rescaled_actions:
        model = fold_rescaling(model, low, high)
    if not (np.array_equal(model.low, low) and np.array_equal(model.high, high)):
        ours, theirs = (f"[{x.min():g}, {y.max():g}]" for x, y in ((model.low, model.high), (low, high)))
        hint = "name its own, or give --rescaled-actions if a wrapper as RescaleAction stretched them linearly"
        raise Stop(f"its actions are in {ours}, those of {args.env_id} in {theirs}; {hint}")
    return model, statistics


# ------------------------------------------------------------------------------ main


def one_line(text: str) -> str:
    """A text without line breaks and without what would change the terminal."""
    return "".join(x for x in " ".join(text.split()) if x.isprintable())


def in_short(error: Exception) -> str:
    """An error's kind and message, cut to a line's length."""
    return re.sub(r"\x1b\[\d*m", "", f"{type(error).__name__}: {error}")[:160]  # without colours


def write_new(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and never over another one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        open(path, "xb").close()  # unlike a rename, fails if there is such a file by now
        os.replace(temporary, path)
    except OSError as error:
        known = isinstance(error, FileExistsError | NotADirectoryError | PermissionError)
        message = f"cannot write {path} ({error.strerror}); choose another file with --export"
        raise Stop(message, 2 if known else 1) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def policy_file(args: Args) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of the policy file; Stop if the model or its statistics cannot be converted."""
    if not args.model.is_file():
        raise Stop(f"there is no model {args.model}; name a file that model.save wrote, with its .zip")
    try:
        model = load_model(args.model)
        if model.normalised and args.vecnormalize is None:
            raise Stop("it was trained with VecNormalize; name the file that VecNormalize.save wrote, --vecnormalize")
    except Stop as error:
        raise Stop(f"{args.model}: {error}") from None
    except Exception as error:  # a damaged file can fail in any way
        raise Stop(
            f"{args.model} is no model that can be read ({in_short(error)}); name a file of model.save"
        ) from None
    try:
        statistics = load_statistics(args.vecnormalize, model.obs_dim)
    except Exception as error:
        raise Stop(
            f"--vecnormalize {args.vecnormalize} cannot be used ({in_short(error)}); name the model's own"
        ) from None
    alpha = args.alpha
    if alpha is None and model.alpha is not None:
        alpha = model.alpha * statistics.reward_scale  # in units of the environment's reward
    try:
        model, statistics = fit_environment(model, statistics, args)
    except Stop as error:
        raise Stop(f"{args.model}: {error}") from None
    tensors = {"obs_mean": statistics.mean, "obs_var": statistics.var}
    for i, (weight, bias) in enumerate(model.layers):
        tensors |= {f"actor_mean.{2 * i}.weight": weight, f"actor_mean.{2 * i}.bias": bias}
    names = ("actor_logstd.weight", "actor_logstd.bias") if model.squash else ("actor_logstd",)
    tensors |= dict(zip(names, model.log_std, strict=True))
    training = {"source": model.source, "num_timesteps": model.num_timesteps, "vecnormalize": bool(args.vecnormalize)}
    training |= {"drop_inputs": args.drop_inputs} if args.drop_inputs else {}
    metadata = {
        "format": "pt",
        "env_id": args.env_id,
        "squash": str(model.squash).lower(),
        "hidden_sizes": json.dumps([len(bias) for _, bias in model.layers[:-1]]),
        "activation": model.activation,
        "obs_clip": str(statistics.clip),
        "gamma": str(model.gamma),
        "training": json.dumps(training),
    }
    metadata |= {"log_std": "clip -20 2"} if model.squash else {}
    metadata |= {} if alpha is None else {"alpha": str(alpha)}
    with np.errstate(over="ignore"):
        tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    return tensors, metadata


def convert(args: Args) -> str:
    """Write the policy file. Returns: what it is, for the user."""
    if os.path.lexists(args.export):
        raise Stop(f"{args.export} exists; move it away, or choose another file with --export")
    if args.alpha is not None and not 0 <= args.alpha < math.inf:
        raise Stop(f"--alpha is {args.alpha}; it must be a finite number and not negative")
    tensors, metadata = policy_file(args)
    metadata["sha256"] = enjoy.policy_digest(tensors, metadata)
    try:
        enjoy.check_policy(tensors, metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise Stop(f"{args.model} would be no sound prior: {error}") from None
    write_new(args.export, safetensors.numpy.save(tensors, metadata))
    shown = ("squash", "hidden_sizes", "activation", "obs_clip", "alpha", "gamma")
    source = json.loads(metadata["training"])["source"]
    return f"{source} for {args.env_id}; " + ", ".join(f"{name} {metadata.get(name, 'unknown')}" for name in shown)


def main(argv: list[str] | None = None) -> int:
    """Convert. Returns: the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(f"the prior is {args.export}: {convert(args)}")
    except Stop as error:
        print(f"{Path(__file__).name}: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
