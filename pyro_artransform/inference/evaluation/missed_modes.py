# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Mass of a posterior that a guide has missed, by draws that are not the guide's.

A guide never draws where it has no mass, so that its weights are good where a whole mode is missing.
Two checks do not rest on its draws: importance sampling with heavy tails around the guide and every known
mode; and, in many dimensions, the mass of each mode by its curvature, or a lower bound of it, beside the
share of draws near it. Modes are those that the search for an initial guide has found, and those reached
by climbs from overdispersed starts; points that differ by full turns of an angle are one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics import Importance
from ...diagnostics.importance import GOOD_KHAT
from ...joint import LogDensity
from ..config import EvaluationConfig, InitializationConfig
from ..initialization.gaussians import (
    Gaussians,
    Modes,
    antithetic_noise,
    concatenate,
    evaluate_density,
)
from .mode_search import GuideDraws, ModeSearch, distances_to, radius


class MissedModes(NamedTuple):
    """What was found outside of a guide.

    :param log_evidence: the log evidence from heavy-tailed draws, ``nan`` if it is not reliable.
    :param lost_mass: the share of the posterior in modes without draws of the guide, 0 if too small to
        matter; ``num_lost`` is how many there are.
    :param searched_by: how modes were searched for: by "curvature", by "gradients" alone, or "none".
    :param excess_by_turns: nats by which the guide's own evidence counts several turns of angles.
    """

    log_evidence: float = math.nan
    log_evidence_se: float = math.nan
    lost_mass: float = 0.0
    num_lost: int = 0
    searched_by: str = "curvature"
    excess_by_turns: float = 0.0


