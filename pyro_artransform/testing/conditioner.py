# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a conditioner, as assertions; parameters away from their start, and random inputs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioners import Conditioner
from ..conditioners.masks import levels

BATCH_SHAPES = ((), (3,), (3, 4))
DTYPES = (torch.float32, torch.float64)


def redraw(module: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Re-draws every parameter of a module in place, at PyTorch's default scale times ``gain``.

    :param seed: of a generator of its own; the global one stays as it is.
    :return: the module.
    """
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            size = gain / max(fan_in, 1) ** 0.5
            parameter.copy_((2 * torch.rand(parameter.shape, **options) - 1) * size)
    return module


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers on the CPU, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes a dtype the default for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_conditioner(
    make: Callable[[], nn.Module],
    input_dim: int,
    *,
    context_dim: int = 0,
    adjacency: Tensor | None = None,
) -> None:
    """Checks that a conditioner keeps its contract.

    It returns shape ``(*, D, P)`` in the dtype of its input, starts at zero, depends on exactly the
    coordinates that its graph allows, also where no gradient shows it, states no smaller ``depth``, gives
    the same values again, treats rows alike, broadcasts a context, and is restored by its state dict.

    :param input_dim: the number D of coordinates.
    :param context_dim: the size C of its context, 0 for none.
    :param adjacency: its graph, boolean of shape ``(D, D)``, by default that of the order 0 .. D-1.
    :raises AssertionError: that says which contract broke, and for which input.
    """

    def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        x = normal((*shape, input_dim), dtype, seed=1)
        return (x, normal((*shape, context_dim), dtype, seed=2)) if context_dim else (x,)

    conditioner = make()
    assert isinstance(conditioner, nn.Module), f"expected an nn.Module, got {type(conditioner)}"
    if adjacency is None:
        adjacency = torch.ones((input_dim, input_dim), dtype=torch.bool, device="cpu").tril(-1)
    for dtype, shape in product(DTYPES, BATCH_SHAPES):
        x, *contexts = inputs(shape, dtype)
        params = copy.deepcopy(conditioner).to(dtype)(x, *contexts)
        wanted, got = f"{shape} + ({input_dim}, P)", tuple(params.shape)
        assert params.shape[:-1] == x.shape, f"shape: expected {wanted}, got {got}"
        assert params.dtype == x.dtype, f"dtype: expected {x.dtype}, got {params.dtype}"
    conditioner = conditioner.double()
    largest = conditioner(*inputs((3,))).abs().max().item()
    assert largest == 0, f"start: expected zero parameters of a new conditioner, got {largest}"
    _check_rows(redraw(conditioner), inputs((3, 4)))
    for gain in (1.0, 10.0):
        _check_graph(redraw(conditioner, gain), adjacency, inputs(()), f"re-drawn at gain {gain}")
    # the inverse stops after as many passes as the stated depth
    depth = conditioner.depth if isinstance(conditioner, Conditioner) else None
    needed = int(levels(adjacency).max()) + 1
    path = f"{needed} coordinates are on the longest path of its graph"
    assert depth is None or depth >= needed, f"depth: it states {depth}, but {path}"
    expected, other = conditioner(*inputs((3,))), redraw(make().double(), seed=1)
    other.load_state_dict(conditioner.state_dict(), strict=True)
    for name, twin in (("load_state_dict", other), ("deepcopy", copy.deepcopy(conditioner))):
        assert torch.equal(twin(*inputs((3,))), expected), f"{name}: the values changed"


def _check_graph(module: nn.Module, adjacency: Tensor, inputs: Any, when: str) -> None:
    depends = torch.zeros_like(adjacency, dtype=torch.bool, device="cpu")
    for seed in range(3):
        x = normal((len(adjacency),), seed=seed)
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v, *inputs[1:]), x)
        depends |= (jacobian != 0).any(1) | _moved(module, x, inputs[1:])
    where = f"with parameters {when}, parameters of coordinate i"
    wrong, absent = (depends & ~adjacency).nonzero(), (adjacency & ~depends).nonzero()
    fault = f"autoregressive: {where} depend on x_j where the graph has no edge"
    assert not len(wrong), f"{fault}, for (i, j) in {wrong[:10].tolist()}"
    fault = f"graph: {where} do not depend on x_j where the graph has an edge"
    assert not len(absent), f"{fault}, for (i, j) in {absent[:10].tolist()}"


def _moved(module: nn.Module, x: Tensor, contexts: tuple[Tensor, ...]) -> Tensor:
    """Which parameters change with which coordinate, which a step or a detached x keeps from gradients."""
    rows = x.expand(len(x), -1)
    contexts = tuple(context.expand(len(x), -1) for context in contexts)
    moved = torch.zeros((len(x), len(x)), dtype=torch.bool, device="cpu")
    is_moved = torch.eye(len(x), dtype=torch.bool, device="cpu")
    with torch.no_grad():
        before = module(rows, *contexts)
        for value in (-10.0, 10.0):
            after = module(rows.masked_fill(is_moved, value), *contexts)
            moved |= ~torch.isclose(after, before, rtol=1e-9, atol=1e-10).all(-1)
    return moved.mT


def _check_rows(conditioner: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    whole = conditioner(*inputs)
    assert torch.equal(conditioner(*inputs), whole), "random: the same x gives other values again"
    row = conditioner(*(argument[1, 2] for argument in inputs))
    assert torch.allclose(whole[1, 2], row, atol=1e-10), "batch: a row alone gives another value"
    x, *contexts = inputs
    for context in contexts:
        one = conditioner(x, context[:1, :1])
        assert one.shape == whole.shape, "context: one of shape (1, 1, C) does not broadcast with x"
        assert not torch.equal(one, whole), "context: it has no effect"
