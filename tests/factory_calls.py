# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Calls in a source file that make a tensor without saying of which dtype and where."""

import ast
from pathlib import Path

FLOAT_FACTORIES = {
    *("zeros", "ones", "eye", "tensor", "rand", "randn", "full", "empty", "linspace", "logspace"),
    "scalar_tensor",
}
INTEGER_FACTORIES = {"arange", "randint", "randperm", "range", "tril_indices", "triu_indices"}


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
