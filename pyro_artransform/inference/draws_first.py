# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ensemble of chains at the beginning of a fit."""

from .._base.time_limit import TimeLimit
from ..diagnostics.importance_weights import ModelAndGuide
from ..sampling import Ensemble, StartError, StopReason
from ..sampling.chains import Chains, chains_of
from ..sampling.run_mcmc import CHAINS_UNTIL, from_nothing
from .optimization.objective import FEWER

# effective draws of each latent, unless the user requests a number; if they only initialize the guide, or the
# model runs for one draw at a time; and the most trajectories per chain then
_NUM_DRAWS, _NUM_FOR_START, _MOST_TRAJECTORIES = 400, 100, 1000

#: the reason for a fit without steps
DRAWS_ARE_THERE = "the chains gave the requested draws"


class DrawsFirst:
    """An ensemble of chains before the guide is trained, and another one if parameters of the model are.

    :param requested: the requested number of effective draws of each latent; 0 if they only initialize the
        guide, ``None`` for 400, or 100 by loop.
    :param trains_model: whether parameters of the model are trained. Chains before the steps then only
        initialize the guide, since they sample the posterior at the initial parameters.
    :param fewer: divides the number of trajectories by loop.
    """

    def __init__(
        self,
        subject: ModelAndGuide,
        requested: int | None,
        limit: TimeLimit,
        *,
        trains_model: bool = False,
        fewer: int = FEWER,
    ) -> None:
        self._subject, self._limit, self._trains_model = subject, limit, trains_model
        self.is_requested, self.gives_draws = bool(requested), requested != 0
        is_loop = subject.log_joint.strategy == "loop"
        usual = _NUM_FOR_START if is_loop or requested == 0 else _NUM_DRAWS
        self._num_draws = requested or usual
        self._most = {"most": _MOST_TRAJECTORIES // fewer} if is_loop and not requested else {}
        self.ensemble: Ensemble | None = None
        self.failure = ""  #: why no chain could start; empty if chains ran
        self._reason, self._seconds = "", 0.0

    def sample(self) -> str:
        """Runs the chains; returns why no steps are needed, empty if they are."""
        self._limit.say("chains")
        began = self._limit.seconds
        ensemble = from_nothing(self._subject.log_joint, self._num_draws)
        try:
            ensemble.run(self._num_draws, **self._most)
        except StartError as error:
            if self.is_requested:
                raise
            self.failure = str(error)
            return ""
        self.ensemble, self._reason = ensemble, self._limit.reason
        self._seconds += self._limit.seconds - began
        if self._trains_model or not self.is_requested:
            return ""
        return {StopReason.ENOUGH: DRAWS_ARE_THERE, StopReason.APART: StopReason.APART.value}.get(
            ensemble.end, ""
        )

    @property
    def has_mixed(self) -> bool:
        """Whether there are chains, and they have mixed."""
        return self.ensemble is not None and self.ensemble.convergence().has_mixed

    def finish(self, prior_only: str) -> Chains | None:
        """Returns the draws; chains at the initial parameters of a model give way to new ones."""
        if self._trains_model:
            self.ensemble = None
            if self.is_requested:
                self._limit.enter_phase(CHAINS_UNTIL)
                self.sample()
        if self.ensemble is None or not self.gives_draws:
            return None
        return chains_of(self.ensemble, self._num_draws, self._seconds, self._reason, prior_only)
