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
LICENCE = [
    "# Copyright Contributors to the pyro_artransform project.",
    "# SPDX-License-Identifier: Apache-2.0",
]

# Who may import whom (each part may import itself). A part that is not listed is an error: give it
# its place here when it is built.
ARROWS: dict[str, set[str]] = {
    "_base": set(),
    "flows": {"_base"},
    "model": {"_base"},
    "posterior": {"_base", "model"},
    "diagnostics": {"_base", "model", "posterior"},
    "sampling": {"_base", "model", "posterior", "diagnostics"},
    "guides": {"_base", "flows", "model", "posterior"},
    "inference": {"_base", "diagnostics", "guides", "model", "posterior", "sampling"},
    "plots": {"diagnostics", "guides", "inference"},
    "testing": {"_base", "flows"},
}
# The same inside of a room, for its folders and files.
ARROWS_INSIDE: dict[str, dict[str, set[str]]] = {
    "flows": {
        "univariate": set(),
        "conditioners": set(),
        "transforms": {"univariate", "conditioners"},
        "builders": {"univariate", "conditioners", "transforms"},
    },
}
FLOAT_FACTORIES = {
    *("zeros", "ones", "eye", "tensor", "rand", "randn", "full", "empty", "linspace", "logspace"),
    "scalar_tensor",
}
INTEGER_FACTORIES = {"arange", "randint", "randperm", "range", "tril_indices", "triu_indices"}
# Nothing in the package imports these; the front door may name them, and imports plots on use only.
IMPORTED_BY_NOBODY = {"plots", "testing"}


