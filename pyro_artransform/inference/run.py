# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The stages of a fit after its set-up: start, train, judge."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from .._base.arguments import first_of
from .._base.files import FilePath
from .._base.progress import ProgressBar
from .._base.time_limit import INTERRUPTED, OUT_OF_TIME, abandonable
from ..diagnostics.checks import Check, FailedCheck
from ..model import LogJoint
from ..model.protocols import FlowGuide, MinibatchGuide, PriorGuide
from ..sampling import Ensemble
from ..sampling.run_mcmc import CHAINS_UNTIL
from .checkpoint import resume as resumed
from .checkpoint import save
from .draws_first import DrawsFirst
from .evaluation.elements import weigh_elements
from .evaluation.evaluate import evaluate, evaluate_minibatches
from .evaluation.verdict import FitStatus
from .initialization.gradient_check import check_gradient
from .initialization.start import (
    FAILED,
    UNCHANGED,
    InitialGuide,
    MinibatchDensity,
    find_initial_minibatch_guide,
    find_start,
)
from .loader import Batch
from .optimization.objective import PyroObjective
from .optimization.schedule import LIMIT
from .optimization.training import Training
from .result import FitResult
from .set_up import SetUp

_ASKED = "the callback asked to stop"
# the shares of max_seconds at which chains and steps end, and the share to find the guide's start
_START_UNTIL, _STEPS_UNTIL, _FOR_GUIDE = 0.5, 0.75, 0.1
# draws of the guide for its verdict, if the user requested draws of the posterior
_NUM_BESIDE_DRAWS = 2000


def start(set_up: SetUp, resume: FilePath | None = None) -> Training:
    """Runs the ensemble and initializes or restores the guide; the training may already be over."""
    parallel, chains = set_up.parallel, set_up.draws_first
    if resume is not None:
        training = resumed(set_up, resume)
        if chains is not None:  # steps continue with the random numbers of the checkpoint
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                set_up.limit.enter_phase(_START_UNTIL)
                parallel.first("the ensemble", chains.sample)
        return training
    initial, why_no_steps = parallel.first("the initial guide", partial(_find_start, set_up))
    parallel.copy_first(set_up.tensors)
    parallel.seed_apart()
    training = set_up.new_training(set_up.schedule)
    with abandonable(parallel.size == 1):  # others would wait for the end
        training.check_start(initial.name)
    if why_no_steps and set_up.schedule.num_steps is None:
        training.schedule = training.schedule.ending_at(0, why_no_steps)
    return training


def _find_start(set_up: SetUp) -> tuple[InitialGuide, str]:
    """Initializes the guide if it supports that; also returns why there are no steps, empty if there are."""
    minibatches, chains = set_up.minibatches, set_up.draws_first
    if minibatches is not None and (missing := set_up.missing()):
        raise ValueError(
            "loader: the guide's graph lacks dependencies that other mini-batches have: "
            f"{first_of(missing)}. Make a new guide and set it up with all data before the fit, "
            "guide.set_up(*all_data), or use AutoIAF, or AutoAmortized if rows have latents of their own"
        )
    _, _, args, kwargs, log_joint = set_up.subject
    guide: object = set_up.subject.guide
    of_batch = set_up.objective if minibatches is None else minibatches.objective
    batch, config, limit = Batch(args, kwargs), set_up.config.initialization, set_up.limit
    until = CHAINS_UNTIL if chains is not None and chains.is_requested else _START_UNTIL
    limit.enter_phase(until)
    is_flow = isinstance(guide, FlowGuide) and not isinstance(of_batch, PyroObjective)
    density = whole = log_joint
    if is_flow and minibatches is not None:
        density = minibatches.mean_log_joint()
        whole = minibatches.whole or density
    elif is_flow and log_joint.is_random:
        density = whole = MinibatchDensity(log_joint)
    if is_flow:
        with abandonable():
            check_gradient(density, density.with_coordinates(None).start)
    why_no_steps = "" if chains is None else chains.sample()

    def chains_of(density: LogJoint) -> Ensemble | None:
        first = DrawsFirst(set_up.subject._replace(log_joint=density), 0, limit, config)
        first.sample()
        return first.ensemble

    if is_flow and not density.is_random:
        ensemble = chains_of(density) if chains is None else chains.ensemble
        limit.enter_phase(until + _FOR_GUIDE)
        of_start = whole, cast(FlowGuide, guide), ensemble, config
        return find_start(*of_start, "" if chains is None else chains.failure), why_no_steps
    if isinstance(guide, MinibatchGuide):
        elbo_draws = set_up.objective.elbo_draws
        initial = find_initial_minibatch_guide(
            log_joint, guide, batch, elbo_draws, chains_of, config
        )
        return initial, why_no_steps
    return InitialGuide(UNCHANGED, math.nan), why_no_steps


def train(
    set_up: SetUp,
    training: Training,
    checkpoint: FilePath | None,
    callback: Callable[[int, float], object] | None,
    bar: ProgressBar,
) -> bool:
    """Takes steps until the schedule, the callback or Ctrl-C ends them; returns if a checkpoint was saved."""
    limit, parallel, stream = set_up.limit, set_up.parallel, set_up.stream
    limit.enter_phase(_STEPS_UNTIL)
    if parallel.rank > 0:
        checkpoint = None
    is_asked, is_late = parallel.any(False, limit.is_over())
    is_saved = False
    while not (training.is_over() or is_asked or is_late):
        loss: float | None = None
        with abandonable(parallel.size == 1):  # others would wait for the end
            loss = training.step()
        if loss is None:
            break
        step = training.num_steps
        place = () if stream is None else stream.place(training.schedule.end)
        bar.update(training.losses, training.schedule.expected_end(step), *place)
        if checkpoint and step % set_up.config.optimization.checkpoint_every == 0:
            is_saved |= save(set_up, training, checkpoint)
        answer: Any = None if callback is None else callback(step, -loss)
        # True may also be a scalar of NumPy or PyTorch
        is_asked = (answer.item() if hasattr(answer, "item") else answer) is True
        is_asked, is_late = parallel.any(is_asked, limit.is_over())
    if checkpoint is not None:
        is_saved |= save(set_up, training, checkpoint)
    if is_asked or not training.is_over():
        # another process may reach the time limit before this one
        reason = _ASKED if is_asked else limit.reason or OUT_OF_TIME
        training.schedule = training.schedule.ending_at(training.num_steps, reason)
    return is_saved


