"""Measure what residual_ppo.py wants to know of a prior, and record it in the policy file.

    python priors/measure.py hopper.safetensors --alpha 0.05

survival_reward, in reward per step: mean r - alpha mean log pi over the steps of the policy's own episodes: the part of
the basic reward that log pi does not carry, and without which the end of an episode costs next to nothing.
measured_alpha, in reward per nat: the temperature that log pi really has. Of a soft-optimal policy, two policies that
start from the same states differ in sum_t gamma^t r by alpha times what they differ in sum_t gamma^t log pi, as the
shaping telescopes. Here the other policy is the same one with twice its deviation.

The scripts here record the survival reward themselves; this is for policies made otherwise. Both numbers are of the
basic reward, so a policy that was trained on an add-on task is refused.
"""

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import enjoy  # noqa: E402
import residual_ppo as rpg  # noqa: E402


@dataclass(frozen=True)
class Args:
    path: tyro.conf.Positional[Path]
    """the policy file; what is measured is added to it"""
    alpha: float | None = None
    """temperature it was trained at, in units of reward per nat; if not given, the file's; if that has none either,
    only measured_alpha is recorded"""
    gamma: float | None = None
    """discount it was trained with; if not given, the file's, or 0.99"""
    env_id: str | None = None
    """another version of the environment, as Hopper-v4 for a file of Hopper-v2; if not given, the file's"""
    num_envs: int = 64
    """environments, each played for 1000 steps"""
    seed: int = 0
    """seed of the environments and the sampling"""


