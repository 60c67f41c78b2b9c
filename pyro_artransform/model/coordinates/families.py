# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The location, the scale and the shape of a prior on the unconstrained space.

The shape is the standard member of a family, location 0 and scale 1, as a function of a standard normal x,

.. math::

    r = F^{-1}(\Phi(x))

with its distribution function F. The logarithm of a half-Cauchy scale has long tails; with weak data its
posterior is nearly normal in x.

**Reference**: Embedded-Model Flows (Silvestri, Fertig, Moore, Ambrogioni, 2022),
https://arxiv.org/abs/2110.06021
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Independent,
    IndependentTransform,
)
from torch.nn.functional import softplus
from torch.special import erfcx, ndtri

# below this lambda a prior with a shape is mapped to a normal one (benchmarks/coordinates.md)
_SHAPED = 0.9


class StandardFamily(NamedTuple):
    """The standard member of a univariate family.

    :param lower: the quantile function for x <= 0, as a function of log Phi(x).
    :param upper: the quantile function for x >= 0, as a function of log(1 - Phi(x)); ``None`` for a symmetric
        family.
    :param tails: the lower and the upper tail probability at r.
    :param log_prob: the log density at r.
    """

    lower: Callable[[Tensor], Tensor]
    upper: Callable[[Tensor], Tensor] | None
    tails: Callable[[Tensor], tuple[Tensor, Tensor]]
    log_prob: Callable[[Tensor], Tensor]

    def from_normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """r and log dr/dx, from the nearer tail: the other tail probability has lost its precision."""
        is_low = x < 0
        size = torch.where(is_low, -x, x)
        tail = torch.log(0.5 * erfcx(math.sqrt(0.5) * size)) - 0.5 * size.square()
        lower = self.lower(tail)
        r = torch.where(is_low, lower, -lower if self.upper is None else self.upper(tail))
        return r, normal_log_prob(x) - self.log_prob(r)

    def to_normal(self, r: Tensor) -> Tensor:
        """x at r, clamped where a tail probability would underflow."""
        less, more = self.tails(r)
        least = torch.finfo(r.dtype).tiny
        return torch.where(less < more, ndtri(less.clamp_min(least)), -ndtri(more.clamp_min(least)))


def normal_log_prob(x: Tensor) -> Tensor:
    """The log density of a standard normal."""
    return -0.5 * (x.square() + math.log(2 * math.pi))


def _log_ratio(log_tail: Tensor, function: Callable[[Tensor], Tensor], slope: float) -> Tensor:
    """log f(p) at log p, with f(0) = 0 and slope f'(0) = ``slope``, also where p underflows."""
    p = log_tail.exp()
    is_small = p < 1e-9 if p.dtype == torch.float64 else p < 1e-5
    return torch.where(
        is_small, log_tail + math.log(slope), function(p.masked_fill(is_small, 0.1)).log()
    )


#: log of a half-Cauchy variable
HALF_CAUCHY = StandardFamily(
    lambda tail: _log_ratio(tail, lambda p: torch.tan(0.5 * math.pi * p), 0.5 * math.pi),
    None,
    lambda r: (torch.atan(r.exp()) * (2 / math.pi), torch.atan((-r).exp()) * (2 / math.pi)),
    lambda r: math.log(2 / math.pi) + r - softplus(2 * r),
)
#: log of a half-normal variable
HALF_NORMAL = StandardFamily(
    lambda tail: _log_ratio(
        tail, lambda p: math.sqrt(2) * torch.erfinv(p), math.sqrt(0.5 * math.pi)
    ),
    lambda tail: (-ndtri(0.5 * tail.exp().clamp_min(torch.finfo(tail.dtype).tiny))).log(),
    lambda r: (torch.erf(math.sqrt(0.5) * r.exp()), torch.erfc(math.sqrt(0.5) * r.exp())),
    lambda r: 0.5 * math.log(2 / math.pi) + r - 0.5 * (2 * r).exp(),
)
#: log of an exponential variable
EXPONENTIAL = StandardFamily(
    lambda tail: _log_ratio(tail, lambda p: -torch.log1p(-p), 1.0),
    lambda tail: (-tail).log(),
    lambda r: (-torch.expm1(-r.exp()), (-r.exp()).exp()),
    lambda r: r - r.exp(),
)
#: logit of a uniform variable
LOGISTIC = StandardFamily(
    lambda tail: tail - torch.log1p(-tail.exp()),
    None,
    lambda r: (r.sigmoid(), (-r).sigmoid()),
    lambda r: r - 2 * softplus(r),
)

# wrappers that keep the density of an element
_WRAPPERS: frozenset[Any] = frozenset({dist.Independent, Independent, dist.ExpandedDistribution})
_TRANSFORMED: frozenset[Any] = frozenset({dist.TransformedDistribution, dist.LogNormal})
# class attributes that an instance may shadow; no density reads the matrices
_OF_INSTANCES = {"_validate_args", "covariance_matrix", "precision_matrix", "scale_tril"}


