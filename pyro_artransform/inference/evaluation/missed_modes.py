# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Mass of a posterior that a guide has missed, by draws that are not the guide's.

A guide never draws where it has no mass, so that its weights are good where a whole mode is missing. A
search proposes places where there may be mass. What is there says one sample that has strata: draws of all
widths around those of the guide, and draws at each of these places. A draw counts by the density of all
strata together, whichever it came from (the balance heuristic of a deterministic mixture), so that no
weight is larger than that of the best stratum. The guide itself is none of them: its density is known at
its own draws alone, and what it leaves out it has no draws of.

Places have regions: the share of the Gaussian of each, as far as it reaches, in the sum of all of them and
that of the guide. Where the guide is the posterior both have the same mass in each region, whatever the
regions are. What has much mass by the weights and few of the guide's draws is lost.

**References**

1. Optimally Combining Sampling Techniques for Monte Carlo Rendering (Veach, Guibas, 1995),
   https://doi.org/10.1145/218380.218498
2. Safe and Effective Importance Sampling (Owen, Zhou, 2000),
   https://doi.org/10.1080/01621459.2000.10473909
3. Generalized Multiple Importance Sampling (Elvira, Martino, Luengo, Bugallo, 2019),
   https://doi.org/10.1214/18-STS668
4. Truncated Importance Sampling (Ionides, 2008), https://doi.org/10.1198/106186008X320456
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics.importance import GOOD_GAP, GOOD_LOST_MASS
from ...joint import LogJoint, MeanLogJoint
from ..config import FitConfig
from ..initialization.gaussians import evaluate_density, moments
from .mode_search import ModeSearch, Shape, Stratum

_NUM_HEAVIEST = 4  # climbs from the draws of the largest weights
_UNCLEAR = 3  # times as many draws again around a guide, where the side of a bound is not known
MIN_SHARE = 0.1  # of its share of the mass, of draws in a place that is not lost
# lost mass that is a reason to search for more, and the part of it with which a mode is counted
_MIN_LOST, _MIN_COUNTED = 0.002, 0.01
# draws whose density is taken again, so many ulps away, and nats by which it may change
_NUM_REPEATED, _ULPS, _MOST_ROUND_OFF = 32, 4, 1.0


class MissedModes(NamedTuple):
    """What was found outside of a guide."""

    log_evidence: float = math.nan  #: by all strata, ``nan`` without draws that can be used
    log_evidence_se: float = math.nan
    #: the share of the posterior in modes without draws of the guide, 0 if too small to matter
    lost_mass: float = 0.0
    num_lost: int = 0  #: how many these modes are
    #: how they were searched for: by "curvature", in a few mini-"batches", or "none"
    searched_by: str = "curvature"


NOT_SEARCHED = MissedModes(searched_by="none")


class Mixture(NamedTuple):
    """What strata say together."""

    log_evidence: float  #: by all strata
    log_evidence_se: float
    log_masses: Tensor  #: of the posterior in the region of each place, shape ``(K,)``
    shares_of_draws: Tensor  #: of the guide there
    points: Tensor  #: the draws of all strata ``(n, D)``
    log_weights: Tensor  #: theirs ``(n,)``, the sum of the weights is the evidence

    @classmethod
    def of(
        cls, draws: Tensor, guide: Shape, around: Sequence[Stratum], places: Sequence[Stratum]
    ) -> "Mixture":
        """Of strata around a guide and at K places; the guide's draws are ``(n, D)``."""
        strata = [*around, *places]
        points = torch.cat([s.draws for s in strata])
        densities = [s.shape.log_probs(points) for s in strata]
        by_stratum, near = (torch.cat(each).double() for each in zip(*densities))
        log_weights = _balanced_weights(strata, by_stratum)
        log_evidence = log_weights.logsumexp(0)
        variances = [
            len(each) * (each - log_evidence).exp().var(correction=0).item()
            for each in log_weights.split([len(s.draws) for s in strata])
        ]
        by_guide = guide.log_probs(points)[0].double()
        regions = torch.cat([by_guide, near[len(around) :]]).log_softmax(0)[1:]
        of_draws = [guide.log_probs(draws)[0], *(s.shape.log_probs(draws)[1] for s in places)]
        return cls(
            log_evidence.item(),
            math.sqrt(sum(variances)),
            (regions + log_weights).logsumexp(-1),
            torch.cat(of_draws).double().softmax(0)[1:].mean(-1),
            points,
            log_weights,
        )


