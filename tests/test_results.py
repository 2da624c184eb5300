"""Tables are what the committed runs say, and the commands that make them run."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import reproduce  # noqa: E402
import zero_shot  # noqa: E402

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


@pytest.mark.parametrize("name", TABLES)
def test_no_run_is_counted_twice_and_all_are_of_reporting_seeds(name):
    rows = reproduce.read_rows(reproduce.RESULTS / f"{name}.csv")
    keys = [(row["env_id"], row["label"], row["seed"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert {int(row["seed"]) for row in rows} <= ({21, 22} if "tuning" in name else {101, 102, 103, 104, 105})


def test_mean_and_interval_of_a_known_sample():
    """The bootstrap interval of a normal sample is close to mean ± 1.96 standard errors."""
    sample = np.random.default_rng(0).normal(50, 10, 400)
    mean, low, high = (float(x.strip("[],")) for x in reproduce.mean_and_interval(list(sample), 2).split())
    error = sample.std() / 20
    assert mean == pytest.approx(sample.mean(), abs=0.01)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_only_a_run_with_the_same_flags_stands_for_one_of_another_table(tmp_path):
    """Of the table clock the flags do not say all: the algorithm is the label."""
    for name in ("clock", "customisation"):
        (tmp_path / f"{name}.csv").write_text((reproduce.RESULTS / f"{name}.csv").read_text())
    greedy = next(setting for setting in reproduce.customisation() if setting.label == "Greedy PPO")
    clock = next(setting for setting in reproduce.clock() if setting.label == "soft_ppo.py")
    wanted = [greedy, greedy._replace(flags="--omega 0.7"), clock._replace(label="another algorithm")]
    reused = reproduce.rows_of_other_tables([(x._replace(label=f"like {x.label}"), 101) for x in wanted], tmp_path)
    assert [row["label"] for row in reused] == ["like Greedy PPO"]


def call_reproduce(*flags):
    """Exit code and output of `reproduce.py init`."""
    command = [sys.executable, str(ROOT / "results" / "reproduce.py"), "init", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_smoke_run_fills_a_table_and_is_not_repeated(tmp_path):
    """Really run, with tiny budgets; the second call finds all rows there."""
    flags = ("--smoke", "--out", tmp_path, "--labels", "from scratch")
    first = call_reproduce(*flags)
    assert first.returncode == 0, first.stderr
    assert "1 runs to go" in first.stdout
    table = (tmp_path / "init.md").read_text()
    assert "| prior |" in table and "| from scratch |" in table
    assert (tmp_path / "init.png").read_bytes().startswith(b"\x89PNG")
    again = call_reproduce(*flags)
    assert again.returncode == 0
    assert "to go" not in again.stdout
    assert (tmp_path / "init.md").read_text() == table


def test_a_failed_run_is_said_and_leaves_no_row(tmp_path):
    """No environment can have a negative seed, which the script finds, not reproduce.py."""
    failed = call_reproduce("--smoke", "--out", tmp_path, "--labels", "from scratch", "--seeds", "-1")
    assert failed.returncode == 1
    assert "--seed is -1" in failed.stdout
    assert failed.stderr.startswith("reproduce.py: 1 runs failed") and failed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [("--env-ids", "Hoper-v4"), ("--labels", "scratch"), ("--no-run",)])
def test_what_the_table_does_not_have_is_one_line(flags, tmp_path):
    """Nothing is run, nothing written."""
    refused = call_reproduce(*flags, "--out", tmp_path)
    assert refused.returncode == 2
    assert flags[-1].strip("-") in refused.stderr and refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
