# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Places where a posterior may have mass that a guide has not: where climbs from afar end.

Climbs start in shells around the guide, at its draws of the largest weights, at mirror images, and at draws
of the prior. A place has the Gaussian of its curvature, from which draws are taken; whether they have mass
is not asked here.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics.defensive_mixture import base_draws, log_base_density
from ...graphs.factorization import lower_factor
from ...joint import LogJoint, MeanLogJoint
from ..config import FitConfig
from ..initialization.gaussians import (
    Density,
    Gaussians,
    Modes,
    climb,
    climb_by_gradients,
    evaluate_density,
)
from ..initialization.points import starting_points

_SHELLS, _WIDENED = (3.0, 10.0, 30.0, 100.0), 1.2  # around the guide, in sds of this factor
_OF_SHELL = 2  # points of each that climbs start at, and of the best of each
_MOST_MODES = 32  # modes that draws are taken around: memory
# from the end of a climb by gradients to the mode (10 find no more: benchmarks/verdict.md)
_NEWTON_STEPS = 4
# sds of each coordinate within which ends of climbs are one; squared distance of two modes that always differ
_SAME_END, _DIFFERENT = 0.1, 16.0
# nats, and standard deviations of what a part of the data makes of them, by which a mode may be lower
_MOST_LOWER, _MOST_SDS = 20.0, 6.0


