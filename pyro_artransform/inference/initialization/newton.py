# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Newton steps to the modes of a log-density from many points at once, and the Gaussians on the way.

A regression with raw scales has a posterior whose axes differ by orders of magnitude, which defeats
first-order methods; Newton steps do not depend on scales. All points move together: their values,
gradients and rows of Hessians are each one evaluation of the model.

**References**

1. Identifying and Attacking the Saddle Point Problem in High-Dimensional Non-Convex Optimization
   (Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, 2014), https://arxiv.org/abs/1406.2572
2. Pathfinder: Parallel Quasi-Newton Variational Inference (Zhang, Carpenter, Gelman, Vehtari, 2022),
   https://arxiv.org/abs/2108.03782
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .gaussians import Density, Gaussians, elbos, evaluate_density

# the step sizes tried at once: from a whole Newton step down to a ten-millionth of one
_STEP_SIZES = [4.0**-k for k in range(12)]
# of the largest curvature, once all coordinates have unit curvature
_FLAT = 1e-8
# expected gains, in nats: below the one a point no longer moves, below the other it is at a maximum
_SETTLED, _CONVERGED = 1e-6, 1e-3


class Modes(NamedTuple):
    """Where climbs ended: S points, with the Gaussians of the curvature there.

    ``value`` is the log-density, shape ``(S,)``; ``converged`` says where it is a maximum.
    """

    gaussians: Gaussians
    value: Tensor
    converged: Tensor

    def take(self, index: list[int]) -> "Modes":
        """Those at an index."""
        return Modes(self.gaussians.take(index), self.value[index], self.converged[index])

    def log_masses(self) -> Tensor:
        """The log evidence of each mode by its curvature (Laplace's approximation)."""
        dim = self.gaussians.loc.shape[-1]
        return self.value + self.gaussians.log_volume() + 0.5 * dim * math.log(2 * math.pi)


def climb(
    log_density: Density, points: Tensor, noise: Tensor, max_steps: int
) -> tuple[Modes, Gaussians]:
    """Climbs from each point, and remembers the Gaussian with the largest ELBO on each way.

    The mode is not the best place for a Gaussian: that of a funnel is in its neck, where there is
    no mass. So each point on the way is a candidate, judged by its ELBO.

    :param log_density: the log-density.
    :param points: where to start, shape ``(S, D)``, each with a finite density.
    :param noise: standard normal draws for the ELBOs, shape ``(K, D)``.
    :param max_steps: the most Newton steps, at least 1.
    :return: the modes, and the best Gaussian on each way.
    """
    best = Gaussians(points, torch.diag_embed(torch.ones_like(points)))
    best_elbo = points.new_full(points.shape[:1], -torch.inf)
    for _ in range(max_steps):
        value, gradient, curvature = _expand(log_density, points)
        here, steps, is_maximum = _gaussians_and_steps(points, gradient, curvature)
        elbo = elbos(log_density, here, noise)
        best = _where(elbo > best_elbo, here, best)
        best_elbo = torch.fmax(elbo, best_elbo)
        expected_gain = (steps * gradient).sum(-1)
        points, gain = _search_line(log_density, points, value, steps)
        if bool(((gain < _SETTLED) | ~(expected_gain > _SETTLED)).all()):
            break
    return Modes(here, value, is_maximum & (expected_gain < _CONVERGED)), best


def _where(condition: Tensor, new: Gaussians, old: Gaussians) -> Gaussians:
    loc = torch.where(condition[:, None], new.loc, old.loc)
    return Gaussians(loc, torch.where(condition[:, None, None], new.scale_tril, old.scale_tril))


@torch.enable_grad()
def _expand(log_density: Density, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-density at each point, its gradient, and its curvature (minus the Hessian)."""
    points = points.detach().requires_grad_()
    value = log_density(points)
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    hessian = points.new_zeros(*points.shape, points.shape[-1])
    for i, column in enumerate(gradient.sum(0)):
        if column.requires_grad:
            row = torch.autograd.grad(column, points, retain_graph=True, allow_unused=True)[0]
            hessian[:, i] = 0.0 if row is None else row
    curvature = -0.5 * (hessian + hessian.mT)
    return value.detach(), gradient.detach(), curvature.detach()


def _gaussians_and_steps(
    points: Tensor, gradient: Tensor, curvature: Tensor
) -> tuple[Gaussians, Tensor, Tensor]:
    """The Gaussian of the absolute curvature at each point, its Newton step, and where a maximum is."""
    usable = curvature.isfinite().all(-1).all(-1) & gradient.isfinite().all(-1)
    identity = torch.diag_embed(torch.ones_like(points))
    curvature = torch.where(usable[:, None, None], curvature, identity)
    gradient = torch.where(usable[:, None], gradient, torch.zeros_like(points))
    # to unit curvature by coordinate first: floors and round-off are then relative to each scale
    units = _units(curvature)
    values, vectors = torch.linalg.eigh(curvature * units[:, :, None] * units[:, None, :])
    floored = values.abs().clamp_min(_FLAT)
    axes = units[:, :, None] * vectors
    along = (axes.mT @ gradient[..., None])[..., 0]
    steps = (axes @ (along / floored)[..., None])[..., 0]
    is_maximum = usable & (values > _FLAT).all(-1)
    return Gaussians(points, _lower(axes * floored.rsqrt()[:, None])), steps, is_maximum


def _units(curvature: Tensor) -> Tensor:
    """The unit of each coordinate in which its curvature is 1; by its row where that is next to 0."""
    largest = curvature.abs().amax(-1)
    diagonal = curvature.diagonal(dim1=-2, dim2=-1).abs()
    tiny = diagonal <= 1e-12 * diagonal.amax(-1, keepdim=True)
    by_row = torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.where(tiny, by_row.rsqrt(), diagonal.rsqrt())


def _lower(root: Tensor) -> Tensor:
    """The Cholesky factor of ``root @ root.mT``, without squaring its condition number."""
    lower = torch.linalg.qr(root.mT).R.mT
    signs = lower.diagonal(dim1=-2, dim2=-1).sign()
    return lower * torch.where(signs == 0, torch.ones_like(signs), signs)[..., None, :]


def _search_line(
    log_density: Density, points: Tensor, value: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Each point moved along its step by the best of several sizes, and what that gained."""
    sizes = points.new_tensor(_STEP_SIZES)
    trials = points[:, None] + sizes[:, None] * steps[:, None]
    gain, k = (evaluate_density(log_density, trials) - value[:, None]).max(-1)
    moved = trials[torch.arange(len(points), device=points.device), k]
    up = gain > 0
    return torch.where(up[:, None], moved, points), torch.where(up, gain, torch.zeros_like(gain))
