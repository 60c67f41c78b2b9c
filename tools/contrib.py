# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Writes the part of the package that Pyro could take, as ``pyro.contrib.artransform``, in three branches.

``python tools/contrib.py TARGET``, with TARGET a clean git checkout of Pyro, makes the branches of
:data:`BRANCHES`, each with one commit on top of the one before it: the transforms, the distribution, and a
guide on Pyro's own ``AutoContinuous``. Each has its tests, an example and a part of a page of docs. What its
public names reach of the package is copied as it is. The lines that each file gains and loses are printed.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from contrib_files.reachable import Module, Reach, is_text, read_package

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PLACE = "pyro_artransform", "pyro.contrib.artransform"
FILES = Path(__file__).parent / "contrib_files"


class Branch(NamedTuple):
    """One request: what it adds to those before it."""

    name: str
    subject: str  # of its commit
    public: dict[str, str]  #: what users import, by the module that has it
    example: str  #: runs with ``-n``, the number of steps
    files: Sequence[str]  #: tests, and modules of the package


BRANCHES = (
    Branch(
        "artransform-transforms",
        "Autoregressive transforms with an exact inverse",
        {
            "Affine": "flows.univariate.affine",
            "AutoregressiveTransform": "flows.transforms.autoregressive",
            "ConditionedUnivariate": "flows.transforms.conditioned",
            "Conditioner": "flows.conditioners.base",
            "FlowModule": "flows.transforms.flow_module",
            "MaskedInput": "flows.conditioners.masked_input",
            "MaskedMLP": "flows.conditioners.masked_mlp",
            "Univariate": "flows.univariate.base",
        },
        "transforms.py",
        ["test_transforms.py"],
    ),
    Branch(
        "artransform-distribution",
        "A transformed distribution that scores its draws without an inverse; tails",
        {
            "ComposedTransform": "flows.transforms.chain",
            "CompressedTails": "flows.transforms.scales_and_tails",
            "FlowDistribution": "flows.transforms.flow_distribution",
            "Hinged": "flows.univariate.affine",
            "LocationScale": "flows.transforms.scales_and_tails",
            "Unconditional": "flows.conditioners.masked_mlp",
        },
        "heavy_tails.py",
        ["test_distribution.py"],
    ),
    Branch(
        "artransform-autoguide",
        "An autoguide whose flow starts as the identity",
        {"AutoIAF": "autoguide"},
        "eight_schools.py",
        ["test_autoguide.py", "autoguide.py"],
    ),
)
TYPING = {"list": "List", "dict": "Dict", "tuple": "Tuple", "set": "Set", "type": "Type"}


def _first_line(unit: ast.stmt, lines: list[str]) -> int:
    """The first line of a statement with its decorators and the comments above it."""
    decorators = getattr(unit, "decorator_list", [])
    first = min([unit.lineno, *(d.lineno for d in decorators)])
    while lines[first - 2].lstrip().startswith("#") and first > 4:
        first -= 1
    return first


def reached(branches: Sequence[Branch]) -> Reach:
    """What users of these branches, and the modules that come with them, reach of the package."""
    reach = Reach(read_package(ROOT, PACKAGE))
    names = [(f"{PACKAGE}.{m}", name) for branch in branches for name, m in branch.public.items()]
    for file in [file for branch in branches for file in branch.files if "test_" not in file]:
        for unit in ast.parse((FILES / file).read_text()).body:
            if isinstance(unit, ast.ImportFrom) and str(unit.module).startswith(PACKAGE):
                names += [(str(unit.module), alias.name) for alias in unit.names]
    for module, name in names:
        reach.add(module, name)
    return reach


