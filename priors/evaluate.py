"""Evaluate the shipped priors, in EnvPool and in Gymnasium, and write the table of priors/README.md.

python priors/evaluate.py --episodes 50
"""

import datetime
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium
import jax
import numpy as np
import tyro

PRIORS = Path(__file__).parent
sys.path.insert(0, str(PRIORS.parent))
import residual_ppo as rpg  # noqa: E402
import train_prior_ppo  # noqa: E402


@dataclass(frozen=True)
class Args:
    episodes: int = 50
    """episodes in each simulator, with sampled and again with deterministic actions"""
    seed: int = 1000
    """seed of the environments and the sampling"""


def gymnasium_returns(env_id, actor, policy, squash, noise_scale, episodes, seed):
    """Returns (episodes,) of the basic reward in Gymnasium's own environment."""
    envs = gymnasium.make_vec(env_id, num_envs=episodes, vectorization_mode="sync")
    act = jax.jit(lambda obs: actor.apply(policy.params, rpg.normalise(obs, policy.obs_stats)))
    rng = np.random.default_rng(seed)
    low, high = envs.single_action_space.low, envs.single_action_space.high
    obs, _ = envs.reset(seed=seed)
    returns, alive = np.zeros(episodes), np.ones(episodes, bool)
    while alive.any():
        mean, log_std = jax.device_get(act(obs.astype(np.float32)))
        action = mean + noise_scale * np.exp(log_std) * rng.normal(size=mean.shape)
        obs, reward, terminated, truncated, _ = envs.step(np.asarray(rpg.env_action(action, low, high, squash)))
        returns += alive * reward
        alive &= ~(terminated | truncated)
    envs.close()
    return returns


def training_command(training):
    """The command that trains such a prior with today's defaults, from the arguments that a policy file records."""
    defaults = json.loads(json.dumps(asdict(train_prior_ppo.Args()), default=str))
    ignored = ("export", "runs_dir", "progress", "eval_episodes", "checkpoint_interval")
    flags = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in training["args"].items()
        if name == "env_id" or (name not in ignored and value != defaults.get(name, value))
    ]
    return f"python train_prior_ppo.py {' '.join(flags)}"


def mean_and_interval(x):
    """Mean and its 95 % confidence interval."""
    return f"{x.mean():.0f} ± {1.96 * x.std(ddof=1) / len(x) ** 0.5:.0f}"


def main(args: Args) -> None:
    warnings.filterwarnings("ignore", message=".*is out of date")
    rows, recipes = [], []
    for path in sorted(PRIORS.glob("*.safetensors")):
        env_id = path.stem
        env = rpg.make_env(env_id, args.episodes, args.seed)
        actor, policy, info = rpg.load_policy(path, env, rpg.Args(env_id=env_id))
        training = json.loads(info["training"])
        addon = rpg.choose_addon(None, env_id, 1.0)
        results = rpg.evaluate(env, addon, actor, True, policy, 1.0, args.seed)
        for actions, noise_scale in (("stochastic", 1.0), ("deterministic", 0.0)):
            columns = results[actions]
            other = gymnasium_returns(env_id, actor, policy, True, noise_scale, args.episodes, args.seed)
            cells = [mean_and_interval(columns[name]) for name in ("basic", "length", "addon", "total")]
            rows.append([env_id, info["alpha"], actions, cells[0], mean_and_interval(other), *cells[1:]])
            print(" | ".join(rows[-1]), flush=True)
        steps = training["args"]["total_timesteps"]
        recipes.append(
            f"- {env_id}: `{training_command(training)}`, {steps:,} steps, commit `{training['git_commit'][:7]}`"
        )
    header = [
        "prior",
        "alpha",
        "actions",
        "basic return, EnvPool",
        "basic return, Gymnasium",
        "length",
        "add-on",
        "total",
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
    text = (PRIORS / "README.md").read_text()
    start, end = "<!-- evaluate.py writes from here -->\n", "<!-- to here -->"
    before, after = text.partition(start)[0], text.partition(end)[2]
    made = f"`python priors/evaluate.py --episodes {args.episodes}`, {datetime.date.today()}"
    note = f"{made}: {args.episodes} episodes a row, mean ± 95 % confidence interval of the mean."
    recipe = "\n".join(recipes)
    (PRIORS / "README.md").write_text(
        f"{before}{start}{note}\n\n{table}\n\nHow they were made:\n\n{recipe}\n{end}{after}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
