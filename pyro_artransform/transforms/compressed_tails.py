# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A fixed elementwise transform that lets no draw go far."""

import math

import torch
from torch import Tensor

from ..arguments import check_positive
from .flow_module import FlowModule


class CompressedTails(FlowModule):
    r"""The identity up to a knot, and beyond it a distance that grows like a logarithm.

    .. math::

        y = \pm \left(c + w \operatorname{arsinh} \frac{|x| - c}{w}\right) \qquad |x| > c

    It acts on each coordinate, has two continuous derivatives, and no parameters. By default 100
    goes to 48 and 1,000 to 54; what is within 40 scales stays what it is.

    :param knot: c, where it begins.
    :param width: w, the distance over which the slope falls from 1 to :math:`1/\sqrt2`.
    :param cache_size: as for :class:`FlowModule`.
    :raises ValueError: if one of the two is not positive and finite.

    Example::

        >>> import torch
        >>> CompressedTails()(torch.tensor([-3.0, 0.0, 10.0]))
        tensor([-3.,  0., 10.])
    """

    def __init__(self, knot: float = 40.0, width: float = 2.0, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.knot = check_positive("knot", knot)
        self.width = check_positive("width", width)

    def extra_repr(self) -> str:
        return f"knot={self.knot}, width={self.width}"

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner, excess = self._split(x)
        return torch.add(inner, excess.asinh(), alpha=self.width), -_log_root(excess).sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inner, excess = self._split(y)
        # so that the square of what comes out does not overflow
        large = 0.4 * math.log(torch.finfo(y.dtype).max)
        excess = excess.clamp(-large, large).sinh()
        return torch.add(inner, excess, alpha=self.width), _log_root(excess).sum(-1)

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        excess = _bounded(self._split(x.detach())[1])
        square = 1 + excess * excess
        score = (score.detach() + excess / (self.width * square)) * square.sqrt()
        return *self.call_and_ladj(x), score

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is up to the knot, and in units of the width what is beyond."""
        inner = x.clamp(-self.knot, self.knot)
        return inner, (x - inner) / self.width


def _log_root(x: Tensor) -> Tensor:
    """``log(sqrt(1 + x * x))``."""
    x = _bounded(x)
    return 0.5 * torch.log1p(x * x)


def _bounded(x: Tensor) -> Tensor:
    """x where its square does not overflow."""
    large = torch.finfo(x.dtype).max ** 0.4
    return x.clamp(-large, large)
