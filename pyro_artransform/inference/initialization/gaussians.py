# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussians on the unconstrained space, their ELBOs, and climbs to modes.

A regression with raw scales has a posterior whose axes differ by orders of magnitude, which defeats
first-order methods; Newton steps do not depend on scales, and L-BFGS learns them. All points move
together. Hessians are differences of gradients, which each model has.

**References**

1. Identifying and Attacking the Saddle Point Problem in High-Dimensional Non-Convex Optimization
   (Dauphin et al., 2014), https://arxiv.org/abs/1406.2572
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...capture import Captured, ReplayError
from ...graphs.dependencies import value_and_gradient
from ...graphs.factorization import eigh, lower_factor
from ...time_limit import check_time

#: a log-density: a function of ``(n, D)`` that returns ``(n,)``
Density = Callable[[Tensor], Tensor]

# points evaluated at once: a bound on memory
_CHUNK = 2048
# of the largest curvature, once all coordinates have unit curvature: less is round-off, and up to the
# larger one a point may be anything but a mode
_LEAST_CURVATURE, _FLAT = 1e-12, 1e-8
# expected gains, in nats: below the one a point no longer moves, below the other it is at a maximum
_SETTLED, _CONVERGED = 1e-6, 1e-3
_MEMORY, _MOST_SHORTER = 10, 12  # steps that L-BFGS remembers, and sizes of one that it tries


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

    def take(self, index: Tensor | list[int] | int) -> "Gaussians":
        return Gaussians(self.loc[index], self.scale_tril[index])

    def to(self, dtype: torch.dtype) -> "Gaussians":
        return Gaussians(self.loc.to(dtype), self.scale_tril.to(dtype))

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

    loc: Tensor
    scale_tril: Tensor
    value: Tensor
    converged: Tensor

    @property
    def gaussians(self) -> Gaussians:
        return Gaussians(self.loc, self.scale_tril)

    def log_masses(self) -> Tensor:
        """The log evidence of each mode by its curvature (Laplace's approximation)."""
        dim = self.loc.shape[-1]
        return self.value + self.gaussians.log_volume() + 0.5 * dim * math.log(2 * math.pi)


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
    found = []
    for chunk in points.reshape(-1, points.shape[-1]).split(_CHUNK):
        check_time()
        found.append(log_density(chunk))
    values = torch.cat(found).reshape(points.shape[:-1])
    return values.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def climb(log_density: Density, points: Tensor, max_steps: int) -> Modes:
    """Climbs from points ``(S, D)`` by Newton steps, to modes: a Hessian takes two gradients a coordinate."""
    values = partial(evaluate_density, log_density)
    gradients = partial(_gradients_of_rows, log_density)
    widths, value = torch.ones_like(points), values(points[None])[0]
    for _ in range(max_steps):
        gradient, curvature = _expand(gradients, points, widths)
        widths = curvature.diagonal(dim1=-2, dim2=-1).abs().rsqrt().clamp(1e-6, 1.0)
        here, steps, is_maximum = newton_steps(points, gradient, curvature)
        expected_gain, height = (steps * gradient).sum(-1), value
        points, value = _search_line(values, points, height, steps)
        gain = torch.where(value > height, value - height, 0.0)
        if bool(((gain < _SETTLED) | ~(expected_gain > _SETTLED)).all()):
            break
    return Modes(*here, height, is_maximum & (expected_gain < _CONVERGED))


def _gradients_of_rows(log_density: Density, points: Tensor) -> Tensor:
    _, gradients = value_and_gradient(log_density, points.reshape(-1, points.shape[-1]))
    return gradients.reshape(points.shape)


