# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The first stage of a fit: an ensemble of chains before the guide is trained."""

from .._base.progress import generators_at
from ..model import LogJoint
from ..model.protocols import FlowGuide
from ..sampling import Ensemble, StartError, StopReason
from ..sampling.chains import Chains, chains_of
from ..sampling.run_mcmc import from_nothing
from .problem import Problem

# effective draws of each latent, unless the user gives a number; if they only initialize the guide, or the
# model runs for one draw at a time; and the most trajectories per chain then
_NUM_DRAWS, _NUM_FOR_START, _MOST_TRAJECTORIES = 400, 100, 125
#: the share of max_seconds at which chains end
START_UNTIL = 0.5


class FirstDraws:
    """An ensemble of chains before the guide is trained, and another one if parameters of the model are.

    They are those of :func:`~pyro_artransform.mcmc`, with the same seed the same draws. Chains before the
    training of such parameters only initialize the guide.

    :param num_draws: the number of effective draws of each latent; 0 if they only initialize the guide,
        ``None`` for 400, or 100 by loop.
    """

    def __init__(
        self, problem: Problem, log_joint: LogJoint, num_draws: int | None, *, relabel: bool = True
    ) -> None:
        self._problem, self._log_joint, self._relabel = problem, log_joint, relabel
        self.gives_draws = num_draws != 0
        is_loop = log_joint.strategy == "loop"
        usual = _NUM_DRAWS if self.gives_draws and not is_loop else _NUM_FOR_START
        self._num_draws = num_draws or usual
        self._most = {"most": _MOST_TRAJECTORIES} if is_loop and not num_draws else {}
        self.ensemble: Ensemble | None = None
        self.chains: Chains | None = None  #: the draws, if the fit returns any
        self.failure = ""  #: why no chain could start; empty if chains ran
        self._reason, self._seconds = "", 0.0

    @classmethod
    def of_fit(cls, problem: Problem, num_draws: int | None, relabel: bool) -> "FirstDraws | None":
        """The chains of a fit, if the density is a deterministic function of all data.

        :raises ValueError: if draws are requested of another density.
        """
        is_known = problem.has_all_data and not problem.subject.log_joint.is_random
        if num_draws and not is_known:
            raise ValueError(
                "draws: expected a model that sees all data, since chains need its density, got one that is "
                "random, or sees mini-batches that may not be all data or have latents of their own: fit "
                "without draws="
            )
        if not (num_draws or (is_known and problem.minibatches is None)):
            return None
        if problem.point_estimates and num_draws is None:
            num_draws = 0
        return cls(problem, problem.subject.log_joint, num_draws, relabel=relabel)

    def sample(self, until: float = START_UNTIL) -> None:
        """Runs the chains, up to a share of ``max_seconds``."""
        self._problem.limit.enter_phase(until)
        self._problem.limit.say("chains")
        ensemble = from_nothing(self._log_joint, self._num_draws)
        try:
            with generators_at(self._problem.generators):
                self._run(ensemble)
        except StartError as error:
            self.failure = str(error)

    def _run(self, ensemble: Ensemble) -> None:
        limit = self._problem.limit
        began = limit.seconds
        ensemble.run(self._num_draws, **self._most)
        self.ensemble, self._reason = ensemble, limit.reason
        self._seconds += limit.seconds - began

    def judged(self) -> Chains | None:
        """The draws with their verdict, if there are any to return."""
        if self.ensemble is None or not self.gives_draws:
            return None
        problem = self._problem
        problem.limit.enter_phase(1.0, has_grace=True)
        of_run = self._num_draws, self._seconds, self._reason
        self.chains = chains_of(self.ensemble, *of_run, problem.prior_only, relabel=self._relabel)
        return self.chains

    @property
    def has_mixed(self) -> bool:
        """Whether there are chains, and they have mixed."""
        return self.ensemble is not None and self.ensemble.convergence().has_mixed

    @property
    def is_apart(self) -> bool:
        """Whether chains ended since they stay in modes."""
        return self.ensemble is not None and self.ensemble.end is StopReason.APART

    def go_on(self, guide: FlowGuide, log_joint: LogJoint) -> None:
        """Continues chains that stay in modes, with jumps to draws of a guide of these modes."""
        if self.ensemble is not None:
            self.ensemble.propose_from(guide, log_joint)
            self._run(self.ensemble)
