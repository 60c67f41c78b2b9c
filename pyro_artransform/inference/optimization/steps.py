# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The third stage of a fit: the steps of a training."""

import math
from collections.abc import Callable
from typing import Any

from ..._base.progress import ProgressBar
from ..._base.time_limit import OUT_OF_TIME, abandonable
from ..first_draws import FirstDraws, keeping
from ..problem import Problem
from .training import Training

#: the reason for the end of a fit
STOPPED = "the callback asked to stop"
FAILED_GUIDE = "an error ended the training of the guide"
_STEPS_UNTIL = 0.75  # the share of max_seconds at which steps end


def take_steps(
    problem: Problem,
    draws: FirstDraws | None,
    training: Training,
    callback: Callable[[int, float], object] | None,
    bar: ProgressBar,
) -> None:
    """Takes steps until the schedule, the callback or Ctrl-C ends them."""
    limit, parallel, stream = problem.limit, problem.parallel, problem.stream
    limit.enter_phase(_STEPS_UNTIL)
    is_asked, is_late = parallel.any(False, limit.is_over())
    began = limit.seconds
    while not (training.is_over() or is_asked or is_late or problem.guide_failure):
        loss: float | None = None
        # other processes would wait for the end
        with keeping(draws, problem), abandonable(parallel.size == 1):
            loss = training.step()
        if loss is None:
            break
        step = training.num_steps
        if parallel.size == 1 and math.isfinite(limit.end):
            per_step = (limit.seconds - began) / step
            left = (limit.end - limit.seconds) / per_step
            training.schedule = training.schedule.within_time(step, left)
        place = () if stream is None else stream.place(training.schedule.end)
        bar.update(training.losses, training.schedule.expected_end(step), *place)
        answer: Any = None if callback is None else callback(step, -loss)
        # True may also be a scalar of NumPy or PyTorch
        is_asked = (answer.item() if hasattr(answer, "item") else answer) is True
        is_asked, is_late = parallel.any(is_asked, limit.is_over())
    if is_asked or problem.guide_failure or not training.is_over():
        # another process may reach the time limit before this one
        reason = STOPPED if is_asked else limit.reason or OUT_OF_TIME
        reason = FAILED_GUIDE if problem.guide_failure else reason
        training.schedule = training.schedule.ending_at(training.num_steps, reason)
