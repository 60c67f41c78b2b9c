# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Modes far from a guide: its draws beside modes, and climbs by gradients alone.

Climbs by gradients start at draws of the prior, in shells around the guide, at its mirror images, and
afar, for any number of latents. Where an end is far from the guide, draws of the guide moved there and a
mean-field fit bound the mass from below, so that a high density without mass, as in the neck of a funnel,
raises no alarm.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...joint import LogDensity
from ..config import EvaluationConfig, InitializationConfig
from ..initialization.gaussians import (
    Gaussians,
    Modes,
    antithetic_noise,
    climb_by_gradients,
    concatenate,
    elbos,
    evaluate_density,
    fit_independent,
)

# so many turns leave the density of an angle as it is, and that of any proper prior not, if they are
# beyond so many standard deviations of the draws as well
_TURNS, _BEYOND = (1.0, -32.0), 4.0
# numbers of points that are evaluated at once: 64 MB in double precision
_MOST_VALUES = 2**23
# nats, to which round-off is added
_TURN_TOLERANCE = 1e-3


class GuideDraws(NamedTuple):
    """Draws of a guide, shape ``(n, D)``, angles within a turn, and what they say of it.

    :param gaussian: their mean and covariance.
    :param log_evidence: the log evidence by their weights, of one turn of each angle.
    :param is_circular: which coordinates are angles, shape ``(D,)``; ``None`` if there is no angle.
    :param excess_by_turns: the nats by which the weights count several turns of an angle.
    """

    draws: Tensor
    gaussian: Gaussians
    log_evidence: float
    is_circular: Tensor | None
    excess_by_turns: float

    @classmethod
    def of(
        cls, log_density: LogDensity, draws: Tensor, log_evidence: float, max_dense_dim: int
    ) -> "GuideDraws":
        """The draws, folded where a coordinate of the density is an angle.

        :param max_dense_dim: the most coordinates that a covariance is made of.
        """
        is_circular = find_circular(log_density, draws)
        folded, excess = fold(draws, is_circular), 0.0
        if is_circular is not None:
            excess = _entropy_of_turns(draws[:, is_circular], folded[:, is_circular])
        return cls(
            folded, fit_gaussian(folded, max_dense_dim), log_evidence - excess, is_circular, excess
        )

    def widened(self, factor: float) -> Gaussians:
        """The Gaussian of the draws with its scale times a factor."""
        return Gaussians(self.gaussian.loc, factor * self.gaussian.scale_tril)

    def regions(self, modes: Modes, points: Tensor) -> Tensor:
        """Which of n points are of which of S modes, shape ``(S, n)``: each of one at most.

        A point is of a mode if it is within reach of it, and the mode's Gaussian explains its
        density better than those of other modes and of the guide do: in many dimensions a point may
        be within reach of several.
        """
        dim = points.shape[-1]
        distances = distances_to(modes.gaussians, points, self.is_circular)
        by_mode = modes.value[:, None] - 0.5 * dim * distances
        top = self.log_evidence - self.gaussian.log_volume() - 0.5 * dim * math.log(2 * math.pi)
        by_guide = top - 0.5 * dim * distances_to(self.gaussian, points, self.is_circular)[0]
        best = torch.cat([by_mode, by_guide[None]]).max(0).values
        return (distances < radius(dim)) & (by_mode >= best)

    def capped(self, gaussians: Gaussians) -> Gaussians:
        """Gaussians no wider in any direction than that of the draws."""
        lower = self.gaussian.scale_tril[0]
        units = torch.linalg.solve_triangular(lower, gaussians.scale_tril, upper=False)
        axes, scales, _ = torch.linalg.svd(units)
        root = lower @ (axes * (scales / (1 + scales**2).sqrt())[:, None])
        triangular = torch.linalg.qr(root.mT).R.mT
        signs = triangular.diagonal(dim1=-2, dim2=-1).sign()
        return Gaussians(gaussians.loc, triangular * signs[:, None])


def radius(dim: int) -> float:
    """The mean square, in units of a Gaussian, within which are all of its draws but the tail."""
    return 1 + 3 * math.sqrt(2 / dim)


