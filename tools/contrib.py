# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Writes the part of the package that Pyro could take, as ``pyro.contrib.artransform``, in two branches.

``python tools/contrib.py TARGET``, with TARGET a clean git checkout of Pyro, makes the branches of
:data:`BRANCHES`, each with one commit on top of the one before it: the room ``flows`` as it is, and a guide
based on Pyro's own ``AutoContinuous``. Each has its tests, examples and a part of a page of docs. Of
``_base`` only the functions are copied that ``flows`` uses. The lines that each file gains are printed.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PLACE = "pyro_artransform", "pyro.contrib.artransform"
FILES = Path(__file__).parent / "contrib_files"
FOLDER, TESTS = PLACE.replace(".", "/"), "tests/contrib/artransform"
EXAMPLES, PAGE = "contrib/artransform", f"docs/source/{PLACE[5:]}.rst"


class Branch(NamedTuple):
    """One request: what it adds to the one before it, in files of :data:`FILES`."""

    name: str
    subject: str  # of its commit
    page: str
    tests: Sequence[str]
    examples: Sequence[str]  #: run with ``-n``, the number of steps
    modules: Sequence[str] = ()  #: besides those of the package


BRANCHES = (
    Branch(
        "artransform-flows",
        "Autoregressive transforms with an exact inverse",
        "flows.rst",
        ["test_flows.py"],
        ["heavy_tails.py", "transforms.py"],
    ),
    Branch(
        "artransform-autoguide",
        "An autoguide whose flow starts as the identity",
        "autoguide.rst",
        ["test_autoguide.py"],
        ["eight_schools.py"],
        ["autoguide.py"],
    ),
)


def package_files() -> Iterator[tuple[str, str]]:
    """The path in a checkout of Pyro, and the source, of each file of ``flows`` and of what it uses."""
    used: dict[str, set[str]] = {}  # the names that flows imports, by module of _base
    for path in sorted((ROOT / PACKAGE / "flows").rglob("*.py")):
        text = path.read_text()
        for unit in ast.walk(ast.parse(text)):
            if isinstance(unit, ast.ImportFrom) and (unit.module or "").startswith("_base."):
                names = used.setdefault(unit.module[6:], set())
                names.update(alias.name for alias in unit.names)
        # the folder is one level higher in Pyro
        text = re.sub(r"^from \.(\.+_base)", r"from \1", text, flags=re.MULTILINE)
        yield f"{FOLDER}/{path.relative_to(ROOT / PACKAGE / 'flows')}", text
    for module, names in sorted(used.items()):
        source = (ROOT / PACKAGE / "_base" / f"{module}.py").read_text()
        yield f"{FOLDER}/_base/{module}.py", keep_names(source, names)
    yield f"{FOLDER}/_base/__init__.py", _header()


def keep_names(source: str, names: set[str]) -> str:
    """A module with these of its names, and the others that they use."""
    units = ast.parse(source).body
    names = set(names)
    kept: list[ast.stmt] = []
    while new := [unit for unit in units if unit not in kept and names & _bound(unit)]:
        kept += new
        names |= {node.id for unit in new for node in ast.walk(unit) if isinstance(node, ast.Name)}
    lines, end = source.splitlines(keepends=True), 0
    text = ""
    for unit in units:
        # a statement includes its decorators and the comments and blank lines above
        above = lines[end : unit.lineno - 1]
        end = unit.end_lineno or unit.lineno
        if isinstance(unit, (ast.Import, ast.ImportFrom)) and unit in kept:
            unit.names = [a for a in unit.names if (a.asname or a.name.split(".")[0]) in names]
            text += "".join(above) + ast.unparse(unit) + "\n"
        elif unit in kept or unit is units[0]:
            text += "".join(above + lines[unit.lineno - 1 : end])
    return text


def _bound(unit: ast.stmt) -> set[str]:
    """The names that a statement of a module binds."""
    if isinstance(unit, (ast.FunctionDef, ast.ClassDef)):
        return {unit.name}
    if isinstance(unit, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.split(".")[0] for alias in unit.names}
    return {target.id for target in getattr(unit, "targets", ()) if isinstance(target, ast.Name)}


def _header() -> str:
    """The two lines with the copyright and the license."""
    return "".join(Path(__file__).read_text().splitlines(keepends=True)[:2])


def for_pyro(text: str) -> str:
    """A text with the names of its place in Pyro."""
    text = text.replace("to the pyro_artransform project", "to the Pyro project")
    text = re.sub(r" \(benchmarks/[\w.]+\)", "", text)
    text = re.sub(rf"{PACKAGE}\.flows\b", PLACE, text)
    # builders are imported from the package in either place
    return text.replace(PACKAGE, PLACE)


def for_python_3_8(text: str) -> str:
    """A module whose types are not evaluated, with aliases of types that Python 3.8 can evaluate."""
    text = text.replace("from collections.abc import", "from typing import")
    part = r"[\w.\[\], ]+"
    alias = re.compile(rf"^(\w+) = ({part}(?: \| {part})+)$", re.MULTILINE)
    future = "\nfrom __future__ import annotations\n"
    if alias.search(text):
        text = alias.sub(lambda found: f"{found[1]} = Union[{found[2].replace(' | ', ', ')}]", text)
        future += "from typing import Union\n"
    if not re.search(r"^(def|class) ", text, re.MULTILINE):
        return text
    lines = text.splitlines(keepends=True)
    lines.insert(ast.parse(text).body[0].end_lineno or 0, future)  # after the docstring
    return "".join(lines)


