# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The last stage of a fit: its result, with a verdict on draws and guide."""

from dataclasses import replace
from functools import partial
from typing import Any, cast

from ..._base.time_limit import INTERRUPTED, OUT_OF_TIME
from ...diagnostics.checks import Check, FailedCheck
from ...diagnostics.convergence import ModeShares
from ...diagnostics.importance_weights import NUM_DRAWS
from ...model.protocols import FlowGuide, MinibatchGuide
from ..first_draws import FirstDraws, keeping
from ..initialization.start import FAILED
from ..optimization.schedule import FILLED, LIMIT
from ..optimization.steps import STOPPED
from ..optimization.training import Training
from ..problem import Problem
from ..result import FitResult
from .elements import weigh_elements
from .evaluate import evaluate, evaluate_minibatches, not_evaluated
from .verdict import FitStatus


def result_of(problem: Problem, draws: FirstDraws | None, training: Training) -> FitResult:
    """Finishes training and returns the result of the fit."""
    problem.limit.enter_phase(1.0, has_grace=True)
    if problem.stream is not None:
        problem.stream.close()
    if not problem.guide_failure:
        with keeping(draws, problem):
            training.finish()
    problem.parallel.copy_first(problem.tensors)
    judged = partial(_result, problem, draws, training)
    model, guide, *_ = problem.subject
    return replace(problem.parallel.first("the verdict", judged), guide=guide).with_model(model)


def _cut_short(training: Training) -> FailedCheck | None:
    """The failed check if steps ended early or before the ELBO settled, with a remedy; else ``None``."""
    schedule, reason = training.schedule, training.schedule.reason
    hints = {
        INTERRUPTED: "fit again",
        OUT_OF_TIME: "increase max_seconds",
        STOPPED: "let it continue",
    }
    if reason in hints:
        reason, remedy = f"{reason} after step {training.num_steps:,}", hints[reason]
    elif schedule.is_still(training.losses[: schedule.decay_start]):
        return None
    elif schedule.num_steps is not None:
        remedy = "set a larger number, or none, so that fit chooses it"
    elif reason == FILLED:
        remedy = "increase max_seconds"
    elif reason == LIMIT:
        remedy = "set a larger num_steps"
    else:
        return None
    return Check.CUT_SHORT.failed(reason=reason, remedy=remedy)


def _remedy(problem: Problem, draws: FirstDraws | None, num_steps: int) -> str:
    """Remedies for a guide that differs from the posterior, the most reliable first."""
    if problem.prior_only:
        return ""
    if not num_steps:
        return "num_steps=1000, since the guide was not trained"
    guide, way = cast(object, problem.subject.guide), "a flow guide, such as AutoIAF"
    if isinstance(guide, FlowGuide):
        way = "more layers (num_transforms) or wider ones"
    elif isinstance(guide, MinibatchGuide) or not problem.has_all_data:
        way = "an encoder with more informative features, or a more flexible local_flow"
    if draws is not None and draws.gives_draws:
        way = f"result.draws, or {way}" if draws.has_mixed else way
    elif problem.has_all_data and not problem.subject.log_joint.is_random:
        way = f"draws=1000 (chains do not need a small k-hat), or {way}"
    return way if problem.schedule.num_steps is None else f"{way}, or more steps"


def _evaluated(
    problem: Problem, draws: FirstDraws | None, status: FitStatus, num_gradients: int
) -> dict[str, Any]:
    """The fields of the result about the guide."""
    subject, minibatches, is_loop = problem.subject, problem.minibatches, problem.is_loop
    if minibatches is not None and not problem.has_all_data:
        passed = minibatches.over_a_pass()
        elements = weigh_elements(minibatches, passed, num_gradients)
        return evaluate_minibatches(subject, passed, status, elements)
    ensemble = None if draws is None else draws.ensemble
    terms = None if minibatches is None else minibatches.terms
    return evaluate(subject, status, num_gradients, ensemble, is_loop=is_loop, terms=terms)


def _result(problem: Problem, draws: FirstDraws | None, training: Training) -> FitResult:
    """The result of the fit without its model and guide."""
    subject = problem.subject
    guide: object = subject.guide
    num_steps, num_gradients = training.num_steps, training.num_gradients
    cut_short = None if problem.guide_failure else _cut_short(training)
    weights = None
    # chains may jump to its draws
    is_mixture = isinstance(guide, FlowGuide) and len(guide.components) > 1
    if is_mixture and not problem.guide_failure:
        with keeping(draws, problem):
            weights = cast(FlowGuide, guide).weigh(subject.log_joint, NUM_DRAWS // problem.fewer)
    chains = None if draws is None else draws.finish()
    status = FitStatus(
        training.num_skipped / max(num_steps, 1),
        training.schedule.reason in (INTERRUPTED, OUT_OF_TIME, STOPPED),
        cut_short=cut_short,
        point_estimates=problem.point_estimates,
        start_failed=training.start == FAILED,
        prior_only=problem.prior_only,
        no_chains=draws.failure if draws is not None and draws.gives_draws else "",
        missing=problem.missing,
    )
    modes = None if chains is None else chains.modes
    # modes may have different numbers of images
    if weights is not None and not (chains is not None and chains.symmetries):
        modes = ModeShares(*weights, () if modes is None else modes.names)
        status = status._replace(modes=modes)
    if not cut_short:  # depends on the final draws
        status = status._replace(remedy=_remedy(problem, draws, num_steps))
    problem.limit.enter_phase(1.0, has_grace=True)
    fields = dict[str, Any]()
    if not problem.guide_failure:
        with keeping(draws, problem):
            fields = _evaluated(problem, draws, status, num_gradients)
    fields = fields or not_evaluated(problem.guide_failure, status)
    if chains is not None:
        words = f"{chains.verdict} About the guide alone: {fields['verdict']}"
        fields |= {"chains": chains, "draws": chains.draws, "verdict": words}
    given = guide.coordinates if isinstance(guide, (FlowGuide, MinibatchGuide)) else None
    return FitResult(
        **fields,
        history=[-loss for loss in training.losses],
        num_steps=num_steps,
        num_skipped=training.num_skipped,
        num_gradients=num_gradients,
        seconds=problem.limit.seconds,
        stopped_because=training.schedule.reason,
        start=training.start,
        culprits=dict(training.culprits),
        point_estimates=tuple(problem.point_estimates),
        one_at_a_time=problem.looped_because or subject.log_joint.reason,
        coordinates={} if given is None else given.centered_by_site(),
        guide_class=type(guide).__name__,
        guide_reason=problem.guide_reason,
        modes=modes,
    )