def exact_class(part: Any) -> type | None:
    """The class of a distribution or transform; ``None`` if the instance shadows class attributes.

    Unlike with ``isinstance``, a subclass, which may have another density, does not count as its parent.
    """
    kind, own = type(part), vars(part).keys() - _OF_INSTANCES
    return None if any(map(partial(hasattr, kind), own)) else kind


def _unwrapped(fn: Any) -> tuple[Any, type | None]:
    """A distribution without wrappers, and its exact class."""
    while (kind := exact_class(fn)) in _WRAPPERS:
        fn = fn.base_dist
    return fn, kind


def is_identity_or_exp(bijection: Any) -> bool:
    """Whether a bijection is torch's own onto the real or the positive numbers."""
    return _parts_of(bijection) in ([], [ExpTransform])


def _parts_of(bijection: Any) -> list[Any]:
    while type(bijection) is IndependentTransform:
        bijection = bijection.base_transform
    parts = bijection.parts if type(bijection) is ComposeTransform else [bijection]
    # torch adds the bound, 0, after the exponential
    return [
        type(p) for p in parts if type(p) is not AffineTransform or torch.as_tensor(p.loc).any()
    ]


#: a latent u, the log-determinant of the map to it, and its log density where that is computed, elementwise
Mapped = tuple[Tensor, Tensor, Tensor | None]