def _comments_above(text: str) -> str:
    """The source with comments above lines that are too long for Pyro, in place of beside them."""
    lines = text.splitlines(keepends=True)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    for token in [token for token in tokens if token.type == tokenize.COMMENT]:
        row = token.start[0] - 1
        code = lines[row][: token.start[1]]
        is_setting = re.match("# (noqa|type:)", token.string)
        if code.strip() and len(lines[row]) > 89 and not is_setting:
            indent = code[: len(code) - len(code.lstrip())]
            lines[row] = f"{indent}{token.string}\n{code.rstrip()}\n"
    return "".join(lines)


def _wrapped(text: str) -> str:
    """The source with docstrings, comments and messages in lines of Pyro's length.

    What is too long for a line goes to the beginning of the next line, if that continues the same
    paragraph, comment or message, or else to a new line.
    """
    tokens = [*tokenize.generate_tokens(io.StringIO(text).readline)]
    rows = [range(t.start[0], t.end[0] + 1) for t in tokens if t.string.endswith('"""')]
    docs = {row for found in rows for row in found}
    lines = [(line, row in docs) for row, line in enumerate(text.splitlines(), 1)]
    k = 0
    while k < len(lines):
        line, is_doc = lines[k]
        message = not is_doc and re.match(r' *f?"(?=[^"]+"[,)]*$)', line)
        start = message or re.match(" *" if is_doc else r" *#:? ", line)
        end = line.rfind(" ", start.end(), 87 if message else 89) if start else -1
        if len(line) > 88 and end > 0 and ">>>" not in line:
            indent, rest = start[0], line[end + 1 :]
            if mark := re.match(r" *(:\w+:?|\d\.|\.\.) ", line):  # of a list, or a formula
                indent += " " * (3 if mark[1][0].isdigit() else 4)
            after, is_same = lines[k + 1] if k + 1 < len(lines) else ("", False)
            goes_on = re.match(re.escape(indent) + r"(?![ :\-.>]|\d\.|\"\"\")\S", after)
            lines[k] = (line[:end] + ' "' if message else line[:end], is_doc)
            if goes_on and is_same == is_doc and (not message or rest.endswith('"')):
                rest = rest[:-1] if message else f"{rest} "
                lines[k + 1] = (indent + rest + after[len(indent) :], is_doc)
            else:
                lines.insert(k + 1, (indent + rest, is_doc))
        k += 1
    return "".join(f"{line}\n" for line, _ in lines)


def files(branches: Sequence[Branch]) -> Iterator[tuple[str, str]]:
    """The path in a checkout of Pyro, and the text, of each file that the last of these branches adds."""
    last = branches[-1]
    if len(branches) == 1:
        for path, text in package_files():
            yield path, _comments_above(for_python_3_8(for_pyro(text)))
        yield f"{TESTS}/__init__.py", for_pyro(_header())
    yield PAGE, "\n".join(for_pyro((FILES / branch.page).read_text()) for branch in branches)
    for folder, names in (
        (FOLDER, last.modules),
        (TESTS, last.tests),
        (f"examples/{EXAMPLES}", last.examples),
    ):
        for name in names:
            yield f"{folder}/{name}", for_pyro((FILES / name).read_text())


def with_examples(tests: str, branch: Branch) -> str:
    """Pyro's list of examples to try with those of a branch, before the next one of ``contrib``."""
    entries = "".join(f'    "{EXAMPLES}/{name} -n 20",\n' for name in branch.examples)
    next_one = re.search(r'^    "contrib/', tests, re.MULTILINE)
    if entries in tests or next_one is None:
        return tests
    return tests[: next_one.start()] + entries + tests[next_one.start() :]


def with_page(index: str) -> str:
    """The index of Pyro's docs with the page of these branches, in the order of the names."""
    lines = index.splitlines(keepends=True)
    pages = [k for k, line in enumerate(lines) if re.fullmatch(r"\s+contrib\.\w+\s*", line)]
    names = [lines[k].strip() for k in pages]
    page = PLACE[5:]
    if not pages or page in names:
        return index
    place = next((k for k, name in zip(pages, names) if name > page), pages[-1] + 1)
    lines.insert(place, lines[pages[0]].replace(names[0], page))
    return "".join(lines)


def write(target: Path, branches: Sequence[Branch]) -> None:
    """Writes what the last of these branches adds to the others into a checkout, in its own format."""
    sources = []
    for name, text in files(branches):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_wrapped(text) if path.suffix == ".py" else text)
        sources += [str(path)] if path.suffix == ".py" else []
    if (index := target / "docs/source/index.rst").exists():
        index.write_text(with_page(index.read_text()))
    if (tests := target / "tests/test_examples.py").exists():
        tests.write_text(with_examples(tests.read_text(), branches[-1]))
    for command in (["check", "--quiet", "--fix", "--select", "I"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *sources], cwd=target, check=True)


def write_branches(target: Path) -> None:
    """Makes the branches on top of what is checked out, and prints the lines that each adds."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=target, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"git {command[0]}: {done.stderr or done.stdout}")
        return done.stdout

    if find_spec("ruff") is None:
        raise SystemExit("tools/contrib.py formats what it writes by ruff: pip install ruff")
    if git("status", "--porcelain"):
        raise SystemExit(f"{target}: expected a checkout without changes, commit them first")
    for k, branch in enumerate(BRANCHES, 1):
        git("switch", "--create", branch.name)
        write(target, BRANCHES[:k])
        git("add", "--all")
        git("commit", "--message", branch.subject)
        print(f"{branch.name}\n{git('show', '--numstat', '--format=')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path, help="a git checkout of Pyro")
    write_branches(parser.parse_args().target.resolve())


if __name__ == "__main__":
    main()
