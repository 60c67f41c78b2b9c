# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Choices by the ELBO on common noise: of the step size, and of the parameters at the end."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics import fit_tail
from ...diagnostics.importance import GOOD_KHAT
from ..config import OptimizationConfig
from .training import FitError, Trainer, Training, gap_of


def choose_step_size(trainer: Trainer) -> tuple[float, int]:
    """The largest step size that a few steps do not speak against; the parameters are then as before.

    A small step size looks best after a few steps and is slow after many: only one whose ELBO is
    clearly larger takes the place of a larger step size. The search ends where the evidence leaves
    no room for that.

    :param trainer: makes a training for each step size.
    :return: the step size, and the number of steps that all trainings took.
    """
    config = trainer.schedule.config
    # no longer than the fit, and at a constant step size throughout
    num_steps = min(config.search_steps, trainer.schedule.end or config.search_steps)
    schedule = trainer.schedule.constant()
    state = torch.get_rng_state()
    elbos: list[float] = []
    for step_size in config.step_sizes:
        torch.set_rng_state(state)
        training = trainer.new(step_size, schedule)
        before = training.candidates()["last"]
        elbo, room = _elbo_after(training, num_steps)
        elbos.append(elbo)
        training.set_parameters(before)
        if room < config.search_min_gain:
            break
    enough = max(elbos) - config.search_min_gain
    best = next(k for k in range(len(elbos)) if elbos[k] >= enough)
    return config.step_sizes[best], num_steps * len(elbos)


def _elbo_after(training: Training, num_steps: int) -> tuple[float, float]:
    """The ELBO after so many steps, and how far it is from the evidence, as far as it is known."""
    try:
        for _ in range(num_steps):
            training.step()
    except FitError:
        return -math.inf, math.inf
    draws = training.objective.elbo_draws(training.schedule.config.search_draws)
    elbo = draws.mean().item()
    if not math.isfinite(elbo):
        return -math.inf, math.inf
    # weights with a heavy tail know too little of the evidence
    is_known = training.objective.has_weights and fit_tail(draws).khat < GOOD_KHAT
    return elbo, gap_of(draws) if is_known else math.inf


class Score(NamedTuple):
    """What a candidate is judged by."""

    elbo: float
    khat: float


def select_parameters(training: Training) -> str:
    """Leaves the parameters at the candidate with the largest ELBO on common noise.

    Another one with a clearly smaller k-hat is taken if its ELBO is next to equal.

    :param training: a training that is over.
    :return: the name of the candidate.
    """
    config, candidates = training.schedule.config, training.candidates()
    state = torch.get_rng_state()
    scores = {}
    for name, values in candidates.items():
        torch.set_rng_state(state)
        training.set_parameters(values)
        draws = training.objective.elbo_draws(config.selection_draws)
        scores[name] = _score(draws, training.objective.has_weights)
    best = best_of(scores, config)
    training.set_parameters(candidates[best])
    return best


def _score(draws: Tensor, are_weights: bool) -> Score:
    elbo = draws.mean().item()
    if not math.isfinite(elbo):
        return Score(-math.inf, math.inf)
    return Score(elbo, fit_tail(draws).khat if are_weights else 0.0)


def best_of(scores: dict[str, Score], config: OptimizationConfig) -> str:
    """The name of the best score: of the largest ELBO, less a price for k-hat among those next to it.

    :param scores: the scores by name.
    :param config: what k-hat costs, in nats.
    """
    best, best_value = "", -math.inf
    least = max(scores.values()).elbo - config.selection_as_good
    for name, (elbo, khat) in scores.items():
        price = config.khat_price * max(khat, config.selection_good_khat)
        price += config.khat_price_without_variance * max(khat - config.selection_bad_khat, 0.0)
        if elbo >= least and (not best or elbo - price > best_value):
            best, best_value = name, elbo - price
    return best
