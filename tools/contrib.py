# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Writes the part of the package that Pyro could take, as ``pyro.contrib.artransform``.

``python tools/contrib.py TARGET``, with TARGET a checkout of Pyro or its unpacked source distribution, writes
what ``AutoIAF`` and ``AutoregressiveTransform`` need for plain SVI, with tests, an example and a page of
docs, and prints a table of its files. The guide is ``contrib_files/autoguide.py``, on Pyro's own
``AutoContinuous``; of the package what it and the public names reach is copied as it is.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from contrib_files.reachable import Module, Reach, is_text, read_package

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PLACE = "pyro_artransform", "pyro.contrib.artransform"
FILES = Path(__file__).parent / "contrib_files"

#: what users of the slice import, by the module that has it
PUBLIC = {
    "Affine": "univariate.affine",
    "AutoIAF": "autoguide",
    "AutoregressiveTransform": "transforms.autoregressive",
    "ConditionedUnivariate": "transforms.conditioned",
    "FlowDistribution": "transforms.flow_distribution",
    "MaskedInput": "conditioners.masked_input",
    "MaskedMLP": "conditioners.masked_mlp",
    "affine_autoregressive": "flows",
    "iaf": "flows",
    "inverse": "transforms.flow_module",
}
#: the example, as Pyro's tests name it
EXAMPLE = "contrib/artransform/eight_schools.py"
#: files that are copied: the guide, and those of tests, examples and docs
COPIED = {
    "autoguide.py": f"{PLACE.replace('.', '/')}/autoguide.py",
    "test_autoguide.py": "tests/contrib/artransform/test_autoguide.py",
    "test_transform.py": "tests/contrib/artransform/test_transform.py",
    "eight_schools.py": f"examples/{EXAMPLE}",
    "contrib.artransform.rst": "docs/source/contrib.artransform.rst",
}
TYPING = {"list": "List", "dict": "Dict", "tuple": "Tuple", "set": "Set", "type": "Type"}


def _first_line(unit: ast.stmt, lines: list[str]) -> int:
    """The first line of a statement with its decorators and the comments above it."""
    decorators = getattr(unit, "decorator_list", [])
    first = min([unit.lineno, *(d.lineno for d in decorators)])
    while lines[first - 2].lstrip().startswith("#") and first > 4:
        first -= 1
    return first


def reached() -> Reach:
    """What users of the slice, and its guide, reach of the package."""
    reach = Reach(read_package(ROOT, PACKAGE))
    names = [(f"{PACKAGE}.{module}", name) for name, module in PUBLIC.items()]
    for unit in ast.parse((FILES / "autoguide.py").read_text()).body:
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


def files(reach: Reach) -> Iterator[tuple[str, str]]:
    """The path in a checkout of Pyro, and the text, of each file of the slice."""
    units = {
        name: [u for u in m.tree.body if u in reach.units] for name, m in reach.modules.items()
    }
    kept = {name for name, found in units.items() if found and not reach.modules[name].is_package}
    parents = {
        ".".join(name.split(".")[:k]) for name in kept for k in range(2, name.count(".") + 1)
    }
    place = PLACE.replace(".", "/")
    for name in sorted(kept | parents):
        module = reach.modules[name]
        path = place + name[len(PACKAGE) :].replace(".", "/")
        text = write_front(reach, module) if module.is_package else write_module(reach, module)
        yield (
            path + ("/__init__.py" if module.is_package else ".py"),
            _comments_above(for_pyro(text)),
        )
    yield f"{place}/__init__.py", _front_door()
    for source, target in COPIED.items():
        yield target, for_pyro((FILES / source).read_text(), is_module=False)
    header = "".join((FILES / "front_door.py").read_text().splitlines(keepends=True)[:2])
    yield "tests/contrib/artransform/__init__.py", for_pyro(header, is_module=False)


def with_example(tests: str) -> str:
    """Pyro's list of examples to try with that of the slice, before the next one of ``contrib``."""
    entry, next_one = f'    "{EXAMPLE} -n 20",\n', re.search(r'^    "contrib/', tests, re.M)
    if EXAMPLE in tests or next_one is None:
        return tests
    return tests[: next_one.start()] + entry + tests[next_one.start() :]


def with_page(index: str) -> str:
    """The index of Pyro's docs with the page of the slice, in the order of the names."""
    lines = index.splitlines(keepends=True)
    pages = [k for k, line in enumerate(lines) if re.fullmatch(r"\s+contrib\.\w+\s*", line)]
    names = [lines[k].strip() for k in pages]
    page = "contrib.artransform"
    if not pages or page in names:
        return index
    place = next((k for k, name in zip(pages, names) if name > page), pages[-1] + 1)
    lines.insert(place, lines[pages[0]].replace(names[0], page))
    return "".join(lines)


def _front_door() -> str:
    head = (FILES / "front_door.py").read_text()
    lines = [f"from .{module} import {name}" for name, module in sorted(PUBLIC.items())]
    return for_pyro(head + "\n".join(lines) + "\n" + _all(PUBLIC), is_module=False)


def write(target: Path) -> dict[str, int]:
    """Writes the slice into a checkout, in its own format.

    :return: the number of lines by file.
    """
    if find_spec("ruff") is None:
        raise SystemExit("tools/contrib.py formats what it writes by ruff: pip install ruff")
    paths = []
    for name, text in files(reached()):
        paths.append(target / name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text(text)
    if (index := target / "docs/source/index.rst").exists():
        index.write_text(with_page(index.read_text()))
    if (tests := target / "tests/test_examples.py").exists():
        tests.write_text(with_example(tests.read_text()))
    sources = [str(path) for path in paths if path.suffix == ".py"]
    for command in (["check", "--quiet", "--fix", "--select", "I"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, *sources], cwd=target, check=True)
    return {str(p.relative_to(target)): len(p.read_text().splitlines()) for p in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "target", type=Path, help="a checkout of Pyro, or its unpacked source distribution"
    )
    counts = write(parser.parse_args().target.resolve())
    for name, count in counts.items():
        print(f"{count:6}  {name}")
    package = sum(count for name, count in counts.items() if name.startswith("pyro/"))
    print(f"{package:6}  of the package, {sum(counts.values())} in all")


if __name__ == "__main__":
    main()
