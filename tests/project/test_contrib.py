# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The branches for Pyro: each is whole, short, and right in a tree of Pyro's."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyro
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PLACE = "pyro/contrib/artransform"
#: of each branch the examples, and the most lines of the package, docstrings included
BRANCHES = {
    "artransform-flows": (["heavy_tails.py", "transforms.py"], 4500),
    "artransform-autoguide": (["eight_schools.py"], 250),
}
#: Pyro's own settings of the linter, and the Python that they are for
SETTINGS = """
[project]
name = "pyro-ppl"
version = "1.9.2"
requires-python = ">=3.8"

[tool.ruff]
line-length = 88

[tool.ruff.lint]
ignore = ["E501", "E741", "E721"]
select = ["E", "F", "I"]
"""


INDEX = """
.. toctree::
   :caption: Contributed Code:

   contrib.autoname
   contrib.zuko

Indices
"""


PYRO_HEADER = "# Copyright Contributors to the Pyro project.\n"
#: as it begins in Pyro
EXAMPLES = """
CPU_EXAMPLES = [
    "air/main.py --num-steps=1",
    "contrib/autoname/mixture.py --num-epochs=1",
]
CUDA_EXAMPLES = [
    "contrib/gp/sv-dkl.py --epochs=1 --cuda",
]
"""


