# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussians on the unconstrained space: by Newton's method, and by mean-field fits.

A regression with raw scales has a posterior whose axes differ by orders of magnitude, which defeats
first-order methods; Newton steps do not depend on scales. All points move together: their values,
gradients and rows of Hessians are each one evaluation of the model.

**References**

1. Identifying and Attacking the Saddle Point Problem in High-Dimensional Non-Convex Optimization
   (Dauphin et al., 2014), https://arxiv.org/abs/1406.2572
2. Pathfinder: Parallel Quasi-Newton Variational Inference (Zhang et al., 2022),
   https://arxiv.org/abs/2108.03782
3. Automatic Differentiation Variational Inference (Kucukelbir et al., 2017),
   https://arxiv.org/abs/1603.00788
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import InitializationConfig
from ..optimization.optimizers import Adam

#: a log-density: a function of ``(n, D)`` that returns ``(n,)``
Density = Callable[[Tensor], Tensor]

# points evaluated at once: a bound on memory
_CHUNK = 2048
# of the largest curvature, once all coordinates have unit curvature: less is round-off, and up to the
# larger one a point may be anything but a mode
_ROUND_OFF, _FLAT = 1e-12, 1e-8
# expected gains, in nats: below the one a point no longer moves, below the other it is at a maximum
_SETTLED, _CONVERGED = 1e-6, 1e-3


class Gaussians(NamedTuple):
    """S Gaussians: ``loc`` of shape ``(S, D)``, ``scale_tril`` of shape ``(S, D, D)``.

    For many coordinates, ``scale_tril`` is the sds of independent ones, shape ``(S, D)``.
    """

    loc: Tensor
    scale_tril: Tensor

    @property
    def is_independent(self) -> bool:
        """Whether there are standard deviations alone."""
        return self.scale_tril.dim() == 2

    def take(self, index: Tensor | list[int] | slice) -> "Gaussians":
        return Gaussians(self.loc[index], self.scale_tril[index])

    def log_volume(self) -> Tensor:
        """The log-determinants of the scales, shape ``(S,)``."""
        scale = self.scale_tril
        scale = scale if self.is_independent else scale.diagonal(dim1=-2, dim2=-1)
        return scale.log().sum(-1)

    def widened(self, factor: float) -> "Gaussians":
        return Gaussians(self.loc, factor * self.scale_tril)

    def dense(self) -> "Gaussians":
        """Independent Gaussians with matrices for scales."""
        return Gaussians(self.loc, torch.diag_embed(self.scale_tril))

    def deviations(self, noise: Tensor) -> Tensor:
        """The deviations ``(S, n, D)`` from the means, of standard normal noise ``(*, n, D)``."""
        if self.is_independent:
            return noise * self.scale_tril[:, None]
        return noise @ self.scale_tril.mT

    def units(self, away: Tensor) -> Tensor:
        """The noise ``(S, n, D)`` of deviations from the means."""
        if self.is_independent:
            return away / self.scale_tril[:, None]
        return torch.linalg.solve_triangular(self.scale_tril, away.mT, upper=False).mT


class Modes(NamedTuple):
    """Where climbs ended: S points, with the Gaussians of the curvature there.

    ``value`` is the log-density, shape ``(S,)``; ``converged`` says where it is a maximum.
    """

    gaussians: Gaussians
    value: Tensor
    converged: Tensor

    def take(self, index: list[int] | slice) -> "Modes":
        return Modes(self.gaussians.take(index), self.value[index], self.converged[index])

    def log_masses(self) -> Tensor:
        """The log evidence of each mode by its curvature (Laplace's approximation)."""
        dim = self.gaussians.loc.shape[-1]
        return self.value + self.gaussians.log_volume() + 0.5 * dim * math.log(2 * math.pi)


def concatenate(parts: Iterable[Gaussians]) -> Gaussians:
    """The Gaussians of all parts."""
    locs, scale_trils = zip(*parts)
    return Gaussians(torch.cat(locs), torch.cat(scale_trils))


