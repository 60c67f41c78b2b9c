# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A family with a slope of its own on each side: skewed, and with heavier or lighter tails."""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..arguments import check_positive
from .base import ElementwiseTransform, Univariate, soft_bound, unbind_params

# Adam moves every parameter at the same pace, and one log-slope moves a whole tail: at the pace of a
# network's weights the log-density would be noisy. The factor is chosen by hand.
_PACE = 0.1


class HingedTransform(ElementwiseTransform):
    r"""Smooth hinges, one after the other, each of which changes the slope beyond its knot.

    .. math::

        x \mapsto x \pm (e^a - 1) h(\pm x - c), \qquad h(u) = \tfrac12 (u + \sqrt{u^2 + w^2})

    A hinge has slope 1 on one side of its knot and :math:`e^a` on the other. There are two for each knot
    c, to the right at c and to the left at -c. The inverse of each is in closed form.

    :param right: the log-slopes to the right, one tensor of shape ``(*, D)`` for each knot.
    :param left: those to the left, likewise.
    :param knots: the knots c, in the order in which they are applied.
    :param width: the width w of a hinge.
    :raises ValueError: if there is no knot.

    Example::

        >>> transform = HingedTransform(torch.zeros(2, 5), torch.zeros(2, 5), [0.0, 1.0])
        >>> transform(torch.randn(32, 5)).shape
        torch.Size([32, 5])
    """

    def __init__(
        self,
        right: Sequence[Tensor] | Tensor,
        left: Sequence[Tensor] | Tensor,
        knots: Sequence[float],
        width: float = 0.7,
    ) -> None:
        super().__init__()
        if len(knots) == 0:
            raise ValueError("knots: expected at least one, got none")
        self._hinges: list[tuple[Tensor, float, float]] = []
        for k, knot in enumerate(knots):
            self._hinges += [(right[k], 1.0, knot), (left[k], -1.0, knot)]
        self.width = width

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        large = torch.finfo(x.dtype).max ** 0.4  # u * u must not overflow
        square, slopes = x.new_full((), self.width**2), []
        for log_slope, side, knot in self._hinges:
            k = 0.5 * torch.expm1(log_slope)
            u = (side * x - knot).clamp(-large, large)
            root = torch.addcmul(square, u, u).sqrt()
            x = torch.addcmul(x, k, u + root, value=side)
            slopes.append(torch.addcmul(1 + k, k, u / root))
        # one logarithm: it costs more than all else of a hinge
        return x, reduce(torch.mul, slopes).log()

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        large = torch.finfo(y.dtype).max ** 0.4
        square, slopes = y.new_full((), self.width**2), []
        for log_slope, side, knot in reversed(self._hinges):
            k, slope = 0.5 * torch.expm1(log_slope), log_slope.exp()
            v = (side * y - knot).clamp(-large, large)
            change = -k / slope * (v + torch.addcmul(slope * square, v, v).sqrt())
            y = y + side * change
            u = v + change
            slopes.append(torch.addcmul(1 + k, k, u / torch.addcmul(square, u, u).sqrt()))
        return y, -reduce(torch.mul, slopes).log()


class Hinged(Univariate):
    """The family of smooth hinges to the left and to the right.

    There are two log-slopes for each knot; their bounds sum to 3. It adds what Gaussian noise lacks of the
    shape of a marginal, such as the exponential tail of the logarithm of a scale.

    :param knots: where the slopes change, positive or zero, mirrored to the left.
    :param width: how smoothly.
    :raises ValueError: if there is no knot, a knot is negative, or ``width`` is not positive.

    Example::

        >>> Hinged(knots=[0.0])(torch.zeros(32, 5, 2))(torch.randn(32, 5)).shape
        torch.Size([32, 5])

    **References**

    1. Marginal Tail-Adaptive Normalizing Flows (Laszkiewicz, Lederer, Fischer, 2022),
       https://arxiv.org/abs/2206.10311
    """

    def __init__(self, *, knots: Sequence[float] = (0.0, 1.0, 2.0), width: float = 0.7) -> None:
        super().__init__()
        self.knots = tuple(map(float, knots))
        if not self.knots or min(self.knots) < 0 or not math.isfinite(sum(self.knots)):
            raise ValueError(f"knots: expected numbers of at least 0, got {knots!r}")
        self.width = check_positive("width", width)
        self.bound = 3.0 / len(self.knots)
        self.num_params = 2 * len(self.knots)
        self.broadcasts = True

    def extra_repr(self) -> str:
        return f"knots={self.knots}, width={self.width}"

    def forward(self, params: Tensor) -> HingedTransform:
        log_slopes = unbind_params(soft_bound(_PACE * params, self.bound), self.num_params)
        return HingedTransform(log_slopes[0::2], log_slopes[1::2], self.knots, self.width)
