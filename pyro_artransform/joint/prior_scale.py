# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""The location, the scale and the shape of a prior on the unconstrained space.

The shape is a family with location 0 and scale 1 as a function of a standard normal,

.. math::

    r = F^{-1}(\Phi(x))

with the distribution function F. In x what the data leave open of a half-Cauchy scale, whose logarithm has
long tails, is normal.

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

# below this lambda a prior with a shape is taken to a normal one (benchmarks/coordinates.md)
_SHAPED = 0.9


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


#: the logarithm of a half-Cauchy number
HALF_CAUCHY = StandardFamily(
    lambda tail: _log_ratio(tail, lambda p: torch.tan(0.5 * math.pi * p), 0.5 * math.pi),
    None,
    lambda r: (torch.atan(r.exp()) * (2 / math.pi), torch.atan((-r).exp()) * (2 / math.pi)),
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

# What follows are all the classes whose density is known here, each without its subclasses.

# on the real line, with the attributes loc and scale
_WITH_LOCATION: frozenset[Any] = frozenset(
    {dist.StudentT, dist.Laplace, dist.Cauchy, dist.Gumbel, dist.Logistic, dist.SoftLaplace}
)
# of bounded numbers: the location on the unconstrained space, where the scale is 1, and the shape
_BOUNDED: dict[Any, tuple[Callable[[Any], Tensor], StandardFamily | None]] = {
    dist.HalfNormal: (lambda fn: fn.scale.log(), HALF_NORMAL),
    dist.HalfCauchy: (lambda fn: fn.scale.log(), HALF_CAUCHY),
    dist.Exponential: (lambda fn: fn.rate.reciprocal().log(), EXPONENTIAL),
    dist.Gamma: (lambda fn: fn.rate.reciprocal().log(), None),
    dist.InverseGamma: (lambda fn: fn.rate.log(), None),
    dist.Uniform: (lambda fn: torch.zeros_like(fn.low), LOGISTIC),
}
# that leave the density of an element as it is
_WRAPPERS: frozenset[Any] = frozenset({dist.Independent, Independent, dist.ExpandedDistribution})
_TRANSFORMED: frozenset[Any] = frozenset({dist.TransformedDistribution, dist.LogNormal})
# attributes of these classes that an instance may have of its own; no density reads the matrices
_OF_INSTANCES = {"_validate_args", "covariance_matrix", "precision_matrix", "scale_tril"}


def exact_class(part: Any) -> type | None:
    """The class of a distribution or a transform; ``None`` where attributes of its own replace the class's.

    Unlike with ``isinstance``, a subclass, which may have another density, is not taken for its parent.
    """
    kind, own = type(part), vars(part).keys() - _OF_INSTANCES
    return None if any(map(partial(hasattr, kind), own)) else kind


def _without_wrappers(fn: Any) -> Any:
    while exact_class(fn) in _WRAPPERS:
        fn = fn.base_dist
    return fn


def is_identity_or_exp(bijection: Any) -> bool:
    """Whether a bijection onto the real or the positive numbers is torch's own, not another one."""
    while type(bijection) is IndependentTransform:
        bijection = bijection.base_transform
    parts = bijection.parts if type(bijection) is ComposeTransform else [bijection]
    # positive numbers are those above a bound, 0, which is added
    kinds = [type(part) for part in parts if type(part) is not AffineTransform or part.loc != 0]
    return kinds in ([], [ExpTransform])


class PriorScale(NamedTuple):
    """The location and the scale of a prior on the unconstrained space.

    :param loc: broadcasts to the latent.
    :param scale: positive, the same; of a vector a lower-triangular matrix, of one more dimension.
    :param log_prob: the log density of the family with location 0 and scale 1; ``None`` where the density
        at a value loses no digits, as that of positive numbers.
    :param shape: the family with location 0 and scale 1, if it is not normal and has quantiles.
    """

    loc: Tensor
    scale: Tensor
    log_prob: Callable[[Tensor], Tensor] | None = None
    shape: StandardFamily | None = None

    @classmethod
    def of(cls, fn: Any) -> "PriorScale | None":
        """That of a distribution; ``None`` where it is not known to be a location-scale family.

        Known are the exact classes above, also reinterpreted, expanded, or behind affine transforms and an
        exponential. All else may have another density: subclasses, masked ones, instances whose methods
        are replaced.
        """
        fn = _without_wrappers(fn)
        kind = exact_class(fn)
        if kind in _BOUNDED:
            location, shape = _BOUNDED[kind]
            loc = location(fn)
            return cls(loc, torch.ones_like(loc), None, shape)
        return cls._of_transformed(fn) if kind in _TRANSFORMED else cls._on_the_line(fn)

    @classmethod
    def _on_the_line(cls, fn: Any) -> "PriorScale | None":
        kind: Any = exact_class(fn)
        if kind is dist.MultivariateNormal:
            # the matrix that its density reads
            matrix = fn._unbroadcasted_scale_tril
            return cls(fn.loc, matrix.expand((*fn.loc.shape, -1)), normal_log_prob)
        if kind is dist.Normal:
            return cls(fn.loc, fn.scale, normal_log_prob)
        if kind not in _WITH_LOCATION:
            return None
        given = {"df": fn.df} if kind is dist.StudentT else {}
        zero, one = torch.zeros_like(fn.loc), torch.ones_like(fn.scale)
        standard = kind(**given, loc=zero, scale=one, validate_args=False)
        return cls(fn.loc, fn.scale, standard.log_prob)

    @classmethod
    def _of_transformed(cls, fn: Any) -> "PriorScale | None":
        """That of such a family behind affine transforms, or before an exponential, as LogNormal."""
        base, transforms = _without_wrappers(fn.base_dist), fn.transforms
        prior = cls._on_the_line(base)
        if transforms and exact_class(transforms[-1]) is ExpTransform:
            transforms = transforms[:-1]
        for transform in transforms:
            if prior is None or prior._is_matrix or exact_class(transform) is not AffineTransform:
                return None
            if type(base) is dist.Gumbel:  # mirrored, it is of another family
                return None
            loc, scale = transform.loc + transform.scale * prior.loc, transform.scale * prior.scale
            prior = prior._replace(loc=loc, scale=scale.abs())
        return prior

    def unconstrained(
        self, x: Tensor, centered: Tensor, unit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """u at coordinates x, the log-determinant of the map, and the log density of u, by element.

        In the neck of a funnel a scale is below the round-off of a location, and u less the location is
        zero: the density is that of the residual before both are added.
        """
        centered, is_shaped = self._gated(centered)
        away, (powers, ladj) = x - centered * self.loc, self._powers(centered, unit)
        if is_shaped is not None and self.shape is not None:
            shaped, of_shape = self.shape.from_normal(away.masked_fill(~is_shaped, 0.0))
            away, ladj = torch.where(is_shaped, shaped, away), ladj + of_shape * is_shaped
        if self._is_matrix:
            column = powers @ away[..., None]
            residual = torch.linalg.solve_triangular(self.scale, column, upper=False)[..., 0]
            away = column[..., 0]
        else:
            residual = away / (self.scale**centered * unit ** (1 - centered))
            away = powers * away
        if self.log_prob is None:
            return self.loc + away, ladj.expand_as(away), None
        log_prob = self.log_prob(residual) - self.diagonal.log()
        return self.loc + away, ladj.expand_as(away), log_prob

    def coordinates(self, u: Tensor, centered: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """x at u, and the log-determinant of the map from x, by element."""
        centered, is_shaped = self._gated(centered)
        away, (powers, ladj) = u - self.loc, self._powers(centered, unit)
        if self._is_matrix:
            away = torch.linalg.solve_triangular(powers, away[..., None], upper=False)[..., 0]
        else:
            away = away / powers
        if is_shaped is not None and self.shape is not None:
            normal = self.shape.to_normal(away.masked_fill(~is_shaped, 0.0))
            away = torch.where(is_shaped, normal, away)
            ladj = ladj + self.shape.from_normal(away.masked_fill(~is_shaped, 0.0))[1] * is_shaped
        return centered * self.loc + away, ladj.expand_as(away)

    def _gated(self, centered: Tensor) -> tuple[Tensor, Tensor | None]:
        """lambda, and where the shape is a part of the map, if there is one."""
        if self.shape is None:
            return centered, None
        is_shaped = centered < _SHAPED
        return centered.masked_fill(is_shaped, 0.0), is_shaped

    @property
    def _is_matrix(self) -> bool:
        return self.scale.dim() > self.loc.dim()

    @property
    def diagonal(self) -> Tensor:
        """The scale, of a vector the diagonal of the matrix."""
        return self.scale.diagonal(dim1=-2, dim2=-1) if self._is_matrix else self.scale

    def _powers(self, centered: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """The scale in units to the power of 1 - lambda, by rows of a matrix, and the log of its diagonal."""
        if self.log_prob is None:  # the scale is 1
            return self.scale, self.scale.new_zeros(())
        share, diagonal = 1 - centered, self.diagonal / unit
        powers = diagonal**share
        if self._is_matrix:
            below = (self.scale / unit[..., None, :]).tril(-1)
            powers = torch.diag_embed(powers) + share[..., None] * below
        return powers, share * diagonal.log()
