# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a conditioner, as assertions, at redrawn parameters and random inputs."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.conditioners import Conditioner
from ..flows.conditioners.masks import levels
from .comparison import BATCH_SHAPES, DTYPES, equal, normal, redraw


def check_conditioner(
    make: Callable[[], nn.Module],
    input_dim: int,
    *,
    context_dim: int = 0,
    adjacency: Tensor | None = None,
) -> None:
    """Checks that a conditioner keeps its contract.

    It returns shape ``(*, D, P)`` in the dtype of its input, starts at zero, depends on exactly the
    coordinates that its graph allows (checked beyond gradients), has a ``depth`` no smaller than its graph's,
    is deterministic, treats rows alike, broadcasts a context, and is restored by its state dict.

    :param input_dim: the number D of coordinates.
    :param context_dim: the size C of its context, 0 for none.
    :param adjacency: its graph, boolean of shape ``(D, D)``, by default all edges in the order 0 .. D-1.
    :raises AssertionError: with the broken contract and the input.
    """

    def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        sizes = [input_dim, context_dim] if context_dim else [input_dim]
        return [normal((*shape, size), dtype, seed=size) for size in sizes]

    conditioner = make()
    assert isinstance(conditioner, nn.Module), f"expected an nn.Module, got {type(conditioner)}"
    for dtype, shape in product(DTYPES, BATCH_SHAPES):
        params = copy.deepcopy(conditioner).to(dtype)(*inputs(*shape, dtype=dtype))
        zeros = torch.zeros((*shape, input_dim, params.shape[-1]), dtype=dtype, device="cpu")
        equal(params, zeros, "shape and start: expected zero parameters (*, D, P) at first")
    _check_rows(redraw(conditioner.double()), *inputs(3, 4))
    if adjacency is None:
        adjacency = torch.ones((input_dim, input_dim), dtype=torch.bool, device="cpu").tril(-1)
    for gain in (1.0, 10.0):
        _check_graph(redraw(conditioner, gain), adjacency, inputs()[1:], gain)
    depth = conditioner.depth if isinstance(conditioner, Conditioner) else None
    needed = int(levels(adjacency).max()) + 1
    path = f"{needed} coordinates are on the longest path of its graph"
    # the inverse stops after ``depth`` passes
    assert depth is None or depth >= needed, f"depth: it states {depth}, but {path}"
    restored, expected = redraw(make().double(), seed=1), conditioner(*inputs(3))
    restored.load_state_dict(conditioner.state_dict(), strict=True)
    equal(restored(*inputs(3)), expected, "load_state_dict: the values changed")
    equal(copy.deepcopy(conditioner)(*inputs(3)), expected, "deepcopy: the values changed")


def _check_rows(conditioner: nn.Module, x: Tensor, *contexts: Tensor) -> None:
    whole = conditioner(x, *contexts)
    equal(conditioner(x, *contexts), whole, "random: the same x gives different values")
    row = conditioner(*(argument[1, 2] for argument in (x, *contexts)))
    equal(row, whole[1, 2], "batch: a row alone gives a different value", 1e-10)
    for context in contexts:
        one = conditioner(x, context[:1, :1])
        assert one.shape == whole.shape, "context: shape (1, 1, C) does not broadcast with x"
        assert not torch.equal(one, whole), "context: it has no effect"


def _check_graph(module: nn.Module, adjacency: Tensor, contexts: list[Tensor], gain: float) -> None:
    points = [normal((len(adjacency),), seed=seed) for seed in range(3)]
    depends = torch.stack([_moved(module, x, contexts) for x in points]).any(0)
    for name, wrong in {
        "autoregressive: {} depend on x_j where the graph has no edge": depends & ~adjacency,
        "graph: {} do not depend on x_j where the graph has an edge": adjacency & ~depends,
    }.items():
        fault = name.format(f"with parameters re-drawn at gain {gain}, parameters of coordinate i")
        assert not wrong.any(), f"{fault}, for (i, j) in {wrong.nonzero()[:10].tolist()}"


def _moved(module: nn.Module, x: Tensor, contexts: list[Tensor]) -> Tensor:
    """Which parameters change as each coordinate moves a little and far, also without gradients."""
    rows, is_moved = x.expand(len(x), -1), torch.eye(len(x), dtype=torch.bool, device="cpu")
    inputs: list[Any] = [context.expand(len(x), -1) for context in contexts]
    to = (x - 10.0, x - 0.1, x + 0.1, x + 10.0)
    with torch.no_grad():
        before = module(rows, *inputs)
        after = torch.stack([module(torch.where(is_moved, new, rows), *inputs) for new in to])
    return ~torch.isclose(after, before, rtol=1e-9, atol=1e-10).all(-1).all(0).mT
