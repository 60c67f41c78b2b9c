# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Searches for modes far from a guide, and what its draws say of the region around each.

Climbs start in shells around the guide, at draws of the prior and at mirror images. With Hessians each end
has the mass of its curvature; else moved draws of the guide and mean-field fits bound it from below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...joint import LogDensity
from ..config import EvaluationConfig, InitializationConfig
from ..initialization.batch_and_match import ascend_independent, fit_independent
from ..initialization.gaussians import (
    Gaussians,
    Modes,
    antithetic_noise,
    climb,
    climb_by_gradients,
    concatenate,
    elbos,
    evaluate_density,
    lower_factor,
)
from ..initialization.points import starting_points

# the density of an angle is the same after these turns, that of a proper prior is not where they lead
# beyond some standard deviations of the draws
_TURNS, _BEYOND = (1.0, -32.0), 4.0
_TURN_TOLERANCE = 1e-3  # nats, to which round-off is added
_SAME_END = 0.1  # sds of the guide within which ends of climbs are one
# points between two ends, and nats by which the density is less there if they are two modes
_NUM_BETWEEN, _DIP = 17, 1.0
_MOST_VALUES = 2**23  # of points that are evaluated at once: 64 MB in double precision


class GuideDraws(NamedTuple):
    """Draws of a guide, shape ``(n, D)``, angles within a turn, with their moments.

    :param log_evidence: the log evidence by their weights, of one turn of each angle.
    :param is_circular: which coordinates are angles, shape ``(D,)``; ``None`` without angles.
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
        """The draws, folded where a coordinate is an angle; more than the most have sds alone."""
        is_circular = _find_circular(log_density, draws)
        folded, excess = fold(draws, is_circular), 0.0
        if is_circular is not None:
            excess = _entropy_of_turns(draws[:, is_circular], folded[:, is_circular])
        loc = folded.mean(0)
        centered = folded - loc
        scale = sd = centered.std(0).clamp_min(torch.finfo(folded.dtype).tiny ** 0.5)
        if len(sd) <= max_dense_dim:
            scaled = centered / sd
            covariance = scaled.T @ scaled / (len(folded) - 1)
            jitter = 1e-6 * torch.eye(len(sd), dtype=sd.dtype, device=sd.device)
            scale = sd[:, None] * torch.linalg.cholesky(covariance + jitter)
        gaussian = Gaussians(loc[None], scale[None])
        return cls(folded, gaussian, log_evidence - excess, is_circular, excess)

    def regions(self, modes: Modes, points: Tensor) -> Tensor:
        """Which of n points are of which of S modes, shape ``(S, n)``: within reach of the likeliest."""
        dim = points.shape[-1]
        distances = distances_to(modes.gaussians, points, self.is_circular)
        by_mode = modes.value[:, None] - 0.5 * dim * distances
        top = self.log_evidence - self.gaussian.log_volume() - 0.5 * dim * math.log(2 * math.pi)
        by_guide = top - 0.5 * dim * distances_to(self.gaussian, points, self.is_circular)[0]
        best = torch.cat([by_mode, by_guide[None]]).max(0).values
        return (distances < radius(dim)) & (by_mode >= best)


def radius(dim: int) -> float:
    """The mean square, in units of a Gaussian, within which are all of its draws but the tail."""
    return 1 + 3 * math.sqrt(2 / dim)


def distances_to(gaussians: Gaussians, points: Tensor, is_circular: Tensor | None = None) -> Tensor:
    """Mean squares over coordinates of n points in the units of S Gaussians, shape ``(S, n)``."""
    away = points - gaussians.loc[:, None]
    if is_circular is not None:
        away = torch.where(is_circular, _wrapped(away), away)
    return (gaussians.units(away) ** 2).mean(-1)


def fold(points: Tensor, is_circular: Tensor | None, center: Tensor | None = None) -> Tensor:
    """Points ``(n, D)`` with each angle within half a turn of a center, by default their mean."""
    if is_circular is None:
        return points
    if center is None:
        center = torch.atan2(points.sin().mean(0), points.cos().mean(0))
    return torch.where(is_circular, center + _wrapped(points - center), points)


def _wrapped(angles: Tensor) -> Tensor:
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi


def _find_circular(log_density: LogDensity, draws: Tensor) -> Tensor | None:
    """Which coordinates are angles: after whole turns the density is the same; ``None`` without."""
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
    """The entropy of turns given angles, by which an ELBO is too large (corrected: Miller, 1955)."""
    total, size = 0.0, math.isqrt(len(draws))  # of pieces in which the angle counts as the same
    for angles, within in zip(draws.double().mT, folded.double().mT):
        turns, nats = ((angles - within) / (2 * math.pi)).round(), 0.0
        for piece in turns[within.argsort()].split(size):
            counts = piece.unique(return_counts=True)[1]
            shares = counts / len(piece)
            entropy = -(shares * shares.log()).sum() + (len(counts) - 1) / (2 * len(piece))
            nats += entropy.item() * len(piece)
        total += nats / len(turns)
    return total


# draws of a mean-field fit
_NUM_DRAWS = 32


@dataclass(frozen=True)
class ModeSearch:
    """A search for modes far from a guide."""

    log_density: LogDensity
    model: Callable[[], object]
    config: EvaluationConfig
    initialization: InitializationConfig
    guide: GuideDraws

    def search(self, starts: Tensor, known: Modes | None) -> tuple[Modes | None, str]:
        """Known modes, and those above starts and points afar; how, as ``MissedModes.searched_by``."""
        points, searched_by = torch.cat([starts, self._points_afar()]), "curvature"
        if known is None:  # no start has climbed from there
            is_slow, config = self.log_density.strategy == "loop", self.initialization
            count = config.num_points_by_loop if is_slow else config.num_points
            center = self.guide.gaussian.loc[0]
            others = starting_points(self.log_density, self.model, center, count)
            points = torch.cat([points, others])
        found = self._climb(points)
        if found is None:
            searched_by = "gradients"
            try:
                found = self._climb_by_gradients(points)
            except RuntimeError:  # a model without a gradient
                searched_by = "none"
        known = None if known is None else self._weighed(known)
        return self._distinct(known, found), searched_by

    def search_more(self, modes: Modes | None) -> Modes | None:
        """Known modes, and those above other points afar."""
        return self._distinct(modes, self._climb(self._points_afar()))

    def _points_afar(self) -> Tensor:
        """Points of finite density far outside of the guide, and its images in origin and start."""
        # half of the points are any, half those whose density exceeds the Gaussian's the most
        config, density = self.config, self.log_density
        around = self.guide.gaussian.widened(config.heavy_inflation)
        screened, count = config.num_screened, config.num_climbs
        if density.strategy == "loop":
            screened, count = config.num_screened_by_loop, config.num_climbs_by_loop
        noise = torch.randn_like(around.loc.expand(screened, -1))
        shells = torch.arange(screened, device=noise.device) % len(config.far)
        far = noise.new_tensor(config.far)[shells, None]
        points = around.loc + around.deviations(far * noise)[0]
        images = torch.cat([-around.loc, 2 * density.start - around.loc])
        values = evaluate_density(density, points)
        is_finite = values.isfinite()
        points, values, shells = points[is_finite], values[is_finite], shells[is_finite]
        half = count // 2
        excess = values + 0.5 * points.shape[-1] * distances_to(around, points)[0]
        best = _best_of_each(shells[half:], excess[half:])[: count - half]
        images = images[evaluate_density(density, images).isfinite()]
        return torch.cat([points[:half], points[half:][best], images])

    def _climb(self, points: Tensor) -> Modes | None:
        """The modes above points, if Hessians can be had."""
        density, config = self.log_density, self.config
        if density.latents.latent_dim > config.max_hessian_dim or not len(points):
            return None
        scale, kept = self.guide.gaussian.scale_tril[0], list[int]()
        try:
            ends, values = climb_by_gradients(density, points, scale, config.max_climb_steps)
            units = self.guide.gaussian.units(ends[None])[0]
            for i in values.argsort(descending=True).tolist():
                # what is left of the way is less than what a step sees
                distances = (units[kept] - units[i]).abs().amax(-1)
                if bool((distances > _SAME_END).all()) and bool(values[i].isfinite()):
                    kept.append(i)
            return self._weighed(climb(density, ends[kept], config.max_newton_steps))
        except RuntimeError:  # a model without a gradient
            return None

    def _climb_by_gradients(self, points: Tensor) -> Modes | None:
        """Gaussians far from the guide, above points and mirror images, with bounds of their masses."""
        density, config, around = self.log_density, self.config, self.guide.gaussian
        draws = self.guide.draws[: config.num_moved]
        base = evaluate_density(density, draws)
        starts, signs = self._with_mirror_images(points)
        starts = torch.cat([draws[base.argmax()][None], starts])
        scale = around.scale_tril[0]
        ends, values = climb_by_gradients(density, starts, scale, config.max_climb_steps)
        kept = [i for i in self._far(ends, values) if self._is_beyond_a_dip(ends[0], ends[i])]
        if not kept:
            return None
        own, far, signs = ends[0], ends[kept], signs[[k - 1 for k in kept]]
        moved = far[:, None] + signs[:, None] * (draws - own)
        gain = (evaluate_density(density, moved) - base)[:, base.isfinite()].mean(-1)
        scales = scale.expand(len(far), *scale.shape)
        if not around.is_independent:
            scales = signs[:, :, None] * scales * signs[:, None]
        mirrored = Gaussians(far - signs * own + signs * around.loc, scales)
        # mean-field fits in the units of the draws
        sd, count = draws.std(0), 1 if density.strategy == "loop" else len(far)
        steps = self.initialization.num_matches

        def in_units(z: Tensor) -> Tensor:
            return density(z * sd)

        fitted = fit_independent(in_units, far[:count] / sd, _NUM_DRAWS, steps)
        fitted = ascend_independent(in_units, fitted, _NUM_DRAWS, steps // 2)
        fitted = Gaussians(fitted.loc * sd, sd * fitted.scale_tril)
        fitted = fitted if around.is_independent else fitted.dense()
        noise = antithetic_noise(far, 2 * _NUM_DRAWS)
        bounds = torch.cat([self.guide.log_evidence + gain, elbos(density, fitted, noise)])
        matters = bounds > self.guide.log_evidence + math.log(config.max_lost * config.min_counted)
        modes = Modes.of_masses(concatenate([mirrored, fitted]), bounds, matters)
        return modes.take(matters.nonzero()[:, 0].tolist()) if bool(matters.any()) else None

    def _with_mirror_images(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points and images of the guide's mean, of finite density; and signs, -1 where mirrored."""
        density, flips, start = self.log_density, list[Tensor](), 0
        center = self.guide.gaussian.loc[0]
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

    def _is_beyond_a_dip(self, own: Tensor, end: Tensor) -> bool:
        """Whether the density between two ends is less than at both: else they are of one mode."""
        between = torch.linspace(0, 1, _NUM_BETWEEN, dtype=own.dtype, device=own.device)
        values = evaluate_density(self.log_density, torch.lerp(own, end, between[:, None]))
        return bool(values.min() < torch.minimum(values[0], values[-1]) - _DIP)

    def _far(self, ends: Tensor, values: Tensor) -> list[int]:
        """The highest of the ends that are far from the first one, and from each other."""
        units = self.guide.gaussian.units(ends[None])[0]
        kept = [0]
        for i in values.argsort(descending=True).tolist():
            distances = (units[kept] - units[i]).square().sum(-1)
            if bool((distances > self.config.min_distance_by_gradients**2).all()):
                kept.append(i)
        return kept[1 : self.config.num_far + 1]

    def _weighed(self, modes: Modes) -> Modes:
        """Modes whose mass is that of their curvature, or what draws find, which is less in a neck."""
        config, converged = self.config, modes.converged[:, None, None]
        # elsewhere no wider in any direction than the guide
        lower = self.guide.gaussian.scale_tril[0]
        units = torch.linalg.solve_triangular(lower, modes.gaussians.scale_tril, upper=False)
        axes, scales, _ = torch.linalg.svd(units)
        root = lower @ (axes * (scales / (1 + scales**2).sqrt())[:, None])
        scale_tril = torch.where(converged, modes.gaussians.scale_tril, lower_factor(root))
        gaussians = Gaussians(modes.gaussians.loc, scale_tril)
        noise = antithetic_noise(gaussians.loc, config.num_for_mode)
        log_p = evaluate_density(self.log_density, gaussians.loc[:, None] + noise @ scale_tril.mT)
        log_ratio = log_p + 0.5 * noise.square().sum(-1)  # but for the constant of the Gaussian
        found = log_ratio.logsumexp(-1) - math.log(config.num_for_mode)
        excess = modes.value - found - noise.shape[-1] * config.max_curvature_error
        value = modes.value - excess.clamp_min(0)
        return Modes(gaussians, value, value.isfinite())

    def _distinct(self, known: Modes | None, found: Modes | None) -> Modes | None:
        """The maxima that are not the same, those with the most mass first, angles near the guide's."""
        if known is None and found is None:
            return None
        gaussians, values, converged = zip(*filter(None, (known, found)))
        loc, scale_tril = concatenate(gaussians)
        is_circular = self.guide.is_circular
        loc = fold(loc, is_circular, self.guide.gaussian.loc[0])
        modes = Modes(Gaussians(loc, scale_tril), torch.cat(values), torch.cat(converged))
        config, kept = self.config, list[int]()
        least = min(loc.shape[-1] * config.min_mode_distance, config.max_squared_distance)
        for i in modes.log_masses().argsort(descending=True).tolist():
            if not bool(modes.converged[i]):
                continue
            # a spike inside of a wide mode is far from its top in units of its own
            others, this = modes.gaussians.take(kept), modes.gaussians.take([i])
            distances = len(loc[i]) * torch.maximum(
                distances_to(others, this.loc, is_circular)[:, 0],
                distances_to(this, others.loc, is_circular)[0],
            )
            if bool((distances > least).all()):
                kept.append(i)
        return modes.take(kept) if kept else None


def _best_of_each(groups: Tensor, values: Tensor) -> Tensor:
    """The indices of values: the largest of each group first, then the second of each, and so on."""
    order = values.argsort(descending=True)
    same, members = groups[order].sort(stable=True)
    rank = torch.empty_like(members)
    rank[members] = torch.arange(len(same), device=same.device) - torch.searchsorted(same, same)
    return order[rank.argsort(stable=True)]
