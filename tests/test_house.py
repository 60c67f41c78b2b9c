# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, checked on the source: who may import whom, and what a file may be."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "pyro_artransform"
MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "core", "common", "misc"}
RUNTIME = {"pyro", "torch"}

# Who may import whom (each part may import itself). A part that is not listed is an error: give it
# its place here when it is built.
ARROWS: dict[str, set[str]] = {
    "arguments": set(),
    "differentiation": set(),
    "files": set(),
    "moments": {"arguments"},
    "univariate": {"arguments", "differentiation"},
    "conditioners": {"arguments", "differentiation", "graphs"},
    "transforms": {"arguments", "moments", "univariate", "conditioners"},
    "flows": {"arguments", "univariate", "conditioners", "transforms"},
    "graphs": {"arguments"},
    "joint": {"arguments", "differentiation", "graphs"},
    "guides": {
        *("arguments", "univariate", "conditioners", "transforms", "flows", "graphs"),
        *("joint", "files"),
    },
    "diagnostics": {"arguments", "joint"},
    "posterior": {"arguments", "joint"},
    "inference": {
        *("arguments", "moments", "graphs", "joint", "diagnostics", "posterior", "files"),
    },
    "plots": {"inference", "diagnostics"},
    "testing": {
        *("arguments", "univariate", "conditioners", "transforms", "flows", "guides"),
        *("graphs", "joint", "diagnostics", "posterior", "inference"),
    },
}
# Nothing in the package imports these; the front door may name them, and imports plots on use only.
IMPORTED_BY_NOBODY = {"plots", "testing"}


def _files(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def _module(path: Path) -> tuple[str, ...]:
    """The dotted name of a file, in parts: ``("pyro_artransform", "univariate", "affine")``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Every module that the nodes of ``tree`` import, by absolute dotted name.

    ``from . import x`` counts as ``.x``, so that a submodule imported by that form is seen.
    """
    package = _module(path) if path.stem == "__init__" else _module(path)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def _part(path: Path) -> str:
    """The room of the house that a file is in; ``""`` for the front door."""
    parts = _module(path)
    return parts[1] if len(parts) > 1 else ""


def _parts_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in _imports(path, ast.parse(path.read_text()))]
    return {name[1] for name in names if name[0] == PACKAGE and len(name) > 1}


def _at_import(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions: what runs when it is imported."""

    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_Lambda(self, node: ast.Lambda) -> ast.Constant:
            return ast.copy_location(ast.Constant(None), node)

    return WithoutFunctions().visit(tree)


def _ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


PACKAGE_FILES = _files(PACKAGE)
package_files = pytest.mark.parametrize("path", PACKAGE_FILES, ids=_ids)
files_of_parts = pytest.mark.parametrize("path", list(filter(_part, PACKAGE_FILES)), ids=_ids)
all_files = pytest.mark.parametrize(
    "path",
    [
        *PACKAGE_FILES,
        *_files("tests", "tutorials", "benchmarks", "docs"),
        *sorted(ROOT.glob("*.py")),
    ],
    ids=_ids,
)


@files_of_parts
def test_arrows_point_one_way(path: Path) -> None:
    part = _part(path)
    assert part in ARROWS, f"{part} has no place among the arrows"
    others = _parts_imported(path) & set(ARROWS) - {part}
    assert others <= ARROWS[part], f"{part} must not import {sorted(others - ARROWS[part])}"


@package_files
def test_only_the_front_door_imports_the_front_door(path: Path) -> None:
    """A part that imports names from the package itself would hide an arrow."""
    names = [name.split(".") for name in _imports(path, ast.parse(path.read_text()))]
    through_the_door = {name[1] for name in names if name[0] == PACKAGE and len(name) > 1}
    unknown = through_the_door - set(ARROWS)
    assert not unknown, f"import from the part itself: {sorted(unknown)}"
    assert [PACKAGE] not in names


def test_the_front_door_imports_plots_on_use_only() -> None:
    path = ROOT / PACKAGE / "__init__.py"
    names = list(_imports(path, _at_import(ast.parse(path.read_text()))))
    assert names
    assert not [name for name in names if name.startswith(f"{PACKAGE}.plots")]


def test_nobody_may_import_plots_or_testing() -> None:
    assert not set().union(*ARROWS.values()) & IMPORTED_BY_NOBODY


def test_the_core_knows_neither_families_nor_conditioners() -> None:
    path = ROOT / PACKAGE / "transforms" / "autoregressive.py"
    assert not _parts_imported(path) - {"transforms", "arguments"}


@pytest.mark.parametrize(
    "path", [path for path in PACKAGE_FILES if _part(path) != "plots"], ids=_ids
)
def test_the_package_needs_torch_and_pyro_only(path: Path) -> None:
    """Whatever else a part uses is an extra, and is imported where it is used."""
    tree = _at_import(ast.parse(path.read_text()))
    roots = {name.split(".")[0] for name in _imports(path, tree)}
    assert roots <= RUNTIME | {PACKAGE} | set(sys.stdlib_module_names)


@all_files
def test_every_file_has_the_licence_header(path: Path) -> None:
    assert path.read_text().splitlines()[:2] == [
        "# Copyright Contributors to the pyro_artransform project.",
        "# SPDX-License-Identifier: Apache-2.0",
    ]


@all_files
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@all_files
def test_names_say_what_is_inside(path: Path) -> None:
    assert not VAGUE_NAMES & {part.lower().strip("_") for part in _module(path)}


@pytest.mark.parametrize(
    "path", [path for path in PACKAGE_FILES if path.stem == "__init__"], ids=_ids
)
def test_public_names_are_sorted_and_there(path: Path) -> None:
    name = ".".join(_module(path))
    module = importlib.import_module(name)
    if len(_module(path)) > 2 and not hasattr(module, "__all__"):
        return  # a folder inside of a room need not export anything
    assert list(module.__all__) == sorted(set(module.__all__))
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert not missing


IMPORT_CHANGES_NOTHING = """
import sys
import warnings

import pyro
import sympy  # which filters its own warnings, and which some versions of PyTorch import late
import torch

warnings.simplefilter("error")


def public_attributes(module):
    # Submodules that an import loads are new names of torch, and no change of its behaviour.
    return {
        name: value
        for name, value in vars(module).items()
        if not isinstance(value, type(sys)) and not name.startswith("__")
    }


def state():
    watched = [
        torch,
        torch.distributions,
        torch.distributions.transforms,
        torch.distributions.Transform,
        torch.distributions.TransformedDistribution,
        torch.nn.Module,
        pyro,
        pyro.distributions,
        pyro.distributions.TransformModule,
        pyro.distributions.torch_transform,
        pyro.infer,
        pyro.infer.autoguide.AutoGuide,
        pyro.infer.autoguide.AutoContinuous,
        pyro.nn.module,
    ]
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "seed": torch.initial_seed(),
        "random state": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "Pyro's settings": dict(pyro.settings.get()),
        "param store": list(pyro.get_param_store().keys()),
        "warning filters": list(warnings.filters),
        **{repr(module): public_attributes(module) for module in watched},
    }


before = state()
import pyro_artransform

after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, changed
assert "matplotlib" not in sys.modules
"""


def test_importing_the_package_changes_nothing_outside_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHANGES_NOTHING], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
