# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that a fit was asked for: an ensemble of chains before any step of the guide."""

import torch

from ..diagnostics.base_space import ensemble_of
from ..diagnostics.importance_weights import ModelAndGuide
from ..joint.protocols import FlowGuide, PriorGuide
from ..sampling import End, Ensemble
from ..time_limit import TimeLimit
from .chains import Chains, chains_of
from .evaluation.verdict import FitStatus
from .initialization.gaussians import moments
from .mcmc import CHAINS_UNTIL, from_nothing

#: why there are no steps, and where the guide is then
DRAWS_ARE_THERE, AT_DRAWS = "chains have the draws that were asked for", "moments of the draws"
# the share of the seconds for chains from nothing, and the root of what is added to correlations of draws
_CHAINS_FROM_NOTHING_UNTIL, _RIDGE = 0.5, 1e-3**0.5


class DrawsFirst:
    """An ensemble from nothing, and where it does not mix, one in the base space of the trained guide.

    :param num_draws: how many effective draws of each latent.
    """

    def __init__(self, subject: ModelAndGuide, num_draws: int, limit: TimeLimit) -> None:
        self._subject, self._num_draws, self._limit = subject, num_draws, limit
        self.ensemble: Ensemble | None = None
        self._reason = ""

    def sample(self) -> bool:
        """Runs chains from nothing; whether more of them, from a trained guide, would tell no more."""
        self._limit.enter_phase(_CHAINS_FROM_NOTHING_UNTIL)
        self._limit.say("chains")
        self.ensemble = from_nothing(self._subject.log_joint, self._num_draws)
        self.ensemble.run(self._num_draws)
        self._reason = self._limit.reason
        return self.ensemble.end in (End.ENOUGH, End.APART)

    @torch.no_grad()
    def start_guide(self) -> bool:
        """Puts a flow guide at the moments of the draws; whether it can be."""
        guide: object = self._subject.guide
        if self.ensemble is None or not isinstance(guide, FlowGuide):
            return False
        log_joint = self._subject.log_joint
        if isinstance(guide, PriorGuide) and guide.chooses_coordinates:
            _center_as(self.ensemble, guide)
        z, _ = log_joint.from_unconstrained(self.ensemble.draws.flatten(0, 1))
        z = z[z.isfinite().all(-1)]
        gaussian = moments(z, _RIDGE)
        guide.start_at(gaussian.loc[0], gaussian.scale_tril[0])
        return True

    def finish(self, status: FitStatus) -> Chains:
        """The draws: by chains in the base space of the guide, where those from nothing have not mixed."""
        best, reason = self.ensemble, self._reason
        if best is None or best.end in (End.TOO_MANY, End.OUT_OF_TIME):
            self._limit.enter_phase(CHAINS_UNTIL)
            self._limit.say("chains")
            second = ensemble_of(self._subject, self._num_draws)
            second.run(self._num_draws)
            if best is None or _worst_rhat(second) < _worst_rhat(best):
                best, reason = second, self._limit.reason
        return chains_of(best, self._num_draws, self._limit.seconds, reason, status)


def _worst_rhat(ensemble: Ensemble) -> float:
    return float(ensemble.convergence().rhat.max())


def _center_as(ensemble: Ensemble, guide: PriorGuide) -> None:
    """Makes a guide's coordinates as centred as those in which chains have mixed."""
    own, other = guide.prior_coordinates, ensemble.log_joint.coordinates
    if own is None or other is None:
        return
    parts = ensemble.log_joint.latents.views(own.centered.data)
    for name, centered in ensemble.log_joint.latents.split(other.centered).items():
        if name in own.with_location:
            parts[name].copy_(centered)
