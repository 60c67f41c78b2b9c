# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A family with a slope of its own on each side: skewed, and with heavier or lighter tails."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_positive, values_can_be_read
from ..differentiation import gradients_with_graph
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
        self._log_slopes: list[Tensor] = []
        self._hinges: list[tuple[float, float]] = []  # the side and the knot of each
        for k, knot in enumerate(knots):
            self._log_slopes += [right[k], left[k]]
            self._hinges += [(1.0, knot), (-1.0, knot)]
        self.width = width

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        factors = 0.5 * torch.expm1(torch.stack(self._log_slopes))
        while factors.dim() <= x.dim():
            factors = factors.unsqueeze(1)
        if not values_can_be_read(x):
            return _bend(x, factors, self._hinges, self.width)[:2]
        y, ladj = _Bend.apply(x, factors, self._hinges, self.width)
        return y, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        large = torch.finfo(y.dtype).max ** 0.4  # v * v must not overflow
        width, slopes = y.new_full((), self.width), []
        for log_slope, (side, knot) in zip(self._log_slopes[::-1], self._hinges[::-1]):
            k, slope = 0.5 * torch.expm1(log_slope), log_slope.exp()
            v = (side * y - knot).clamp(-large, large)
            change = -k / slope * (v + torch.hypot(v, slope.sqrt() * width))
            y = y + side * change
            u = v + change
            slopes.append(torch.addcmul(1 + k, k, u / torch.hypot(u, width)))
        return y, -reduce(torch.mul, slopes).log()


def _bend(
    x: Tensor, factors: Tensor, hinges: Sequence[tuple[float, float]], width: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All hinges one after the other.

    :param factors: half of :math:`e^a - 1` of each, shape ``(n, *, D)``.
    :return: the value, the log-slope, and for all hinges the slope, the root and the derivative of
        2h, of shape ``(n, *, D)``.
    """
    x, _ = torch.broadcast_tensors(x, factors[0])
    large, width_of_all = torch.finfo(x.dtype).max ** 0.4, x.new_full((), width)
    arguments, roots = [], []
    for factor, (side, knot) in zip(factors.unbind(), hinges):
        # clamped, so that infinity stays itself
        u = (x - knot if side > 0 else -knot - x).clamp(-large, large)
        # several times as fast as the root of a sum of squares
        roots.append(torch.hypot(u, width_of_all))
        arguments.append(u)
        x = torch.addcmul(x, factor, u + roots[-1], value=side)
    root = torch.stack(roots)
    derivative = 1 + torch.stack(arguments) / root
    slope = 1 + factors * derivative
    # one logarithm: it costs more than all else of a hinge
    return x, reduce(torch.mul, slope.unbind()).log(), slope, root, derivative


class _Bend(torch.autograd.Function):
    """The same with a derivative by hand: a third of the operations that its graph would have."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: Tensor, hinges: Sequence[tuple[float, float]], width: float
    ) -> tuple[Tensor, Tensor]:
        y, ladj, *rest = _bend(x, factors, hinges, width)
        ctx.save_for_backward(x, factors, *rest)
        ctx.hinges, ctx.width = hinges, width
        return y, ladj

    @staticmethod
    def backward(ctx: Any, g_y: Tensor, g_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, slope, root, derivative = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated

            def function(x: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
                return _bend(x, factors, ctx.hinges, ctx.width)[:2]

            return *gradients_with_graph(function, (x, factors), (g_y, g_ladj)), None, None
        sides = slope.new_tensor([side for side, _ in ctx.hinges])
        sides = sides.reshape(-1, *(1,) * (slope.dim() - 1))
        by_slope = g_ladj / slope
        # the derivative of the log-slope: that of 2h' is w^2 / root^3
        bends = sides * ctx.width**2 * by_slope * factors / root.pow(3)
        after = []
        for bend, factor in zip(bends.unbind()[::-1], slope.unbind()[::-1]):
            after.append(g_y)
            g_y = torch.addcmul(bend, g_y, factor)
        by_value = sides * torch.stack(after[::-1])
        g_factors = derivative * torch.addcmul(by_slope, by_value, root)
        return g_y.sum_to_size(x.shape), g_factors.sum_to_size(factors.shape), None, None


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
