"""README.md, and what stands beside it, say what is so."""

import ast
import re

import pytest
from conftest import DQN_SCRIPTS, ROOT, SAC_SCRIPTS, SCRIPTS, script_path

README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "priors/README.md", "benchmark/README.md", "results/README.md")
DOCUMENTS += ("results/defaults.md", "results/mirror_descent_vi/README.md")
DOCUMENTS += ("residual_q_learning/README.md", "mirror_descent/README.md")
FURTHER = (*DQN_SCRIPTS, "residual_mppi", "residual_mcts", "train_prior_bc")  # whose own flags their README names
FURTHER += ("mirror_descent_vi",)


def flags(name):
    """A script's flags, less the positional arguments."""
    tree = ast.parse((ROOT / f"{name}.py" if "/" in name else script_path(name)).read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [x for x in args.body if isinstance(x, ast.AnnAssign) and "Positional" not in ast.unparse(x.annotation)]
    return [f"--{x.target.id.replace('_', '-')}" for x in fields]


def prose(document):
    """A document without comments and code, and without the tables that programs write between comments."""
    text = re.sub(r"(?s)<!-- [^>]*from here -->.*?<!-- to here -->", "", (ROOT / document).read_text())
    return re.sub(r"(?s)<!--.*?-->|```.*?```", "", text)


def anchors(text):
    """The anchors that GitHub gives to a document's headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?s)```.*?```", "", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 200


def test_no_line_of_readme_is_too_long():
    assert [line for line in README.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("document", DOCUMENTS[1:])
def test_no_line_of_the_other_documents_is_too_long(document):
    assert [line for line in prose(document).splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("name", [*SCRIPTS, *SAC_SCRIPTS, "enjoy", *FURTHER])
def test_every_flag_is_named(name):
    found = flags(name)
    text = README + ((script_path(name).parent / "README.md").read_text() if name in FURTHER else "")
    assert len(found) > 10
    assert [flag for flag in found if f"`{flag}`" not in text and f"`{flag} " not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_use_flags_that_exist(document):
    others = ("enjoy", "priors/from_sb3", "priors/measure", "results/reproduce", "results/bc", "results/zero_shot")
    known = {name: set(flags(name)) for name in (*SCRIPTS, *SAC_SCRIPTS, *FURTHER, *others)}
    folder = "(?:residual_q_learning/|mirror_descent/)?"
    commands = re.findall(rf"(?m)^python {folder}(\S+)\.py (.*?)(?:  +#.*)?$", (ROOT / document).read_text())
    used = {(name, flag) for name, rest in commands if name in known for flag in re.findall(r"--[a-z0-9-]+", rest)}
    assert {(name, flag) for name, flag in used if flag not in known[name]} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_linked_exists(document):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


def test_documents_name_only_files_that_exist():
    for document in DOCUMENTS:
        folder = (ROOT / document).parent
        for name in re.findall(r"`([\w./-]+\.(?:py|md|cff))`", prose(document)):
            folders = (ROOT, folder, ROOT / "residual_q_learning", ROOT / "mirror_descent")
            assert any((base / name).exists() for base in folders) or name.startswith("ppo_"), (document, name)


def test_speed_is_what_the_benchmark_wrote():
    written = (ROOT / "benchmark" / "results" / "throughput.md").read_text().strip()
    assert written in (ROOT / "benchmark" / "README.md").read_text()


def test_the_test_command_is_the_one_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    install, test = "pip install -r requirements.txt -r requirements-dev.txt", "python -m pytest"
    assert f"\n{install} && {test}\n" in README
    assert ci.rstrip().splitlines()[-1] == test
    assert install.replace("install", "install --quiet") in ci


def test_citation_is_complete():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r'(  )*(- )?[a-z-]+:( (?:"[^"\\]+"|[\w.:/-]+))?', line)] == []
    top = dict(line.split(": ", 1) for line in lines if re.match(r"[a-z-]+: ", line))
    assert {"cff-version", "message", "title", "license"} <= top.keys()
    assert top["license"] == (ROOT / "LICENSE").read_text().split()[0]
    text = "\n".join(lines)
    paper = text[text.index("preferred-citation:\n") :]
    assert re.findall(r'family-names: "(\w+)"', paper) == ["Wang", "Zhu", "Chen", "Xu", "Tomizuka", "Li"]
    assert "arXiv:2503.11019" in paper
    assert "year: 2025" in paper