def _balanced_weights(strata: Sequence[Stratum], by_stratum: Tensor) -> Tensor:
    """Log weights of all draws, of the model over the densities of all strata: their sum is the evidence."""
    sizes = [len(s.draws) for s in strata]
    own = torch.cat([log_q.split(sizes)[k] for k, log_q in enumerate(by_stratum)])
    of_all = (by_stratum + by_stratum.new_tensor(sizes).log()[:, None]).logsumexp(0)
    log_weights = torch.cat([s.log_weights for s in strata]).double() + own - of_all
    log_weights = log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    # no draw decides alone: truncated as in the last reference
    return log_weights.clamp_max(log_weights.logsumexp(0) - 0.5 * math.log(len(own)))


def find_missed_modes(
    log_density: LogJoint,
    config: FitConfig,
    draws: Tensor,
    log_evidence: float,
    elbo: float = math.nan,
    log_weights: Tensor | None = None,
    of_few: MeanLogJoint | None = None,
) -> MissedModes:
    """Searches outside of a guide, of which there are draws ``(n, latent_dim)``, unconstrained.

    :param log_evidence: the log evidence according to them; those of the largest weights are starts.
    :param elbo: that of the guide: where its bound is near, more draws around the guide decide.
    :param of_few: the density of a few mini-batches, where that of all data is too expensive to climb in.
    """
    is_usable = draws.isfinite().all(-1)
    heaviest = draws[:0]
    if log_weights is not None:
        weights = torch.where(is_usable, log_weights, -torch.inf).nan_to_num(-torch.inf)
        heaviest = draws[weights.topk(min(_NUM_HEAVIEST, len(draws))).indices]
    draws = draws[is_usable]
    # Hessians of many latents are too expensive
    if len(draws) < 2 or draws.shape[1] > config.evaluation.max_dense_dim:
        return NOT_SEARCHED
    around = Shape(moments(draws))
    search = ModeSearch(log_density, config, draws, around)
    points = search.points_of_few(of_few) if of_few else torch.cat([heaviest, search.points()])
    found, searched_by = _mixture(search, points, log_evidence, elbo)
    lost, count = _lost(found, log_evidence)
    # less than one says, or what a climb has made of the round-off of a density
    if not round(100 * lost) or _is_round_off(log_density, found):
        lost, count = 0.0, 0
    if of_few and searched_by != "none":
        searched_by = "batches"
    return MissedModes(found.log_evidence, found.log_evidence_se, lost, count, searched_by)


def _mixture(
    search: ModeSearch, points: Tensor, log_evidence: float, elbo: float
) -> tuple[Mixture, str]:
    """What draws say all around a guide and above points, and how modes were searched for."""
    config = search.config.evaluation
    guide, places = (search.draws, search.around), list[Stratum]()
    wide, modes = search.around._replace(is_heavy=True), None
    around, searched_by = [wide.stratum(search.log_density, config.num_around)], "curvature"
    found = Mixture.of(*guide, around, [])
    for _ in range(config.max_searches if len(points) else 0):
        try:
            modes = search.modes_above(points, modes)
            places = search.around_modes(modes)
        except RuntimeError:  # a model without a gradient
            searched_by = "none"
        found = Mixture.of(*guide, around, places)
        # too much for none, and too little for a loss
        if not _MIN_LOST < _lost(found, log_evidence)[0] <= GOOD_LOST_MASS:
            break
        points = search.points_afar()
    is_said, more = log_evidence - elbo > GOOD_GAP, found.log_evidence - elbo - GOOD_GAP
    if not is_said and abs(more) <= 2 * found.log_evidence_se < 2 * GOOD_GAP:
        around.append(wide.stratum(search.log_density, _UNCLEAR * config.num_around))
        found = Mixture.of(*guide, around, places)
    return found, searched_by


def _lost(found: Mixture, log_evidence: float) -> tuple[float, int]:
    """The share of all mass in places with next to no draws, and the number of these places."""
    log_masses = found.log_masses - log_evidence
    is_lost = found.shares_of_draws < MIN_SHARE * log_masses.sigmoid()
    lost = log_masses[is_lost]
    total = lost.logsumexp(0)
    return total.sigmoid().item(), int((lost >= total + math.log(_MIN_COUNTED)).sum())


def _is_round_off(log_density: LogJoint, found: Mixture) -> bool:
    """Whether the density of the draws that weigh most is another one some ulps away, as in large lgammas."""
    heaviest = found.points[found.log_weights.topk(min(_NUM_REPEATED, len(found.points))).indices]
    ulps = _ULPS * torch.finfo(heaviest.dtype).eps * (2 * torch.rand_like(heaviest) - 1)
    values = evaluate_density(log_density, torch.cat([heaviest, heaviest * (1 + ulps)]))
    before, after = values.chunk(2)
    return float((after - before).abs().median()) > _MOST_ROUND_OFF
