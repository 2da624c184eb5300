"""Tables are what the committed runs say, and the commands that make them run."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import tyro
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import reproduce  # noqa: E402
import zero_shot  # noqa: E402

import residual_ppo  # noqa: E402

TABLES = [name for name in reproduce.TABLES if (reproduce.RESULTS / f"{name}.csv").exists()]


@pytest.mark.parametrize("name", TABLES)
def test_table_is_what_its_csv_says(name):
    rows = reproduce.read_rows(reproduce.RESULTS / f"{name}.csv")
    table = reproduce.markdown(reproduce.in_order(rows, name), name)
    marked = f"<!-- {name} from here -->\n{table}<!-- to here -->"
    assert marked in (reproduce.RESULTS / "README.md").read_text()


def test_zero_shot_table_is_what_its_csv_says():
    table = zero_shot.markdown(zero_shot.read_rows(zero_shot.RESULTS / "zero-shot.csv"))
    marked = f"<!-- zero-shot from here -->\n{table}<!-- to here -->"
    assert marked in (reproduce.RESULTS / "README.md").read_text()


def test_overview_in_readme_is_what_the_runs_say():
    assert reproduce.overview() in (ROOT / "README.md").read_text()


def test_rows_called_default_have_the_rollouts_of_the_default():
    args = residual_ppo.Args()
    assert f"--num-envs {args.num_envs} --num-steps {args.num_steps}" == reproduce.LONG
    rows = reproduce.read_rows(reproduce.RESULTS / "customisation.csv")
    assert {row["flags"] for row in rows if row["label"] == reproduce.DEFAULT} == {reproduce.LONG}


@pytest.mark.parametrize("name", TABLES)
def test_no_run_is_counted_twice_and_all_are_of_reporting_seeds(name):
    rows = reproduce.read_rows(reproduce.RESULTS / f"{name}.csv")
    keys = [(row["env_id"], row["label"], row["seed"]) for row in rows]
    assert len(keys) == len(set(keys))
    for env_id, label, seed in keys:  # so the command given again adds only what is missing, of the same kind
        seeds = reproduce.seeds_of(name, env_id, label)
        assert int(seed) in seeds and ({21, 22}.isdisjoint(seeds) or "tuning" in name), (label, seed)


def test_intervals_and_p_values_of_known_samples():
    """t = 2.776 for five values, from a table; Welch's t and its degrees of freedom by formulas."""
    sample = [3.0, 5.0, 4.0, 8.0, 10.0]
    mean, half = (float(x) for x in reproduce.mean_and_interval(sample, 3).split(" ± "))
    error = np.sqrt(np.var(sample, ddof=1) / 5)
    assert (mean, half) == pytest.approx((6, 2.776 * error), abs=2e-3)

    def runs(values):
        return [{"policy stochastic total": str(x), "policy deterministic total": str(-x)} for x in values]

    other = [9.0, 11.0, 12.0]
    errors = [np.var(x, ddof=1) / len(x) for x in (sample, other)]
    t = (np.mean(sample) - np.mean(other)) / np.sqrt(sum(errors))
    freedom = sum(errors) ** 2 / sum(e**2 / (len(x) - 1) for e, x in zip(errors, (sample, other), strict=True))
    p = 2 * scipy.stats.t.sf(abs(t), freedom)
    assert reproduce.welch(runs(sample), runs(other)) == f"{p:.2g} / {p:.2g}"
    assert reproduce.welch(runs(sample), runs(other[:1])) == "–"


def test_only_a_run_with_the_same_flags_stands_for_one_of_another_table(tmp_path):
    """Of the table clock the flags do not say all: the algorithm is the label."""
    greedy = next(setting for setting in reproduce.customisation() if setting.label == "Greedy PPO")
    clock = next(setting for setting in reproduce.clock() if setting.label == "soft_ppo.py")
    for name, setting in (("clock", clock), ("customisation", greedy)):
        reproduce.write_rows(tmp_path / f"{name}.csv", [setting._asdict() | {"seed": 201}])
    wanted = [greedy, greedy._replace(flags="--omega 0.7"), clock._replace(label="another algorithm")]
    reused = reproduce.rows_of_other_tables([(x._replace(label=f"like {x.label}"), 201) for x in wanted], tmp_path)
    assert [row["label"] for row in reused] == ["like Greedy PPO"]


def call_reproduce(*flags):
    """What `reproduce.py init` does in this process."""
    reproduce.main(tyro.cli(reproduce.Args, args=["init", *map(str, flags)]))


def test_smoke_run_fills_a_table_and_is_not_repeated(tmp_path, capsys):
    """Really run, with tiny budgets, from the command line; the second call finds all rows there."""
    flags = ("--smoke", "--out", tmp_path, "--labels", "from scratch")
    command = [sys.executable, str(ROOT / "results" / "reproduce.py"), "init", *map(str, flags)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert first.returncode == 0, first.stderr
    assert "1 runs to go" in first.stdout
    table = (tmp_path / "init.md").read_text()
    assert "| prior |" in table and "| from scratch |" in table
    assert (tmp_path / "init.png").read_bytes().startswith(b"\x89PNG")
    call_reproduce(*flags)
    assert "to go" not in capsys.readouterr().out
    assert (tmp_path / "init.md").read_text() == table


def test_a_failed_run_is_said_and_leaves_no_row(tmp_path, capsys):
    """No environment can have a negative seed, which the script finds, not reproduce.py."""
    with pytest.raises(SystemExit) as ended:
        call_reproduce("--smoke", "--out", tmp_path, "--labels", "from scratch", "--seeds", "-1")
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "--seed is -1" in said.out
    assert said.err.startswith("reproduce.py: 1 runs failed") and said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [("--env-ids", "Hoper-v4"), ("--labels", "scratch"), ("--no-run",)])
def test_what_the_table_does_not_have_is_one_line(flags, tmp_path, capsys):
    """Nothing is run, nothing written."""
    with pytest.raises(SystemExit) as ended:
        call_reproduce(*flags, "--out", tmp_path)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert flags[-1].strip("-") in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
