# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Parameters away from their start, where a mistake cannot hide behind zeros, and random inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BATCH_SHAPES = ((), (3,), (3, 4))
DTYPES = (torch.float32, torch.float64)


def redraw(module: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Re-draws every parameter of a module in place, at PyTorch's default scale times ``gain``.

    :param module: any module.
    :param gain: a factor for the weights.
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
    draw = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return draw.to(dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes a dtype the default for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
