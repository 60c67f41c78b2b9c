# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A search for missed modes without Hessians, for any number of latents.

Climbs start at draws of the prior, in shells around the guide, at its mirror images, and afar. Where an
end is far from the guide, draws of the guide moved there and a mean-field fit bound the mass from
below, so that a high density without mass, as in the neck of a funnel, raises no alarm.
"""

import math
from dataclasses import dataclass

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
