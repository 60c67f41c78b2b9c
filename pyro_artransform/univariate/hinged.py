# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Laws with a slope of their own on each side: skewed, and with heavier or lighter tails."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import ElementwiseTransform, Univariate, positive, soft_bound, unbind_params

# a slope moves a whole tail: at the pace of a network's weights it would be restless
_PACE = 0.1


class HingedTransform(ElementwiseTransform):
    r"""
    Smooth hinges, one after the other, each of which changes the slope beyond its knot.

    .. math::

        x \mapsto x \pm (e^a - 1) h(\pm x - c), \qquad h(u) = \tfrac12 (u + \sqrt{u^2 + w^2})

    A hinge has slope 1 on one side of its knot and :math:`e^a` on the other. There are two for each
    knot c, to the right at c and to the left at -c. The inverse of each is in closed form.

    :param right: The log-slopes to the right, one tensor of shape ``(*, D)`` for each knot.
    :param left: Those to the left, likewise.
    :param knots: The knots c, in the order in which they are applied.
    :param float width: The width w of a hinge.

    Example::

        >>> import torch
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
        self._hinges = [
            (log_slopes[k], side, knot)
            for k, knot in enumerate(knots)
            for log_slopes, side in ((right, 1.0), (left, -1.0))
        ]
        self.width = width

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for log_slope, side, knot in self._hinges:
            k = 0.5 * torch.expm1(log_slope)
            u = _finite(side * x - knot)
            root = torch.sqrt(u * u + self.width**2)
            x = x + side * k * (u + root)
            ladj = torch.log1p(k * (1 + u / root))
            total = ladj if total is None else total + ladj
        return x, _known(total)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for log_slope, side, knot in reversed(self._hinges):
            k, slope = 0.5 * torch.expm1(log_slope), log_slope.exp()
            v = _finite(side * y - knot)
            change = -k / slope * (v + torch.sqrt(v * v + slope * self.width**2))
            y = y + side * change
            u = v + change
            ladj = -torch.log1p(k * (1 + u / torch.sqrt(u * u + self.width**2)))
            total = ladj if total is None else total + ladj
        return y, _known(total)


class Hinged(Univariate):
    """
    The family of smooth hinges to the left and to the right.

    There are two log-slopes for each knot; their bounds sum to 3. What Gaussian noise lacks of the
    shape of a marginal, such as the exponential tail of the logarithm of a scale, this has.

    :param knots: Where the slopes change, positive or zero, mirrored to the left.
    :param float width: How smoothly.
    :raises ValueError: If there is no knot, a knot is negative, or ``width`` is not positive.

    Example::

        >>> import torch
        >>> family = Hinged()
        >>> family(torch.zeros(32, 5, family.num_params))(torch.randn(32, 5)).shape
        torch.Size([32, 5])

    References:

    Marginal Tail-Adaptive Normalizing Flows (Laszkiewicz, Lederer, Fischer, 2022),
    https://arxiv.org/abs/2206.10311
    """

    def __init__(self, *, knots: Sequence[float] = (0.0, 1.0, 2.0), width: float = 0.7) -> None:
        super().__init__()
        self.knots = tuple(float(knot) for knot in knots)
        if not self.knots or not all(0 <= knot < math.inf for knot in self.knots):
            raise ValueError(f"knots: expected numbers of at least 0, got {knots!r}")
        self.width = positive("width", width)
        self.bound = 3.0 / len(self.knots)
        self.num_params = 2 * len(self.knots)

    def extra_repr(self) -> str:
        return f"knots={self.knots}, width={self.width}"

    def forward(self, params: Tensor) -> HingedTransform:
        self.check_params(params)
        log_slopes = unbind_params(soft_bound(_PACE * params, self.bound))
        return HingedTransform(log_slopes[0::2], log_slopes[1::2], self.knots, self.width)


def _known(total: Tensor | None) -> Tensor:
    if total is None:
        raise ValueError("knots: expected at least one, got none")
    return total


def _finite(u: Tensor) -> Tensor:
    """So large at most that the square does not overflow: infinity times a slope of zero is no number."""
    large = torch.finfo(u.dtype).max ** 0.4
    return u.clamp(-large, large)
