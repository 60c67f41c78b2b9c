# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The location, the scale and the shape of a prior on the unconstrained space."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform, TransformedDistribution

from . import standard_families as families
from .standard_families import StandardFamily
from .traces import unwrapped

# on the real line, with the attributes loc and scale
_WITH_LOCATION: tuple[Any, ...] = (
    dist.StudentT,
    dist.Laplace,
    dist.Cauchy,
    dist.Gumbel,
    dist.Logistic,
    dist.SoftLaplace,
)
# of positive numbers: their logarithm has a location, which is the logarithm of this scale
_POSITIVE: dict[type, tuple[Callable[[Any], Tensor], StandardFamily | None]] = {
    dist.HalfNormal: (lambda fn: fn.scale, families.HALF_NORMAL),
    dist.HalfCauchy: (lambda fn: fn.scale, families.HALF_CAUCHY),
    dist.Exponential: (lambda fn: fn.rate.reciprocal(), families.EXPONENTIAL),
    dist.Gamma: (lambda fn: fn.rate.reciprocal(), None),
    dist.InverseGamma: (lambda fn: fn.rate, None),
}
# below it a prior with a shape is taken to a normal one (benchmarks/coordinates.md)
_SHAPED = 0.9


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
        """That of a distribution; ``None`` where it is not a location-scale family."""
        fn = unwrapped(fn)
        for kind, (scale, shape) in _POSITIVE.items():
            if isinstance(fn, kind):
                loc = scale(fn).log()
                return cls(loc, torch.ones_like(loc), None, shape)
        if isinstance(fn, dist.Uniform):
            return cls(torch.zeros_like(fn.low), torch.ones_like(fn.low), None, families.LOGISTIC)
        found = cls._on_the_line(fn)
        if found is None and isinstance(fn, TransformedDistribution):
            return cls._of_transformed(fn)
        return found

    @classmethod
    def _on_the_line(cls, distribution: Any) -> "PriorScale | None":
        fn: Any = unwrapped(distribution)
        if isinstance(fn, dist.MultivariateNormal):
            return cls(fn.loc, fn.scale_tril, families.normal_log_prob)
        if isinstance(fn, dist.Normal):
            return cls(fn.loc, fn.scale, families.normal_log_prob)
        for kind in _WITH_LOCATION:
            if isinstance(fn, kind):
                given = {"df": fn.df} if kind is dist.StudentT else {}
                zero, one = torch.zeros_like(fn.loc), torch.ones_like(fn.scale)
                standard = kind(**given, loc=zero, scale=one, validate_args=False)
                return cls(fn.loc, fn.scale, standard.log_prob)
        return None

    @classmethod
    def _of_transformed(cls, fn: TransformedDistribution) -> "PriorScale | None":
        """That of such a family behind affine transforms, or before an exponential, as LogNormal."""
        prior, transforms = cls._on_the_line(fn.base_dist), fn.transforms
        if transforms and isinstance(transforms[-1], ExpTransform):
            transforms = transforms[:-1]
        for transform in transforms:
            is_matrix = prior is not None and prior._is_matrix
            # mirrored, a Gumbel distribution is of another family
            is_other = is_matrix or isinstance(unwrapped(fn.base_dist), dist.Gumbel)
            if prior is None or is_other or not isinstance(transform, AffineTransform):
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
        away, (powers, ladj), log_prob = x - centered * self.loc, self._powers(centered, unit), None
        if is_shaped is not None and self.shape is not None:
            shaped, of_shape = self.shape.from_normal(away.masked_fill(~is_shaped, 0.0))
            away, ladj = torch.where(is_shaped, shaped, away), ladj + of_shape * is_shaped
        if self._is_matrix:
            away = (powers @ away[..., None])[..., 0]
            if self.log_prob is not None:
                parts = torch.linalg.solve_triangular(self.scale, away[..., None], upper=False)
                log_prob = self.log_prob(parts[..., 0]) - self.diagonal.log()
        else:
            if self.log_prob is not None:
                log_prob = self.log_prob(away / (self.scale**centered * unit ** (1 - centered)))
                log_prob = log_prob - self.scale.log()
            away = powers * away
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
