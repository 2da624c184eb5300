"""Measure what residual_ppo.py wants to know of a prior, and record it in the policy file.

    python priors/measure.py hopper.safetensors

survival_reward, in reward per step: mean r - alpha mean log pi over the steps of the policy's own episodes: the part of
the basic reward that log pi does not carry, and without which the end of an episode costs next to nothing.
measured_alpha, in reward per nat: the temperature that log pi really has. Of a soft-optimal policy, two policies that
start from the same states differ in sum_t gamma^t r by alpha times what they differ in sum_t gamma^t log pi, as the
shaping telescopes. Here the other policy is the same one with twice its deviation.

train_prior_ppo.py and soft_ppo.py record the survival reward themselves; this is for policies made otherwise.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import residual_ppo as rpg  # noqa: E402


@dataclass(frozen=True)
class Args:
    path: tyro.conf.Positional[Path]
    """the policy file; what is measured is added to it"""
    alpha: float | None = None
    """temperature it was trained at, in units of reward per nat; if not given, the file's"""
    gamma: float | None = None
    """discount it was trained with; if not given, the file's, or 0.99"""
    num_envs: int = 64
    """environments, each played for 1000 steps"""
    seed: int = 0
    """seed of the environments and the sampling"""


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


def play(policy: rpg.Policy, prior: rpg.Policy, env_id: str, args: Args) -> rpg.Transitions:
    """1000 steps of a policy in each environment; the prior's log pi stands in place of the add-on reward."""
    addon = rpg.ADDON_TASKS["none"]
    simulator = rpg.make_simulator(env_id, "{}", rpg.env_seeds(args.seed, rpg.EVALUATION, args.num_envs))
    env, key = rpg.make_env(simulator, addon, policy.actor.squash), rpg.seed_words(args.seed, rpg.PLAY)
    _, transitions = rpg.rollout(env, 1000, jax.device_get(policy), env.reset(), key)
    log_prob = jax.jit(rpg.policy_log_prob)(prior, transitions.obs[:-1], transitions.action)
    return jax.tree.map(np.float64, transitions._replace(addon_reward=log_prob))


def main(args: Args) -> None:
    """Measure, and write the file anew."""
    try:
        data = args.path.read_bytes() if args.path.is_file() else b""
        env_id = safetensors.safe_open(args.path, "numpy").metadata()["env_id"] if data else "none"
        rpg.check_policy_file(args.path, env_id)
        policy, metadata = rpg.load_policy(args.path)
    except (rpg.StopRun, safetensors.SafetensorError, KeyError, TypeError, OSError) as error:
        print(f"measure.py: {args.path} is no policy file that can be measured: {error}", file=sys.stderr)
        sys.exit(2)
    alpha = args.alpha if args.alpha is not None else float(metadata.get("alpha", 0))
    gamma = args.gamma if args.gamma is not None else float(metadata.get("gamma", 0.99))
    params = jax.tree.map(np.asarray, policy.params)
    wider = {**params["params"]}
    log_std = wider["actor_logstd"]
    key = "bias" if isinstance(log_std, dict) else None
    wider["actor_logstd"] = {**log_std, key: log_std[key] + np.log(2)} if key else log_std + np.float32(np.log(2))
    other = dataclasses.replace(policy, params={"params": wider})
    plays = [play(x, policy, env_id, args) for x in (policy, other)]
    own, valid = plays[0], plays[0].valid == 1
    survival_reward = own.basic_reward[valid].mean() - alpha * own.addon_reward[valid].mean()
    ends = [(x.basic_reward, x.addon_reward, (x.terminated + x.truncated) > 0) for x in plays]
    metadata |= {"alpha": str(alpha), "gamma": str(gamma), "survival_reward": f"{survival_reward:.6g}"}
    metadata |= {"measured_alpha": f"{measured_temperature(ends, gamma):.6g}"}
    tensors = safetensors.numpy.load(data)
    tensors = {name: x for name, x in tensors.items() if not name.startswith("critic.")}
    metadata["sha256"] = rpg.policy_digest(tensors, metadata)
    rpg.write_atomic(args.path, safetensors.numpy.save(tensors, metadata))
    print({name: metadata[name] for name in ("alpha", "measured_alpha", "gamma", "survival_reward")})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