@dataclass(frozen=True)
class MissedModeSearch:
    """A search for mass of the posterior that a guide has missed; the model has its arguments."""

    log_density: LogDensity
    model: Callable[[], object]
    config: EvaluationConfig
    initialization: InitializationConfig

    def find(
        self,
        draws: Tensor,
        log_evidence: float,
        modes: Modes | None,
        log_weights: Tensor | None = None,
        elbo: float = math.nan,
    ) -> MissedModes:
        """Searches outside of a guide, of which there are draws ``(n, latent_dim)``, unconstrained.

        :param log_evidence: the log evidence according to them; those of the largest weights are starts.
        :param modes: the modes that are known already.
        """
        is_usable, config = draws.isfinite().all(-1), self.config
        heaviest = draws[:0]
        if log_weights is not None:
            weights = torch.where(is_usable, log_weights, -torch.inf).nan_to_num(-torch.inf)
            heaviest = draws[weights.topk(min(config.num_heaviest, len(draws))).indices]
            heaviest = heaviest[evaluate_density(self.log_density, heaviest).isfinite()]
        draws = draws[is_usable]
        if len(draws) < 2:
            return MissedModes(searched_by="none")
        guide = GuideDraws.of(self.log_density, draws, log_evidence, config.max_dense_dim)
        search = ModeSearch(self.log_density, self.model, config, self.initialization, guide)
        modes, searched_by = search.search(heaviest, modes)
        by_curvature = searched_by == "curvature"
        for _ in range(config.max_more_searches if by_curvature else 0):
            # too many for none, and too few for a loss
            if not config.min_lost < self._lost(guide, modes)[0] <= config.max_lost:
                break
            modes = search.search_more(modes)
        found, is_complete = self._heavy_tailed_weights(guide, modes, elbo)
        if found is not None and is_complete and by_curvature and modes is not None:
            # by gradients, masses are lower bounds
            modes = self._confirmed(guide, modes, found)
        share, count = self._lost(guide, modes, by_curvature)
        if not round(100 * share):  # less than one says
            share, count = 0.0, 0
        around = (math.nan, math.nan)
        if found is not None:
            around = found.log_evidence, found.log_evidence_se
        return MissedModes(*around, share, count, searched_by, guide.excess_by_turns)

    def log_evidence_around(self, draws: Tensor) -> float:
        """The log evidence where draws ``(n, latent_dim)`` are, or a bound: by their Gaussian."""
        config = self.config
        guide = GuideDraws.of(self.log_density, draws, 0.0, config.max_dense_dim)
        loc, noise = guide.gaussian.loc, torch.randn_like(draws[: config.num_for_region])
        log_p = evaluate_density(self.log_density, loc + guide.gaussian.deviations(noise)[0])
        log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        log_q = log_q - guide.gaussian.log_volume()
        return float((log_p - log_q).logsumexp(0)) - math.log(len(noise))

    def _heavy_tailed_weights(
        self, guide: GuideDraws, modes: Modes | None, elbo: float
    ) -> tuple[Importance | None, bool]:
        """The weights of heavy-tailed draws, ``None`` if unreliable, and whether they find all mass."""
        config, more = self.config, None
        around = guide.gaussian.widened(config.heavy_inflation)
        if around.is_independent:
            return None, False
        # wider ones only where these are unreliable: around most guides and modes they are draws in vain
        for widenings in ((1.0,), (1.0, *config.heavy_widenings)):
            weigh = partial(self.weigh_heavy_tailed, around, modes, guide.is_circular, widenings)
            found = weigh()
            if not found.ess > config.heavy_min_ess * config.num_heavy:
                continue
            # whether such draws alone say how far the ELBO is from the evidence, and are too few for it
            deviation = abs(found.log_evidence - elbo - config.max_gap)
            is_unclear = deviation <= 2 * found.log_evidence_se
            if guide.log_evidence - elbo <= config.max_gap and is_unclear:
                others = [weigh().log_weights for _ in range(config.num_heavy_again)]
                found = Importance.from_log_weights(torch.cat([found.log_weights, *others]))
            if found.khat <= GOOD_KHAT:
                return found, len(widenings) == 1
            if found.log_evidence - 2 * found.log_evidence_se > guide.log_evidence:
                more = found
        return more, False

    def _confirmed(self, guide: GuideDraws, modes: Modes, found: Importance) -> Modes:
        """The modes, unless draws around the first of them find too little of what they promise."""
        most = self.config.max_modes
        promised = -math.log1p(-min(self._lost(guide, modes.take(slice(most)))[0], 1 - 1e-9))
        gain = found.log_evidence + 2 * found.log_evidence_se - guide.log_evidence
        is_there = gain >= self.config.min_confirmed * promised
        return modes if is_there else modes.take(slice(most, None))

    def _lost(
        self, guide: GuideDraws, modes: Modes | None, by_curvature: bool = True
    ) -> tuple[float, int]:
        """The share of all mass found in modes with next to no draws, and the number of these modes."""
        if modes is None:
            return 0.0, 0
        share_of_draws = guide.regions(modes, guide.draws).double().mean(-1)
        log_masses = modes.log_masses().double() - guide.log_evidence
        least = self.config.min_draws_share
        is_lost = share_of_draws < least * log_masses.sigmoid()
        if by_curvature:  # by gradients, masses are lower bounds already
            for k in is_lost.nonzero()[:, 0].tolist():
                log_masses[k] = log_masses[k].clamp_max(self._log_mass_in_region(guide, modes, k))
            is_lost = share_of_draws < least * log_masses.sigmoid()
        lost = log_masses[is_lost]
        total = lost.logsumexp(0)
        is_counted = lost >= total + math.log(self.config.min_counted)
        return total.sigmoid().item(), int(is_counted.sum())

    def _log_mass_in_region(self, guide: GuideDraws, modes: Modes, k: int) -> float:
        """The log mass in the region of a mode, relative to the guide's, by draws of its Gaussian."""
        config, (loc, scale_tril) = self.config, modes.gaussians.take([k])
        noise = antithetic_noise(loc, config.num_for_region)
        points = loc + noise @ scale_tril[0].mT
        inside = guide.regions(modes, points)[k] & (noise.square().mean(-1) < radius(loc.shape[-1]))
        log_p = evaluate_density(self.log_density, points).masked_fill(~inside, -torch.inf)
        log_ratio = log_p + 0.5 * noise.square().sum(-1)
        found = log_ratio.logsumexp(0).item() - math.log(config.num_for_region)
        found += modes.log_masses()[k].item() - modes.value[k].item()
        slack = loc.shape[-1] * config.max_curvature_error
        return found + slack - guide.log_evidence

    def weigh_heavy_tailed(
        self,
        around: Gaussians,
        modes: Modes | None,
        is_circular: Tensor | None = None,
        widenings: Sequence[float] = (1.0,),
    ) -> Importance:
        """Importance sampling from a mixture of Student's t around the guide and around each mode.

        Of angles, only the turn around the guide counts.

        :param widenings: what their scales are multiplied by, each in its part of the mixture.
        """
        mixture, config, degrees = around, self.config, self.config.heavy_degrees
        if modes is not None:
            mixture = concatenate([around, modes.gaussians.take(slice(config.max_modes))])
        count = len(mixture.loc)
        guide_share = config.heavy_guide_share if count > 1 else 1.0
        others = (1 - config.heavy_guide_share) / max(count - 1, 1)
        of_each = [guide_share] + [others] * (count - 1)
        shares = mixture.loc.new_tensor(len(widenings) * of_each) / len(widenings)
        mixture = concatenate(map(mixture.widened, widenings))
        count, dim = mixture.loc.shape
        which = torch.multinomial(shares, config.num_heavy, replacement=True)
        draws = mixture.loc[which]
        noise = torch.randn_like(draws)
        gamma = torch.distributions.Chi2(torch.full_like(noise[:, :1], degrees)).sample()
        noise = noise * (degrees / gamma).sqrt()
        for k in range(count):
            # a scale for each draw would take their number times D^2 of memory
            draws[which == k] += mixture.take([k]).deviations(noise[which == k])[0]
        half = 0.5 * (degrees + dim)
        constant = math.lgamma(half) - math.lgamma(0.5 * degrees)
        constant -= 0.5 * dim * math.log(degrees * math.pi)
        kernel = half * torch.log1p(distances_to(mixture, draws) * dim / degrees)
        log_q = constant - mixture.log_volume()[:, None] - kernel + shares.log()[:, None]
        log_p = evaluate_density(self.log_density, draws)
        if is_circular is not None:
            away = is_circular & ((draws - around.loc).abs() > math.pi)
            log_p = log_p.masked_fill(away.any(-1), -torch.inf)
        return Importance.from_log_weights(log_p - log_q.logsumexp(0))
