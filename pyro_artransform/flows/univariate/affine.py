# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Affine and piecewise affine families with bounded log-scales."""

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from ..._base.arguments import (
    check_broadcast,
    check_positive,
    is_tracing,
    shown,
    values_can_be_read,
)
from ..._base.differentiation import gradients_with_graph
from .base import Derivatives, ElementwiseTransform, Univariate


def soft_bound(x: Tensor, bound: float) -> Tensor:
    r"""Squashes the real line smoothly into ``(-bound, bound)``, with slope 1 at zero.

    .. math:: b(x) = \frac{2B}{\pi} \arctan\left(\frac{\pi x}{2B}\right)

    It is exactly 0 at 0. The gradient decays like ``x**-2``, so it stays positive where that of a hyperbolic
    tangent is rounded to zero, and automatic differentiation computes it accurately.

    :param x: a tensor of any shape.
    :param bound: B, positive.
    """
    scale = 2 * bound / math.pi
    return torch.atan(x / scale) * scale


def unbind_params(params: Tensor, count: int) -> Sequence[Tensor]:
    """Splits the ``count`` parameters of a family into views of shape ``(*, D)``.

    :raises ValueError: if there are not ``count`` parameters.
    """
    if is_tracing():  # sizes are tensors during tracing, and cannot be compared
        return [params[..., k] for k in range(count)]
    if params.shape[-1:] != (count,):
        raise ValueError(f"params: expected shape (*, D, {count}), got {tuple(params.shape)}")
    return params.unbind(-1) if params.dim() < 2 else params.mT.unbind(-2)