def git(where, *command):
    return subprocess.run(
        ["git", *command], cwd=where, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with the settings of Pyro's linter."""
    target = tmp_path_factory.mktemp("pyro")
    (target / "pyproject.toml").write_text(SETTINGS)
    (target / "docs/source").mkdir(parents=True)
    (target / "docs/source/index.rst").write_text(INDEX)
    (target / "tests").mkdir()
    (target / "tests/test_examples.py").write_text(PYRO_HEADER + EXAMPLES)
    git(target, "init", "--initial-branch=dev")
    git(target, "config", "user.name", "someone")
    git(target, "config", "user.email", "someone@example.org")
    git(target, "add", "--all")
    git(target, "commit", "--message=before")
    return target


@pytest.fixture(scope="module")
def trees(checkout, tmp_path_factory):
    """A tree of each branch."""
    command = [sys.executable, TOOLS / "contrib.py", checkout]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{PLACE}/autoguide.py" in done.stdout
    git(checkout, "switch", "dev")
    found = {}
    for name in BRANCHES:
        found[name] = tmp_path_factory.mktemp(name)
        git(checkout, "worktree", "add", found[name], name)
    return found


@pytest.fixture(params=BRANCHES)
def branch(request):
    return request.param


@pytest.fixture
def tree(trees, branch):
    return trees[branch]


def _sources(tree):
    return {path: path.read_text() for path in sorted(tree.rglob("*.py"))}


def test_each_branch_is_one_short_commit_on_top_of_the_one_before(tree, branch):
    names = ["dev", *BRANCHES]
    before = names[names.index(branch) - 1]
    assert git(tree, "rev-list", "--count", f"{before}..{branch}") == "1\n"
    assert not git(tree, "log", f"{branch}..{before}")
    changes = [line.split() for line in git(tree, "show", "--numstat", "--format=").splitlines()]
    added = {path: int(lines) for lines, _, path in changes}
    assert 0 < sum(n for path, n in added.items() if path.startswith(PLACE)) <= BRANCHES[branch][1]
    assert [path for path in added if path.startswith("tests/contrib/artransform/test_")]


def test_it_names_and_imports_nothing_outside(tree):
    for path, text in _sources(tree).items():
        assert "pyro_artransform" not in text, path
        assert text.startswith(PYRO_HEADER), path
        if PLACE not in str(path):
            continue
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            roots = {name.split(".")[0] for name in names}
            assert roots <= {"torch", "pyro", *sys.stdlib_module_names}, path


def test_the_docs_have_its_page_with_all_modules(tree):
    index = (tree / "docs/source/index.rst").read_text()
    assert index == INDEX.replace("   contrib.auto", "   contrib.artransform\n   contrib.auto")
    page = (tree / "docs/source/contrib.artransform.rst").read_text()
    folders = {path.name for path in (tree / PLACE).iterdir() if path.is_dir()}
    described = set(
        re.findall(r"automodule:: pyro\.contrib\.artransform\.(\w+)\n +:members:", page)
    )
    assert described == folders - {"_base"} | {"builders"}
    for name in re.findall(r"pyro\.contrib\.artransform\.([\w.]+)`", page):
        module, _, last = name.rpartition(".")
        assert f'"{last}"' in (tree / PLACE / module.replace(".", "/") / "__init__.py").read_text()


def test_its_example_is_tried_by_the_tests_of_pyro(tree, branch):
    tests = (tree / "tests/test_examples.py").read_text()
    examples = tree / "examples/contrib/artransform"
    listed = re.findall(r'^    "contrib/artransform/(\w+\.py) -n 20",$', tests, re.M)
    assert sorted(listed) == sorted(path.name for path in examples.iterdir())
    assert {*BRANCHES[branch][0]} <= {*listed}
    assert re.sub(r'    "contrib/artransform/.*\n', "", tests) == PYRO_HEADER + EXAMPLES


def test_shorter_lines_are_the_same_code(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    contrib = importlib.import_module("contrib")
    for k in (1, 2):
        for path, text in contrib.files(contrib.BRANCHES[:k]):
            if path.endswith(".py"):
                assert _code(contrib._wrapped(text)) == _code(text), path


def _code(text):
    """The code, whatever white space its docstrings have."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(words)) as constant):
                constant.value = " ".join(words.split())
    return ast.dump(tree)


def test_nothing_is_written_without_ruff_or_over_changes(checkout, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    contrib = importlib.import_module("contrib")
    with pytest.raises(SystemExit, match=r"git status: .*not a git repository"):
        contrib.write_branches(tmp_path)
    (changed := checkout / "changed").touch()
    with pytest.raises(SystemExit, match="a checkout without changes"):
        contrib.write_branches(checkout)
    changed.unlink()
    monkeypatch.setattr(contrib, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install ruff"):
        contrib.write_branches(checkout)
    assert not git(checkout, "status", "--porcelain")


def test_docstrings_refer_to_what_is_there(tree):
    names, references = set(), set()
    for path, text in _sources(tree / PLACE).items():
        names |= {path.stem, path.parent.name}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                names.add(ast.unparse(node.target))
        references |= {
            name.split(".")[-1]
            for name in re.findall(r":(?:attr|class|func|meth):`~?([\w.]+)`", text)
            if not name.startswith("torch.")
        }
        references |= set(re.findall(r"artransform(?:\.\w+)*\.(\w+)", text))
    assert references <= names, references - names


def test_its_lines_are_those_of_pyro(tree):
    for path in (*(tree / PLACE).rglob("*.py"), *(tree / "examples").rglob("*.py")):
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 88, path
        # a formula goes on further in
        assert not re.search(r"\n( *)\.\. \w+:: .+\n\1\S", text), path


def test_it_is_in_the_syntax_of_python_3_8(tree):
    for text in _sources(tree).values():
        ast.parse(text, feature_version=(3, 8))
        assert "collections.abc" not in text
        assert "removeprefix" not in text
        assert "pairwise" not in text


def test_it_keeps_to_the_rules_of_the_linter(tree):
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=tree, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_it_passes_its_tests_in_a_tree_of_pyro(tree, branch):
    """Its tests and those of the branches before it, the doctests, and the examples."""
    shutil.copytree(Path(pyro.__file__).parent, tree / "pyro", dirs_exist_ok=True)
    here = {**os.environ, "PYTHONPATH": str(tree)}
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tree)]
    tests = [*options, "--doctest-modules", "tests/contrib/artransform", PLACE]
    examples = [f"examples/contrib/artransform/{name}" for name in BRANCHES[branch][0]]
    for command in (["-m", "pytest", *tests], *([example, "-n", "20"] for example in examples)):
        done = subprocess.run(
            [sys.executable, *command], cwd=tree, env=here, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
