# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which statements of a package its roots reach, found on the source alone.

A unit is a statement of a module or of a class. It uses names, attributes and strings. A name leads to the
statement of its module that binds it, an import to the statement of the other module. A method is reached
once its class is and some unit that is reached uses its name; special methods, and those that override a
class from elsewhere, which may call them, are reached with their class.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

Unit = ast.stmt
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class Module:
    """A parsed file, and which of its statements bind a name."""

    def __init__(self, name: str, source: str, is_package: bool) -> None:
        self.name, self.source, self.is_package = name, source, is_package
        self.tree = ast.parse(source)
        self.bindings: dict[str, list[Unit]] = {}
        for unit in self.tree.body:
            for bound in _bound(unit):
                self.bindings.setdefault(bound, []).append(unit)

    def origin(self, unit: ast.ImportFrom) -> str:
        """The absolute name of the module that an import is from."""
        if not unit.level:
            return unit.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - unit.level + self.is_package]
        return ".".join([*parts, *filter(None, [unit.module])])


def _bound(unit: ast.AST) -> Iterator[str]:
    if isinstance(unit, (*Function, ast.ClassDef)):
        yield unit.name
    elif isinstance(unit, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.split(".")[0] for alias in unit.names)
    else:
        for node in ast.walk(unit):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from _bound(node)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                yield from (n.id for n in ast.walk(node.value) if isinstance(n, ast.Name))


def is_text(unit: ast.AST) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(unit, ast.Expr) and isinstance(unit.value, ast.Constant)


class Reach:
    """What is reached from some names of a package.

    :param sources: the source by the name of its module, and whether it is the file of a package.
    """

    def __init__(self, sources: dict[str, tuple[str, bool]]) -> None:
        self.modules = {name: Module(name, *found) for name, found in sources.items()}
        self.units: set[Unit] = set()  #: what is reached, members of classes too
        self.names: set[tuple[str, str]] = set()  #: module and name
        self._words: set[str] = set()
        self._waiting: list[tuple[ast.ClassDef, Unit]] = []
        self._work: list[tuple[Module, Unit]] = []

    def add(self, module: str, name: str) -> None:
        """Adds a name of a module, and all that it needs."""
        self._add_name(module, name)
        while self._work or self._called():
            self._scan(*self._work.pop())

    def _called(self) -> bool:
        ready = [entry for entry in self._waiting if entry[1][1].name in self._words]
        for entry in ready:
            self._waiting.remove(entry)
            self._add_unit(*entry[1])
        return bool(ready)

    def _add_name(self, module: str, name: str) -> None:
        if module not in self.modules or (module, name) in self.names:
            return
        self.names.add((module, name))
        for unit in self.modules[module].bindings.get(name, ()):
            if isinstance(unit, ast.ImportFrom):
                self._add_import(self.modules[module], unit, name)
            else:
                self._add_unit(self.modules[module], unit)

    def _add_import(self, module: Module, unit: ast.ImportFrom, name: str) -> None:
        original = next(a.name for a in unit.names if name in (a.asname, a.name))
        origin = module.origin(unit)
        if f"{origin}.{original}" not in self.modules:  # of a module, its attributes are added
            self._add_name(origin, original)

    def _add_unit(self, module: Module, unit: Unit) -> None:
        if unit not in self.units:
            self.units.add(unit)
            self._work.append((module, unit))

    def _scan(self, module: Module, unit: Unit) -> None:
        if not isinstance(unit, ast.ClassDef):
            self._use(module, unit)
            return
        for part in (*unit.bases, *unit.keywords, *unit.decorator_list):
            self._use(module, part)
        for member in unit.body:
            if not isinstance(member, Function) or self._comes_along(module, unit, member.name):
                self._add_unit(module, member)
            else:
                self._waiting.append((unit, (module, member)))

    def _comes_along(self, module: Module, owner: ast.ClassDef, name: str) -> bool:
        if name.startswith(("__", "_pyro_")):
            return True
        mro = getattr(importlib.import_module(module.name), owner.name).__mro__
        root = module.name.split(".")[0]
        others = [base for base in mro if base.__module__.split(".")[0] != root]
        return any(hasattr(base, name) for base in others)

    def _use(self, module: Module, unit: ast.AST) -> None:
        if is_text(unit):
            return
        texts = {
            n.body[0].value
            for n in ast.walk(unit)
            if isinstance(n, Function) and is_text(n.body[0])
        }
        for node in ast.walk(unit):
            if isinstance(node, ast.Name):
                self._words.add(node.id)
                self._add_name(module.name, node.id)
            elif isinstance(node, ast.Attribute):
                self._words.add(node.attr)
                if isinstance(node.value, ast.Name):
                    self._use_of_module(module, node.value.id, node.attr)
            elif (
                isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts
            ):
                self._words.add(node.value)
                if node.value in module.bindings:  # an annotation in quotes
                    self._add_name(module.name, node.value)

    def _use_of_module(self, module: Module, name: str, attribute: str) -> None:
        for unit in module.bindings.get(name, ()):
            if isinstance(unit, ast.ImportFrom):
                self._add_name(f"{module.origin(unit)}.{name}", attribute)


def read_package(root: Path, name: str) -> dict[str, tuple[str, bool]]:
    """The source of each module of a package, and whether it is the file of a package."""
    found = {}
    for path in sorted((root / name).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found[".".join(parts[: len(parts) - is_package])] = path.read_text(), is_package
    return found
