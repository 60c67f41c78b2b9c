# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""One fit, from top to bottom: the draws, the guide's start, its training, and the result."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
from torch import Tensor

from .._base.progress import ProgressBar
from .._base.time_limit import INTERRUPTED, OUT_OF_TIME, abandonable
from ..diagnostics.convergence import ModeShares
from ..diagnostics.importance_weights import NUM_DRAWS
from ..model import LogJoint
from ..model.protocols import FlowGuide, MinibatchGuide
from ..sampling import Ensemble
from ..sampling.chains import Chains
from ..sampling.run_mcmc import CHAINS_UNTIL
from ..sampling.starts import check_has_gradient
from .evaluation.elements import weigh_elements
from .evaluation.evaluate import evaluate, evaluate_minibatches, not_evaluated
from .evaluation.verdict import FitStatus, about_end
from .first_draws import START_UNTIL, FirstDraws
from .initialization.start import (
    AT_BATCHES,
    AT_DRAWS,
    FAILED,
    UNCHANGED,
    InitialGuide,
    find_initial_minibatch_guide,
    find_start,
    find_start_of_elements,
)
from .optimization.schedule import STOPPED
from .optimization.training import Training
from .problem import Problem
from .result import FitResult

#: reasons for the end of a fit
NO_DATA = "the posterior is the prior, so there is nothing to learn"
FAILED_GUIDE = "an error ended the training of the guide"
#: errors of a guide or of its training that leave the draws: of numerics, or a lack of memory
_GUIDE_FAILURES = (ArithmeticError, RuntimeError, ValueError)
# the shares of max_seconds to find the guide's start after the draws, and at which steps end
_FOR_GUIDE, _STEPS_UNTIL = 0.1, 0.75

Callback = Callable[[int, float], object]


