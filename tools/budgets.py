# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Counts lines, words and numeric constants, and compares them with ``[tool.budgets]`` of pyproject.toml.

``make lint`` runs it. It prints a table, and fails where a count is above its budget, or has none.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyro_artransform"


def _lines(paths: Iterable[Path]) -> int:
    return sum(path.read_text().count("\n") for path in paths)


def _words(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text().split()) for path in paths)


def _is_number(value: ast.expr) -> bool:
    if isinstance(value, ast.UnaryOp):
        return _is_number(value.operand)
    if isinstance(value, ast.BinOp):
        return _is_number(value.left) and _is_number(value.right)
    return isinstance(value, ast.Constant) and type(value.value) in (int, float)


def _numbers(value: ast.expr) -> int:
    """How many numbers a value is: an expression of literals is one, a tuple of them as many as it has."""
    if isinstance(value, (ast.Tuple, ast.List)):
        return sum(map(_numbers, value.elts))
    return int(_is_number(value))


def _constants(path: Path) -> int:
    """The numbers that a module's own statements give names to."""
    statements = ast.parse(path.read_text()).body
    given = (s.value for s in statements if isinstance(s, (ast.Assign, ast.AnnAssign)))
    return sum(_numbers(value) for value in given if value is not None)


def counts() -> dict[str, int]:
    """Every count that has a budget, by name."""
    files = sorted(PACKAGE.rglob("*.py"))
    rooms = sorted({path.relative_to(PACKAGE).parts[0] for path in files if path.parent != PACKAGE})
    found = {"root": _lines(PACKAGE.glob("*.py"))}
    found |= {room: _lines((PACKAGE / room).rglob("*.py")) for room in rooms}
    found |= {"package": sum(found.values()), "constants": sum(map(_constants, files))}
    found |= {name: _lines((ROOT / name).rglob("*.py")) for name in ("tests", "benchmarks")}
    # docs/benchmarks and docs/tutorials are copies, made by the site's build
    pages = {"README": "README.md", "docs": "docs/*.md", "CHANGELOG": "CHANGELOG.md"}
    pages |= {"benchmarks": "benchmarks/*.md"}
    return found | {f"words of {name}": _words(ROOT.glob(where)) for name, where in pages.items()}


def main() -> int:
    """Prints the table; returns the number of counts above their budgets."""
    budgets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["budgets"]
    over = 0
    for name, count in counts().items():
        budget = budgets.get(name, 0)
        over += count > budget
        print(f"{name:<22}{count:>8,}{budget:>8,}{'  above its budget' * (count > budget)}")
    return over


if __name__ == "__main__":
    sys.exit(f"{over} above budget" if (over := main()) else 0)