def fit_gaussian(draws: Tensor, max_dense_dim: int) -> Gaussians:
    """The Gaussian of the mean and covariance of draws; of many coordinates, of their sds alone."""
    centered = draws - draws.mean(0)
    sd = centered.std(0).clamp_min(torch.finfo(draws.dtype).tiny ** 0.5)
    if len(sd) > max_dense_dim:
        return Gaussians(draws.mean(0)[None], sd[None])
    scaled = centered / sd
    covariance = scaled.T @ scaled / (len(draws) - 1)
    jitter = 1e-6 * torch.eye(len(sd), dtype=draws.dtype, device=draws.device)
    lower = torch.linalg.cholesky(covariance + jitter)
    return Gaussians(draws.mean(0)[None], (sd[:, None] * lower)[None])


def distances_to(gaussians: Gaussians, points: Tensor, is_circular: Tensor | None = None) -> Tensor:
    """Mean squares over coordinates of n points in the units of S Gaussians, shape ``(S, n)``."""
    away = _shortest(points - gaussians.loc[:, None], is_circular)
    return (gaussians.units(away) ** 2).mean(-1)


def find_circular(log_density: LogDensity, draws: Tensor) -> Tensor | None:
    """Which coordinates are angles: after whole turns the density is the same.

    :param draws: draws of a guide, shape ``(n, D)``.
    :return: shape ``(D,)``, of booleans; ``None`` if there is no angle.
    """
    points, spread = draws[:1], draws.std(0) / (2 * math.pi)
    value = evaluate_density(log_density, points)
    tolerance = _TURN_TOLERANCE + 10 * torch.finfo(value.dtype).eps * value.abs()
    circular = spread.isfinite().nonzero()[:, 0]
    for turns in _TURNS:
        if not len(circular):
            return None
        kept = []
        for some in circular.split(max(_MOST_VALUES // points.shape[-1], 1)):
            # a wide density changes little within its own width
            size = turns * (_BEYOND * spread[some] / abs(turns)).ceil().clamp_min(1)
            shifts = torch.zeros_like(points.expand(len(some), -1))
            shifts.scatter_(1, some[:, None], 2 * math.pi * size[:, None])
            change = evaluate_density(log_density, points + shifts) - value
            kept.append(some[change.abs() <= tolerance])
        circular = torch.cat(kept)
    if not len(circular):
        return None
    is_circular = torch.zeros_like(draws[0], dtype=torch.bool)
    is_circular[circular] = True
    return is_circular


def _entropy_of_turns(draws: Tensor, folded: Tensor) -> float:
    """The entropy of the turn that a draw is in, given its angle, of n draws of several angles.

    As the density is the same in all turns, a guide's ELBO is larger by that.
    """
    total = 0.0
    size = math.isqrt(len(draws))  # of pieces in which the angle counts as the same
    for angles, within in zip(draws.double().mT, folded.double().mT):
        turns = ((angles - within) / (2 * math.pi)).round()
        pieces = turns[within.argsort()].split(size)
        total += sum(_entropy(piece) * len(piece) for piece in pieces) / len(turns)
    return total


def _entropy(values: Tensor) -> float:
    """The entropy of discrete draws, corrected for their number (Miller, 1955)."""
    counts = values.unique(return_counts=True)[1]
    shares = counts / len(values)
    return (-(shares * shares.log()).sum() + (len(counts) - 1) / (2 * len(values))).item()


def _shortest(differences: Tensor, is_circular: Tensor | None) -> Tensor:
    """Differences of points of shape ``(*, D)``, those of angles the shorter way around."""
    if is_circular is None:
        return differences
    wrapped = torch.remainder(differences + math.pi, 2 * math.pi) - math.pi
    return torch.where(is_circular, wrapped, differences)


def fold(points: Tensor, is_circular: Tensor | None, center: Tensor | None = None) -> Tensor:
    """Points of shape ``(n, D)`` with each angle within half a turn of a center.

    :param center: shape ``(D,)``; the mean direction of the points unless it is given.
    """
    if is_circular is None:
        return points
    if center is None:
        center = torch.atan2(points.sin().mean(0), points.cos().mean(0))
    folded = center + _shortest(points - center, is_circular)
    return torch.where(is_circular, folded, points)


@dataclass(frozen=True)
class GradientSearch:
    """A search for modes far from a guide.

    :param initialization: how mean-field fits are made.
    """

    log_density: LogDensity
    config: EvaluationConfig
    initialization: InitializationConfig

    def find(
        self, points: Tensor, draws: Tensor, around: Gaussians, log_evidence: float
    ) -> Modes | None:
        """Gaussians far from a guide, with a lower bound of the mass of each.

        :param points: where to start, besides mirror images.
        :param draws: draws of the guide, shape ``(n, D)``.
        :param around: their Gaussian.
        :param log_evidence: the log evidence according to them.
        :return: ``None`` if none has a mass that matters.
        """
        density, config = self.log_density, self.config
        draws = draws[: config.num_moved]
        base = evaluate_density(density, draws)
        starts, signs = self._starts(points, around.loc[0])
        starts = torch.cat([draws[base.argmax()][None], starts])
        ends, values = climb_by_gradients(
            density, starts, around.scale_tril[0], config.max_newton_steps
        )
        kept = self._far(ends, values, around)
        if not kept:
            return None
        own, far, signs = ends[0], ends[kept], signs[[k - 1 for k in kept]]
        moved = far[:, None] + signs[:, None] * (draws - own)
        gain = (evaluate_density(density, moved) - base)[:, base.isfinite()].mean(-1)
        mirrored = around.mirrored(signs)
        gaussians = Gaussians(far - signs * own + mirrored.loc, mirrored.scale_tril)
        fitted = self._fit(far, draws.std(0), around.is_independent)
        noise = antithetic_noise(far, self.initialization.num_rough)
        log_masses = torch.cat([log_evidence + gain, elbos(density, fitted, noise)])
        least = log_evidence + math.log(config.max_lost * config.min_counted)
        matters = log_masses > least
        modes = Modes(concatenate([gaussians, fitted]), torch.zeros_like(log_masses), matters)
        # as modes of these masses by Laplace's approximation
        modes = modes._replace(value=log_masses - modes.log_masses())
        return modes.take(matters.nonzero()[:, 0].tolist()) if bool(matters.any()) else None

    def _starts(self, points: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """Points of finite density, and which coordinates are mirrored there: 1 or -1."""
        density, flips, start = self.log_density, list[Tensor](), 0
        if density.strategy != "loop":
            for site in density.latents.sites.values():
                flips.append(torch.ones_like(center))
                flips[-1][start : start + site.size] = -1
                start += site.size
        signs = torch.stack([-torch.ones_like(center), *flips[: self.config.max_mirrored]])
        images = torch.cat([signs * center, density.start + signs * (center - density.start)])
        signs = torch.cat([torch.ones_like(points), signs, signs])
        points = torch.cat([points, images])
        is_finite = evaluate_density(density, points).isfinite()
        return points[is_finite], signs[is_finite]

    def _far(self, ends: Tensor, values: Tensor, around: Gaussians) -> list[int]:
        """The highest of the ends that are far from the first one, and from each other."""
        units = around.units(ends[None])[0]
        kept = [0]
        for i in values.argsort(descending=True).tolist():
            distances = (units[kept] - units[i]).square().sum(-1)
            if bool((distances > self.config.min_distance_by_gradients**2).all()):
                kept.append(i)
        return kept[1 : self.config.num_far + 1]

    def _fit(self, points: Tensor, sd: Tensor, is_independent: bool) -> Gaussians:
        """Mean-field fits from points, in the units of the guide's draws."""

        def log_density(units: Tensor) -> Tensor:
            return self.log_density(units * sd)

        count = 1 if self.log_density.strategy == "loop" else len(points)
        loc, scale = fit_independent(log_density, points[:count] / sd, self.initialization)
        scale = sd * scale
        return Gaussians(loc * sd, scale if is_independent else torch.diag_embed(scale))
