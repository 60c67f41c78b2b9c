# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Mass of each of many posteriors that a guide has missed.

All posteriors are searched at once: a row of points is one for each of them, a gradient at it has the
gradients of all, and each climbs by its own. Where climbs end, draws of the Gaussian of the curvature say
how much mass there is, as of a single posterior (``mixture.py``): much where the guide has few draws is lost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...graphs.dependencies import value_and_gradient
from ...joint import log_density_by_element
from ...joint.posteriors import Posteriors
from ...time_limit import limited
from ..config import FitConfig
from ..initialization.gaussians import Gaussians, newton_steps
from ..initialization.points import starting_points
from .missed_modes import MIN_SHARE, moments

_NUM_STEPS = 25  # of a climb
_SETTLED = 1e-4  # nats below which none of a row of points has gained
_SHELLS = (3.0, 10.0, 30.0)  # where points are far outside, in sds


@dataclass(frozen=True, eq=False)
class EachSearch:
    """A search for modes of E posteriors of d latents each.

    :param index: the coordinates of each, shape ``(E, d)``.
    :param draws: draws of the guide, shape ``(m, E, d)``.
    :param around: the Gaussians of their moments.
    """

    posteriors: Posteriors
    index: Tensor
    draws: Tensor
    around: Gaussians

    @classmethod
    def of(cls, posteriors: Posteriors, draws: Tensor) -> "EachSearch":
        """With draws ``(m, latent_dim)`` of the guide."""
        index = posteriors.elements.argsort(stable=True).reshape(posteriors.size, -1)
        own = draws[:, index]
        each = [moments(own[:, k], index.shape[1]) for k in range(len(index))]
        around = Gaussians(*(torch.cat(parts) for parts in zip(*each)))
        return cls(posteriors, index, own, around)

    def shares_lost(
        self, model: Callable[[], object], config: FitConfig, log_evidence: Tensor
    ) -> Tensor:
        """The share of each posterior in its largest mode without draws of the guide, 0 without one.

        :param log_evidence: according to draws of the guide, shape ``(E,)``.
        """
        lost = torch.zeros_like(log_evidence)
        points = self._points(model, config.initialization.num_points)
        modes, is_maximum = self._climbed(points)
        for k in limited(range(len(points))):
            mode = Gaussians(modes.loc[k], modes.scale_tril[k])
            mass, of_draws = self._mass_at(mode, config.evaluation.num_for_mode)
            share = (mass - log_evidence).sigmoid()
            is_lost = is_maximum[k] & (of_draws < MIN_SHARE * share)
            lost = torch.where(is_lost, torch.maximum(lost, share), lost)
        return lost

    def _points(self, model: Callable[[], object], count: int) -> Tensor:
        """Points of the prior, around the guide, far outside and mirrored, shape ``(P, E, d)``."""
        density = self.posteriors.log_joint
        center = torch.empty_like(density.start)
        center[self.index] = self.around.loc
        near = starting_points(density, model, center, count)
        images = torch.stack([-center, 2 * density.start - center])
        rows = torch.cat([near, images])[:, self.index]
        noise = torch.randn_like(self.around.loc.expand(len(_SHELLS), -1, -1))
        afar = noise.new_tensor(_SHELLS)[:, None, None] * _deviations(self.around, noise)
        points = torch.cat([rows, self.around.loc + afar])
        is_finite = self._log_densities(points).isfinite()[..., None]
        return torch.where(is_finite, points, self.around.loc)

    def _packed(self, points: Tensor) -> Tensor:
        """Points ``(..., E, d)`` as rows of all latents ``(n, latent_dim)``."""
        rows = points.reshape(-1, self.index.numel())
        packed = torch.empty_like(rows)
        packed[:, self.index.flatten()] = rows
        return packed

    def _log_densities(self, points: Tensor) -> Tensor:
        """The log density of each at points ``(..., E, d)``; ``-inf`` where it is not finite."""
        log_joint, plate = self.posteriors.log_joint, self.posteriors.plate
        found, _ = log_density_by_element(log_joint, self._packed(points), plate)
        found = found.reshape(points.shape[:-1])
        return found.nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    def _climbed(self, points: Tensor) -> tuple[Gaussians, Tensor]:
        """The Gaussians of the curvature where Newton steps end, ``(P, E, d)``, and where a maximum is."""
        widths, value = torch.ones_like(points), self._log_densities(points)
        sizes = points.new_tensor([4.0**-k for k in range(12)])[:, None, None, None]
        for step in range(_NUM_STEPS + 1):
            gradient, curvature = self._expanded(points, widths)
            widths = curvature.diagonal(dim1=-2, dim2=-1).abs().rsqrt().clamp(1e-6, 1.0)
            found = newton_steps(*(each.flatten(0, 1) for each in (points, gradient, curvature)))
            gaussians, steps, is_maximum = found[0], found[1].view_as(points), found[2]
            if step == _NUM_STEPS:
                break
            gain, k = (self._log_densities(points + sizes * steps) - value).max(0)
            is_up = gain > 0
            moved = 4.0 ** -k[..., None].to(points) * steps
            points = torch.where(is_up[..., None], points + moved, points)
            value = torch.where(is_up, value + gain, value)
            if bool((gain < _SETTLED).all()):
                break
        batch = points.shape[:2]
        return Gaussians(*(t.unflatten(0, batch) for t in gaussians)), is_maximum.unflatten(
            0, batch
        )

    def _expanded(self, points: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of each at points ``(P, E, d)``, and its curvature by differences of gradients."""
        dim = points.shape[-1]
        size = widths * (1e-4 if points.dtype == torch.float64 else 1e-2)
        shifts = torch.diag_embed(size).movedim(-2, 1)
        around = torch.cat([points[:, None], points[:, None] + shifts, points[:, None] - shifts], 1)
        _, gradient = value_and_gradient(self.posteriors.log_joint, self._packed(around))
        gradient = gradient[:, self.index].reshape(around.shape)
        here, ahead, behind = gradient.split([1, dim, dim], 1)
        hessian = ((ahead - behind) / (2 * size.movedim(-1, 1)[..., None])).movedim(1, 2)
        curvature, here = -0.5 * (hessian + hessian.mT), here[:, 0]
        usable = curvature.isfinite().all(-1).all(-1) & here.isfinite().all(-1)
        saddle = -torch.diag_embed(torch.ones_like(here))
        curvature = torch.where(usable[..., None, None], curvature, saddle)
        return torch.where(usable[..., None], here, 0.0), curvature

    def _mass_at(self, mode: Gaussians, count: int) -> tuple[Tensor, Tensor]:
        """The log mass ``(E,)`` in the region of a mode of each, and the share of the guide's draws there."""
        noise = torch.randn_like(mode.loc.expand(count, -1, -1))
        draws = mode.loc + _deviations(mode, noise)
        log_weights = self._log_densities(draws) - _log_normal(mode, draws)[0]
        # no draw decides alone
        log_weights = log_weights.clamp_max(log_weights.logsumexp(0) - 0.5 * math.log(count))
        mass = (log_weights + self._region(mode, draws).log()).logsumexp(0) - math.log(count)
        return mass, self._region(mode, self.draws).mean(0)

    def _region(self, mode: Gaussians, points: Tensor) -> Tensor:
        """The share of a mode, as far as it reaches, in the densities there of that and the guide."""
        return (_log_normal(mode, points)[1] - _log_normal(self.around, points)[0]).sigmoid()


def _deviations(gaussians: Gaussians, noise: Tensor) -> Tensor:
    """The deviations ``(n, E, d)`` of E Gaussians."""
    return torch.einsum("eij,nej->nei", gaussians.scale_tril, noise)


def _log_normal(gaussians: Gaussians, points: Tensor) -> tuple[Tensor, Tensor]:
    """The log density of each at points ``(n, E, d)``, and that alone where its draws are."""
    dim, lower = points.shape[-1], gaussians.scale_tril
    identity = torch.eye(dim, dtype=lower.dtype, device=lower.device)
    # by the inverse: a solver would copy the matrices for all draws
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    units = torch.einsum("eij,nej->nei", inverse, points - gaussians.loc)
    squares = units.square().sum(-1)
    found = -0.5 * squares - 0.5 * dim * math.log(2 * math.pi) - gaussians.log_volume()
    return found, found.masked_fill(squares > dim + 3 * math.sqrt(2 * dim), -torch.inf)
