"""The benchmark measures the scripts as they are."""

import csv
import re

import pytest
from conftest import run_script


def test_benchmark_lets_raw_stepping_and_the_training_of_a_script_take_turns(tmp_path):
    size = ("--env-ids", "Swimmer-v4", "--num-envs", 8, "--rounds", 2, "--seconds", 0.05)
    flags = (*size, "--only", "raw", "soft_ppo", "--no-start", "--scale", "--out", tmp_path / "results")
    process = run_script("benchmark/throughput", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    with open(tmp_path / "results" / "throughput.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == 2 * ["raw stepping", "soft_ppo training"]
    assert all(float(row["value"]) > 0 and row["unit"] == "steps/s" for row in rows)
    ratio = sum(float(rows[i + 1]["value"]) / float(rows[i]["value"]) for i in (0, 2)) / 2
    (line,) = re.findall(r"training ÷ raw stepping \| (\S+) ", (tmp_path / "results" / "throughput.md").read_text())
    assert float(line) == pytest.approx(ratio, abs=0.01)