def judge(set_up: SetUp, training: Training, is_saved: bool) -> FitResult:
    """Finishes training and returns the result of the fit."""
    set_up.limit.enter_phase(1.0, has_grace=True)
    if set_up.stream is not None:
        set_up.stream.close()
    training.finish()
    set_up.parallel.copy_first(set_up.tensors)
    judged = partial(_judge, set_up, training, is_saved)
    model, guide, *_ = set_up.subject
    return replace(set_up.parallel.first("the verdict", judged), guide=guide).with_model(model)


def _cut_short(training: Training, is_saved: bool) -> FailedCheck | None:
    """The failed check if steps ended early or before the ELBO settled, with a remedy; else ``None``."""
    schedule, reason = training.schedule, training.schedule.reason
    again = "resume from the checkpoint" if is_saved else "fit again"
    hints = {INTERRUPTED: again, OUT_OF_TIME: "increase max_seconds", _ASKED: "let it continue"}
    if reason in hints:
        reason, remedy = f"{reason} after step {training.num_steps:,}", hints[reason]
    elif schedule.is_still(training.losses[: schedule.decay_start]):
        return None
    elif schedule.num_steps is not None:
        remedy = "set a larger number, or none, so that fit chooses it"
    elif reason == LIMIT:
        remedy = "set a larger num_steps"
    else:
        return None
    return Check.CUT_SHORT.failed(reason=reason, remedy=remedy)


def _remedy(set_up: SetUp, num_steps: int) -> str:
    """Remedies for a guide that differs from the posterior, the most reliable first."""
    if not num_steps:
        return "num_steps=1000, since the guide was not trained"
    guide, way = cast(object, set_up.subject.guide), "a flow guide, such as AutoIAF"
    if isinstance(guide, FlowGuide):
        way = "more layers (num_transforms) or wider ones"
    elif isinstance(guide, MinibatchGuide) or not set_up.has_all_data:
        way = "an encoder with more informative features, or a more flexible local_flow"
    chains = set_up.draws_first
    if chains is not None and chains.gives_draws:
        way = f"result.draws, or {way}" if chains.has_mixed else way
    elif set_up.has_all_data:
        way = f"draws=1000 (chains do not need a small k-hat), or {way}"
    return way if set_up.schedule.num_steps is None else f"{way}, or more steps"


def _judge(set_up: SetUp, training: Training, is_saved: bool) -> FitResult:
    """The result of the fit without its model and guide."""
    subject, config, draws_first = set_up.subject, set_up.config, set_up.draws_first
    guide: object = subject.guide
    num_steps, num_gradients = training.num_steps, training.num_gradients
    cut_short = _cut_short(training, is_saved)
    status = FitStatus(
        training.num_skipped / max(num_steps, 1),
        training.schedule.reason in (INTERRUPTED, OUT_OF_TIME, _ASKED),
        cut_short=cut_short,
        has_chains=draws_first is not None and draws_first.is_requested,
        point_estimates=set_up.point_estimates,
        start_failed=training.start == FAILED,
        prior_only=set_up.prior_only,
        no_chains=draws_first.failure
        if draws_first is not None and draws_first.gives_draws
        else "",
        no_sum=set_up.no_sum,
        missing=set_up.missing,
    )
    chains = None if draws_first is None else draws_first.finish(status.prior_only)
    if not cut_short:  # depends on the final draws
        status = status._replace(remedy=_remedy(set_up, num_steps))
    set_up.limit.enter_phase(1.0, has_grace=True)
    minibatches = set_up.minibatches
    if minibatches is not None and not set_up.has_all_data:
        passed = minibatches.over_a_pass()
        elements = weigh_elements(minibatches, passed, num_gradients)
        fields = evaluate_minibatches(subject, passed, status, elements)
    else:
        ensemble = None if draws_first is None else draws_first.ensemble
        if draws_first is not None and draws_first.is_requested:
            few = min(config.evaluation.num_samples, _NUM_BESIDE_DRAWS)
            config = replace(config, evaluation=replace(config.evaluation, num_samples=few))
        fields = evaluate(subject, status, config, num_gradients, ensemble)
    if chains is not None:
        words = f"{chains.verdict} About the guide alone: {fields['verdict']}"
        fields |= {"chains": chains, "draws": chains.draws, "verdict": words}
    return FitResult(
        **fields,
        history=[-loss for loss in training.losses],
        num_steps=num_steps,
        num_skipped=training.num_skipped,
        num_gradients=num_gradients,
        seconds=training.earlier_seconds + set_up.limit.seconds,
        stopped_because=training.schedule.reason,
        start=training.start,
        culprits=dict(training.culprits),
        point_estimates=tuple(set_up.point_estimates),
        one_at_a_time=set_up.looped_because or subject.log_joint.reason,
        coordinates=guide.coordinates.centered_by_site() if isinstance(guide, PriorGuide) else {},
        guide_class=type(guide).__name__,
        guide_reason=set_up.guide_reason,
    )
