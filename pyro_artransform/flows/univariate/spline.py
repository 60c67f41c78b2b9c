# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Rational-quadratic splines with identity tails."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._base.arguments import check_broadcast, check_integer, check_positive, is_tracing
from .base import ElementwiseTransform, Univariate, split_params

# The arc tangent times this is below 1. It bounds the log-slope of a bin relative to the others, and the log
# derivative at a knot relative to adjacent slopes, so that the spline's log derivative is below about 3.
_TO_ONE = 2 / math.pi


class Bin(NamedTuple):
    """The bins that contain some points, with the spline's square scaled to the unit square."""

    x0: Tensor
    y0: Tensor
    height: Tensor
    slope: Tensor
    alpha: Tensor  # the derivative at the left knot, minus the slope
    beta: Tensor  # the derivative at the right knot, minus the slope

    def log_derivative(self, z: Tensor, z1: Tensor, denominator: Tensor) -> Tensor:
        """The log of dy / dx at a fraction ``z = 1 - z1`` of the bin."""
        # In this form it is exactly zero if both derivatives and the slope are one.
        numerator = self.slope + self.beta * z * z + self.alpha * z1 * z1
        return torch.log(numerator * (self.slope / denominator).square())


class MonotonicRQSTransform(ElementwiseTransform):
    r"""A rational-quadratic spline on ``[-bound, bound]``, and the identity outside.

    In a bin with corners :math:`(x_0, y_0)` and :math:`(x_0 + w, y_0 + h)`, slope
    :math:`s = h / w`, derivatives :math:`d_0, d_1` at its ends and :math:`z = (x - x_0) / w`,

    .. math::
        y = y_0 + h \frac{s z^2 + d_0 z (1 - z)}{s + (d_0 + d_1 - 2 s) z (1 - z)}

    The derivative is continuous everywhere. The widths are the softmax of the bounded ``widths``; the slopes
    are proportional to the exponential of the bounded ``heights`` (a height is a slope times a width); and
    the derivative at a knot is the geometric mean of the adjacent slopes, times the exponential of the
    bounded ``derivatives``. Zero parameters give exactly the identity.

    :param widths: unconstrained bin widths, shape ``(*, K)``.
    :param heights: unconstrained bin heights, shape ``(*, K)``.
    :param derivatives: unconstrained knot derivatives, shape ``(*, K - 1)``.
    :param bound: the upper end of the spline's domain and codomain.
    :raises ValueError: if the shapes do not match.

    **References**

    1. Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios, 2019),
       https://arxiv.org/abs/1906.04032
    """

    def __init__(
        self, widths: Tensor, heights: Tensor, derivatives: Tensor, *, bound: float = 5.0
    ) -> None:
        super().__init__()
        tables = widths, heights, derivatives
        if not is_tracing():  # sizes are tensors during tracing, and cannot be compared
            bins = widths.shape[-1] if widths.dim() else 0
            if bins < 2 or [t.shape[-1:] for t in tables[1:]] != [(bins,), (bins - 1,)]:
                got = ", ".join(str(tuple(t.shape)) for t in tables)
                raise ValueError(
                    "expected widths, heights and derivatives of shapes (*, K), (*, K) and (*, K - 1) "
                    f"with K >= 2, got {got}"
                )
        batches = [t.shape[:-1] for t in tables]
        check_broadcast("batch shapes of widths, heights and derivatives", *batches)
        self.bound = check_positive("bound", bound)
        # Bins are moved before the last dimension, where softmax and cumsum are vectorized; a table without
        # a dimension of coordinates gets one.
        widths, heights, self.derivatives = (torch.atleast_2d(table).mT for table in tables)
        # In place, a quarter of the cost of soft_bound, since tables are K times as large as the data.
        logits = torch.atan(widths)
        self.widths = torch.softmax(logits, -2)
        slopes = torch.atan(heights).mul_(_TO_ONE)
        self.heights = torch.softmax(logits + slopes, -2)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() < self.bound
        t = self._to_unit(x)
        b = self._find(t, self.widths)
        step = t - b.x0
        z = step * b.slope / b.height
        z1 = 1 - z
        zz = z * z1
        denominator = b.slope + (b.alpha + b.beta) * zz
        bend = b.height * zz * (b.alpha * z1 - b.beta * z) / denominator
        # The difference from x is exactly zero for zero parameters.
        change = (b.y0 - b.x0) + (b.slope - 1) * step + bend
        ladj = b.log_derivative(z, z1, denominator)
        y = torch.where(inside, x + change * (2 * self.bound), x)
        return y, torch.where(inside, ladj, 0.0)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.abs() < self.bound
        t = self._to_unit(y)
        b = self._find(t, self.heights)
        step = t - b.y0
        u = step / b.height
        # The quadratic a z^2 + q z - s u = 0. This formula for its root never subtracts nearly equal
        # numbers, and also holds for a = 0.
        gamma = (b.alpha + b.beta) * u
        a = gamma - b.alpha
        q = b.alpha + b.slope - gamma
        ratio = 2 / (q + torch.sqrt(q * q + 4 * a * b.slope * u))
        z = ratio * b.slope * u
        z1 = 1 - z
        denominator = b.slope + (b.alpha + b.beta) * z * z1
        change = (b.x0 - b.y0) + (ratio - 1) * step
        ladj = -b.log_derivative(z, z1, denominator)
        x = torch.where(inside, y + change * (2 * self.bound), y)
        return x, torch.where(inside, ladj, 0.0)

    def _to_unit(self, x: Tensor) -> Tensor:
        # Clamped, so that gradients of the unused spline values in the tails are finite (zero).
        return (x.clamp(-self.bound, self.bound) + self.bound) * (0.5 / self.bound)

    def _find(self, t: Tensor, lengths: Tensor) -> Bin:
        """The bins that contain ``t``; ``lengths`` are the widths or heights of all bins."""
        scalar = t.dim() == 0 and self.widths.dim() == 2 and self.widths.shape[-1] == 1
        tables = self.widths, self.heights, lengths, self.derivatives
        t = torch.broadcast_tensors(t, *(table[..., 0, :] for table in tables))[0]
        widths, heights, lengths, derivatives = (
            table.expand(*t.shape[:-1], table.shape[-2], t.shape[-1]) for table in tables
        )
        last = widths.shape[-2] - 1
        knots = lengths.detach().cumsum(-2)[..., :-1, :]
        passed = t.unsqueeze(-2) >= knots
        x0 = (widths[..., :-1, :] * passed).sum(-2)
        y0 = (heights[..., :-1, :] * passed).sum(-2)
        # The slopes of the bin and its two neighbours determine the derivatives at both knots.
        three = passed.sum(-2, keepdim=True) + torch.arange(-1, 2, device=t.device).unsqueeze(-1)
        clamped = three.clamp(0, last)
        height = heights.gather(-2, clamped)
        slope = height / widths.gather(-2, clamped)
        two = three[..., :2, :]
        inner = two.clamp(0, last - 1)
        tilt = torch.atan(derivatives.gather(-2, inner)) * _TO_ONE
        mean = torch.sqrt(slope[..., :2, :] * slope[..., 1:, :])
        # At the ends the derivative is 1, as in the tails.
        derivative = torch.where(inner == two, mean * tilt.exp(), 1.0)
        slope = slope[..., 1, :]
        excess = derivative - slope.unsqueeze(-2)
        found = Bin(x0, y0, height[..., 1, :], slope, excess[..., 0, :], excess[..., 1, :])
        return Bin(*(part.squeeze(-1) for part in found)) if scalar else found


class RationalQuadraticSpline(Univariate):
    """The family of :class:`MonotonicRQSTransform`: K widths, K heights and K - 1 derivatives.

    :param count_bins: the number K of bins, at least 2.
    :param bound: the spline's domain is ``[-bound, bound]``.
    :raises ValueError: if an argument is out of range.
    """

    def __init__(self, *, count_bins: int = 8, bound: float = 5.0) -> None:
        super().__init__()
        self.count_bins = check_integer("count_bins", count_bins, least=2)
        self.bound = check_positive("bound", bound)
        self.num_params = 3 * self.count_bins - 1
        self.broadcasts = True

    def extra_repr(self) -> str:
        return f"count_bins={self.count_bins}, bound={self.bound}"

    def forward(self, params: Tensor) -> MonotonicRQSTransform:
        sizes = (self.count_bins, self.count_bins, self.count_bins - 1)
        widths, heights, derivatives = split_params(params, sizes)
        return MonotonicRQSTransform(widths, heights, derivatives, bound=self.bound)
