# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The second stage of a fit: the guide is put where the draws are."""

import math
from functools import partial
from typing import cast

from ..._base.arguments import first_of
from ..._base.time_limit import abandonable
from ...model import LogJoint
from ...model.protocols import FlowGuide, MinibatchGuide, StructuredGuide
from ...sampling import Ensemble
from ...sampling.starts import check_has_gradient
from ..first_draws import START_UNTIL, FirstDraws, keeping
from ..optimization.objective import PyroObjective
from ..optimization.training import Training
from ..problem import Problem
from .start import (
    AT_BATCHES,
    AT_DRAWS,
    UNCHANGED,
    InitialGuide,
    find_initial_minibatch_guide,
    find_start,
    find_start_of_elements,
    minibatch_density,
)

#: the reason for a fit without steps
NO_DATA = "the posterior is the prior, so there is nothing to learn"
_FOR_GUIDE = 0.1  # the share of max_seconds to find the guide's start after the draws


def initial_training(problem: Problem, draws: FirstDraws | None) -> Training:
    """Draws, and initializes the guide; the training may already be over."""
    parallel = problem.parallel
    initial = parallel.first("the initial guide", partial(_initialize, problem, draws))
    parallel.copy_first(problem.tensors)
    parallel.seed_apart()
    training = problem.new_training(problem.schedule)
    # other processes would wait for the end
    with keeping(draws, problem), abandonable(parallel.size == 1):
        training.check_start(initial.name)
    if problem.prior_only and problem.schedule.num_steps is None:
        training.schedule = training.schedule.ending_at(0, NO_DATA)
    return training


def _initialize(problem: Problem, draws: FirstDraws | None) -> InitialGuide:
    """Draws, and initializes the guide if it supports that."""
    minibatches, log_joint = problem.minibatches, problem.subject.log_joint
    if minibatches is not None and (missing := problem.missing()):
        raise ValueError(
            "loader: the guide's graph lacks dependencies that other mini-batches have: "
            f"{first_of(missing)}. Make a new guide and set it up with all data before the fit, "
            "guide.set_up(*all_data), or use AutoIAF, or AutoAmortized if rows have latents of their own"
        )
    guide: object = problem.subject.guide
    of_batch = problem.objective if minibatches is None else minibatches.objective
    density = whole = log_joint
    is_flow = isinstance(guide, FlowGuide) and not isinstance(of_batch, PyroObjective)
    problem.limit.enter_phase(START_UNTIL)
    has_gaussian = isinstance(guide, StructuredGuide) and guide.is_of_elements
    if has_gaussian and problem.terms is not None and minibatches and minibatches.whole:
        problem.limit.enter_phase(START_UNTIL + _FOR_GUIDE)  # there are no chains
        of_elements = minibatches.whole, cast(StructuredGuide, guide), problem.terms
        return find_start_of_elements(*of_elements)
    if is_flow and minibatches is not None:
        density = minibatches.mean_log_joint()
        whole = minibatches.whole or density
    elif is_flow and log_joint.is_random:
        density = whole = minibatch_density(log_joint)
    if is_flow:
        check_has_gradient(density)
    if draws is not None:
        draws.sample()
    if draws is not None and draws.ensemble is not None and not problem.point_estimates:
        problem.choose_for_modes(len(draws.ensemble.parts()))
        if problem.subject.guide is not guide:
            guide, density = problem.subject.guide, problem.subject.log_joint
            whole = density
    if draws is not None:
        draws.announce()
    with keeping(draws, problem):
        return _start_guide(problem, draws, density if is_flow else None, whole)
    return InitialGuide(UNCHANGED, math.nan)


def _start_guide(
    problem: Problem, draws: FirstDraws | None, density: LogJoint | None, whole: LogJoint
) -> InitialGuide:
    """Initializes the guide near draws, if it supports that.

    :param density: the log joint density of chains for the start; ``None`` if the guide has no flow.
    :param whole: the log joint density of all data, if it is known, otherwise the same as ``density``.
    """
    guide: object = problem.subject.guide

    def chains_of(density: LogJoint) -> Ensemble | None:
        of_start = FirstDraws(problem, density, 0)
        of_start.sample()
        return of_start.ensemble

    if isinstance(guide, FlowGuide) and density is not None and not density.is_random:
        ensemble = chains_of(density) if draws is None else draws.ensemble
        problem.limit.enter_phase(START_UNTIL + _FOR_GUIDE)
        failure = "" if draws is None else draws.failure
        found = find_start(whole, guide, ensemble, failure, fewer=problem.fewer)
        is_of_batches = draws is None and found.name == AT_DRAWS
        return found._replace(name=AT_BATCHES) if is_of_batches else found
    if isinstance(guide, MinibatchGuide):
        elbo_draws = problem.objective.elbo_draws
        of_guide = problem.subject.log_joint, guide, problem.batch, elbo_draws, chains_of
        return find_initial_minibatch_guide(*of_guide, fewer=problem.fewer)
    return InitialGuide(UNCHANGED, math.nan)
