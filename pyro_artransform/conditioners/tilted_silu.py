# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""SiLU with a linear part of any size."""

from torch import Tensor, nn
from torch.nn.functional import silu

from ..arguments import check_share


class TiltedSiLU(nn.Module):
    r"""Twice SiLU, tilted to another slope at zero.

    .. math:: x \, (\mathrm{slope} + \tanh(x / 2)) = 2 \, \mathrm{SiLU}(x) + (\mathrm{slope} - 1) \, x

    The sum of many units has a linear part that training has to take away again where only the even part
    is wanted, as in a quadratic function. With slope 1 it is twice SiLU; with slope 0 it is even, and
    what is linear is left to ``skip_connections``.

    :param slope: the derivative at zero, from 0 to 1.
    :raises ValueError: if it is anything else.

    Example::

        >>> import torch
        >>> TiltedSiLU()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.5232, 0.0000, 2.5232])
    """

    __constants__ = ("slope",)

    def __init__(self, slope: float = 0.5) -> None:
        super().__init__()
        self.slope = check_share("slope", slope)

    def forward(self, x: Tensor) -> Tensor:
        """The value of each element."""
        return ((self.slope - 1.0) * x).add(silu(x), alpha=2.0)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"
