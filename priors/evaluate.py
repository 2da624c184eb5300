"""Evaluate the shipped priors, in EnvPool and in Gymnasium, and write the table of priors/README.md.

python priors/evaluate.py --episodes 50
"""

import dataclasses
import datetime
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

PRIORS = Path(__file__).resolve().parent
sys.path[:0] = [str(PRIORS.parent), str(PRIORS.parent / "residual_q_learning")]
import enjoy  # noqa: E402
import residual_ppo as rpg  # noqa: E402

START, END = "<!-- evaluate.py writes from here -->\n", "<!-- to here -->"
NUMBERS = {"alpha": "alpha", "measured alpha": "measured_alpha", "gamma": "gamma", "survival reward": "survival_reward"}
HEADER = ["prior", *NUMBERS, "actions", "basic return, EnvPool", "basic return, Gymnasium", "length", "add-on", "total"]


@dataclass(frozen=True)
class Args:
    episodes: int = 50
    """episodes in each simulator, with sampled and again with deterministic actions"""
    seed: int = 1000
    """seed of the environments and the sampling"""
    readme: Path = PRIORS / "README.md"
    """file with the two markers between which the table goes"""


def envpool_results(policy: rpg.Policy, env_id: str, args: Args) -> dict[str, dict[str, np.ndarray]]:
    """{"stochastic", "deterministic"} -> {"basic", ...} -> (episodes,), in the simulator of the training."""
    task = next(task for task in rpg.ADDON_TASKS.values() if task.env in (env_id.rpartition("-v")[0], ""))
    simulator = rpg.make_simulator(env_id, "{}", np.tile(rpg.env_seeds(args.seed, rpg.EVALUATION, args.episodes), 2))
    env = rpg.make_env(simulator, task, policy.actor.squash)  # half of them for either actions
    return rpg.evaluate(env, {"prior": policy}, 1.0, args.seed)["prior"]


def gymnasium_returns(path: Path, env_id: str, deterministic: bool, args: Args) -> np.ndarray:
    """Returns (episodes,) of the basic reward in Gymnasium's own environment, by the reader that knows no JAX."""
    policy, addon = enjoy.read_policy(path), enjoy.ADDON_TASKS["none"]
    env = enjoy.make_gymnasium(env_id, [policy], {})
    flags = enjoy.Args(path, episodes=args.episodes, seed=args.seed, deterministic=deterministic)
    (episodes,) = enjoy.play_all(env, [policy], addon, flags)
    env.close()
    return np.array([episode.basic for episode in episodes])


def mean_and_interval(x: np.ndarray) -> str:
    """Mean and its 95 % confidence interval."""
    return f"{x.mean():.0f} ± {1.96 * x.std(ddof=1) / len(x) ** 0.5:.0f}"


def flag(name: str, value: Any) -> str:
    """A flag of the command line."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def recipe(training: dict[str, Any]) -> str:
    """How a policy was made, from what its file records: a command with today's defaults, where a script trained it."""
    if "args" not in training:
        return ", ".join(f"{name} {value}" for name, value in training.items())
    script = importlib.import_module(Path(training["command"].split()[0]).stem)
    given, default = training["args"], json.loads(json.dumps(vars(script.Args()), default=str))
    names = [field.name for field in dataclasses.fields(script.Args)]
    names = ["env_id", "seed", "num_evals", *names[names.index("env_id") + 1 :]]  # what else is before has no effect
    changed = [
        name
        for name in names
        if name in default and name in given and (name == "env_id" or given[name] != default[name])
    ]
    flags = " ".join(flag(name, given[name]) for name in changed)
    commit = (training["git_commit"] or "unknown")[:7]
    steps = training.get("stopped_after") or f"{given['total_timesteps']:,} steps"
    return f"`python {script.__name__}.py {flags}`, {steps}, commit `{commit}`"


def main(args: Args) -> None:
    """Evaluate and write."""
    if any(args.readme.read_text().count(marker) != 1 for marker in (START, END)):
        sys.exit(f"{args.readme} does not have the lines {START.strip()} and {END}")
    rows, recipes = [HEADER, ["---"] * len(HEADER)], []
    for path in sorted(PRIORS.glob("*-v4*.safetensors")):
        env_id = path.stem.removesuffix("-sac")
        policy, metadata = rpg.load_policy(path)
        numbers = [f"{float(metadata[x]):.4g}" if x in metadata else "–" for x in NUMBERS.values()]
        for actions, results in envpool_results(policy, env_id, args).items():
            other = gymnasium_returns(path, env_id, actions == "deterministic", args)
            columns = (results["basic"], other, results["length"], results["addon"], results["total"])
            rows.append([path.stem, *numbers, actions, *map(mean_and_interval, columns)])
            print(" | ".join(rows[-1]), flush=True)
        recipes.append(f"- {path.stem}: {recipe(json.loads(metadata.get('training', '{}')))}")
    made = f"`python priors/evaluate.py --episodes {args.episodes}`, {datetime.date.today()}"
    note = f"{made}: {args.episodes} episodes a row, mean ± 95 % confidence interval of the mean."
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    before, _, rest = args.readme.read_text().partition(START)
    text = "\n\n".join([note, table, "How they were made:", "\n".join(recipes)])
    args.readme.write_text(f"{before}{START}{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
