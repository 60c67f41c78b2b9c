# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Parameters away from their start, where a mistake cannot hide behind zeros."""

import torch
from torch import nn


def redraw(module: nn.Module, gain: float = 1.0, seed: int = 0) -> nn.Module:
    """Re-draws every parameter of a module in place, at PyTorch's default scale times ``gain``.

    :param module: any module.
    :param gain: a factor for the weights.
    :param seed: of a generator of its own; the global one stays as it is.
    :return: the module.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            size = gain / max(fan_in, 1) ** 0.5
            draw = torch.rand(
                parameter.shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            parameter.copy_((2 * draw - 1) * size)
    return module


def normal_like(shape: tuple[int, ...], like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers from a generator of their own.

    :param shape: the shape.
    :param like: a tensor whose dtype and device are taken.
    :param seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return draw.to(dtype=like.dtype, device=like.device)
