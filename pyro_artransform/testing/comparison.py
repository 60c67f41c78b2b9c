# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Inputs and comparisons shared by all checks of contracts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BATCH_SHAPES = ((), (3,), (3, 4))
DTYPES = (torch.float32, torch.float64)


def redraw(module: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Redraws every parameter of a module in place, at PyTorch's default scale times ``gain``.

    :param seed: the seed of a separate generator; the global one is not used.
    :return: the module.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            draws = torch.zeros(parameter.shape, dtype=torch.float64, device="cpu")
            draws.uniform_(-1, 1, generator=generator)
            parameter.copy_(draws * gain / max(fan_in, 1) ** 0.5)
    return module


def normal(shape: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal draws on the CPU, from a separate generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets the default dtype within a context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def require(holds: Tensor, contract: str, **values: Tensor) -> None:
    """Fails with the values of the first entry that breaks a contract."""
    if not holds.all():
        first = tuple((~holds).nonzero()[0].tolist())
        entries = {name: value.broadcast_to(holds.shape)[first] for name, value in values.items()}
        shown = ", ".join(f"{name} = {entry.item():.9g}" for name, entry in entries.items())
        raise AssertionError(f"{contract} (contract broken for {shown}; entry {first})")


def equal(
    found: Tensor, expected: Tensor, contract: str, tolerance: Any = 0.0, **at: Tensor
) -> None:
    """Requires equality up to a tolerance relative to ``1 + |expected|``."""
    kinds = [(value.dtype, tuple(value.shape)) for value in (found, expected)]
    assert kinds[0] == kinds[1], f"{contract} (got {kinds[0]}, expected {kinds[1]})"
    holds = (found - expected).abs() <= tolerance * (1 + expected.abs())
    require(holds, contract, **at, found=found, expected=expected)


def check_gradient(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], contract: str
) -> None:
    """Checks gradients against finite differences; those of an output without a graph are zero."""
    try:
        torch.autograd.gradcheck(function, inputs, rtol=1e-5, fast_mode=True)
    except RuntimeError as error:
        differ = " ".join(str(error).splitlines()[:3])  # whole Jacobians follow
        raise AssertionError(f"{contract}: {differ}") from error