class Shape(NamedTuple):
    """A density: a Gaussian, or, where it is heavy, its mixture with tails of all coordinates and of one.

    Their draws are at all distances, so that a spike sees a wide part around it.
    """

    gaussian: Gaussians
    is_heavy: bool = False

    def stratum(self, log_density: Density, count: int) -> "Stratum":
        """Draws, with their weights."""
        like = self.gaussian.loc.expand(count, -1)
        noise = base_draws(like) if self.is_heavy else torch.randn_like(like)
        draws = self.gaussian.loc + self.gaussian.deviations(noise)[0]
        log_p = evaluate_density(log_density, draws)
        return Stratum(draws, log_p - self.log_probs(draws)[0][0], self)

    def log_probs(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The log density, and that of the Gaussian alone where its draws are.

        :param points: shape ``(n, D)``; of S densities ``(S, n, D)``, each has its own.
        :return: shape ``(S, n)``.
        """
        dim, units = points.shape[-1], units_of(self.gaussian, points)
        squares, log_volume = units.square().sum(-1), self.gaussian.log_volume()[:, None]
        normal = -0.5 * squares - 0.5 * dim * math.log(2 * math.pi) - log_volume
        near = normal.masked_fill(squares > dim + 3 * math.sqrt(2 * dim), -torch.inf)
        return (log_base_density(units) - log_volume if self.is_heavy else normal), near


class Stratum(NamedTuple):
    """Draws ``(n, D)``, the density of the model over their own ``(n,)``, and what they look like."""

    draws: Tensor
    log_weights: Tensor
    shape: Shape


@dataclass(frozen=True)
class ModeSearch:
    """A search for modes far from a guide.

    :param draws: draws of the guide, shape ``(n, D)``.
    :param around: the Gaussian of their moments.
    """

    log_density: LogJoint
    config: FitConfig
    draws: Tensor
    around: Shape

    def points(self) -> Tensor:
        """Points around the guide and in the prior, as for an initial guide; afar; and mirror images."""
        density, config = self.log_density, self.config.initialization
        center = self.around.gaussian.loc[0]
        near = starting_points(density, center, config.num_points)
        images = torch.stack([-center, 2 * density.start - center])
        return torch.cat([near, self.points_afar(), images])

    def points_afar(self) -> Tensor:
        """Points in shells far outside of the guide: any, and those of the largest density."""
        around = self.around.gaussian.widened(_WIDENED)
        each = max(self.config.evaluation.num_screened // len(_SHELLS), _OF_SHELL)
        sds = around.loc.new_tensor(_SHELLS).repeat_interleave(each)
        noise = torch.randn_like(around.loc.expand(len(sds), -1))
        points = around.loc + around.deviations(sds[:, None] * noise)[0]
        # by how much it exceeds the Gaussian's
        excess = evaluate_density(self.log_density, points)
        excess = excess + 0.5 * squared_distances(around, points)[0]
        best = excess.reshape(len(_SHELLS), each).topk(_OF_SHELL).indices
        by_shell = points.reshape(len(_SHELLS), each, -1)
        chosen = by_shell.gather(1, best[:, :, None].expand(-1, -1, points.shape[-1]))
        return torch.cat([by_shell[:, :_OF_SHELL], chosen], 1).flatten(0, 1)

    def points_of_few(self, of_few: MeanLogJoint) -> Tensor:
        """Ends of climbs in a few mini-batches, other than the guide's, that may be a mode of all data.

        The mode of a part is off by as much as its posterior is wider: then the density of all data is lower
        by half a chi-squared variable over the part.
        """
        search, center = replace(self, log_density=of_few), self.around.gaussian.loc
        own, _ = search.climbed(center)
        ends, _ = search.climbed(search.points())
        units = self.around.gaussian.units((ends - own)[None])[0]
        ends = ends[units.abs().amax(-1) > _SAME_END]
        heights = evaluate_density(self.log_density, torch.cat([center, ends]))
        dim = ends.shape[-1]
        most = 0.5 * (dim + _MOST_SDS * math.sqrt(2 * dim)) / of_few.share
        return ends[heights[1:] > heights[0] - most - _MOST_LOWER]

    def climbed(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct ends of climbs from points of finite density, the highest first, and their heights."""
        points = points[evaluate_density(self.log_density, points).isfinite()]
        gaussian, kept = self.around.gaussian, list[int]()
        most = self.config.evaluation.max_climb_steps
        ends, values = climb_by_gradients(self.log_density, points, gaussian.scale_tril[0], most)
        units = gaussian.units(ends[None])[0]
        for i in values.argsort(descending=True).tolist():
            is_new = ((units[kept] - units[i]).abs().amax(-1) > _SAME_END).all()
            if bool(is_new) and bool(values[i].isfinite()):
                kept.append(i)
        return ends[kept], values[kept]

    def modes_above(self, points: Tensor, before: Modes | None = None) -> Modes:
        """The modes that climbs end at, and those before, with the most mass by their curvature first."""
        modes = climb(self.log_density, self.climbed(points)[0], _NEWTON_STEPS)
        modes, kept = modes._replace(scale_tril=self._no_wider_off_maxima(modes)), list[int]()
        if before is not None:
            modes = Modes(*map(torch.cat, zip(modes, before)))
        # each is within the other: a spike inside of a wide mode is another one
        distances = squared_distances(modes.gaussians, modes.loc)
        is_same = torch.maximum(distances, distances.T) <= min(modes.loc.shape[-1], _DIFFERENT)
        for i in modes.log_masses().argsort(descending=True).tolist():
            if len(kept) < _MOST_MODES and not bool(is_same[i, kept].any()):
                kept.append(i)
        return Modes(*(each[kept] for each in modes))

    def _no_wider_off_maxima(self, modes: Modes) -> Tensor:
        """What is no maximum, as on a ridge, is no wider in any direction than the guide."""
        own = modes.scale_tril
        lower = self.around.gaussian.scale_tril[0]
        axes, scales, _ = torch.linalg.svd(torch.linalg.solve_triangular(lower, own, upper=False))
        root = lower @ (axes * (scales / (1 + scales**2).sqrt())[:, None])
        return torch.where(modes.converged[:, None, None], own, lower_factor(root))

    def around_modes(self, modes: Modes) -> list[Stratum]:
        """Draws around each of S modes."""
        each = (modes.gaussians.take([k]) for k in range(len(modes.value)))
        shapes = (Shape(gaussian, True) for gaussian in each)
        return [s.stratum(self.log_density, self.config.evaluation.num_for_mode) for s in shapes]


def units_of(gaussian: Gaussians, points: Tensor) -> Tensor:
    """Points ``(n, D)`` in the units of S Gaussians, from their means: shape ``(S, n, D)``."""
    return gaussian.units(points - gaussian.loc[:, None])


def squared_distances(gaussian: Gaussians, points: Tensor) -> Tensor:
    """Squared distances ``(S, n)`` of points from the means of Gaussians, in their units."""
    return units_of(gaussian, points).square().sum(-1)
