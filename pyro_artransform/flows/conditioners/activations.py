# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Activations, and a check that one is elementwise."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ..._base.arguments import check_share


class TiltedSiLU(nn.Module):
    r"""Twice SiLU, tilted to a given slope at zero.

    .. math:: x \, (\mathrm{slope} + \tanh(x / 2)) = 2 \, \mathrm{SiLU}(x) + (\mathrm{slope} - 1) \, x

    The sum of many units has a linear part, which training must remove if only the even part is needed. With
    slope 1 this is twice SiLU; with slope 0 it is an even function.

    :param slope: the derivative at zero, from 0 to 1.
    :raises ValueError: if the slope is not between 0 and 1.
    """

    __constants__ = ("slope",)
    elementwise = True  # for is_elementwise

    def __init__(self, slope: float = 0.5) -> None:
        super().__init__()
        self.slope = check_share("slope", slope)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the activation to each element."""
        return ((self.slope - 1.0) * x).add(silu(x), alpha=2.0)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


#: PyTorch's elementwise activations without randomness.
ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish),
    *(nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink),
)


def is_elementwise(nonlinearity: object) -> bool:
    """Whether an activation is known, by its exact class, to be elementwise and deterministic."""
    cls = type(nonlinearity)
    return cls in ELEMENTWISE or "elementwise" in vars(cls)


def default_activation(dim: int) -> nn.Module:
    """The activation of a guide's networks: SiLU up to 64 coordinates, then :class:`TiltedSiLU`."""
    # beyond 64, narrower networks get as close with a smaller linear part (benchmarks/flows.md)
    return nn.SiLU() if dim <= 64 else TiltedSiLU()


def slope_of(nonlinearity: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an elementwise function at x, in the shape of x, without a graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = nonlinearity(x)
        return torch.autograd.grad(value.sum(), x)[0]
