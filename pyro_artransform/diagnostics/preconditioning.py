# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The base space of a guide, where its posterior is nearly a standard normal, and where it is not.

A guide that offers its transform of a standard normal gives that space. Of any other guide it is
that of the means and standard deviations of its draws. Directions in which the posterior is much
wider or narrower than the guide are found by a few products with the mean Hessian, and stretched:
chains with unit masses would hardly move along a wide one, and nothing in a single latent would show
it, as with the common level of a thousand groups of which a guide knows nothing.

**References**

1. Iterative Methods for the Solution of Eigenvalue Problems (Lanczos, 1950),
   https://doi.org/10.6028/jres.045.026
2. NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman, Sountsov,
   Dillon, Langmore, Tran, Vasudevan, 2019), https://arxiv.org/abs/1903.03704
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..joint.protocols import TransformedGuide, call_and_ladj
from .hamiltonian import PulledBack, ToLatent

# as many directions as a few trajectories cost: 24 products with a Hessian, of two gradients each
_NUM_DIRECTIONS = 24
_NUM_POINTS = 32
# the mean over points is that of a smooth function: a wide difference costs no more than a narrow one
_DIFFERENCE = 0.1
# a direction whose sd is right within a factor of 1.4 is forgotten in a few steps as it is
_FLATTEST, _STEEPEST = 0.5, 2.0
# the mean Hessian away from the posterior may be anything: the sd of a direction grows 100 times at most
_LEAST_CURVATURE, _MOST_CURVATURE = 1e-4, 1e4
_NO_NEW_DIRECTION = 1e-3


class Stretched(NamedTuple):
    """A linear map that stretches a few orthogonal directions.

    :param directions: orthonormal, shape ``(D, k)``.
    :param factors: shape ``(k,)``.
    """

    directions: Tensor
    factors: Tensor

    def __call__(self, base: Tensor) -> Tensor:
        """The image of points, shape ``(n, D)``."""
        return base + (base @ self.directions * (self.factors - 1)) @ self.directions.T

    def inverse(self, image: Tensor) -> Tensor:
        """The points of an image, shape ``(n, D)``."""
        return Stretched(self.directions, self.factors.reciprocal())(image)

    def before(self, to_latent: ToLatent) -> ToLatent:
        """This map, then another; the log-determinant lacks a constant."""
        return lambda base: to_latent(self(base))


def guide_transform(
    guide: object, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> ToLatent | None:
    """The transform of a standard normal that a guide is; ``None`` if it offers none."""
    if not isinstance(guide, TransformedGuide):
        return None
    try:
        # with its graph: torch's product of a matrix and many vectors, as in AutoMultivariateNormal,
        # is ten times slower where the vectors have a gradient and the matrix has none
        with torch.enable_grad():
            transform = guide.get_transform(*args, **kwargs)
    except NotImplementedError:  # some of Pyro's guides have no more than the method
        return None
    return partial(call_and_ladj, transform)


def location_scale(loc: Tensor, scale: Tensor) -> ToLatent:
    """The transform of a standard normal by means and standard deviations, shape ``(D,)``."""
    return lambda base: (loc + scale * base, scale.log().sum().expand(len(base)))


def misjudged_directions(target: PulledBack, points: Tensor) -> Stretched:
    """The directions of the base space in which a posterior is far from a standard normal.

    These are Ritz vectors of the mean Hessian of minus the log density, and they are stretched to
    unit curvature.

    :param points: points of the base space, shape ``(n, D)``.
    """
    directions, images = _krylov(target, points[:_NUM_POINTS])
    projected = directions.T @ images
    curvatures, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    is_far = (curvatures < _FLATTEST) | (curvatures > _STEEPEST)
    factors = curvatures[is_far].clamp(_LEAST_CURVATURE, _MOST_CURVATURE).rsqrt()
    return Stretched(directions @ rotation[:, is_far], factors)


def _krylov(target: PulledBack, points: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions, each the image of the one before, and all images, ``(D, k)`` each."""
    directions = points.new_zeros((points.shape[1], 0))
    images, candidate = [], torch.randn_like(points[0])
    for _ in range(min(_NUM_DIRECTIONS, points.shape[1])):
        direction = _orthogonal(candidate, directions)
        if direction.norm() < _NO_NEW_DIRECTION * candidate.norm():
            direction = _orthogonal(torch.randn_like(candidate), directions)
        direction = direction / direction.norm()
        candidate = _times_hessian(target, points, direction)
        directions = torch.cat([directions, direction[:, None]], 1)
        images.append(candidate)
    return directions, torch.stack(images, 1)


def _orthogonal(vector: Tensor, directions: Tensor) -> Tensor:
    """A vector less its part in some orthonormal directions; once is not enough for round-off."""
    for _ in range(2):
        vector = vector - directions @ (directions.T @ vector)
    return vector


def _times_hessian(target: PulledBack, points: Tensor, direction: Tensor) -> Tensor:
    """The mean Hessian of minus the log density, times a direction, where that is finite."""
    step = _DIFFERENCE * direction
    ahead, behind = target(points + step), target(points - step)
    is_finite = ahead.is_finite & behind.is_finite
    if not is_finite.any():
        return direction
    change = (behind.gradient - ahead.gradient)[is_finite]
    return change.mean(0) / (2 * _DIFFERENCE)