class PriorScale(NamedTuple):
    """The location and the scale of a prior on the unconstrained space.

    :param loc: the location, broadcastable to the latent.
    :param scale: positive, same.
    :param log_prob: the log density of the standard member; ``None`` if the density at the value itself is
        precise, as for positive numbers.
    :param shape: the standard member, if it is not normal and has a quantile function.
    """

    loc: Tensor
    scale: Tensor
    log_prob: Any
    shape: StandardFamily | None = None

    @staticmethod
    def of(fn: Any) -> "PriorScale | None":
        """The scale of a distribution; ``None`` if it is not a known location-scale family.

        Accepts the exact classes in ``FAMILIES``, also reinterpreted, expanded, or followed by affine
        transforms and an exponential. Subclasses, masked distributions and instances with replaced methods
        may have another density.
        """
        fn, kind = _unwrapped(fn)
        if kind in _TRANSFORMED:
            return _of_transformed(fn)
        return FAMILIES[kind](fn) if kind in FAMILIES else None

    @property
    def diagonal(self) -> Tensor:
        """The scale of each element, the diagonal of a matrix."""
        return self.scale

    def to_unconstrained(self, x: Tensor, centered: Tensor | None, unit: Tensor) -> Mapped:
        """Maps x to u; returns u, the log-determinant and the log density of u, elementwise.

        In the neck of a funnel the scale is below the round-off of the location, so that u minus the location
        is zero. The density is therefore evaluated at the residual, before the location is added.

        :param centered: lambda; ``None`` for zero, where the density does not depend on the location.
        """
        ratio = self.scale / unit
        if centered is None:
            away, residual, ladj = ratio * x, x / unit, ratio.log()
        else:
            share, away = 1 - centered, x - centered * self.loc
            residual = away / (self.scale**centered * unit**share)
            away, ladj = ratio**share * away, share * ratio.log()
        log_prob = self.log_prob(residual) - self.scale.log()
        return self.loc + away, ladj.expand_as(away), log_prob

    def from_unconstrained(
        self, u: Tensor, centered: Tensor, unit: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps u to x; returns x and the log-determinant of the map from x, elementwise."""
        share, ratio = 1 - centered, self.scale / unit
        away = (u - self.loc) / ratio**share
        return centered * self.loc + away, (share * ratio.log()).expand_as(away)


class MatrixPrior(PriorScale):
    """A multivariate normal prior, whose scale is a lower-triangular matrix."""

    @property
    def diagonal(self) -> Tensor:
        return self.scale.diagonal(dim1=-2, dim2=-1)

    def to_unconstrained(self, x: Tensor, centered: Tensor | None, unit: Tensor) -> Mapped:
        centered = torch.zeros_like(unit) if centered is None else centered
        powers, ladj = self._powers(centered, unit)
        column = powers @ (x - centered * self.loc)[..., None]
        residual = torch.linalg.solve_triangular(self.scale, column, upper=False)[..., 0]
        away, log_prob = column[..., 0], normal_log_prob(residual) - self.diagonal.log()
        return self.loc + away, ladj.expand_as(away), log_prob

    def from_unconstrained(
        self, u: Tensor, centered: Tensor, unit: Tensor
    ) -> tuple[Tensor, Tensor]:
        (powers, ladj), column = self._powers(centered, unit), (u - self.loc)[..., None]
        away = torch.linalg.solve_triangular(powers, column, upper=False)[..., 0]
        return centered * self.loc + away, ladj.expand_as(away)

    def _powers(self, centered: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """(scale / unit) to the power of 1 - lambda, by rows, and its log diagonal."""
        share, ratio = 1 - centered, self.diagonal / unit
        below = (self.scale / unit[..., None, :]).tril(-1)
        return torch.diag_embed(ratio**share) + share[..., None] * below, share * ratio.log()


class BoundedPrior(PriorScale):
    """A prior of bounded support, of scale 1; with lambda near 0 its shape is part of the map."""

    def to_unconstrained(self, x: Tensor, centered: Tensor | None, unit: Tensor) -> Mapped:
        if centered is None:
            away, ladj = self.shape.from_normal(x) if self.shape else (x, torch.zeros_like(x))
            return self.loc + away, ladj, None
        is_shaped = centered < (0.0 if self.shape is None else _SHAPED)
        away, ladj = self._shaped(x - centered.masked_fill(is_shaped, 0.0) * self.loc, is_shaped)
        return self.loc + away, ladj, None

    def from_unconstrained(
        self, u: Tensor, centered: Tensor, unit: Tensor
    ) -> tuple[Tensor, Tensor]:
        is_shaped, away = centered < (0.0 if self.shape is None else _SHAPED), u - self.loc
        if self.shape is not None:
            normal = self.shape.to_normal(away.masked_fill(~is_shaped, 0.0))
            away = torch.where(is_shaped, normal, away)
        x = centered.masked_fill(is_shaped, 0.0) * self.loc + away
        return x, self._shaped(away, is_shaped)[1]

    def _shaped(self, away: Tensor, is_shaped: Tensor) -> tuple[Tensor, Tensor]:
        """Distances from the location, of this shape where it is part of the map; the log-determinant."""
        if self.shape is None:
            return away, torch.zeros_like(away)
        shaped, ladj = self.shape.from_normal(away.masked_fill(~is_shaped, 0.0))
        return torch.where(is_shaped, shaped, away), ladj * is_shaped


def _standardized(fn: Any, **given: Any) -> PriorScale:
    """A distribution with attributes loc and scale, and others that its standard member shares."""
    zero, one = torch.zeros_like(fn.loc), torch.ones_like(fn.scale)
    standard = type(fn)(**given, loc=zero, scale=one, validate_args=False)
    return PriorScale(fn.loc, fn.scale, standard.log_prob)


def _multivariate(fn: Any) -> PriorScale:
    # the matrix that log_prob reads
    matrix = fn._unbroadcasted_scale_tril.expand((*fn.loc.shape, -1))
    return MatrixPrior(fn.loc, matrix, normal_log_prob)


def _bounded(loc: Tensor, shape: StandardFamily | None = None) -> PriorScale:
    """A family of bounded support with this location on the unconstrained space."""
    return BoundedPrior(loc, torch.ones_like(loc), None, shape)


#: All classes whose density is known, subclasses excluded, and their location and scale. For another family
#: add a line here, and one to ``FAMILIES`` of tests/model/test_families.py.
FAMILIES: dict[Any, Callable[[Any], PriorScale]] = {
    dist.Normal: lambda fn: PriorScale(fn.loc, fn.scale, normal_log_prob),
    dist.MultivariateNormal: _multivariate,
    dist.StudentT: lambda fn: _standardized(fn, df=fn.df),
    dist.Laplace: _standardized,
    dist.Cauchy: _standardized,
    dist.Gumbel: _standardized,
    dist.Logistic: _standardized,
    dist.SoftLaplace: _standardized,
    dist.HalfNormal: lambda fn: _bounded(fn.scale.log(), HALF_NORMAL),
    dist.HalfCauchy: lambda fn: _bounded(fn.scale.log(), HALF_CAUCHY),
    dist.Exponential: lambda fn: _bounded(-fn.rate.log(), EXPONENTIAL),
    dist.Gamma: lambda fn: _bounded(-fn.rate.log()),
    dist.InverseGamma: lambda fn: _bounded(fn.rate.log()),
    dist.Uniform: lambda fn: _bounded(torch.zeros_like(fn.low), LOGISTIC),
}


def _of_transformed(fn: Any) -> PriorScale | None:
    """The scale of a family after affine transforms and, as for LogNormal, an exponential."""
    (base, kind), transforms = _unwrapped(fn.base_dist), fn.transforms
    prior = FAMILIES[kind](base) if kind in FAMILIES else None
    if isinstance(prior, BoundedPrior):
        return None
    if transforms and exact_class(transforms[-1]) is ExpTransform:
        transforms = transforms[:-1]
    for transform in transforms:
        # a reflected Gumbel leaves the family
        is_kept = type(prior) is PriorScale and kind is not dist.Gumbel
        if prior is None or not is_kept or exact_class(transform) is not AffineTransform:
            return None
        loc, scale = transform.loc + transform.scale * prior.loc, transform.scale * prior.scale
        prior = prior._replace(loc=loc, scale=scale.abs())
    return prior
