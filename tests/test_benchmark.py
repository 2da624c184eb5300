"""The benchmark measures the scripts as they are."""

import csv
import re

import pytest
from conftest import ROOT, run_script

SIZE = ("--env-ids", "Swimmer-v4", "--num-envs", 8, "--rounds", 2, "--seconds", 0.05)


def test_benchmark_lets_raw_stepping_and_the_training_of_a_script_take_turns(tmp_path):
    flags = (*SIZE, "--only", "raw", "soft_ppo", "--no-start", "--scale", "--out", tmp_path / "results")
    process = run_script("benchmark/throughput", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    with open(tmp_path / "results" / "throughput.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == 2 * ["raw stepping", "soft_ppo training"]
    assert all(float(row["value"]) > 0 and row["unit"] == "steps/s" for row in rows)
    ratio = sum(float(rows[i + 1]["value"]) / float(rows[i]["value"]) for i in (0, 2)) / 2
    (line,) = re.findall(r"training ÷ raw stepping \| (\S+) ", (tmp_path / "results" / "throughput.md").read_text())
    assert float(line) == pytest.approx(ratio, abs=0.01)


def test_benchmark_lets_the_updates_of_two_checkouts_take_turns(tmp_path):
    flags = (*SIZE, "--only", "update", "--against", ROOT, "--out", tmp_path / "results")
    process = run_script("benchmark/throughput", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    rounds = re.findall(r"^update here (\d+), update there (\d+)$", process.stdout, re.MULTILINE)
    ratio = sum(int(here) / int(there) for here, there in rounds) / len(rounds)
    (line,) = re.findall(r"update, here ÷ there \| (\S+) ", process.stdout)
    assert len(rounds) == 2 and float(line) == pytest.approx(ratio, abs=0.01)
    assert not (tmp_path / "results").exists()