class Fit:
    """The stages of a fit, in the order of :meth:`run`.

    :param num_draws: these and the rest are options of :func:`~pyro_artransform.fit`.
    """

    def __init__(
        self,
        problem: Problem,
        bar: ProgressBar,
        *,
        num_draws: int | None,
        relabel: bool,
        callback: Callback | None,
    ) -> None:
        self.problem, self.bar, self.callback = problem, bar, callback
        self.parallel, self.limit = problem.parallel, problem.limit
        #: chains, if the density is a deterministic function of all data
        self.draws = FirstDraws.of_fit(problem, num_draws, relabel)
        #: the error that ended the guide's start or training, if the fit has draws nevertheless; else empty
        self.guide_failure = ""
        self._initial = InitialGuide(UNCHANGED, math.nan)

    def run(self) -> FitResult:
        """Draws, trains the guide and judges both."""
        start = self.parallel.first("the initial guide", self._draw_and_start)
        training = self._new_training(start)
        self.bar.say("fit")
        self._train(training)
        self.bar.say("verdict")
        self._finish(training)
        judged = self.parallel.first("the verdict", partial(self._judge, training))
        model, guide, *_ = self.problem.subject
        return replace(judged, guide=guide).with_model(model)

    def _draw_and_start(self) -> InitialGuide:
        """Draws, and puts the guide where the draws are."""
        problem = self.problem
        problem.check_graph()
        self.limit.enter_phase(START_UNTIL)
        guide, density = problem.subject.guide, problem.density_of_start()
        if density is not None:
            check_has_gradient(density)
        if self.draws is not None:
            self._draw(self.draws)
        if problem.subject.guide is not guide:  # one of modes has coordinates of its own
            density = problem.subject.log_joint
        with self._keeping_draws():
            self._initial = self._start(density)
        return self._initial

    def _draw(self, draws: FirstDraws) -> None:
        """Runs the chains, and says what follows; a guide that the fit chose has a flow for each mode."""
        draws.sample()
        if self.problem.point_estimates:
            return  # they are still to be trained
        if draws.ensemble is not None:
            self.problem.choose_for_modes(len(draws.ensemble.parts()))
        if (chains := draws.judged()) is None:
            return
        why = "" if chains.trusted else f": {chains.failed[0].sentence}"
        rest = "Training the guide"
        if self._will_jump:
            rest += " of these modes, between which chains then jump"
        self.limit.tell(f"{chains.answer}{why}. {rest} (Ctrl-C keeps the draws)")
        self.limit.enter_phase(START_UNTIL)

    def _start(self, density: LogJoint | None) -> InitialGuide:
        """Initializes the guide near draws, or by passes over mini-batches, if it supports that."""
        problem, draws = self.problem, self.draws
        guide, minibatches = problem.subject.guide, problem.minibatches
        if (passes := problem.density_of_passes) is not None and problem.terms is not None:
            self.limit.enter_phase(START_UNTIL + _FOR_GUIDE)  # there are no chains
            return find_start_of_elements(passes, guide, problem.terms)
        if isinstance(guide, FlowGuide) and density is not None and not density.is_random:
            ensemble = self._chains_of(density) if draws is None else draws.ensemble
            self.limit.enter_phase(START_UNTIL + _FOR_GUIDE)
            whole = minibatches.whole if minibatches and minibatches.whole else density
            failure = "" if draws is None else draws.failure
            found = find_start(whole, guide, ensemble, failure, fewer=problem.fewer)
            is_of_batches = draws is None and found.name == AT_DRAWS
            return found._replace(name=AT_BATCHES) if is_of_batches else found
        if isinstance(guide, MinibatchGuide):
            elbo_draws = problem.objective.elbo_draws
            of_guide = problem.subject.log_joint, guide, problem.batch, elbo_draws, self._chains_of
            return find_initial_minibatch_guide(*of_guide, fewer=problem.fewer)
        return InitialGuide(UNCHANGED, math.nan)

    def _chains_of(self, density: LogJoint) -> Ensemble | None:
        """Chains that only start the guide."""
        of_start = FirstDraws(self.problem, density, 0)
        of_start.sample()
        return of_start.ensemble

    def _new_training(self, start: InitialGuide) -> Training:
        """The training at the guide's start; it may already be over."""
        problem, parallel = self.problem, self.parallel
        parallel.copy_first(problem.tensors)
        if (seed := parallel.seed()) is not None:
            pyro.set_rng_seed(seed + parallel.rank)
        guide, numbers = problem.subject.guide, (problem.schedule, problem.num_particles)
        scales = guide.step_scales if isinstance(guide, (FlowGuide, MinibatchGuide)) else None
        training = Training(problem.objective, *numbers, scales, parallel)
        # other processes would wait for the end
        with self._keeping_draws(), abandonable(parallel.size == 1):
            training.check_start(start.name)
        if problem.prior_only and problem.schedule.num_steps is None:
            training.schedule = training.schedule.ending_at(0, NO_DATA)
        return training

    def _train(self, training: Training) -> None:
        """Takes steps until the schedule, the callback or Ctrl-C ends them."""
        limit, parallel, stream = self.limit, self.parallel, self.problem.stream
        limit.enter_phase(_STEPS_UNTIL)
        is_asked, is_late = parallel.any(False, limit.is_over())
        began = limit.seconds
        while not (training.is_over() or is_asked or is_late or self.guide_failure):
            loss: float | None = None
            # other processes would wait for the end
            with self._keeping_draws(), abandonable(parallel.size == 1):
                loss = training.step()
            if loss is None:
                break
            step = training.num_steps
            if parallel.size == 1 and math.isfinite(limit.end):
                per_step = (limit.seconds - began) / step
                left = (limit.end - limit.seconds) / per_step
                training.schedule = training.schedule.within_time(step, left)
            place = () if stream is None else stream.place(training.schedule.end)
            self.bar.update(training.losses, training.schedule.expected_end(step), *place)
            answer: Any = None if self.callback is None else self.callback(step, -loss)
            # True may also be a scalar of NumPy or PyTorch
            is_asked = (answer.item() if hasattr(answer, "item") else answer) is True
            is_asked, is_late = parallel.any(is_asked, limit.is_over())
        if is_asked or self.guide_failure or not training.is_over():
            # another process may reach the time limit before this one
            reason = STOPPED if is_asked else limit.reason or OUT_OF_TIME
            reason = FAILED_GUIDE if self.guide_failure else reason
            training.schedule = training.schedule.ending_at(training.num_steps, reason)

    def _finish(self, training: Training) -> None:
        """Sets the final parameters of the guide."""
        self.limit.enter_phase(1.0, has_grace=True)
        if self.problem.stream is not None:
            self.problem.stream.close()
        if not self.guide_failure:
            with self._keeping_draws():
                training.finish()
        self.parallel.copy_first(self.problem.tensors)

    def _judge(self, training: Training) -> FitResult:
        """The result of the fit without its model and guide."""
        problem, guide = self.problem, self.problem.subject.guide
        weights: tuple[Tensor, Tensor] | None = None
        if (mixture := self._guide_of_modes) is not None:  # chains may jump to its draws
            with self._keeping_draws():
                weights = mixture.weigh(problem.subject.log_joint, NUM_DRAWS // problem.fewer)
        chains = self._final_draws()
        modes = None if chains is None else chains.modes
        # modes may have different numbers of images
        if weights is not None and not (chains is not None and chains.symmetries):
            modes = ModeShares(*weights, () if modes is None else modes.names)
        self.limit.enter_phase(1.0, has_grace=True)
        fields = self._judged_guide(training, None if weights is None else modes)
        if chains is not None:
            words = f"{chains.verdict} About the guide alone: {fields['verdict']}"
            fields |= {"chains": chains, "draws": chains.draws, "verdict": words}
        given = guide.coordinates if isinstance(guide, (FlowGuide, MinibatchGuide)) else None
        return FitResult(
            **fields,
            history=[-loss for loss in training.losses],
            num_steps=training.num_steps,
            num_skipped=training.num_skipped,
            num_gradients=training.num_gradients,
            seconds=self.limit.seconds,
            stopped_because=training.schedule.reason,
            start=training.start,
            culprits=dict(training.culprits),
            point_estimates=tuple(problem.point_estimates),
            one_at_a_time=problem.looped_because or problem.subject.log_joint.reason,
            coordinates={} if given is None else given.centered_by_site(),
            guide_class=type(guide).__name__,
            guide_reason=problem.guide_reason,
            modes=modes,
        )

    def _judged_guide(self, training: Training, modes: ModeShares | None) -> dict[str, Any]:
        """The fields of the result about the guide.

        :param modes: the modes of the guide, if it is a mixture.
        """
        problem, draws, num_steps = self.problem, self.draws, training.num_steps
        cut_short = None if self.guide_failure else about_end(training.schedule, training.losses)
        status = FitStatus(
            training.num_skipped / max(num_steps, 1),
            training.schedule.reason in (INTERRUPTED, OUT_OF_TIME, STOPPED),
            cut_short=cut_short,
            point_estimates=problem.point_estimates,
            start_failed=training.start == FAILED,
            prior_only=problem.prior_only,
            no_chains=draws.failure if draws is not None and draws.gives_draws else "",
            missing=problem.missing,
            modes=modes,
        )
        if not cut_short and not problem.prior_only:  # depends on the final draws
            status = status._replace(remedy=self._remedy(num_steps))
        fields = dict[str, Any]()
        if not self.guide_failure:
            with self._keeping_draws():
                fields = self._evaluated(status, training.num_gradients)
        return fields or not_evaluated(self.guide_failure, status)

    def _evaluated(self, status: FitStatus, num_gradients: int) -> dict[str, Any]:
        """The fields of the result about a guide without a failure."""
        problem, minibatches = self.problem, self.problem.minibatches
        if minibatches is not None and not problem.has_all_data:
            passed = minibatches.over_a_pass()
            elements = weigh_elements(minibatches, passed, num_gradients)
            return evaluate_minibatches(problem.subject, passed, status, elements)
        ensemble = None if self.draws is None else self.draws.ensemble
        given = problem.subject, status, num_gradients, ensemble
        return evaluate(*given, is_loop=problem.is_loop, terms=problem.terms)

    def _remedy(self, num_steps: int) -> str:
        """Remedies for a guide that differs from the posterior, the most reliable first."""
        if not num_steps:
            return "num_steps=1000, since the guide was not trained"
        problem, draws = self.problem, self.draws
        guide, way = problem.subject.guide, "a flow guide, such as AutoIAF"
        if isinstance(guide, FlowGuide):
            way = "more layers (num_transforms) or wider ones"
        elif isinstance(guide, MinibatchGuide) or not problem.has_all_data:
            way = "an encoder with more informative features, or a more flexible local_flow"
        if draws is not None and draws.gives_draws:
            way = f"result.draws, or {way}" if draws.has_mixed else way
        elif problem.has_all_data and not problem.subject.log_joint.is_random:
            way = f"draws=1000 (chains do not need a small k-hat), or {way}"
        return way if problem.schedule.num_steps is None else f"{way}, or more steps"

    @property
    def _guide_of_modes(self) -> FlowGuide | None:
        """The guide, if it has a flow for each mode and did not fail."""
        guide = self.problem.subject.guide
        is_mixture = isinstance(guide, FlowGuide) and len(guide.components) > 1
        return guide if is_mixture and not self.guide_failure else None

    @property
    def _will_jump(self) -> bool:
        """Whether chains that stay in modes can jump to draws of a guide of these modes."""
        return self._guide_of_modes is not None and self.draws is not None and self.draws.is_apart

    def _final_draws(self) -> Chains | None:
        """The draws; chains at the initial parameters of a model give way to new ones.

        Chains that stay in modes go on with jumps to draws of a guide of these modes.
        """
        problem, draws, guide = self.problem, self.draws, self._guide_of_modes
        if draws is None:
            return None
        if problem.point_estimates:
            draws.ensemble = None
            if draws.gives_draws:
                draws.sample(CHAINS_UNTIL)
        elif guide is not None and self._will_jump and not self.limit.was_interrupted:
            draws.go_on(guide, problem.subject.log_joint)
        elif draws.chains is not None:
            return draws.chains
        return draws.judged()

    @contextmanager
    def _keeping_draws(self) -> Iterator[None]:
        """A block of the guide: if it fails, draws that do not depend on it are the result of the fit.

        The error becomes ``guide_failure``. It is raised if there are no such draws, and with several
        processes, since the others would not know.
        """
        try:
            yield
        except _GUIDE_FAILURES as error:
            has_draws = self.draws is not None and self.draws.chains is not None
            # parameters of the model that appear late were not in the density of the draws
            is_alone = has_draws and self.problem.objective.is_guide_alone()
            if not is_alone or self.parallel.size > 1:
                raise
            self.guide_failure = f"{type(error).__name__}: {error}"
