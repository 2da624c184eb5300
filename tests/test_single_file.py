"""Each script is one file that stands alone, and what the scripts share is the same in all of them."""

import ast
import itertools
import re
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def definitions(name: str) -> dict[str, str]:
    """Source of each top-level function and class of a script, decorators included."""
    lines = SOURCES[name].splitlines()
    first = {
        node: min(part.lineno for part in (node, *getattr(node, "decorator_list", ()))) for node in TREES[name].body
    }
    return {
        node.name: "\n".join(lines[first[node] - 1 : node.end_lineno])
        for node in TREES[name].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def inline_metadata(name: str) -> dict:
    """A script's PEP 723 block."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", SOURCES[name])
    return tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_imports_nothing_of_this_repository(name):
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            imported.add(node.module.partition(".")[0])
    local = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert "jax" in imported
    assert not imported & local


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_equal_names_have_equal_definitions(one, other):
    ours, theirs = definitions(one), definitions(other)
    shared = (ours.keys() & theirs.keys()) - {"Args", "main"}
    assert len(shared) > 20
    assert [name for name in shared if ours[name] != theirs[name]] == []


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_equal_flags_have_equal_types(one, other):
    types = []
    for name in (one, other):
        (args,) = (node for node in TREES[name].body if isinstance(node, ast.ClassDef) and node.name == "Args")
        types.append({x.target.id: ast.unparse(x.annotation) for x in args.body if isinstance(x, ast.AnnAssign)})
    exceptions = {"addon", "omega", "hidden_sizes"}  # in residual_ppo.py they default to what the prior or env says
    assert {name for name in types[0].keys() & types[1].keys() if types[0][name] != types[1][name]} <= exceptions


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_followed_by_its_docstring(name):
    (args,) = (node for node in TREES[name].body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [i for i, node in enumerate(args.body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 20
    for i in fields:
        after = args.body[i + 1] if i + 1 < len(args.body) else None
        assert isinstance(after, ast.Expr), args.body[i].target.id
        assert isinstance(after.value, ast.Constant), args.body[i].target.id
        assert after.value.value.strip(), args.body[i].target.id


@pytest.mark.parametrize("name", SCRIPTS)
def test_top_level_functions_and_classes_have_docstrings(name):
    nodes = [node for node in TREES[name].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [node.name for node in nodes if not ast.get_docstring(node) and node.name != "Args"] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_dependencies_are_those_of_requirements_txt(name):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [line.partition("#")[0].strip() for line in lines]
    assert sorted(inline_metadata(name)["dependencies"]) == sorted(filter(None, requirements))


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_python_version_is_that_of_pyproject_toml(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert inline_metadata(name)["requires-python"] == project["requires-python"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_imported_package_is_a_declared_dependency(name):
    requirements = inline_metadata(name)["dependencies"]
    declared = {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in requirements}
    imported = {
        module.partition(".")[0].lower()
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    optional = {"wandb"}  # only with --track
    assert imported - {module.lower() for module in sys.stdlib_module_names} - optional <= declared