def write_module(reach: Reach, module: Module) -> str:
    """The source of a module without what is not reached."""
    lines = module.source.splitlines(keepends=True)
    units = [(unit, unit in reach.units) for unit in module.tree.body]
    for owner, is_kept in list(units):
        if is_kept and isinstance(owner, ast.ClassDef):
            units += [(unit, unit in reach.units or is_text(unit)) for unit in owner.body]
    used = _used(reach, module)
    changes: list[tuple[int, int, str]] = []
    for unit, is_kept in units:
        first, last = _first_line(unit, lines), unit.end_lineno or unit.lineno
        if isinstance(unit, (ast.Import, ast.ImportFrom)):
            changes.append((unit.lineno, last, _import(unit, used)))
        elif not (is_kept or is_text(unit)):
            changes.append((first, last, ""))
        elif isinstance(unit, ast.Assign) and (text := _with_typing(unit)) is not None:
            changes.append((unit.lineno, last, text))
    for first, last, text in sorted(changes, reverse=True):
        lines[first - 1 : last] = [text]
    return "".join(lines)


def _used(reach: Reach, module: Module) -> set[str]:
    """The names that what is kept of a module uses."""
    used = {name for owner, name in reach.names if owner == module.name}
    for top in module.tree.body:
        units = [top, *(top.body if isinstance(top, ast.ClassDef) else ())]
        for unit in units:
            if unit in reach.units and not isinstance(unit, ast.ClassDef):
                used |= {n.id for n in ast.walk(unit) if isinstance(n, ast.Name)}
            elif unit in reach.units:
                parts = (*unit.bases, *unit.decorator_list)
                used |= {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    return used


def _import(unit: ast.Import | ast.ImportFrom, used: set[str]) -> str:
    """An import without the names that nothing uses; names of abstract classes by ``typing``."""
    names = [a for a in unit.names if (a.asname or a.name.split(".")[0]) in used]
    if not names:
        return ""
    if isinstance(unit, ast.ImportFrom) and unit.module == "collections.abc":
        unit.module = "typing"
    kept = (
        ast.ImportFrom(unit.module, names, unit.level)
        if isinstance(unit, ast.ImportFrom)
        else ast.Import(names)
    )
    return ast.unparse(kept) + "\n"


class _Typing(ast.NodeTransformer):
    """Types that Python 3.8 can evaluate."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        parts = ast.unparse(node).split(" | ")
        if not isinstance(node.op, ast.BitOr) or not all(
            re.fullmatch(r"[\w.\[\], ]+", p) for p in parts
        ):
            return node
        return self.visit(ast.parse(f"Union[{', '.join(parts)}]", mode="eval").body)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in TYPING:
            node.value.id = TYPING[node.value.id]
        return node


def _with_typing(unit: ast.Assign) -> str | None:
    """An alias of types as Python 3.8 can evaluate it; None where it is the same."""
    before = ast.unparse(unit)
    after = ast.unparse(_Typing().visit(ast.parse(before)))
    return None if before == after else after + "\n"


def write_front(reach: Reach, module: Module) -> str:
    """The file of a package: its docstring, and what of its names is there."""
    exports, imports = [], ""
    for unit in module.tree.body:
        if isinstance(unit, ast.ImportFrom):
            origin = module.origin(unit)
            names = [alias.name for alias in unit.names if (origin, alias.name) in reach.names]
            if names:
                imports += f"from {'.' * unit.level}{unit.module} import {', '.join(names)}\n"
                exports += names
    header = "".join(module.source.splitlines(keepends=True)[:2])
    text = f'{header}\n"""{ast.get_docstring(module.tree)}"""\n\n{imports}'
    return text + _all(exports) if exports else text


def _all(names: Iterable[str]) -> str:
    listed = "".join(f'    "{name}",\n' for name in sorted(names))
    return f"\n__all__ = [\n{listed}]\n"


def for_pyro(text: str, *, is_module: bool = True) -> str:
    """The names, the header and the future import of a file of Pyro."""
    text = text.replace("to the pyro_artransform project", "to the Pyro project")
    text = re.sub(r" \(benchmarks/[\w.]+\)", "", text).replace(PACKAGE, PLACE)
    # the page of docs has all classes at the top
    text = re.sub(rf"(:class:`~?{PLACE})[\w.]*(\.\w+`)", r"\1\2", text)
    text = re.sub(r"(\w+)\.removeprefix\((\w+)\)", r"\1[len(\2) :]", text)
    if is_module and re.search(r"^(def|class) ", text, re.M):
        doc = ast.parse(text).body[0]
        lines = text.splitlines(keepends=True)
        lines.insert(doc.end_lineno, "\nfrom __future__ import annotations\n")
        text = "".join(lines)
    aliases = re.findall(r"^\w+ = (.*)$", text, re.M)
    names = sorted(
        {n for line in aliases for n in re.findall(r"\b(Union|Dict|List|Tuple|Set|Type)\[", line)}
    )
    if names:
        text = text.replace(
            "annotations\n", f"annotations\nfrom typing import {', '.join(names)}\n", 1
        )
    return text


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
    """The source with docstrings, comments and messages in lines of Pyro's length."""
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
    """The path in a checkout of Pyro, and the text, of each file of the last of these branches."""
    reach = reached(branches)
    units = {
        name: [u for u in m.tree.body if u in reach.units] for name, m in reach.modules.items()
    }
    kept = {name for name, found in units.items() if found and not reach.modules[name].is_package}
    parents = {
        ".".join(name.split(".")[:k]) for name in kept for k in range(2, name.count(".") + 1)
    }
    place, tests = PLACE.replace(".", "/"), "tests/contrib/artransform"
    for name in sorted(kept | parents):
        module = reach.modules[name]
        path = place + name[len(PACKAGE) :].replace(".", "/")
        text = write_front(reach, module) if module.is_package else write_module(reach, module)
        yield (
            path + ("/__init__.py" if module.is_package else ".py"),
            _comments_above(for_pyro(text)),
        )
    header, front = "".join(module.source.splitlines(keepends=True)[:2]), _front_door(branches)
    copied = {f"{place}/__init__.py": header + front, f"{tests}/__init__.py": header}
    copied[f"docs/source/{PLACE[5:]}.rst"] = _page(branches)
    copied[f"examples/{_example(branches[-1])}"] = (FILES / branches[-1].example).read_text()
    for file in branches[-1].files:
        folder = tests if file.startswith("test_") else place
        copied[f"{folder}/{file}"] = (FILES / file).read_text()
    for path, text in copied.items():
        yield path, for_pyro(text, is_module=False)


def _example(branch: Branch) -> str:
    return f"contrib/artransform/{branch.example}"


def _page(branches: Sequence[Branch]) -> str:
    """The page of docs, with a part for each branch."""
    return "\n".join((FILES / f"{b.name.partition('-')[2]}.rst").read_text() for b in branches)


def with_example(tests: str, branch: Branch) -> str:
    """Pyro's list of examples to try with that of a branch, before the next one of ``contrib``."""
    entry = f'    "{_example(branch)} -n 20",\n'
    next_one = re.search(r'^    "contrib/', tests, re.M)
    if entry in tests or next_one is None:
        return tests
    return tests[: next_one.start()] + entry + tests[next_one.start() :]


def with_page(index: str) -> str:
    """The index of Pyro's docs with the page of the slice, in the order of the names."""
    lines = index.splitlines(keepends=True)
    pages = [k for k, line in enumerate(lines) if re.fullmatch(r"\s+contrib\.\w+\s*", line)]
    names = [lines[k].strip() for k in pages]
    page = PLACE[5:]
    if not pages or page in names:
        return index
    place = next((k for k, name in zip(pages, names) if name > page), pages[-1] + 1)
    lines.insert(place, lines[pages[0]].replace(names[0], page))
    return "".join(lines)


def _front_door(branches: Sequence[Branch]) -> str:
    public = {name: module for branch in branches for name, module in branch.public.items()}
    lines = [f"from .{module} import {name}\n" for name, module in public.items()]
    return f'\n"""{BRANCHES[0].subject}."""\n\n{"".join(lines)}' + _all(public)


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
        tests.write_text(with_example(tests.read_text(), branches[-1]))
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
