# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Mass of a posterior that a guide has missed, by draws that are not the guide's.

A guide never draws where it has no mass, so that its weights look good where a whole mode is missing.
Two checks do not rest on its draws: importance sampling with heavy tails around the guide and
around every known mode; and, where there are too many dimensions for that, the mass of each mode by
its curvature, or a lower bound of it, beside the share of draws near it. The modes are those that
the search for an initial guide has found, and those reached by climbs from overdispersed starts;
points that differ by full turns of an angle are one.
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
    climb,
    concatenate,
    evaluate_density,
)
from ..initialization.initial_guide import GaussianSearch
from .mode_search import GradientSearch, GuideDraws, distances_to, fold, radius


class MissedModes(NamedTuple):
    """What was found outside of a guide.

    :param log_evidence: the log evidence from heavy-tailed draws, ``nan`` if it is not reliable.
    :param log_evidence_se: its standard error.
    :param lost_mass: the share of the posterior in modes without draws of the guide, from 0 to 1;
        0 if it is too small to matter.
    :param num_lost: how many such modes there are.
    :param look: how modes were looked for: by "curvature", by "gradients" alone, or "none".
    :param excess_by_turns: nats by which the guide's own evidence counts several turns of angles.
    """

    log_evidence: float = math.nan
    log_evidence_se: float = math.nan
    lost_mass: float = 0.0
    num_lost: int = 0
    look: str = "curvature"
    excess_by_turns: float = 0.0


