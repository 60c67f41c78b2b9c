# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a conditioner, as assertions."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .redraw import normal, redraw

BATCH_SHAPES = ((), (3,), (3, 4))


def check_conditioner(
    make: Callable[[], nn.Module],
    input_dim: int,
    *,
    context_dim: int = 0,
    adjacency: Tensor | None = None,
    zero_at_start: bool = True,
) -> None:
    """Checks that a conditioner keeps its contract.

    It returns shape ``(*, D, P)`` for any batch shape, in the dtype of its input, starts at zero,
    depends on exactly the coordinates that its graph allows, whatever its parameters are, treats the
    rows of a batch alike, broadcasts a context, and is restored by its state dict.

    :param make: builds the conditioner.
    :param input_dim: the number D of coordinates.
    :param context_dim: the size C of its context, 0 for none.
    :param adjacency: its graph, boolean of shape ``(D, D)``, by default that of the order 0 .. D-1.
    :param zero_at_start: False for one that is documented to start elsewhere.
    :raises AssertionError: that says which contract broke, and for which input.
    """
    conditioner = make()
    assert isinstance(conditioner, nn.Module), f"expected an nn.Module, got {type(conditioner)}"
    if adjacency is None:
        adjacency = torch.ones((input_dim, input_dim), dtype=torch.bool, device="cpu").tril(-1)
    sizes = input_dim, context_dim
    for dtype in (torch.float32, torch.float64):
        _check_shapes(copy.deepcopy(conditioner).to(dtype), sizes, dtype)
    conditioner = conditioner.double()
    if zero_at_start:
        largest = _evaluate(conditioner, *_inputs((3,), sizes)).abs().max().item()
        assert largest == 0, f"start: expected zero parameters of a new conditioner, got {largest}"
    for gain in (1.0, 10.0):
        _check_graph(redraw(conditioner, gain), adjacency, context_dim, f"re-drawn at gain {gain}")
    redraw(conditioner)
    _check_rows(conditioner, *_inputs((3, 4), sizes))
    _check_restored(conditioner, redraw(make().double(), seed=1), *_inputs((3,), sizes))


def _inputs(
    shape: tuple[int, ...], sizes: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None]:
    input_dim, context_dim = sizes
    context = normal(shape + (context_dim,), dtype, seed=2) if context_dim else None
    return normal(shape + (input_dim,), dtype, seed=1), context


def _evaluate(conditioner: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    return conditioner(x) if context is None else conditioner(x, context)


def _check_shapes(conditioner: nn.Module, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    for shape in BATCH_SHAPES:
        x, context = _inputs(shape, sizes, dtype)
        params = _evaluate(conditioner, x, context)
        assert params.shape[:-1] == x.shape, (
            f"shape: expected {tuple(x.shape)} + (P,) for x of shape {tuple(x.shape)}, "
            f"got {tuple(params.shape)}"
        )
        assert params.dtype == dtype, f"dtype: expected {dtype}, got {params.dtype}"


def _check_graph(module: nn.Module, adjacency: Tensor, context_dim: int, when: str) -> None:
    depends = torch.zeros_like(adjacency, dtype=torch.bool, device="cpu")
    _, context = _inputs((), (len(adjacency), context_dim))
    for seed in range(3):
        x = normal((len(adjacency),), seed=seed)
        jacobian = torch.autograd.functional.jacobian(lambda v: _evaluate(module, v, context), x)
        depends |= (jacobian != 0).any(1)
    wrong = (depends & ~adjacency).nonzero().tolist()
    assert not wrong, (
        f"autoregressive: with parameters {when}, parameters of coordinate i depend on x_j where the "
        f"graph has no edge, for (i, j) in {wrong[:10]}"
    )
    absent = (adjacency & ~depends).nonzero().tolist()
    assert not absent, (
        f"graph: with parameters {when}, parameters of coordinate i do not depend on x_j although the "
        f"graph has the edge, for (i, j) in {absent[:10]}"
    )


def _check_rows(conditioner: nn.Module, x: Tensor, context: Tensor | None) -> None:
    whole = _evaluate(conditioner, x, context)
    row = _evaluate(conditioner, x[1, 2], None if context is None else context[1, 2])
    assert torch.allclose(whole[1, 2], row, atol=1e-10), "batch: a row alone gives another value"
    if context is not None:
        one = _evaluate(conditioner, x, context[:1, :1])
        assert one.shape == whole.shape, (
            f"context: one of shape {tuple(context[:1, :1].shape)} does not broadcast with x of shape "
            f"{tuple(x.shape)}"
        )
        assert not torch.equal(one, whole), "context: it has no effect"


def _check_restored(
    conditioner: nn.Module, other: nn.Module, x: Tensor, context: Tensor | None
) -> None:
    expected = _evaluate(conditioner, x, context)
    other.load_state_dict(conditioner.state_dict(), strict=True)
    for name, twin in (("load_state_dict", other), ("deepcopy", copy.deepcopy(conditioner))):
        assert torch.equal(_evaluate(twin, x, context), expected), f"{name}: the values changed"
