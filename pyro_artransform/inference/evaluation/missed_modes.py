# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Mass of a posterior that a guide has missed, by draws that are not the guide's.

A guide never draws where it has no mass, so that its weights look good where a whole mode is missing.
Two checks do not rest on its draws: importance sampling with heavy tails around the guide and
around every known mode; and, where there are too many dimensions for that, the mass of each mode by
its curvature beside the share of draws near it. The modes are those that the search for an initial
guide has found, and those reached by climbs from overdispersed starts; points that differ by full turns
of an angle are one.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics import Importance
from ...diagnostics.importance import GOOD_KHAT
from ...joint import LogDensity
from ..config import EvaluationConfig
from ..initialization.gaussians import Gaussians, Modes, climb, concatenate, evaluate_density
from .circles import find_circular, fold, shortest


class MissedModes(NamedTuple):
    """What was found outside of a guide.

    :param log_evidence: the log evidence from heavy-tailed draws, ``nan`` if it is not reliable.
    :param log_evidence_se: its standard error.
    :param lost_mass: the share of the posterior in modes without draws of the guide, from 0 to 1;
        0 if it is too small to matter.
    :param num_lost: how many such modes there are.
    """

    log_evidence: float = math.nan
    log_evidence_se: float = math.nan
    lost_mass: float = 0.0
    num_lost: int = 0