def _files(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def _module(path: Path) -> tuple[str, ...]:
    """The dotted name of a file, in parts: ``("pyro_artransform", "univariate", "affine")``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imports(path: Path, tree: ast.AST) -> Iterator[list[str]]:
    """Every module that the nodes of ``tree`` import, by absolute dotted name, in parts.

    ``from . import x`` counts as ``.x``, so that a submodule imported by that form is seen.
    """
    package = _module(path) if path.stem == "__init__" else _module(path)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{prefix}.{alias.name}".split(".") for alias in node.names)


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


PACKAGE_FILES = {path: ast.parse(path.read_text()) for path in _files(PACKAGE)}


def test_arrows_point_one_way() -> None:
    """The front door alone may import any part; no part imports the front door."""
    assert not set().union(*ARROWS.values()) & IMPORTED_BY_NOBODY
    for path, tree in PACKAGE_FILES.items():
        own = [name for name in _imports(path, tree) if name[0] == PACKAGE]
        if len(_module(path)) == 1:
            continue
        part, others = _module(path)[1], {name[1] if len(name) > 1 else "" for name in own}
        assert part in ARROWS, f"{part} has no place among the arrows"
        wrong = others - ARROWS[part] - {part}
        assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"
        if len(_module(path)) > 2 and (arrows := ARROWS_INSIDE.get(part)):
            inner = _module(path)[2]
            inside = {name[2] for name in own if name[1] == part and len(name) > 2}
            wrong = inside - arrows[inner] - {inner}
            assert not wrong, f"{path.relative_to(ROOT)} must not import {sorted(wrong)}"


def test_inference_knows_of_guides_the_default_choice_alone() -> None:
    """A fit takes any guide by its protocol, and chooses one if none is given."""
    chosen = {("choice", "choose_guide"), ("choice", "choose_mixture")}
    for path, tree in PACKAGE_FILES.items():
        if _module(path)[1:2] == ("inference",):
            guides = {tuple(name[2:]) for name in _imports(path, tree) if name[1:2] == ["guides"]}
            assert guides <= (chosen if path.stem == "problem" else set()), path


def test_the_core_knows_neither_families_nor_conditioners() -> None:
    path = ROOT / PACKAGE / "flows" / "transforms" / "autoregressive.py"
    names = [name for name in _imports(path, PACKAGE_FILES[path]) if name[0] == PACKAGE]
    parts = {".".join(name[1 : 3 if name[1] == "flows" else 2]) for name in names}
    assert parts <= {"_base", "flows.transforms"}


def test_the_package_needs_torch_and_pyro_only() -> None:
    """Whatever else a part uses is an extra, and is imported where it is used; so are plots."""
    for path, tree in PACKAGE_FILES.items():
        names = list(_imports(path, _at_import(tree)))
        if [*_module(path), ""][1] == "plots":
            continue
        others = {name[0] for name in names} - RUNTIME - {PACKAGE} - set(sys.stdlib_module_names)
        assert not others, f"{path.relative_to(ROOT)} imports {sorted(others)}"
        assert not [name for name in names if name[:2] == [PACKAGE, "plots"]], path


def test_files_have_a_licence_and_a_name_and_are_short() -> None:
    others = [*_files("tests", "tutorials", "benchmarks", "docs"), *ROOT.glob("*.py")]
    for path in [*PACKAGE_FILES, *others]:
        where, lines = path.relative_to(ROOT), path.read_text().splitlines()
        assert lines[:2] == LICENCE, f"{where} has no licence header"
        assert len(lines) <= MAX_LINES, f"{where} has {len(lines)} lines"
        assert not VAGUE_NAMES & {part.lower().strip("_") for part in _module(path)}, where


def test_formulas_of_docstrings_render() -> None:
    """A doubled backslash in a raw docstring is a line break of LaTeX in place of a command."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    for path in PACKAGE_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            docstring = ast.get_docstring(node) if isinstance(node, documented) else None
            assert "\\\\" not in (docstring or ""), path


def bare_factory_calls(path: Path) -> list[tuple[int, str]]:
    """Calls that make a tensor without saying of which dtype and where, and moves by name."""
    faults = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, node.func.value
        given = {keyword.arg for keyword in node.keywords}
        of_torch = isinstance(owner, ast.Name) and owner.id == "torch"
        missing = (
            of_torch
            and None not in given
            and (
                (name in FLOAT_FACTORIES and not {"dtype", "device"} <= given)
                or (name in INTEGER_FACTORIES and "device" not in given)
            )
        )
        if missing or (name in ("cuda", "cpu") and not of_torch):
            faults.append((node.lineno, ast.unparse(node)[:60]))
    return faults


def test_tensors_are_made_where_their_arguments_are() -> None:
    for path in PACKAGE_FILES:
        faults = [f"{path.name}:{line}: {text}" for line, text in bare_factory_calls(path)]
        assert not faults, f"made without dtype and device: {'; '.join(faults[:3])}"


@pytest.mark.parametrize(
    ("line", "faulty"),
    [
        ("torch.zeros(3)", True),
        ("torch.zeros(3, dtype=x.dtype)", True),
        ("torch.zeros(3, dtype=x.dtype, device=x.device)", False),
        ("torch.zeros(3, **like)", False),
        ("torch.arange(3)", True),
        ("torch.arange(3, device=x.device)", False),
        ("torch.zeros_like(x)", False),
        ("x.new_zeros(3)", False),
        ("x.cuda(0)", True),
        ("x.cpu()", True),
    ],
)
def test_lint_of_factory_calls(line: str, faulty: bool, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(f"def f(x, like):\n    return {line}\n")
    assert bool(bare_factory_calls(path)) == faulty


def test_public_names_are_sorted_and_there() -> None:
    for path in PACKAGE_FILES:
        name = ".".join(_module(path))
        module = importlib.import_module(name) if path.stem == "__init__" else None
        if module is None or _module(path)[-1].startswith("_"):
            continue
        if len(_module(path)) > 2 and not hasattr(module, "__all__"):
            continue  # a folder inside of a room need not export anything
        assert list(module.__all__) == sorted(set(module.__all__)), name
        missing = [public for public in module.__all__ if not hasattr(module, public)]
        assert not missing, f"{name} lacks {missing}"


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
from pyro_artransform import *
assert "matplotlib" not in sys.modules
"""


def test_importing_the_package_changes_nothing_outside_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHANGES_NOTHING], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout
