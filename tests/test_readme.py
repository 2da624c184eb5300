"""README.md says what is so."""

import ast

import pytest
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_named(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    flags = [f"--{x.target.id.replace('_', '-')}" for x in args.body if isinstance(x, ast.AnnAssign)]
    assert [flag for flag in flags if f"`{flag}`" not in README and f"`{flag} " not in README] == []


def test_speed_is_what_the_benchmark_wrote():
    assert (ROOT / "benchmark" / "results" / "throughput.md").read_text().strip() in README
