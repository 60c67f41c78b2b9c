# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Families with location 0 and scale 1 on the unconstrained space, as functions of a standard normal.

.. math::

    r = F^{-1}(\Phi(x))

has the distribution function F where x is standard normal. In x what the data leave open of a half-Cauchy
scale, whose logarithm has long tails, is normal.

**Reference**: Embedded-Model Flows (Silvestri, Fertig, Moore, Ambrogioni, 2022),
https://arxiv.org/abs/2110.06021
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.special import erfcx, ndtri


class StandardFamily(NamedTuple):
    """A family of distributions of one number.

    :param lower: the quantile function in x at x of at most 0, given log Phi(x).
    :param upper: the same at x of at least 0, given the logarithm of 1 - Phi(x); ``None`` for a symmetric
        family.
    :param tails: the probabilities of less and of more than r.
    :param log_prob: the log density at r.
    """

    lower: Callable[[Tensor], Tensor]
    upper: Callable[[Tensor], Tensor] | None
    tails: Callable[[Tensor], tuple[Tensor, Tensor]]
    log_prob: Callable[[Tensor], Tensor]

    def from_normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """r and log dr/dx, each side by its own tail: the other one has lost its digits."""
        is_low = x < 0
        size = torch.where(is_low, -x, x)
        tail = torch.log(0.5 * erfcx(math.sqrt(0.5) * size)) - 0.5 * size.square()
        lower = self.lower(tail)
        r = torch.where(is_low, lower, -lower if self.upper is None else self.upper(tail))
        return r, normal_log_prob(x) - self.log_prob(r)

    def to_normal(self, r: Tensor) -> Tensor:
        """x at r, as far out as a probability has a number."""
        less, more = self.tails(r)
        least = torch.finfo(r.dtype).tiny
        return torch.where(less < more, ndtri(less.clamp_min(least)), -ndtri(more.clamp_min(least)))


def normal_log_prob(x: Tensor) -> Tensor:
    """The log density of a standard normal number."""
    return -0.5 * (x.square() + math.log(2 * math.pi))


def _log_ratio(log_tail: Tensor, function: Callable[[Tensor], Tensor], slope: float) -> Tensor:
    """log f(p) at a probability p, of a function with f(0) = 0 and that slope, if p has no number too."""
    p = log_tail.exp()
    is_small = p < 1e-9 if p.dtype == torch.float64 else p < 1e-5
    return torch.where(
        is_small, log_tail + math.log(slope), function(p.masked_fill(is_small, 0.1)).log()
    )


def _log_tangent(log_tail: Tensor) -> Tensor:
    return _log_ratio(log_tail, lambda p: torch.tan(0.5 * math.pi * p), 0.5 * math.pi)


def _half_cauchy_tails(r: Tensor) -> tuple[Tensor, Tensor]:
    return torch.atan(r.exp()) * (2 / math.pi), torch.atan((-r).exp()) * (2 / math.pi)


#: the logarithm of a half-Cauchy number
HALF_CAUCHY = StandardFamily(
    _log_tangent,
    None,
    _half_cauchy_tails,
    lambda r: math.log(2 / math.pi) + r - softplus(2 * r),
)
#: the logarithm of the absolute value of a normal number
HALF_NORMAL = StandardFamily(
    lambda tail: _log_ratio(
        tail, lambda p: math.sqrt(2) * torch.erfinv(p), math.sqrt(0.5 * math.pi)
    ),
    lambda tail: (-ndtri(0.5 * tail.exp().clamp_min(torch.finfo(tail.dtype).tiny))).log(),
    lambda r: (torch.erf(math.sqrt(0.5) * r.exp()), torch.erfc(math.sqrt(0.5) * r.exp())),
    lambda r: 0.5 * math.log(2 / math.pi) + r - 0.5 * (2 * r).exp(),
)
#: the logarithm of an exponential number
EXPONENTIAL = StandardFamily(
    lambda tail: _log_ratio(tail, lambda p: -torch.log1p(-p), 1.0),
    lambda tail: (-tail).log(),
    lambda r: (-torch.expm1(-r.exp()), (-r.exp()).exp()),
    lambda r: r - r.exp(),
)
#: the logit of a uniform number
LOGISTIC = StandardFamily(
    lambda tail: tail - torch.log1p(-tail.exp()),
    None,
    lambda r: (r.sigmoid(), (-r).sigmoid()),
    lambda r: r - 2 * softplus(r),
)
