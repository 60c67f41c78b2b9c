# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Exact means and sds of posteriors: by linear algebra, given a scale, and by the trapezoidal rule.

Of smooth densities that vanish at both ends the trapezoidal rule is exact to round-off as soon as a step
is below an sd (The Exponentially Convergent Trapezoidal Rule, Trefethen and Weideman, 2014).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro import distributions as dist
from torch import Tensor


class Moments(NamedTuple):
    """The mean and the sd of each element of a site on the unconstrained space."""

    mean: Tensor
    sd: Tensor


class LinearGaussian(NamedTuple):
    """z ~ Normal(0, covariance), y | z ~ Normal(design z, variance), one for each of some scales."""

    covariance: Tensor  # (..., D, D)
    design: Tensor  # (N, D)
    variance: Tensor  # (..., N)

    def posterior(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log evidence ``(...)``, and means and variances ``(..., D)`` given data ``(N,)``."""
        shared = self.design @ self.covariance
        factor = torch.linalg.cholesky(shared @ self.design.T + torch.diag_embed(self.variance))
        evidence = dist.MultivariateNormal(torch.zeros_like(y), scale_tril=factor).log_prob(y)
        gain = torch.cholesky_solve(shared, factor)
        variance = self.covariance.diagonal(dim1=-2, dim2=-1) - (shared * gain).sum(-2)
        return evidence, y @ gain, variance

    def moments(self, y: Tensor) -> Moments:
        _, mean, variance = self.posterior(y)
        return Moments(mean, variance.sqrt())


def weights_of(log_weights: Tensor) -> Tensor:
    """Weights over the first dimension of values on a grid.

    :raises ValueError: if the density at an edge of the grid is not zero.
    """
    weights = log_weights.softmax(0)
    edge = torch.stack([weights[0], weights[-1]]).max().item()
    if not edge < 1e-9:  # also where it is not a number
        raise ValueError(f"expected all of the mass inside the grid, got {edge} at an edge")
    return weights


def mixture(weights: Tensor, means: Tensor, variances: Tensor | float = 0.0) -> Moments:
    """Moments of a mixture: weights ``(K,)`` or ``(K, D)``, the others ``(K, D)``."""
    weights = weights.reshape(len(weights), -1)
    mean = (weights * means).sum(0)
    return Moments(mean, (weights * (variances + (means - mean).square())).sum(0).sqrt())


def given_scale(
    prior: dist.TorchDistribution,
    model: Callable[[Tensor], LinearGaussian],
    y: Tensor,
    low: float = -20.0,
    high: float = 12.0,
) -> tuple[Moments, Moments]:
    """Moments of the log of a scale with this prior, and of z: the model is linear given the scale.

    :param low: the least log scale, ``high`` the largest.
    """
    log_scale = torch.linspace(low, high, 2_001)
    scale = log_scale.exp()
    evidence, means, variances = model(scale).posterior(y)
    weights = weights_of(prior.log_prob(scale) + log_scale + evidence)
    of_scale = mixture(weights, log_scale[:, None])
    return Moments(*(value[0] for value in of_scale)), mixture(weights, means, variances)


def one_by_one(log_density: Callable[[Tensor], Tensor]) -> Moments:
    """Moments of D independent latents, of log densities ``(K, D)`` at ``(K, 1)`` or ``(K, D)``.

    On z = c + s sinh(x), so that polynomial tails vanish exponentially; c and s are first 0 and 1, and
    then the median and half the distance of the quartiles.
    """
    x = torch.linspace(-45.0, 45.0, 18_001)[:, None]
    center, scale = torch.zeros(1), torch.ones(1)
    for _ in range(3):
        z = center + scale * x.sinh()
        weights = weights_of(log_density(z) + x.cosh().log())
        z = z.expand_as(weights)
        # weights of the trapezoidal rule belong half to either side
        below = weights.cumsum(0) - weights / 2
        lower, center, upper = (
            z.gather(0, (below < share).sum(0, keepdim=True))[0] for share in (0.25, 0.5, 0.75)
        )
        scale = (upper - lower).clamp_min(1e-6) / 2
    return mixture(weights, z)


def in_box(log_density: Callable[[Tensor], Tensor], dim: int, num_points: int = 401) -> Moments:
    """Moments of one or two latents, of log density ``(K,)`` at ``(K, dim)``.

    Boxes are the smaller the better they are known: all of each but e^-45 of the largest density.
    """
    low, high = torch.full((dim,), -60.0), torch.full((dim,), 60.0)
    for _ in range(4):
        lines = [torch.linspace(a, b, num_points) for a, b in zip(low.tolist(), high.tolist())]
        points = torch.cartesian_prod(*lines).reshape(-1, dim)
        values = log_density(points)
        inside = points[values > values.max() - 45.0]
        step = (high - low) / (num_points - 1)
        low, high = inside.amin(0) - step, inside.amax(0) + step
    return mixture(values.softmax(0), points)


def log_gamma_moments(shape: Tensor, rate: Tensor) -> Moments:
    """Of the log of a gamma variable."""
    return Moments(shape.digamma() - rate.log(), torch.polygamma(1, shape).sqrt())


def logit_beta_moments(a: Tensor, b: Tensor) -> Moments:
    """Of the logit of a beta variable, the difference of the logs of two gamma variables."""
    variance = torch.polygamma(1, a) + torch.polygamma(1, b)
    return Moments(a.digamma() - b.digamma(), variance.sqrt())


def simplex_moments(concentration: Tensor) -> Moments:
    """Of Pyro's coordinates of a Dirichlet variable, whose sticks are independent beta variables.

    Of K entries the first stick is at the logit of its length plus log(K - 1), the last one plus log 1.
    """
    first, rest = concentration[:-1], concentration.flip(0).cumsum(0).flip(0)[1:]
    found = logit_beta_moments(first, rest)
    offset = torch.arange(len(first), 0, -1).to(first).log()
    return Moments(found.mean + offset, found.sd)


def student_sd(df: Tensor | float, scale: Tensor) -> Tensor:
    """Infinite up to 2 degrees of freedom."""
    df = torch.as_tensor(df, dtype=scale.dtype)
    return scale * torch.where(df > 2, df / (df - 2).clamp_min(1e-12), math.inf).sqrt()
