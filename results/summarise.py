"""Make the table of results in README.md, and results/customisation.png, from the run folders in results/.

    python results/summarise.py

A run folder is what residual_ppo.py leaves (args.json, metrics.csv, eval.json), copied here.
"""

import json
from collections import defaultdict
from pathlib import Path

import matplotlib.figure
import numpy as np

RESULTS = Path(__file__).parent


def main() -> None:
    """Read the runs, group them by environment and weights, and write table and picture."""
    groups = defaultdict(list)
    for path in sorted(RESULTS.glob("*__residual_ppo__*/eval.json")):
        run = {
            "info": json.loads((path.parent / "args.json").read_text()),
            "eval": json.loads(path.read_text()),
            "metrics": np.genfromtxt(path.parent / "metrics.csv", delimiter=",", names=True),
        }
        args = run["info"]["args"]
        weights = {name: args[name] for name in ("omega", "omega_prime", "alpha_hat") if args[name] is not None}
        groups[args["env_id"], json.dumps(weights)].append(run)

    groups = dict(sorted(groups.items(), key=lambda item: (item[0][1] != "{}", item[0])))  # default weights first

    lines = ["| environment | weights | seeds | policy | objective | total | basic | add-on | metric | minutes |"]
    lines.append("|---" * 10 + "|")
    for (env_id, weights), runs in groups.items():
        seeds = ", ".join(str(run["info"]["args"]["seed"]) for run in runs)
        minutes = np.mean([run["metrics"]["elapsed_s"][-1] for run in runs]) / 60
        shown = ", ".join(f"{name} = {value:g}" for name, value in json.loads(weights).items()) or "default"
        for policy in ("prior", "customised"):
            cells = []
            for column, digits in (("objective", 0), ("total", 0), ("basic", 0), ("addon", 0), ("metric", 3)):
                means = [run["eval"][policy]["mean"]["stochastic"][column] for run in runs]
                cells.append(f"{np.mean(means):.{digits}f} ({min(means):.{digits}f} to {max(means):.{digits}f})")
            time = f"{minutes:.1f}" if policy == "customised" else ""
            lines.append(f"| {env_id} | {shown} | {seeds} | {policy} | {' | '.join(cells)} | {time} |")
    info = [run["info"] for runs in groups.values() for run in runs]
    commits = ", ".join(sorted({f"`{x['git_commit'][:7]}`" for x in info}))
    episodes = ", ".join(sorted({str(x["args"]["eval_episodes"]) for x in info}))
    note = f"Commit {commits}; {episodes} episodes a seed, sampled actions: mean over seeds (lowest to highest)."
    note += " `results/` has the run folders; `python results/summarise.py` writes this table."
    text = (RESULTS.parent / "README.md").read_text()
    start, end = "<!-- results/summarise.py writes from here -->\n", "<!-- to here -->"
    before, after = text.partition(start)[0], text.partition(end)[2]
    (RESULTS.parent / "README.md").write_text(before + start + note + "\n\n" + "\n".join(lines) + "\n" + end + after)

    columns = len({env_id for env_id, _ in groups})
    figure = matplotlib.figure.Figure(figsize=(10, 5.4), layout="constrained")
    all_axes = figure.subplots(len(groups) // columns, columns, sharex=True).flat
    for axes, ((env_id, weights), runs) in zip(all_axes, groups.items(), strict=True):
        omega = json.loads(weights).get("omega", 1.0)
        for run in runs:
            metrics, prior = run["metrics"], run["eval"]["prior"]["mean"]["stochastic"]
            objective = omega * metrics["basic_return"] + metrics["addon_return"]
            axes.plot(metrics["global_step"] / 1e6, objective, color="tab:blue")
            axes.plot(metrics["global_step"] / 1e6, metrics["addon_return"], color="tab:orange")
            axes.axhline(prior["objective"], color="tab:blue", linestyle="--")
            axes.axhline(prior["addon"], color="tab:orange", linestyle="--")
        axes.set_title(f"{env_id}, ω = {omega:g}")
        axes.grid(alpha=0.3)
    labels = ("objective ω·basic + add-on", "add-on", "the prior's objective", "the prior's add-on")
    figure.legend(axes.get_lines()[:4], labels, loc="outside upper center", ncols=4)
    figure.supxlabel("million environment steps")
    figure.supylabel("return of an episode")
    figure.savefig(RESULTS / "customisation.png", dpi=110)


if __name__ == "__main__":
    main()
