"""Each script and program is one file that stands alone, and what they share is the same in all of them."""

import ast
import itertools
import re
import sys
import tomllib

import pytest
from conftest import DQN_SCRIPTS, ROOT, SAC_SCRIPTS, script_path
from conftest import SCRIPTS as PPO_SCRIPTS

SCRIPTS = (*PPO_SCRIPTS, *SAC_SCRIPTS, *DQN_SCRIPTS)
PLAYERS = ("enjoy", "residual_mppi")  # they need no JAX
STUDIES = ("mirror_descent_vi", "residual_mcts")  # of worlds that can be solved exactly
PROGRAMS = (*SCRIPTS, "train_prior_bc", *PLAYERS, *STUDIES)
SOURCES = {name: script_path(name).read_text() for name in PROGRAMS}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def definitions(name: str) -> dict[str, str]:
    """Source of each top-level function and class, decorators included, and of all that assigns a top-level name."""
    lines, found = SOURCES[name].splitlines(), {}
    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]
        else:
            continue
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
        for each in names:
            found[each] = "\n".join([*([found[each]] if each in found else []), *lines[first - 1 : node.end_lineno]])
    return found


def requirements() -> list[str]:
    """The lines of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return sorted(filter(None, (line.partition("#")[0].strip() for line in lines)))


def inline_metadata(name: str) -> dict:
    """A script's PEP 723 block."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", SOURCES[name])
    return tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))


def imported_packages(name: str) -> set[str]:
    """What a program imports anywhere in it."""
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            imported.add(node.module.partition(".")[0])
    return imported


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_imports_nothing_of_this_repository(name):
    ours = (path for path in ROOT.glob("**/*.py") if "site-packages" not in path.parts)  # of a virtual environment here
    local = {path.stem for path in ours} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert set(PROGRAMS) <= local
    assert "numpy" in imported_packages(name)
    assert not imported_packages(name) & local


def test_scripts_need_jax_and_players_do_not():
    assert all({"jax", "flax", "optax", "envpool"} <= imported_packages(name) for name in (*SCRIPTS, "train_prior_bc"))
    for name in PLAYERS:  # enjoy.py has envpool where Gymnasium has nothing
        assert not imported_packages(name) & {"jax", "flax", "optax", "torch"}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(PROGRAMS, 2)))
def test_equal_names_have_equal_definitions(one, other):
    """Functions, classes and constants."""
    ours, theirs = definitions(one), definitions(other)
    players = {one, other} & set(PLAYERS)
    shared = (ours.keys() & theirs.keys()) - {"Args", "main"} - ({"xp"} if len(players) == 1 else set())
    if not {one, other} & set(STUDIES):
        least = (18 if "train_prior_bc" in (one, other) else 30, 2, 12)
        assert len(shared) >= least[len(players)]
    assert [name for name in shared if ours[name] != theirs[name]] == []


CUT = "# A copy for a project of your own may end here; "  # begins the line below which a copy needs nothing


@pytest.mark.parametrize("name", (*SCRIPTS, "train_prior_bc"))
def test_docstring_names_the_rooms_in_order(name):
    """The parts that a copy keeps, main's being the sixth, then those that it can do without."""
    kept, below = (re.findall(r"(?m)^# -{9,} (.+)$", part) for part in SOURCES[name].split(CUT))
    assert kept[-3:] == ["train and main", "evaluation", "policy files"]
    text = " ".join(ast.get_docstring(TREES[name]).split())
    (said,) = re.findall(r"In this order: (.+?)\. Then what a copy can do without: (.+?)\.", text)
    assert [part.split("; ") for part in said] == [["flags", *kept], below]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_no_longer_than_it_is_today(name):
    kept, _ = SOURCES[name].split(CUT)
    assert kept.count("\n") <= 1045
    assert SOURCES[name].count("\n") <= 1507


def test_cloning_and_planning_are_no_longer_than_they_are_today():
    assert SOURCES["train_prior_bc"].count("\n") <= 700
    assert SOURCES["residual_mppi"].count("\n") <= 815


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations((*SCRIPTS, "train_prior_bc"), 2)))
def test_equal_flags_have_equal_types(one, other):
    types = []
    for name in (one, other):
        (args,) = (node for node in TREES[name].body if isinstance(node, ast.ClassDef) and node.name == "Args")
        types.append({x.target.id: ast.unparse(x.annotation) for x in args.body if isinstance(x, ast.AnnAssign)})
    exceptions = {"hidden_sizes", "gamma"}  # in residual_ppo.py they default to what the prior says
    assert {name for name in types[0].keys() & types[1].keys() if types[0][name] != types[1][name]} <= exceptions


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_is_followed_by_its_docstring(name):
    (args,) = (node for node in TREES[name].body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [i for i, node in enumerate(args.body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 10
    for i in fields:
        after = args.body[i + 1] if i + 1 < len(args.body) else None
        assert isinstance(after, ast.Expr), args.body[i].target.id
        assert isinstance(after.value, ast.Constant), args.body[i].target.id
        assert after.value.value.strip(), args.body[i].target.id


@pytest.mark.parametrize("name", PROGRAMS)
def test_top_level_functions_and_classes_have_docstrings(name):
    nodes = [node for node in TREES[name].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [node.name for node in nodes if not ast.get_docstring(node) and node.name != "Args"] == []


def test_inline_dependencies_are_together_those_of_requirements_txt():
    assert sorted({x for name in PROGRAMS for x in inline_metadata(name)["dependencies"]}) == requirements()


@pytest.mark.parametrize("name", PROGRAMS)
def test_inline_dependencies_are_each_once_in_requirements_txt(name):
    dependencies = inline_metadata(name)["dependencies"]
    assert len(set(dependencies)) == len(dependencies)
    assert set(dependencies) <= set(requirements())


@pytest.mark.parametrize("name", PROGRAMS)
def test_inline_python_version_is_that_of_pyproject_toml(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert inline_metadata(name)["requires-python"] == project["requires-python"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_imported_package_is_a_declared_dependency(name):
    """And no other is declared; wandb and minari serve one flag each, enjoy.py has envpool for what Gymnasium lacks."""
    declared = {re.split(r"[\[<>=!~ ]", x)[0].lower() for x in inline_metadata(name)["dependencies"]}
    standard = {module.lower() for module in sys.stdlib_module_names}
    optional = {"wandb", "minari"} | ({"envpool"} if name == "enjoy" else set())
    imported = {module.lower() for module in imported_packages(name)} - standard - optional
    assert imported <= declared
    assert declared <= imported
