# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The first stage of a fit: an ensemble of chains before the guide is trained."""

from ..model import LogJoint
from ..model.protocols import GuideOfModes
from ..sampling import Ensemble, StartError, StopReason
from ..sampling.chains import Chains, chains_of
from ..sampling.run_mcmc import CHAINS_UNTIL, from_nothing
from .problem import Problem

# effective draws of each latent, unless the user requests a number; if they only initialize the guide, or the
# model runs for one draw at a time; and the most trajectories per chain then
_NUM_DRAWS, _NUM_FOR_START, _MOST_TRAJECTORIES = 400, 100, 125
#: the share of max_seconds at which chains end, unless the user requests draws
START_UNTIL = 0.5

#: the reason for a fit without steps
DRAWS_ARE_THERE = "the chains gave the requested draws"


class FirstDraws:
    """An ensemble of chains before the guide is trained, and another one if parameters of the model are.

    Chains before the training of such parameters only initialize the guide.

    :param requested: the requested number of effective draws of each latent; 0 if they only initialize the
        guide, ``None`` for 400, or 100 by loop.
    """

    def __init__(
        self, problem: Problem, log_joint: LogJoint, requested: int | None, *, relabel: bool = True
    ) -> None:
        self._problem, self._log_joint, self._relabel = problem, log_joint, relabel
        self.is_requested, self.gives_draws = bool(requested), requested != 0
        is_loop = log_joint.strategy == "loop"
        usual = _NUM_FOR_START if is_loop or requested == 0 else _NUM_DRAWS
        self._num_draws = requested or usual
        self._most = {"most": _MOST_TRAJECTORIES} if is_loop and not requested else {}
        self.ensemble: Ensemble | None = None
        self.failure = ""  #: why no chain could start; empty if chains ran
        self._reason, self._seconds = "", 0.0

    @classmethod
    def of_fit(cls, problem: Problem, requested: int | None, relabel: bool) -> "FirstDraws | None":
        """The chains of a fit, if the density is a deterministic function of all data.

        :raises ValueError: if draws are requested of another density.
        """
        is_known = problem.has_all_data and not problem.subject.log_joint.is_random
        if requested and not is_known:
            raise ValueError(
                "draws: expected a model that sees all data, since chains need its density, got one that is "
                "random, or sees mini-batches that may not be all data or have latents of their own: fit "
                "without draws="
            )
        if not (requested or (is_known and problem.minibatches is None)):
            return None
        if problem.point_estimates and requested is None:
            requested = 0
        return cls(problem, problem.subject.log_joint, requested, relabel=relabel)

    @property
    def until(self) -> float:
        """The share of ``max_seconds`` at which the chains end."""
        return CHAINS_UNTIL if self.is_requested else START_UNTIL

    def sample(self) -> str:
        """Runs the chains; returns why no steps are needed, empty if they are."""
        problem, limit = self._problem, self._problem.limit
        limit.enter_phase(self.until)
        limit.say("chains")
        began = limit.seconds
        ensemble = from_nothing(self._log_joint, self._num_draws)
        try:
            ensemble.run(self._num_draws, **self._most)
        except StartError as error:
            if self.is_requested:
                raise
            self.failure = str(error)
            return ""
        self.ensemble, self._reason = ensemble, limit.reason
        self._seconds += limit.seconds - began
        if problem.point_estimates or not self.is_requested:
            return ""
        return DRAWS_ARE_THERE if ensemble.end is StopReason.ENOUGH else ""

    @property
    def has_mixed(self) -> bool:
        """Whether there are chains, and they have mixed."""
        return self.ensemble is not None and self.ensemble.convergence().has_mixed

    def finish(self) -> Chains | None:
        """Returns the draws; chains at the initial parameters of a model give way to new ones.

        Chains that stay in modes go on with jumps to draws of a guide of these modes.
        """
        problem = self._problem
        if problem.point_estimates:
            self.ensemble = None
            if self.is_requested:
                self.sample()
        if self.ensemble is None or not self.gives_draws:
            return None
        guide: object = problem.subject.guide
        if self.ensemble.end is StopReason.APART and isinstance(guide, GuideOfModes):
            self.ensemble.propose_from(guide, problem.subject.log_joint)
            self.ensemble.run(self._num_draws, **self._most)
        of_run = self._num_draws, self._seconds, self._reason
        return chains_of(self.ensemble, *of_run, problem.prior_only, relabel=self._relabel)