def antithetic_noise(like: Tensor, count: int) -> Tensor:
    """Standard normal draws ``(count, D)`` in pairs of opposite sign, for ``like`` of ``(S, D)``."""
    half = torch.randn_like(like[:1].expand(count // 2, -1))
    return torch.cat([half, -half])


def elbos(log_density: Density, gaussians: Gaussians, noise: Tensor) -> Tensor:
    """The ELBO of each Gaussian on common noise ``(K, D)``; ``-inf`` where it is not finite."""
    draws = gaussians.loc[:, None] + gaussians.deviations(noise)
    entropy = 0.5 * (noise**2).sum(-1).mean() + 0.5 * noise.shape[-1] * math.log(2 * math.pi)
    return evaluate_density(log_density, draws).mean(-1) + gaussians.log_volume() + entropy


@torch.no_grad()
def evaluate_density(log_density: Density, points: Tensor) -> Tensor:
    """A log-density at points of shape ``batch + (D,)``, ``-inf`` where it is not a finite number."""
    chunks = points.reshape(-1, points.shape[-1]).split(_CHUNK)
    values = torch.cat(list(map(log_density, chunks))).reshape(points.shape[:-1])
    return values.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def fit_mean_fields(
    log_density: Density, points: Tensor, noise: Tensor, config: InitializationConfig
) -> Gaussians:
    """Independent Gaussians fitted from the points of shape ``(S, D)`` with the largest ELBOs."""
    narrow = Gaussians(points, torch.full_like(points, config.narrow_scale))
    order = elbos(log_density, narrow, noise).argsort(descending=True)
    return fit_independent(log_density, points[order[: config.num_mean_fields]], config)


@torch.enable_grad()
def fit_independent(
    log_density: Density, points: Tensor, config: InitializationConfig
) -> Gaussians:
    """Independent Gaussians fitted by a few steps of Adam from each point of shape ``(S, D)``."""
    loc = points.detach().clone().requires_grad_()
    log_scale = torch.full_like(loc, config.narrow_scale).log().detach().requires_grad_()
    adam = Adam([loc, log_scale], config.mean_field_step_size, config.mean_field_betas)
    for step in range(config.mean_field_steps):
        noise = torch.randn_like(points.expand(config.mean_field_particles, *points.shape))
        draws = loc + noise * log_scale.exp()
        value = log_density(draws.reshape(-1, draws.shape[-1])).sum()
        loss = -value / len(noise) - log_scale.sum()
        by_loc, by_scale = torch.autograd.grad(loss, [loc, log_scale])
        # a Gaussian whose gradients are not finite stays where it is
        usable = (by_loc.isfinite() & by_scale.isfinite()).all(-1, keepdim=True)
        loc.grad = torch.where(usable, by_loc, 0.0)
        log_scale.grad = torch.where(usable, by_scale, 0.0)
        adam.step(config.mean_field_decay**step)
    return Gaussians(loc.detach(), log_scale.detach().exp())


def climb(
    log_density: Density, points: Tensor, noise: Tensor, max_steps: int
) -> tuple[Modes, Gaussians]:
    """Climbs from each point by Newton steps, to modes; also the best Gaussian on each way.

    The mode of a funnel is in its neck, where there is no mass: each point on the way is a candidate,
    judged by its ELBO on standard normal noise of shape ``(K, D)``.
    """
    loc, scale_tril = points, torch.diag_embed(torch.ones_like(points))
    best_elbo = points.new_full(points.shape[:1], -torch.inf)
    for _ in range(max_steps):
        value, gradient, curvature = _expand(log_density, points)
        here, steps, is_maximum = _newton_steps(points, gradient, curvature)
        elbo = elbos(log_density, here, noise)
        is_better = elbo > best_elbo
        loc = torch.where(is_better[:, None], here.loc, loc)
        scale_tril = torch.where(is_better[:, None, None], here.scale_tril, scale_tril)
        best_elbo = torch.fmax(elbo, best_elbo)
        expected_gain = (steps * gradient).sum(-1)
        points, gain = _search_line(log_density, points, value, steps)
        if bool(((gain < _SETTLED) | ~(expected_gain > _SETTLED)).all()):
            break
    modes = Modes(here, value, is_maximum & (expected_gain < _CONVERGED))
    return modes, Gaussians(loc, scale_tril)


def climb_by_gradients(
    log_density: Density, points: Tensor, scale_tril: Tensor, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Climbs from each point without Hessians: uphill in the units of a Gaussian.

    :param scale_tril: shape ``(D, D)``, or ``(D,)`` where it is diagonal.
    :return: the ends, and the log-density there, shape ``(S,)``.
    """
    for _ in range(max_steps):
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            value = log_density(points)
            (gradient,) = torch.autograd.grad(value.sum(), points)
        usable = gradient.isfinite().all(-1, keepdim=True)
        steps = torch.where(usable, gradient, 0.0)
        is_diagonal = scale_tril.dim() == 1
        steps = steps * scale_tril**2 if is_diagonal else steps @ scale_tril @ scale_tril.mT
        points, gain = _search_line(log_density, points.detach(), value.detach(), steps)
        if bool((gain < _SETTLED).all()):
            break
    return points, value.detach() + gain


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
    gradient, curvature = gradient.detach(), -0.5 * (hessian + hessian.mT).detach()
    usable = curvature.isfinite().all(-1).all(-1) & gradient.isfinite().all(-1)
    # a unit Gaussian stands for what is not finite; the sign says that it is no maximum
    saddle = -torch.diag_embed(torch.ones_like(gradient))
    curvature = torch.where(usable[:, None, None], curvature, saddle)
    return value.detach(), torch.where(usable[:, None], gradient, 0.0), curvature


def _newton_steps(
    points: Tensor, gradient: Tensor, curvature: Tensor
) -> tuple[Gaussians, Tensor, Tensor]:
    """The Gaussian of the absolute curvature at each point, its Newton step, and where a maximum is."""
    # to unit curvature by coordinate first (by its row, where that is next to 0): floors and
    # round-off are then relative to each scale
    diagonal, by_row = curvature.diagonal(dim1=-2, dim2=-1).abs(), curvature.abs().amax(-1)
    tiny = diagonal <= 1e-12 * diagonal.amax(-1, keepdim=True)
    units = torch.where(tiny, torch.where(by_row > 0, by_row, 1.0), diagonal).rsqrt()
    values, vectors = torch.linalg.eigh(curvature * units[:, :, None] * units[:, None, :])
    floored = values.abs().clamp_min(_ROUND_OFF)
    axes = units[:, :, None] * vectors
    along = (axes.mT @ gradient[..., None])[..., 0]
    steps = (axes @ (along / floored)[..., None])[..., 0]
    # the Cholesky factor of root @ root.mT, without squaring its condition number
    root = axes * floored.rsqrt()[:, None]
    lower = torch.linalg.qr(root.mT).R.mT
    signs = lower.diagonal(dim1=-2, dim2=-1).sign()
    lower = lower * torch.where(signs == 0, 1.0, signs)[..., None, :]
    return Gaussians(points, lower), steps, (values > _FLAT).all(-1)


def _search_line(
    log_density: Density, points: Tensor, value: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Each point moved along its step by the best of several sizes, and what that gained."""
    # from a whole Newton step down to a ten-millionth of one
    sizes = points.new_tensor([4.0**-k for k in range(12)])
    trials = points[:, None] + sizes[:, None] * steps[:, None]
    gain, k = (evaluate_density(log_density, trials) - value[:, None]).max(-1)
    moved = trials[torch.arange(len(points), device=points.device), k]
    up = gain > 0
    return torch.where(up[:, None], moved, points), torch.where(up, gain, 0.0)
