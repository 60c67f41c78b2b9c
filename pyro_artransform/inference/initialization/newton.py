# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Newton's way to the modes of a log-density from many points at once, and the Gaussians on it.

A regression with raw scales has a posterior whose axes differ by orders of magnitude, which defeats
first-order methods; second derivatives do not mind. All points move together: their values,
gradients and rows of Hessians are each one evaluation of the model.

**References**

1. Identifying and Attacking the Saddle Point Problem in High-Dimensional Non-Convex Optimization
   (Dauphin, Pascanu, Gulcehre, Cho, Ganguli, Bengio, 2014), https://arxiv.org/abs/1406.2572
2. Pathfinder: Parallel Quasi-Newton Variational Inference (Zhang, Carpenter, Gelman, Vehtari, 2022),
   https://arxiv.org/abs/2108.03782
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .gaussians import Gaussians, elbos, evaluated

LogDensity = Callable[[Tensor], Tensor]

# more coordinates than this are too many for Hessians
HESSIAN_LIMIT = 200

_MAX_STEPS = 40
# the step sizes tried at once: from a whole Newton step down to a ten-millionth of one
_STEP_SIZES = [4.0**-k for k in range(12)]
# of the largest curvature, once all coordinates have unit curvature
_FLAT = 1e-8
# an expected gain that is no gain, in nats
_SETTLED = 1e-6


class Modes(NamedTuple):
    """Where Newton's steps ended: S points, with the Gaussians that the curvature there makes.

    ``value`` is the log-density, shape ``(S,)``; ``converged`` says where it is a maximum.
    """

    gaussians: Gaussians
    value: Tensor
    converged: Tensor


class _Local(NamedTuple):
    """The log-density around S points, to second order."""

    value: Tensor
    gradient: Tensor
    curvature: Tensor


def climb(
    log_density: LogDensity, points: Tensor, noise: Tensor
) -> tuple[Modes, Gaussians, Tensor]:
    """Climbs from each point, and keeps the best Gaussian on each way.

    The mode is not the best place for a Gaussian: that of a funnel is in its neck, where there is
    no mass. So each point on the way is a candidate, judged by its ELBO.

    :param log_density: a function of ``(n, D)`` that returns ``(n,)``.
    :param points: where to start, shape ``(S, D)``, each with a finite density.
    :param noise: standard normal draws for the ELBOs, shape ``(K, D)``.
    :return: the modes; the Gaussian with the largest ELBO on each way; and those ELBOs, shape ``(S,)``.
    """
    best, best_elbo = _nothing_yet(points)
    for _ in range(_MAX_STEPS):
        local = _expand(log_density, points)
        here, steps, is_maximum = _gaussians_and_steps(points, local)
        best, best_elbo = _better(best, best_elbo, here, elbos(log_density, here, noise))
        expected_gain = (steps * local.gradient).sum(-1)
        points, gain = _search(log_density, points, local.value, steps)
        if bool(((gain < _SETTLED) | ~(expected_gain > _SETTLED)).all()):
            break
    converged = is_maximum & (expected_gain < 1e-3)
    return Modes(here, local.value, converged), best, best_elbo


def _nothing_yet(points: Tensor) -> tuple[Gaussians, Tensor]:
    identity = torch.diag_embed(torch.ones_like(points))
    return Gaussians(points, identity), points.new_full(points.shape[:1], -torch.inf)


def _better(
    old: Gaussians, old_elbo: Tensor, new: Gaussians, new_elbo: Tensor
) -> tuple[Gaussians, Tensor]:
    wins = new_elbo > old_elbo
    loc = torch.where(wins[:, None], new.loc, old.loc)
    scale_tril = torch.where(wins[:, None, None], new.scale_tril, old.scale_tril)
    return Gaussians(loc, scale_tril), torch.where(wins, new_elbo, old_elbo)


@torch.enable_grad()
def _expand(log_density: LogDensity, points: Tensor) -> _Local:
    points = points.detach().requires_grad_()
    value = log_density(points)
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    rows = [_row(column, points) for column in gradient.sum(0)]
    hessian = torch.stack(rows, -2)
    curvature = -0.5 * (hessian + hessian.mT)
    return _Local(value.detach(), gradient.detach(), curvature.detach())


def _row(of: Tensor, points: Tensor) -> Tensor:
    if not of.requires_grad:
        return torch.zeros_like(points)
    row = torch.autograd.grad(of, points, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(points) if row is None else row


def _gaussians_and_steps(points: Tensor, local: _Local) -> tuple[Gaussians, Tensor, Tensor]:
    """The Gaussian of the absolute curvature at each point, and the step that it suggests."""
    usable = local.curvature.isfinite().all(-1).all(-1) & local.gradient.isfinite().all(-1)
    identity = torch.diag_embed(torch.ones_like(points))
    curvature = torch.where(usable[:, None, None], local.curvature, identity)
    gradient = torch.where(usable[:, None], local.gradient, torch.zeros_like(points))
    # to unit curvature by coordinate first: floors and round-off are then relative to each scale
    largest = curvature.abs().amax(-1)
    units = torch.where(largest > 0, largest, torch.ones_like(largest)).rsqrt()
    units = _diagonal_units(curvature, units)
    scaled = curvature * units[:, :, None] * units[:, None, :]
    values, vectors = torch.linalg.eigh(scaled)
    floored = values.abs().clamp_min(_FLAT)
    axes = units[:, :, None] * vectors
    along = (axes.mT @ gradient[..., None])[..., 0]
    steps = (axes @ (along / floored)[..., None])[..., 0]
    is_maximum = usable & (values > _FLAT).all(-1)
    return Gaussians(points, _lower(axes * floored.rsqrt()[:, None])), steps, is_maximum


def _diagonal_units(curvature: Tensor, fallback: Tensor) -> Tensor:
    diagonal = curvature.diagonal(dim1=-2, dim2=-1).abs()
    tiny = diagonal <= 1e-12 * diagonal.amax(-1, keepdim=True)
    return torch.where(tiny, fallback, diagonal.rsqrt())


def _lower(root: Tensor) -> Tensor:
    """The Cholesky factor of ``root @ root.mT``, without squaring its condition."""
    lower = torch.linalg.qr(root.mT).R.mT
    signs = lower.diagonal(dim1=-2, dim2=-1).sign()
    return lower * torch.where(signs == 0, torch.ones_like(signs), signs)[..., None, :]


def _search(
    log_density: LogDensity, points: Tensor, value: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Each point moved along its step, as far as is best, and what that gained."""
    sizes = points.new_tensor(_STEP_SIZES)
    trials = points[:, None] + sizes[:, None] * steps[:, None]
    found = evaluated(log_density, trials)
    gain, k = (found - value[:, None]).max(-1)
    moved = trials[torch.arange(len(points), device=points.device), k]
    up = gain > 0
    return torch.where(up[:, None], moved, points), torch.where(up, gain, torch.zeros_like(gain))
