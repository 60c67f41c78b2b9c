# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The step size, from short trials on common noise."""

import math
from collections.abc import Callable

import torch

from ...diagnostics import fit_tail
from ...diagnostics.importance import GOOD_KHAT
from .schedule import Schedule
from .training import FitError, Training, gap_of

STEP_SIZES = (5e-3, 2e-3, 5e-4)
_NUM_STEPS = 60
_NUM_DRAWS = 1024
# in nats
_CLEARLY = 1.0


def choose_step_size(new_training: Callable[[float], Training]) -> tuple[float, int]:
    """The largest step size that a short trial does not object to; the parameters are then as before.

    A small step size looks best after a few steps and is slow after many: only one whose ELBO is
    clearly larger takes the place of a larger step size. None is tried where the evidence leaves no
    room for that.

    :param new_training: a function of a step size that returns a training from where the guide is.
    :return: the step size, and the number of steps that all trials took.
    """
    state = torch.get_rng_state()
    scores, total = {}, 0
    for step_size in STEP_SIZES:
        torch.set_rng_state(state)
        training = new_training(step_size)
        # a trial need not be longer than the fit
        num_steps = min(_NUM_STEPS, training.schedule.end or _NUM_STEPS)
        # that of the fit may be over before the trial is
        training.schedule = Schedule(None, 2 * _NUM_STEPS)
        before = training.candidates()["last"]
        scores[step_size], room = _score(training, num_steps)
        total += num_steps
        training.set_parameters(before)
        if room < _CLEARLY:
            break
    enough = max(scores.values()) - _CLEARLY
    best = next(step_size for step_size in STEP_SIZES if scores[step_size] >= enough)
    return best, total


def _score(training: Training, num_steps: int) -> tuple[float, float]:
    """The ELBO after so many steps, and how far it is from the evidence, as far as it is known."""
    try:
        for _ in range(num_steps):
            training.step()
    except FitError:
        return -math.inf, math.inf
    draws = training.objective.elbo_draws(_NUM_DRAWS)
    elbo = draws.mean().item()
    if not math.isfinite(elbo):
        return -math.inf, math.inf
    # weights with a heavy tail know too little of the evidence
    is_known = training.objective.has_weights and fit_tail(draws).khat < GOOD_KHAT
    return elbo, gap_of(draws) if is_known else math.inf