def climb_by_gradients(
    log_density: Density, points: Tensor, scale_tril: Tensor, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Climbs from each point without Hessians: by L-BFGS in the units of a Gaussian.

    See Updating Quasi-Newton Matrices with Limited Storage (Nocedal, 1980),
    https://doi.org/10.1090/S0025-5718-1980-0572855-7.

    :param scale_tril: shape ``(D, D)``, or ``(D,)`` where it is diagonal.
    :return: the ends, and the log-density there, shape ``(S,)``.
    """
    around = Gaussians(torch.zeros_like(points[:1]), scale_tril[None])

    def density(y: Tensor) -> Tensor:
        return log_density(around.deviations(y)[0])

    expand, here = Captured(partial(value_and_gradient, density)), around.units(points[None])[0]
    try:
        ends, value = _climb_in_units(expand, here, max_steps)
        expand.confirm()
    except ReplayError:  # which are none from now on
        ends, value = _climb_in_units(expand, here, max_steps)
    return around.deviations(ends)[0], value


def _climb_in_units(
    expand: Callable[[Tensor], tuple[Tensor, ...]], here: Tensor, max_steps: int
) -> tuple[Tensor, Tensor]:
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    value, gradient = expand(here)
    num_settled = torch.zeros_like(value)
    for _ in range(max_steps):
        step, after, slope = torch.zeros_like(here), value, gradient
        trial = _quasi_newton(gradient, memory)
        least = _SETTLED + 4 * torch.finfo(value.dtype).eps * value.abs()
        is_short = (num_settled < 2) & ((trial * gradient).sum(-1) > least)
        for _ in range(_MOST_SHORTER):
            check_time()
            if not bool(is_short.any()):
                break
            # of all points, for whose number it is captured
            found, at_found = expand(here + torch.where(is_short[:, None], trial, step))
            is_up = is_short & (found > value) & found.isfinite()
            step = torch.where(is_up[:, None], trial, step)
            slope = torch.where(is_up[:, None], at_found, slope)
            after = torch.where(is_up, found, after)
            is_short, trial = is_short & ~is_up, trial / 4
        settled = ~(after - value >= least)
        # once more by the gradient alone, where what is remembered leads nowhere
        num_settled = torch.where(settled, num_settled + 1, 0)
        here, value, change, gradient = here + step, after, gradient - slope, slope
        if bool((num_settled >= 2).all()):
            break
        product = (step * change).sum(-1, keepdim=True)
        is_curved = product > 1e-10 * step.norm(dim=-1, keepdim=True) * change.norm(
            dim=-1, keepdim=True
        )
        weight = torch.where(is_curved, product.reciprocal(), 0.0)
        memory = [(s, y, torch.where(settled[:, None], 0.0, w)) for s, y, w in memory]
        memory = [*memory[1 - _MEMORY :], (step, change, weight)]
    return here, value


def _quasi_newton(gradient: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The gradient times the inverse curvature that L-BFGS remembers; the gradient without memory."""
    step = torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0)
    shares = []
    for moved, change, weight in reversed(memory):
        shares.append(weight * (moved * step).sum(-1, keepdim=True))
        step = step - shares[-1] * change
    if memory:
        moved, change, weight = memory[-1]
        size = change.square().sum(-1, keepdim=True) * weight
        step = torch.where(size > 0, step / size, step)
    for (moved, change, weight), share in zip(memory, reversed(shares)):
        step = step + (share - weight * (change * step).sum(-1, keepdim=True)) * moved
    return step


def _expand(gradients: Density, points: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient at each point, and the curvature there (minus the Hessian).

    That is by differences of gradients, over a part of the widths, shape ``batch + (D,)``: all in one
    batch, while a second derivative of the gradient takes a pass for each coordinate.
    """
    dim = points.shape[-1]
    size = widths * (1e-4 if points.dtype == torch.float64 else 1e-2)
    shifts = torch.diag_embed(size).movedim(-2, 0)
    around = gradients(torch.cat([points[None], points + shifts, points - shifts]))
    gradient, ahead, behind = around[0], around[1 : 1 + dim], around[1 + dim :]
    hessian = ((ahead - behind) / (2 * size.movedim(-1, 0)[..., None])).movedim(0, -2)
    curvature = -0.5 * (hessian + hessian.mT)
    usable = curvature.isfinite().all(-1).all(-1) & gradient.isfinite().all(-1)
    # a unit Gaussian stands for what is not finite; the sign says that it is no maximum
    saddle = -torch.diag_embed(torch.ones_like(gradient))
    curvature = torch.where(usable[..., None, None], curvature, saddle)
    return torch.where(usable[..., None], gradient, 0.0), curvature


def newton_steps(
    points: Tensor, gradient: Tensor, curvature: Tensor
) -> tuple[Gaussians, Tensor, Tensor]:
    """The Gaussian of the absolute curvature at each point, its Newton step, and where a maximum is."""
    # to unit curvature by coordinate first (by its row, where that is next to 0): floors and
    # round-off are then relative to each scale
    diagonal, by_row = curvature.diagonal(dim1=-2, dim2=-1).abs(), curvature.abs().amax(-1)
    tiny = diagonal <= 1e-12 * diagonal.amax(-1, keepdim=True)
    units = torch.where(tiny, torch.where(by_row > 0, by_row, 1.0), diagonal).rsqrt()
    values, vectors = eigh(curvature * units[..., None] * units[..., None, :])
    floored = values.abs().clamp_min(_LEAST_CURVATURE)
    axes = units[..., None] * vectors
    along = (axes.mT @ gradient[..., None])[..., 0]
    steps = (axes @ (along / floored)[..., None])[..., 0]
    lower = lower_factor(axes * floored.rsqrt()[..., None, :])
    return Gaussians(points, lower), steps, (values > _FLAT).all(-1)


def _search_line(
    values: Density, points: Tensor, value: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Each point moved along its step by the best of several sizes, and the log density there."""
    # from a whole Newton step down to a ten-millionth of one
    sizes = points.new_tensor([4.0**-k for k in range(12)])
    trials = points + sizes.reshape(-1, *(1,) * points.dim()) * steps
    best, k = values(trials).max(0)
    moved = trials.take_along_dim(k[None, ..., None], 0)[0]
    up = best > value
    return torch.where(up[..., None], moved, points), torch.where(up, best, value)


def moments(draws: Tensor, ridge: float = 1e-3) -> Gaussians:
    """The Gaussian of the moments of draws ``(n, D)``; the ridge squared is added to its correlations."""
    loc, centered = draws.mean(0, keepdim=True), draws - draws.mean(0)
    sd = centered.std(0).clamp_min(torch.finfo(draws.dtype).tiny ** 0.5)
    scaled = (centered / sd).mT / (len(draws) - 1) ** 0.5
    lower = lower_factor(torch.cat([scaled, ridge * torch.ones_like(sd).diag()], -1)[None])
    return Gaussians(loc, sd[:, None] * lower)
