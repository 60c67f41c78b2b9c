# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Affine families: with a bounded log-scale, without a scale, and with a gate."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..arguments import check_broadcast, check_positive, values_can_be_read
from ..differentiation import gradients_with_graph
from .base import (
    Derivatives,
    ElementwiseTransform,
    Univariate,
    shrink_of,
    soft_bound,
    unbind_params,
)


class MonotonicAffineTransform(ElementwiseTransform):
    r"""An affine transform whose scale is positive and bounded.

    .. math:: y = x \exp(b(\text{scale})) + \text{shift}

    where :math:`b` is :func:`~pyro_artransform.univariate.soft_bound`. ``x`` and the parameters broadcast
    to each other.

    :param shift: the shift, shape ``(*, D)``.
    :param scale: the unconstrained scale, shape ``(*, D)``; 0 is a scale of 1.
    :param bound: the bound of the log-scale.
    :raises ValueError: if the shapes do not broadcast, or the bound is not positive and finite.

    Example::

        >>> transform = MonotonicAffineTransform(torch.zeros(5), torch.zeros(5))
        >>> y, ladj = transform.call_and_ladj(torch.randn(32, 5))
        >>> y.shape, ladj.shape
        (torch.Size([32, 5]), torch.Size([32, 5]))
    """

    def __init__(self, shift: Tensor, scale: Tensor, *, bound: float = 3.0) -> None:
        super().__init__()
        # two comparisons in place of two checks: a network calls this at each evaluation
        if not torch.jit.is_tracing() and shift.shape != scale.shape:
            check_broadcast("shift and scale", shift.shape, scale.shape)
        if not (type(bound) is float and 0 < bound < math.inf):
            bound = check_positive("bound", bound)
        self.shift, self.scale, self.bound = shift, scale, bound

    @property
    def log_scale(self) -> Tensor:
        """The bounded log-scale, of the shape of the parameters."""
        return soft_bound(self.scale, self.bound)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if values_can_be_read(x):
            y, log_scale = _BoundedAffine.apply(x, self.shift, self.scale, self.bound)
        else:
            y, log_scale = _bounded_affine(x, self.shift, self.scale, self.bound)
        return y, log_scale.expand_as(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        ladj = -self.log_scale
        x = (y - self.shift) * ladj.exp()
        return x, ladj.expand_as(x)


def _bounded_affine(x: Tensor, shift: Tensor, scale: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    log_scale = soft_bound(scale, bound)
    return torch.addcmul(shift, x, log_scale.exp()), log_scale


class _BoundedAffine(torch.autograd.Function):
    """The value and the log-scale with their derivatives by hand, which saves half of the operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, bound: float
    ) -> tuple[Tensor, Tensor]:
        shrink, clamped = shrink_of(scale, bound)
        log_scale = shrink * clamped
        factor = log_scale.exp()
        ctx.save_for_backward(x, shift, scale, shrink, factor)
        ctx.bound = bound
        return torch.addcmul(shift, x, factor), log_scale

    @staticmethod
    def backward(ctx: Any, g_y: Tensor, g_log_scale: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, shrink, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            function = partial(_bounded_affine, bound=ctx.bound)
            return *gradients_with_graph(function, (x, shift, scale), (g_y, g_log_scale)), None
        g_x = g_y * factor
        g_scale = torch.addcmul(g_log_scale, g_x, x).sum_to_size(scale.shape) * shrink.pow(3)
        return g_x.sum_to_size(x.shape), g_y.sum_to_size(shift.shape), g_scale, None


class Affine(Univariate):
    r"""The affine family: a shift and a log-scale, in this order.

    :param bound: the bound of the log-scale.
    :param multiplier: what the parameters are multiplied by. Adam moves each weight at one pace, so that
        an output of a wide network moves at the pace of their sum: with less than 1 it moves slower
        (Tensor Programs V, Yang et al., 2022, https://arxiv.org/abs/2203.03466).
    :raises ValueError: if one of them is not positive and finite.

    Example::

        >>> transform = Affine()(torch.zeros(32, 5, 2))
        >>> transform(torch.randn(32, 5)).shape
        torch.Size([32, 5])
    """

    num_params = 2

    def __init__(self, *, bound: float = 3.0, multiplier: float = 1.0) -> None:
        super().__init__()
        self.bound = check_positive("bound", bound)
        self.multiplier = check_positive("multiplier", multiplier)

    def extra_repr(self) -> str:
        multiplier = "" if self.multiplier == 1.0 else f", multiplier={self.multiplier}"
        return f"bound={self.bound}{multiplier}"

    def forward(self, params: Tensor) -> MonotonicAffineTransform:
        if self.multiplier != 1.0:
            params = self.multiplier * params
        shift, scale = unbind_params(params, 2)
        return MonotonicAffineTransform(shift, scale, bound=self.bound)

    def derivatives(self, params: Tensor, x: Tensor) -> Derivatives | None:
        if type(self).forward is not Affine.forward:
            return None
        transform = self(params)
        y, ladj = transform.call_and_ladj(x)
        with torch.no_grad():
            by_scale = shrink_of(transform.scale, self.bound)[0].pow(3).mul_(self.multiplier)
            by_shift = (-ladj).exp().mul_(self.multiplier)
            inverse = torch.stack([-by_shift, -x * by_scale], -2).mT
            volume = torch.stack([torch.zeros_like(by_scale), by_scale], -2).mT
        return Derivatives(y, ladj, inverse, None, volume)


class Standardizing(Univariate):
    r"""The affine family read the other way: what takes a location and a log-scale away.

    .. math:: y = (x - \text{location}) \exp(-b(\text{scale}))

    Its inverse has the location and the scale of a conditional distribution.

    :param bound: the bound of the log-scale.
    :raises ValueError: if ``bound`` is not positive and finite.

    Example::

        >>> transform = Standardizing()(torch.zeros(32, 5, 2))
        >>> transform(torch.randn(32, 5)).shape
        torch.Size([32, 5])
    """

    num_params = 2

    def __init__(self, *, bound: float = 3.0) -> None:
        super().__init__()
        self.bound = check_positive("bound", bound)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"

    def forward(self, params: Tensor) -> ElementwiseTransform:
        location, scale = unbind_params(params, 2)
        return MonotonicAffineTransform(location, scale, bound=self.bound).inv


class AdditiveTransform(ElementwiseTransform):
    r"""A shift: :math:`y = x + \text{shift}`.

    :param shift: the shift, shape ``(*, D)``; broadcasts with ``x``.

    **References**

    1. NICE: Non-linear Independent Components Estimation (Dinh, Krueger, Bengio, 2014),
       https://arxiv.org/abs/1410.8516
    """

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.shift
        return y, torch.zeros_like(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y - self.shift
        return x, torch.zeros_like(x)


class Additive(Univariate):
    """The additive family: a shift, which preserves volume.

    Example::

        >>> Additive()(torch.zeros(32, 5, 1))(torch.randn(32, 5)).shape
        torch.Size([32, 5])
    """

    num_params = 1

    def forward(self, params: Tensor) -> AdditiveTransform:
        self.check_params(params)
        return AdditiveTransform(params[..., 0])


class GatedAffineTransform(ElementwiseTransform):
    r"""A gate that mixes the input with a mean, as the memory cell of an LSTM does.

    .. math:: y = s x + (1 - s) \text{mean} \qquad s = \sigma(\text{gate})

    :param mean: the mean, shape ``(*, D)``.
    :param gate: the logit of ``s``, shape ``(*, D)``; it is not bounded here.
    :raises ValueError: if the shapes do not broadcast.
    """

    def __init__(self, mean: Tensor, gate: Tensor) -> None:
        super().__init__()
        check_broadcast("mean and gate", mean.shape, gate.shape)
        self.mean = mean
        self.gate = gate

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.gate.sigmoid() * x + (-self.gate).sigmoid() * self.mean
        return y, logsigmoid(self.gate).expand_as(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - self.mean) / self.gate.sigmoid() + self.mean
        return x, -logsigmoid(self.gate).expand_as(x)


class GatedAffine(Univariate):
    r"""The gated family of the paper on inverse autoregressive flows: a mean and a gate.

    Since :math:`s < 1`, zero parameters are *not* the identity, unlike in every other family. They are a
    gate that is nearly open: :math:`y = \sigma(\text{gate\_bias}) x`. The gate is bounded such that
    :math:`\log s` stays above -3.05.

    :param gate_bias: the logit of the gate at zero parameters.
    :raises ValueError: if ``gate_bias`` is negative or not finite.

    Example::

        >>> GatedAffine()(torch.zeros(32, 5, 2))(torch.randn(32, 5)).shape
        torch.Size([32, 5])

    **References**

    1. Improved Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans, Jozefowicz,
       Chen, Sutskever, Welling, 2016), https://arxiv.org/abs/1606.04934
    """

    num_params = 2

    def __init__(self, *, gate_bias: float = 2.0) -> None:
        super().__init__()
        if not 0 <= gate_bias < math.inf:
            raise ValueError(
                f"gate_bias: expected a finite number of at least 0, got {gate_bias!r}"
            )
        self.gate_bias = float(gate_bias)

    def extra_repr(self) -> str:
        return f"gate_bias={self.gate_bias}"

    def forward(self, params: Tensor) -> GatedAffineTransform:
        mean, raw = unbind_params(params, 2)
        gate = self.gate_bias + soft_bound(raw, 3.0 + self.gate_bias)
        return GatedAffineTransform(mean, gate)