class GivenLocationScale(ElementwiseTransform):
    """An affine transform with a given location and log-scale, shape ``(*, D)`` each."""

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.loc, self.log_scale = loc, log_scale

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.addcmul(self.loc, x, self.log_scale.exp())
        return y, self.log_scale.expand_as(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        ladj = -self.log_scale
        x = (y - self.loc) * ladj.exp()
        return x, ladj.expand_as(x)


class MonotonicAffineTransform(GivenLocationScale):
    r"""An affine transform :math:`y = x e^{b(\mathrm{scale})} + \mathrm{shift}` with a bounded log-scale.

    :param shift: the shift, shape ``(*, D)``.
    :param scale: the unconstrained scale, shape ``(*, D)``; 0 gives a scale of 1.
    :param bound: the bound of :func:`~pyro_artransform.flows.univariate.soft_bound`, which is b.
    :raises ValueError: if the shapes do not broadcast, or the bound is not positive and finite.
    """

    def __init__(self, shift: Tensor, scale: Tensor, *, bound: float = 3.0) -> None:
        check_broadcast("shift and scale", shift.shape, scale.shape)
        super().__init__(shift, soft_bound(scale, check_positive("bound", bound)))


class Affine(Univariate):
    r"""The affine family: a shift and a log-scale, in this order.

    :param bound: the bound of the log-scale.
    :param multiplier: a factor on the parameters. Adam moves all weights at the same rate, so that the output
        of a wide network moves at the rate of their sum; a factor below 1 slows it down.
    :raises ValueError: if an argument is not positive and finite.

    Example::

        >>> transform = Affine()(torch.zeros(32, 5, 2))
        >>> transform(torch.randn(32, 5)).shape
        torch.Size([32, 5])

    **References**

    1. Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer (Yang et al.,
       2022), https://arxiv.org/abs/2203.03466
    """

    num_params = 2

    def __init__(self, *, bound: float = 3.0, multiplier: float = 1.0) -> None:
        super().__init__()
        self.bound = check_positive("bound", bound)
        self.multiplier = check_positive("multiplier", multiplier)

    def extra_repr(self) -> str:
        return f"bound={self.bound}, multiplier={self.multiplier}"

    def forward(self, params: Tensor) -> ElementwiseTransform:
        return GivenLocationScale(*self._location_and_log_scale(params)[:2])

    def _location_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The location, the bounded log-scale and the unbounded log-scale, each of shape ``(*, D)``."""
        if self.multiplier != 1.0:
            params = self.multiplier * params
        shift, scale = unbind_params(params, 2)
        return shift, soft_bound(scale, self.bound), scale

    def derivatives(self, params: Tensor, x: Tensor) -> Derivatives | None:
        if type(self).forward is not Affine.forward:
            return None
        loc, log_scale, scale = self._location_and_log_scale(params)
        y, ladj = GivenLocationScale(loc, log_scale).call_and_ladj(x)
        with torch.no_grad():
            # the slope of the bound
            by_scale = self.multiplier / (1 + (scale * (math.pi / (2 * self.bound))).square())
            by_shift = (-ladj).exp().mul_(self.multiplier)
            inverse = torch.stack([-by_shift, -x * by_scale], -2).mT
            volume = torch.stack([torch.zeros_like(by_scale), by_scale], -2).mT
        return Derivatives(y, ladj, inverse, None, volume)


class Standardizing(Affine):
    r"""The inverse affine family, which subtracts a location and divides by a scale.

    .. math:: y = (x - \text{location}) \exp(-b(\text{scale}))

    The inverse has the location and the scale of a conditional distribution.
    """

    def forward(self, params: Tensor) -> ElementwiseTransform:
        return super().forward(params).inv


class HingedTransform(ElementwiseTransform):
    r"""A sequence of smooth hinges, each of which changes the slope beyond its knot.

    .. math:: x \mapsto x \pm (e^a - 1) h(\pm x - c), \qquad h(u) = \tfrac12 (u + \sqrt{u^2 + w^2})

    A hinge has slope 1 on one side of its knot and :math:`e^a` on the other. There are two for each knot
    c, to the right at c and to the left at -c. Inverses have a closed form.

    :param right: the log-slopes to the right, one tensor of shape ``(*, D)`` per knot.
    :param left: the log-slopes to the left, in the same form.
    :param knots: the knots c, in the order in which they are applied.
    :param width: the width w of a hinge.
    :raises ValueError: if there are no knots.
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
        self._hinges = [(knot, side) for knot in knots for side in (1.0, -1.0)]
        self._log_slopes = [log_slope for pair in zip(right, left) for log_slope in pair]
        self.width = width

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        factors = 0.5 * torch.expm1(torch.stack(self._log_slopes))
        while factors.dim() <= x.dim():
            factors = factors.unsqueeze(1)
        evaluate = _Bend.apply if values_can_be_read() else partial(_Bend.forward, None)
        return evaluate(x, factors, self._hinges, self.width)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        large = torch.finfo(y.dtype).max ** 0.4  # v * v must not overflow
        width, slopes = y.new_full((), self.width), []
        for log_slope, (knot, side) in zip(self._log_slopes[::-1], self._hinges[::-1]):
            k, slope = 0.5 * torch.expm1(log_slope), log_slope.exp()
            v = (side * y - knot).clamp(-large, large)
            change = -k / slope * (v + torch.hypot(v, slope.sqrt() * width))
            y = y + side * change
            u = v + change
            slopes.append(torch.addcmul(1 + k, k, u / torch.hypot(u, width)))
        return y, -reduce(torch.mul, slopes).log()


class _Bend(torch.autograd.Function):
    """The value and log-slope of all hinges, with a backward of a third of the operations of autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: Tensor, hinges: Sequence[tuple[float, float]], width: float
    ) -> tuple[Tensor, Tensor]:
        # factors are (exp(a) - 1) / 2 of each hinge, (n, *, D); ctx is None if autograd differentiates
        y, _ = torch.broadcast_tensors(x, factors[0])
        large, square = torch.finfo(x.dtype).max ** 0.4, x.new_full((), width**2)
        arguments, roots = [], []
        for factor, (knot, side) in zip(factors.unbind(), hinges):
            arguments.append((y - knot if side > 0 else -knot - y).clamp(-large, large))  # not inf
            roots.append(torch.addcmul(square, arguments[-1], arguments[-1]).sqrt())
            y = torch.addcmul(y, factor, arguments[-1] + roots[-1], value=side)
        if ctx is None or not any(ctx.needs_input_grad):  # stacks would not fit the cache
            parts = zip(factors.unbind(), arguments, roots)
            slopes = (1 + f * (1 + u / r) for f, u, r in parts)
            return y, reduce(torch.mul, slopes).log()
        root = torch.stack(roots)
        derivative = 1 + torch.stack(arguments) / root  # of 2h
        slope = 1 + factors * derivative
        ctx.save_for_backward(x, factors, slope, root, derivative)
        ctx.hinges, ctx.width = hinges, width
        return y, reduce(torch.mul, slope.unbind()).log()

    @staticmethod
    def backward(ctx: Any, g_y: Tensor, g_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, slope, root, derivative = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            function = partial(_Bend.forward, None, hinges=ctx.hinges, width=ctx.width)
            return *gradients_with_graph(function, (x, factors), (g_y, g_ladj)), None, None
        sides = slope.new_tensor([1.0, -1.0] * (len(slope) // 2))
        sides = sides.reshape(-1, *(1,) * (slope.dim() - 1))
        by_slope = g_ladj / slope
        # the derivative of the log-slope; 2h' has the derivative w^2 / root^3
        bends = sides * ctx.width**2 * by_slope * factors / root.pow(3)
        after = []
        for bend, factor in zip(bends.unbind()[::-1], slope.unbind()[::-1]):
            after.append(g_y)
            g_y = torch.addcmul(bend, g_y, factor)
        by_value = sides * torch.stack(after[::-1])
        g_factors = derivative * torch.addcmul(by_slope, by_value, root)
        return g_y.sum_to_size(x.shape), g_factors.sum_to_size(factors.shape), None, None


class Hinged(Univariate):
    """The family of smooth hinges on both sides, for skewness and light or heavy tails.

    There are two log-slopes per knot, with bounds that sum to 3 over all knots.

    :param knots: where the slopes change, positive or zero, mirrored to the left.
    :param width: the width over which they change.
    :raises ValueError: if there are no knots, a knot is negative, or ``width`` is not positive.

    **References**

    1. Marginal Tail-Adaptive Normalizing Flows (Laszkiewicz, Lederer, Fischer, 2022),
       https://arxiv.org/abs/2206.10311
    """

    def __init__(self, *, knots: Sequence[float] = (0.0, 1.0, 2.0), width: float = 0.7) -> None:
        super().__init__()
        self.knots = tuple(map(float, knots))
        if not self.knots or min(self.knots) < 0 or not math.isfinite(sum(self.knots)):
            raise ValueError(f"knots: expected numbers of at least 0, got {shown(knots)}")
        self.width = check_positive("width", width)
        self.bound = 3.0 / len(self.knots)
        self.num_params = 2 * len(self.knots)
        self.broadcasts = True

    def extra_repr(self) -> str:
        return f"knots={self.knots}, width={self.width}"

    def forward(self, params: Tensor) -> HingedTransform:
        # Adam moves all parameters at the same rate, but the log-slope of a hinge moves a whole tail. With a
        # factor of 1 the log density is noisy at step sizes that suit networks.
        log_slopes = unbind_params(soft_bound(0.1 * params, self.bound), self.num_params)
        return HingedTransform(log_slopes[0::2], log_slopes[1::2], self.knots, self.width)
