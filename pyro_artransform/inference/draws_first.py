# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ensemble of chains at the beginning of a fit."""

from ..diagnostics.base_space import ensemble_of
from ..diagnostics.importance_weights import ModelAndGuide
from ..sampling import End, Ensemble
from ..time_limit import TimeLimit
from .chains import Chains, chains_of
from .config import InitializationConfig
from .evaluation.verdict import FitStatus
from .mcmc import CHAINS_UNTIL, from_nothing

#: the reason for a fit without steps
DRAWS_ARE_THERE = "the chains gave the requested draws"


class DrawsFirst:
    """An ensemble started from the prior and, if it does not mix, one in the trained guide's base space.

    :param asked: the requested number of effective draws of each latent; 0 if they only initialize the
        guide, ``None`` for the number in the settings.
    :param trains_model: whether parameters of the model are trained. Chains before the steps then only
        initialize the guide, since they sample the posterior at the initial parameters.
    """

    def __init__(
        self,
        subject: ModelAndGuide,
        asked: int | None,
        limit: TimeLimit,
        config: InitializationConfig,
        trains_model: bool = False,
    ) -> None:
        self._subject, self._limit, self._trains_model = subject, limit, trains_model
        self.is_asked, self.gives_draws = bool(asked), asked != 0
        is_loop = subject.log_joint.strategy == "loop"
        usual = config.num_for_start if is_loop or asked == 0 else config.num_draws
        self._num_draws = asked or usual
        self._most = {} if asked else {"most": config.max_trajectories}
        self.ensemble: Ensemble | None = None
        self._reason, self._seconds = "", 0.0

    def sample(self) -> str:
        """Runs chains from the prior; returns why none are needed in the guide's base space, else empty."""
        self._limit.say("chains")
        began = self._limit.seconds
        try:
            ensemble = from_nothing(self._subject.log_joint, self._num_draws)
            ensemble.run(self._num_draws, **self._most)
        except (RuntimeError, ValueError):  # no gradient, or too few starts with a finite density
            if self.is_asked:
                raise
            return ""
        self.ensemble, self._reason = ensemble, self._limit.reason
        self._seconds = self._limit.seconds - began
        if self._trains_model or not self.is_asked:
            return ""
        return {End.ENOUGH: DRAWS_ARE_THERE, End.APART: End.APART.value}.get(ensemble.end, "")

    @property
    def has_mixed(self) -> bool:
        """Whether there are chains, and they have mixed."""
        return self.ensemble is not None and self.ensemble.convergence().has_mixed

    def finish(self, status: FitStatus) -> Chains | None:
        """Returns the draws; if chains from the prior have not mixed, runs some in the guide's base space."""
        if self._trains_model:
            self.ensemble = None
        best, reason = self.ensemble, self._reason
        if self.is_asked and (best is None or best.end not in (End.ENOUGH, End.APART)):
            self._limit.enter_phase(CHAINS_UNTIL)
            self._limit.say("chains")
            began = self._limit.seconds
            try:
                second = ensemble_of(self._subject, self._num_draws)
                second.run(self._num_draws)
            except (RuntimeError, ValueError):  # the guide has no base space, or no density there
                if best is None:
                    raise
            else:
                if best is None or _worst_rhat(second) < _worst_rhat(best):
                    best, reason = second, self._limit.reason
            self._seconds += self._limit.seconds - began
        if best is None or not self.gives_draws:
            return None
        self.ensemble = best
        return chains_of(best, self._num_draws, self._seconds, reason, status)


def _worst_rhat(ensemble: Ensemble) -> float:
    return float(ensemble.convergence().rhat.max())