class Stop(Exception):
    """Ends the program with one line for the user; exit code 2: bad input, 1: a fault of the environment."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


# ---------------------------------------------------------------------------------- mathematics


def discounted_sums(x: np.ndarray, done: np.ndarray, gamma: float) -> np.ndarray:
    """sum_t gamma^t x_t over the first episode; x, done (num_steps, num_envs) -> (num_envs,)."""
    first = np.cumsum(done, axis=0) - done == 0
    return (np.where(first, x, 0) * gamma ** np.arange(len(x))[:, None]).sum(0)


def measured_temperature(plays: list[tuple[np.ndarray, np.ndarray, np.ndarray]], gamma: float) -> float:
    """Reward per nat between two plays from the same states, each (reward, log pi, done) of (num_steps, num_envs)."""
    (reward, log_prob), (other_reward, other_log_prob) = (
        [discounted_sums(x, done, gamma).mean() for x in (reward, log_prob)] for reward, log_prob, done in plays
    )
    return (reward - other_reward) / (log_prob - other_log_prob)


def wider(policy: rpg.Policy) -> rpg.Policy:
    """The policy with twice its deviation, of the form softplus about that."""
    params, more = dict(jax.tree.map(np.asarray, policy.params)["params"]), np.float32(np.log(2))
    actor, log_std = policy.actor, params["actor_logstd"]
    kind, *bounds = actor.log_std_form.split()
    if actor.state_dependent_std and kind != "softplus":
        bounds = [min(float(bound) + float(more), 20) for bound in bounds]
        actor = dataclasses.replace(actor, log_std_form=f"{kind} {bounds[0]} {bounds[1]}")
    if not actor.state_dependent_std:
        params["actor_logstd"] = log_std + more
    elif kind != "tanh":  # there the bounds do it
        params["actor_logstd"] = {**log_std, "bias": log_std["bias"] + more}
    return dataclasses.replace(policy, params={"params": params}, actor=actor)


# ---------------------------------------------------------------------------------- playing


def play(policy: rpg.Policy, prior: rpg.Policy, env_id: str, args: Args) -> rpg.Transitions:
    """1000 steps of a policy in each environment; the prior's log pi stands in place of the add-on reward.

    All that is used of residual_ppo's environments stands here.
    """
    simulator = rpg.make_simulator(env_id, "{}", rpg.env_seeds(args.seed, rpg.EVALUATION, args.num_envs))
    env = rpg.make_env(simulator, rpg.ADDON_TASKS["none"], policy.actor.squash)
    key = rpg.seed_words(args.seed, rpg.PLAY)
    _, transitions = rpg.rollout(env, 1000, jax.device_get(policy), env.reset(), key)
    log_prob = jax.jit(rpg.policy_log_prob)(prior, transitions.obs[:-1], transitions.action)
    return jax.tree.map(np.float64, transitions._replace(addon_reward=log_prob))


def measure(policy: rpg.Policy, env_id: str, alpha: float | None, gamma: float, args: Args) -> dict[str, str]:
    """What is measured, as metadata; without alpha no survival reward."""
    plays = [play(x, policy, env_id, args) for x in (policy, wider(policy))]
    ends = [(x.basic_reward, x.addon_reward, (x.terminated + x.truncated) > 0) for x in plays]
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = {"measured_alpha": measured_temperature(ends, gamma)}
    own, valid = plays[0], plays[0].valid == 1
    if alpha is not None:
        numbers["survival_reward"] = own.basic_reward[valid].mean() - alpha * own.addon_reward[valid].mean()
    if not np.isfinite(list(numbers.values())).all():
        raise Stop(f"nothing could be measured: {numbers}; the actions may be too large for {env_id}", 1)
    return {name: f"{number:.6g}" for name, number in numbers.items()}


# ---------------------------------------------------------------------------------- files


def check_flags(args: Args) -> None:
    """Stop if a flag cannot work, or the file could not be replaced."""
    limits = {"alpha": (0, math.inf), "gamma": (0, 1), "num_envs": (1, math.inf), "seed": (0, 2**30 - 1)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise Stop(f"--{name.replace('_', '-')} is {value}; it must be finite and from {low:g} to {high:g}")
    if args.path.exists() and not os.access(args.path.resolve().parent, os.W_OK | os.X_OK):
        raise Stop(f"cannot write to {args.path.resolve().parent}; copy {args.path.name} to a folder of your own")


def check_training(metadata: dict[str, str]) -> None:
    """Stop if the policy was trained for more than the basic reward, as far as its file says."""
    try:
        args = json.loads(metadata["training"])["args"]
        task, omega, residual = args.get("addon") or "none", args.get("omega", 1), "prior" in args
    except (KeyError, ValueError, TypeError, AttributeError):
        return  # not of a script that has add-on tasks
    if residual or task != "none" or omega != 1:
        recorded = metadata.get("survival_reward", "unknown")
        raise Stop(
            f"it was trained on an add-on task (--addon {task}), and this measures the basic reward alone; "
            f"its survival_reward, {recorded}, is of its training: use the file as it is"
        )


def read(args: Args) -> tuple[dict[str, np.ndarray], dict[str, str], str]:
    """Tensors and metadata of the file, and the environment to play in; Stop if they do not fit, or it is none."""
    try:
        enjoy.read_policy(args.path)
        with safetensors.safe_open(args.path, "numpy") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("critic.")}  # noqa: SIM118
    except (enjoy.StopRun, safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise Stop(f"{args.path} is no policy file that can be measured: {error}") from None
    check_training(metadata)
    env_id = args.env_id or metadata["env_id"]
    name = metadata["env_id"].rpartition("-v")[0]
    if env_id.rpartition("-v")[0] != name:
        raise Stop(f"{args.path} is for {metadata['env_id']}, not {env_id}; give --env-id a version of {name}")
    known = sorted(x for x in rpg.envpool.list_all_envs() if x.rpartition("-v")[0] == name)
    if env_id not in known:
        hint = f"give --env-id {' or '.join(known)}" if known else "it can only be measured in one of EnvPool's"
        raise Stop(f"EnvPool has no {env_id}; {hint}")
    return tensors, metadata, env_id


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Replace the file by a new one that the reader accepts; Stop, and the old one stays, if that cannot be."""
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(safetensors.numpy.save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        enjoy.read_policy(temporary)
        os.replace(temporary, path)
    except (OSError, enjoy.StopRun) as error:
        raise Stop(f"{path} is as it was, as what was measured cannot be written: {error}", 1) from None
    finally:
        temporary.unlink(missing_ok=True)


def advice(metadata: dict[str, str]) -> str:
    """What to do with what was measured."""
    measured = float(metadata["measured_alpha"])
    if measured <= 0:
        return (
            "log pi does not price this policy's reward (measured_alpha is not above 0): expect little of it as a prior"
        )
    if "alpha" not in metadata:
        return (
            f"no temperature is known; record one with --alpha, as {measured:.2g}, or give --omega-prime, --alpha-hat"
        )
    text = "residual_ppo.py takes alpha and survival_reward from the file"
    if not 1 / 3 < measured / max(float(metadata["alpha"]), 1e-30) < 3:
        text += (
            f"; measured_alpha is far from alpha: try --alpha {measured:.2g} here, too, and keep what customises better"
        )
    return text


def main(args: Args) -> None:
    """Measure, and write the file anew."""
    try:
        check_flags(args)
        tensors, metadata, env_id = read(args)
        alpha = args.alpha if args.alpha is not None else float(metadata["alpha"]) if "alpha" in metadata else None
        gamma = args.gamma if args.gamma is not None else float(metadata.get("gamma", 0.99))
        policy, _ = rpg.load_policy(args.path)
        metadata |= {"gamma": str(gamma)} | ({} if alpha is None else {"alpha": str(alpha)})
        metadata |= measure(policy, env_id, alpha, gamma, args)
        metadata["sha256"] = enjoy.policy_digest(tensors, metadata)
        write(args.path, tensors, metadata)
    except (Stop, rpg.StopRun) as error:
        print(f"measure.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    shown = ("alpha", "measured_alpha", "gamma", "survival_reward")
    print(", ".join(f"{name} {metadata[name]}" for name in shown if name in metadata))
    print(advice(metadata))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
