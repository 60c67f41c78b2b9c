# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a conditioner, as assertions."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .redraw import normal_like, redraw

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
    for dtype in (torch.float32, torch.float64):
        _check_shapes(copy.deepcopy(conditioner).to(dtype), input_dim, context_dim, dtype)
    conditioner = conditioner.double()
    if zero_at_start:
        _check_zero(conditioner, input_dim, context_dim)
    for gain in (1.0, 10.0):
        redraw(conditioner, gain)
        _check_graph(conditioner, adjacency, context_dim, gain)
    redraw(conditioner)
    _check_rows(conditioner, input_dim, context_dim)
    _check_restored(conditioner, make, input_dim, context_dim)


def evaluate(conditioner: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """The parameters, with a context where there is one."""
    return conditioner(x) if context is None else conditioner(x, context)


def _inputs(
    shape: tuple[int, ...], input_dim: int, context_dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None]:
    like = torch.zeros((), dtype=dtype, device="cpu")
    x = normal_like(shape + (input_dim,), like, seed=1)
    return x, normal_like(shape + (context_dim,), like, seed=2) if context_dim else None


def _check_shapes(conditioner: nn.Module, dim: int, context_dim: int, dtype: torch.dtype) -> None:
    for shape in BATCH_SHAPES:
        x, context = _inputs(shape, dim, context_dim, dtype)
        params = evaluate(conditioner, x, context)
        assert params.shape[:-1] == x.shape, (
            f"shape: expected {tuple(x.shape)} + (P,) for x of shape {tuple(x.shape)}, "
            f"got {tuple(params.shape)}"
        )
        assert params.dtype == dtype, f"dtype: expected {dtype}, got {params.dtype}"


def _check_zero(conditioner: nn.Module, dim: int, context_dim: int) -> None:
    largest = evaluate(conditioner, *_inputs((3,), dim, context_dim)).abs().max().item()
    assert largest == 0, f"start: expected zero parameters of a new conditioner, got {largest}"


def _check_graph(conditioner: nn.Module, adjacency: Tensor, context_dim: int, gain: float) -> None:
    dim = len(adjacency)
    depends = torch.zeros((dim, dim), dtype=torch.bool, device="cpu")
    for seed in range(3):
        x = normal_like((dim,), torch.zeros((), dtype=torch.float64, device="cpu"), seed)
        _, context = _inputs((), dim, context_dim)
        jacobian = torch.autograd.functional.jacobian(
            lambda v, c=context: evaluate(conditioner, v, c), x
        )
        depends |= (jacobian != 0).any(1)
    wrong = (depends & ~adjacency).nonzero().tolist()
    assert not wrong, (
        f"autoregressive: with parameters re-drawn at gain {gain}, parameters of coordinate i depend "
        f"on x_j where the graph has no edge, for (i, j) in {wrong[:10]}"
    )
    absent = (adjacency & ~depends).nonzero().tolist()
    assert not absent, (
        f"graph: with parameters re-drawn at gain {gain}, parameters of coordinate i do not depend on "
        f"x_j although the graph has the edge, for (i, j) in {absent[:10]}"
    )


def _check_rows(conditioner: nn.Module, dim: int, context_dim: int) -> None:
    x, context = _inputs((3, 4), dim, context_dim)
    whole = evaluate(conditioner, x, context)
    row = evaluate(conditioner, x[1, 2], None if context is None else context[1, 2])
    assert torch.allclose(whole[1, 2], row, atol=1e-10), "batch: a row alone gives another value"
    if context is not None:
        one = evaluate(conditioner, x, context[:1, :1])
        assert one.shape == whole.shape, (
            f"context: one of shape {tuple(context[:1, :1].shape)} does not broadcast with x of shape "
            f"{tuple(x.shape)}"
        )
        assert not torch.equal(one, whole), "context: it has no effect"


def _check_restored(
    conditioner: nn.Module, make: Callable[[], nn.Module], dim: int, context_dim: int
) -> None:
    x, context = _inputs((3,), dim, context_dim)
    expected = evaluate(conditioner, x, context)
    other = redraw(make().double(), seed=1)
    other.load_state_dict(conditioner.state_dict(), strict=True)
    for name, twin in (("load_state_dict", other), ("deepcopy", copy.deepcopy(conditioner))):
        assert torch.equal(evaluate(twin, x, context), expected), f"{name}: the values changed"
