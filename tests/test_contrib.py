# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The slice for Pyro: it is whole, as short as it is said to be, and right in a tree of Pyro's."""

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

TOOLS = Path(__file__).resolve().parents[1] / "tools"
PLACE = "pyro/contrib/artransform"
#: of the package, in Pyro's line length, docstrings included
MOST_LINES = 2850
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


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree with the settings of Pyro's linter, and the slice."""
    target = tmp_path_factory.mktemp("pyro")
    (target / "pyproject.toml").write_text(SETTINGS)
    (target / "docs/source").mkdir(parents=True)
    (target / "docs/source/index.rst").write_text(INDEX)
    (target / "tests").mkdir()
    (target / "tests/test_examples.py").write_text(PYRO_HEADER + EXAMPLES)
    command = [sys.executable, TOOLS / "contrib.py", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{PLACE}/autoguide.py" in done.stdout
    return target


def _sources(tree):
    return {path: path.read_text() for path in sorted(tree.rglob("*.py"))}


def test_it_is_short_and_names_nothing_outside(tree):
    lines = 0
    for path, text in _sources(tree).items():
        assert "pyro_artransform" not in text, path
        assert text.startswith("# Copyright Contributors to the Pyro project.\n"), path
        lines += len(text.splitlines()) if PLACE in str(path) else 0
    assert 0 < lines <= MOST_LINES


def test_the_index_of_the_docs_has_its_page(tree):
    index = (tree / "docs/source/index.rst").read_text()
    assert index == INDEX.replace("   contrib.auto", "   contrib.artransform\n   contrib.auto")
    assert (tree / "docs/source/contrib.artransform.rst").exists()


def test_its_example_is_tried_by_the_tests_of_pyro(tree):
    tests = (tree / "tests/test_examples.py").read_text()
    entry = '    "contrib/artransform/eight_schools.py -n 20",\n    "contrib/autoname'
    assert tests == PYRO_HEADER + EXAMPLES.replace('    "contrib/autoname', entry)
    assert (tree / "examples" / "contrib/artransform/eight_schools.py").exists()


def test_nothing_is_written_without_ruff(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    contrib = importlib.import_module("contrib")
    monkeypatch.setattr(contrib, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install ruff"):
        contrib.write(tmp_path)
    assert not [*tmp_path.iterdir()]


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
def test_it_passes_its_tests_in_a_tree_of_pyro(tree):
    """What Pyro's tests ask of an autoguide, the doctests, and the example."""
    shutil.copytree(Path(pyro.__file__).parent, tree / "pyro", dirs_exist_ok=True)
    here = {**os.environ, "PYTHONPATH": str(tree)}
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tree)]
    tests = [*options, "--doctest-modules", "tests/contrib/artransform", PLACE]
    example = "examples/contrib/artransform/eight_schools.py"
    for command in (["-m", "pytest", *tests], [example, "-n", "20"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tree, env=here, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