@dataclass(frozen=True)
class MissedModeSearch:
    """A search for mass of the posterior that a guide has missed.

    :param model: the model, with its arguments.
    :param initialization: how the starts of a search are drawn, and mean-field fits are made.
    """

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
        """Searches outside of a guide.

        :param draws: draws of the guide on the unconstrained space, shape ``(n, latent_dim)``.
        :param log_evidence: the log evidence according to them.
        :param modes: the modes that are known already.
        :param log_weights: the log weights of the draws, shape ``(n,)``: those of the largest weights
            are starts, too.
        :param elbo: the guide's, which heavy-tailed draws are to be held against.
        """
        is_usable, config = draws.isfinite().all(-1), self.config
        heaviest = draws[:0]
        if log_weights is not None:
            weights = torch.where(is_usable, log_weights, -torch.inf).nan_to_num(-torch.inf)
            heaviest = draws[weights.topk(min(config.num_heaviest, len(draws))).indices]
            heaviest = heaviest[evaluate_density(self.log_density, heaviest).isfinite()]
        draws = draws[is_usable]
        if len(draws) < 2:
            return MissedModes(look="none")
        guide = GuideDraws.of(self.log_density, draws, log_evidence, config.max_dense_dim)
        modes, look = self._look_afar(guide, heaviest, modes)
        if look == "curvature":
            modes = self._look_again(guide, modes)
        found, is_complete = self._heavy_tailed_weights(guide, modes, elbo)
        if found is not None and is_complete and look == "curvature":
            # by gradients, masses are lower bounds
            modes = self._confirmed(guide, modes, found)
        share, count = self._lost(guide, modes, look)
        if not round(100 * share):  # less than one says
            share, count = 0.0, 0
        around = (math.nan, math.nan)
        if found is not None:
            around = found.log_evidence, found.log_evidence_se
        return MissedModes(*around, share, count, look, guide.excess_by_turns)

    def _heavy_tailed_weights(
        self, guide: GuideDraws, modes: Modes | None, elbo: float
    ) -> tuple[Importance | None, bool]:
        """The weights of heavy-tailed draws, None where they say nothing, and whether they find it all.

        Weights of a heavy tail find too little rather than too much, as those of draws that are wide do
        of a thin part: what they find beyond the guide is there.
        """
        config, more = self.config, None
        around = guide.widened(config.heavy_inflation)
        if around.is_independent:
            return None, False
        # wider ones only where these say nothing: around most guides and modes they are draws in vain
        for widenings in ((1.0,), (1.0, *config.heavy_widenings)):
            weigh = partial(self.weigh_heavy_tailed, around, modes, guide.is_circular, widenings)
            found = weigh()
            if not found.ess > config.heavy_min_ess * config.num_heavy:
                continue
            if self._is_unclear(found, guide, elbo):
                others = [weigh().log_weights for _ in range(config.num_heavy_again)]
                found = Importance.from_log_weights(torch.cat([found.log_weights, *others]))
            if found.khat <= GOOD_KHAT:
                return found, len(widenings) == 1
            if found.log_evidence - 2 * found.log_evidence_se > guide.log_evidence:
                more = found
        return more, False

    def _is_unclear(self, found: Importance, guide: GuideDraws, elbo: float) -> bool:
        """Whether such draws alone say how far the ELBO is from the evidence, and are too few for it."""
        most = self.config.max_gap
        deviation = abs(found.log_evidence - elbo - most)
        return guide.log_evidence - elbo <= most and deviation <= 2 * found.log_evidence_se

    def _look_afar(
        self, guide: GuideDraws, starts: Tensor, modes: Modes | None
    ) -> tuple[Modes | None, str]:
        """The modes known, and found from some starts and far outside; and how they were looked for."""
        points, look = torch.cat([starts, self._points_afar(guide)]), "curvature"
        if modes is None:  # no start has climbed from there
            points = torch.cat([points, self._points_of_prior(guide.gaussian.loc[0])])
        found = self._climb(guide, points)
        if found is None:
            found, look = self._climb_by_gradients(points, guide)
        known = None if modes is None else self._weighed(guide, modes)
        return self._distinct(guide, known, found), look

    def _look_again(self, guide: GuideDraws, modes: Modes | None) -> Modes | None:
        """The modes and more of them, as long as those that are lost are too few for a loss."""
        config = self.config
        for _ in range(config.max_more_looks):
            if not config.min_lost < self._lost(guide, modes, "curvature")[0] <= config.max_lost:
                break
            modes = self._distinct(guide, modes, self._climb(guide, self._points_afar(guide)))
        return modes

    def _confirmed(self, guide: GuideDraws, modes: Modes | None, found: Importance) -> Modes | None:
        """The modes, unless draws around the first of them find too little of what they promise."""
        if modes is None:
            return None
        most = slice(self.config.max_modes)
        promised = -math.log1p(-min(self._lost(guide, modes.take(most), "curvature")[0], 1 - 1e-9))
        gain = found.log_evidence + 2 * found.log_evidence_se - guide.log_evidence
        is_there = gain >= self.config.min_confirmed * promised
        return modes if is_there else modes.take(slice(self.config.max_modes, None))

    def _points_afar(self, guide: GuideDraws) -> Tensor:
        """Points of finite density far outside of a guide.

        Half of the points are any, half are those of each shell whose density exceeds its Gaussian's
        the most; and the images of the Gaussian in the origin and in the starting point.
        """
        config, density = self.config, self.log_density
        around = guide.widened(config.heavy_inflation)
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

    def _points_of_prior(self, center: Tensor) -> Tensor:
        """Draws of the prior and points in shells around a center, of finite density."""
        config = self.initialization
        if self.log_density.strategy == "loop":
            config = config.for_loop()
        return GaussianSearch(self.log_density, self.model, config).points(center)

    def _climb(self, guide: GuideDraws, points: Tensor) -> Modes | None:
        """The modes above points, if Hessians can be had."""
        density, config = self.log_density, self.config
        if density.latents.latent_dim > config.max_hessian_dim or not len(points):
            return None
        try:
            no_noise = torch.zeros_like(points[:1])
            modes, _ = climb(density, points, no_noise, config.max_newton_steps)
            return self._weighed(guide, modes)
        except RuntimeError:  # a model whose gradient cannot be differentiated has no Hessian
            return None

    def _climb_by_gradients(self, points: Tensor, guide: GuideDraws) -> tuple[Modes | None, str]:
        """The modes above points that matter, by gradients alone, and whether these could be had."""
        search = GradientSearch(self.log_density, self.config, self.initialization)
        try:
            found = search.find(points, guide.draws, guide.gaussian, guide.log_evidence)
        except RuntimeError:  # a model without a gradient
            return None, "none"
        return found, "gradients"

    def _weighed(self, guide: GuideDraws, modes: Modes) -> Modes:
        """Modes whose mass is that of their curvature, if draws of their Gaussians find as much.

        In the neck of a funnel, or on a ridge, the curvature promises mass where next to none is. An
        end of a climb that is no maximum, as on a ring, stands for what is around it.
        """
        config, converged = self.config, modes.converged[:, None, None]
        scale_tril = guide.capped(modes.gaussians).scale_tril
        scale_tril = torch.where(converged, modes.gaussians.scale_tril, scale_tril)
        gaussians = Gaussians(modes.gaussians.loc, scale_tril)
        noise = antithetic_noise(gaussians.loc, config.num_for_mode)
        log_p = evaluate_density(self.log_density, gaussians.loc[:, None] + noise @ scale_tril.mT)
        log_ratio = log_p + 0.5 * noise.square().sum(-1)  # but for the constant of the Gaussian
        found = log_ratio.logsumexp(-1) - math.log(config.num_for_mode)
        excess = modes.value - found - noise.shape[-1] * config.max_curvature_error
        value = modes.value - excess.clamp_min(0)
        return Modes(gaussians, value, value.isfinite())

    def _distinct(
        self, guide: GuideDraws, known: Modes | None, found: Modes | None
    ) -> Modes | None:
        """The maxima that are not the same, those with the most mass first, angles near the guide's."""
        parts = list(filter(None, (known, found)))
        if not parts:
            return None
        gaussians, values, converged = zip(*parts)
        loc, scale_tril = concatenate(gaussians)
        loc = fold(loc, guide.is_circular, guide.gaussian.loc[0])
        modes = Modes(Gaussians(loc, scale_tril), torch.cat(values), torch.cat(converged))
        config, kept = self.config, list[int]()
        least = min(loc.shape[-1] * config.min_mode_distance, config.max_squared_distance)
        for i in modes.log_masses().argsort(descending=True).tolist():
            if not bool(modes.converged[i]):
                continue
            # a spike inside of a wide mode is far from its top in units of its own
            others, this = modes.gaussians.take(kept), modes.gaussians.take([i])
            distances = len(loc[i]) * torch.maximum(
                distances_to(others, this.loc, guide.is_circular)[:, 0],
                distances_to(this, others.loc, guide.is_circular)[0],
            )
            if bool((distances > least).all()):
                kept.append(i)
        return modes.take(kept) if kept else None

    def _lost(self, guide: GuideDraws, modes: Modes | None, look: str) -> tuple[float, int]:
        """The share of the mass in modes with next to no draws, and the number of these modes.

        The share is of all mass that was found, the modes' and the guide's; it is their sum that
        matters, since many small modes are a large loss.
        """
        if modes is None:
            return 0.0, 0
        share_of_draws = guide.regions(modes, guide.draws).double().mean(-1)
        log_masses = modes.log_masses().double() - guide.log_evidence

        def is_lost() -> Tensor:
            return share_of_draws < self.config.min_draws_share * log_masses.sigmoid()

        if look == "curvature":  # by gradients, masses are lower bounds already
            for k in is_lost().nonzero()[:, 0].tolist():
                log_masses[k] = log_masses[k].clamp_max(self._log_mass_in_region(guide, modes, k))
        lost = log_masses[is_lost()]
        total = lost.logsumexp(0)
        is_counted = lost >= total + math.log(self.config.min_counted)
        return total.sigmoid().item(), int(is_counted.sum())

    def _log_mass_in_region(self, guide: GuideDraws, modes: Modes, k: int) -> float:
        """The log mass in the region of a mode, relative to the guide's, by draws of its Gaussian.

        Draws of the guide are counted in the same region, which on a ring is a piece of it only.
        """
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

        Of angles, only one turn counts: that around the guide.

        :param widenings: what their scales are multiplied by, each in its part of the mixture.
        """
        mixture = around
        if modes is not None:
            most = slice(self.config.max_modes)
            mixture = concatenate([around, modes.gaussians.take(most)])
        count = len(mixture.loc)
        degrees = self.config.heavy_degrees
        guide_share = self.config.heavy_guide_share if count > 1 else 1.0
        others = (1 - self.config.heavy_guide_share) / max(count - 1, 1)
        of_each = [guide_share] + [others] * (count - 1)
        shares = mixture.loc.new_tensor(len(widenings) * of_each) / len(widenings)
        mixture = concatenate(Gaussians(mixture.loc, k * mixture.scale_tril) for k in widenings)
        count, dim = mixture.loc.shape
        which = torch.multinomial(shares, self.config.num_heavy, replacement=True)
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


def _best_of_each(groups: Tensor, values: Tensor) -> Tensor:
    """The indices of values: the largest of each group first, then the second of each, and so on."""
    order = values.argsort(descending=True)
    same, members = groups[order].sort(stable=True)
    rank = torch.empty_like(members)
    rank[members] = torch.arange(len(same), device=same.device) - torch.searchsorted(same, same)
    return order[rank.argsort(stable=True)]