@dataclass(frozen=True)
class MissedModeSearch:
    """A search for mass of the posterior that a guide has missed."""

    log_density: LogDensity
    config: EvaluationConfig

    def find(self, draws: Tensor, log_evidence: float, modes: Modes | None) -> MissedModes:
        """Searches outside of a guide.

        :param draws: draws of the guide on the unconstrained space, shape ``(n, latent_dim)``.
        :param log_evidence: the log evidence according to them.
        :param modes: the modes that are known already.
        """
        draws, config = draws[draws.isfinite().all(-1)], self.config
        if len(draws) < 2:
            return MissedModes()
        is_circular = find_circular(self.log_density, draws)
        draws = fold(draws, is_circular)
        around = _fit_gaussian(draws, config.heavy_inflation)
        found_afar = self._climb_from_afar(around)
        modes = self._distinct(modes, found_afar, around.loc[0], is_circular)
        found = self.weigh_heavy_tailed(around, modes, is_circular)
        reliable = found.khat <= GOOD_KHAT and found.ess > config.heavy_min_ess * config.num_heavy
        if reliable and found.log_evidence - log_evidence < -math.log1p(-config.max_lost):
            # draws do not find the mass that the curvature of these modes suggests
            modes = None if modes is None else modes.take(slice(config.max_modes, None))
        share, count = (
            (0.0, 0) if modes is None else self._lost(draws, modes, log_evidence, is_circular)
        )
        log_z = found.log_evidence if reliable else math.nan
        return MissedModes(log_z, found.log_evidence_se, share, count)

    def _climb_from_afar(self, around: Gaussians) -> Modes | None:
        """The modes above points far outside of a Gaussian, if Hessians are affordable.

        Half of the points are any, half are those whose density exceeds the Gaussian's the most.
        """
        config, density = self.config, self.log_density
        if density.latents.latent_dim > config.max_hessian_dim:
            return None
        screened, count = config.num_screened, config.num_climbs
        if density.strategy == "loop":
            screened, count = config.num_screened_by_loop, config.num_climbs_by_loop
        noise = torch.randn_like(around.loc.expand(screened, -1))
        far = noise.new_tensor(config.far)
        far = far.repeat(math.ceil(screened / len(far)))[:screened, None]
        points = around.loc + far * noise @ around.scale_tril[0].T
        values = evaluate_density(density, points)
        points, values = points[values.isfinite()], values[values.isfinite()]
        half = count // 2
        excess = values + 0.5 * points.shape[-1] * _distances(around, points)[0]
        order = excess[half:].argsort(descending=True)[: count - half]
        points = torch.cat([points[:half], points[half:][order]])
        if not len(points):
            return None
        try:
            no_noise = torch.zeros_like(points[:1])
            return climb(density, points, no_noise, config.max_newton_steps)[0]
        except RuntimeError:  # a model whose gradient cannot be differentiated has no Hessian
            return None

    def _distinct(
        self,
        known: Modes | None,
        found: Modes | None,
        center: Tensor,
        is_circular: Tensor | None,
    ) -> Modes | None:
        """The maxima that are not the same, those with the most mass first, angles near a center."""
        parts = list(filter(None, (known, found)))
        if not parts:
            return None
        gaussians, values, converged = zip(*parts)
        loc, scale_tril = concatenate(gaussians)
        loc = fold(loc, is_circular, center)
        modes = Modes(Gaussians(loc, scale_tril), torch.cat(values), torch.cat(converged))
        kept: list[int] = []
        for i in modes.log_masses().argsort(descending=True).tolist():
            if not bool(modes.converged[i]):
                continue
            distances = _distances(modes.gaussians.take(kept), loc[i : i + 1], is_circular)
            if bool((distances > self.config.min_mode_distance).all()):
                kept.append(i)
        return modes.take(kept) if kept else None

    def _lost(
        self, draws: Tensor, modes: Modes, log_evidence: float, is_circular: Tensor | None
    ) -> tuple[float, int]:
        """The share of the mass in modes with next to no draws, and the number of these modes.

        The share is of all mass that was found, the modes' and the guide's; it is their sum that
        matters, since many small modes are a large loss.
        """
        ball = 1 + 3 * math.sqrt(2 / draws.shape[-1])  # in which a Gaussian has all but its tail
        share_of_draws = (_distances(modes.gaussians, draws, is_circular) < ball).double().mean(-1)
        log_masses = modes.log_masses().double() - log_evidence
        lost = log_masses[share_of_draws < self.config.min_draws_share * log_masses.sigmoid()]
        total = lost.logsumexp(0)
        if not total.sigmoid() > self.config.max_lost:
            return 0.0, 0
        is_counted = lost >= total + math.log(self.config.min_counted)
        return total.sigmoid().item(), int(is_counted.sum())

    def weigh_heavy_tailed(
        self, around: Gaussians, modes: Modes | None, is_circular: Tensor | None = None
    ) -> Importance:
        """Importance sampling from a mixture of Student's t around the guide and around each mode.

        Of angles, only one turn counts: that around the guide.
        """
        mixture = around
        if modes is not None:
            most = slice(self.config.max_modes)
            mixture = concatenate([around, modes.gaussians.take(most)])
        count, dim = mixture.loc.shape
        degrees = self.config.heavy_degrees
        guide_share = self.config.heavy_guide_share if count > 1 else 1.0
        others = (1 - self.config.heavy_guide_share) / max(count - 1, 1)
        shares = mixture.loc.new_tensor([guide_share] + [others] * (count - 1))
        which = torch.multinomial(shares, self.config.num_heavy, replacement=True)
        draws = mixture.loc[which]
        noise = torch.randn_like(draws)
        gamma = torch.distributions.Chi2(torch.full_like(noise[:, :1], degrees)).sample()
        noise = noise * (degrees / gamma).sqrt()
        for k, scale_tril in enumerate(mixture.scale_tril):
            # a scale for each draw would take their number times D^2 of memory
            draws[which == k] += noise[which == k] @ scale_tril.mT
        half = 0.5 * (degrees + dim)
        constant = math.lgamma(half) - math.lgamma(0.5 * degrees)
        constant -= 0.5 * dim * math.log(degrees * math.pi)
        kernel = half * torch.log1p(_distances(mixture, draws) * dim / degrees)
        log_q = constant - mixture.log_volume()[:, None] - kernel + shares.log()[:, None]
        log_p = evaluate_density(self.log_density, draws)
        if is_circular is not None:
            away = is_circular & ((draws - around.loc).abs() > math.pi)
            log_p = log_p.masked_fill(away.any(-1), -torch.inf)
        return Importance.from_log_weights(log_p - log_q.logsumexp(0))


def _fit_gaussian(draws: Tensor, inflation: float) -> Gaussians:
    """The Gaussian of the mean and covariance of draws, widened."""
    centered = draws - draws.mean(0)
    sd = centered.std(0).clamp_min(torch.finfo(draws.dtype).tiny ** 0.5)
    scaled = centered / sd
    covariance = scaled.T @ scaled / (len(draws) - 1)
    jitter = 1e-6 * torch.eye(len(sd), dtype=draws.dtype, device=draws.device)
    lower = torch.linalg.cholesky(covariance + jitter)
    return Gaussians(draws.mean(0)[None], (inflation * sd[:, None] * lower)[None])


def _distances(gaussians: Gaussians, points: Tensor, is_circular: Tensor | None = None) -> Tensor:
    """Mean squares over coordinates of n points in the units of S Gaussians, shape ``(S, n)``."""
    away = shortest(points - gaussians.loc[:, None], is_circular).mT
    units = torch.linalg.solve_triangular(gaussians.scale_tril, away, upper=False)
    return (units**2).mean(-2)
