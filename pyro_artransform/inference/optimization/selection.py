# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Choices by the ELBO on common noise: of the step size, and of the parameters at the end."""

import math
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from ..config import OptimizationConfig
from .schedule import Score, is_good, quick_score, score_of
from .training import FitError, Trainer, Training


def is_at_posterior(trainer: Trainer) -> bool:
    """Whether steps cannot gain what a fit goes on for, as far as the weights of fresh draws tell.

    Asked where the fit finds its end itself, and has nothing to train but a guide with weights.
    """
    objective, schedule = trainer.objective, trainer.schedule
    is_asked = schedule.num_steps is not None or trainer.optim is not None
    if is_asked or not objective.has_weights or not objective.is_guide_alone():
        return False
    return is_good(quick_score(objective, schedule.config), schedule.config)


def begin(trainer: Trainer) -> tuple[Training, int]:
    """A training with the largest step size that a few steps do not speak against.

    A small step size looks best after a few steps and is slow after many: only one whose ELBO is
    clearly larger takes the place of a larger step size. The search ends where the evidence leaves
    no room for that. A fit that finds its end itself goes on from the steps of the search with this
    step size; one of a given number of steps begins anew.

    :return: the training, and the number of steps that the search took without it.
    """
    config = trainer.schedule.config
    # no longer than the fit, and at a constant step size throughout
    num_steps = min(config.search_steps, trainer.schedule.end or config.search_steps)
    schedule = replace(trainer.schedule, end=None)
    state = torch.get_rng_state()
    trials, num_taken = list[tuple[float, Training, list[Tensor]]](), 0
    best = -math.inf
    # networks of presets give a tenth, those of a model do not (tutorials/vae_iaf.ipynb)
    first = 0 if trainer.objective.is_guide_alone() else 1
    for step_size in config.step_sizes[first:] or config.step_sizes:
        torch.set_rng_state(state)
        training, score = trainer.new(step_size, schedule), Score()
        before = training.candidates()["last"]
        with suppress(FitError):
            while training.num_steps < num_steps and not training.is_over():
                training.step()
            score = score_of(training.objective, config.search_draws)
        num_taken += training.num_steps
        trials.append((score.elbo, training, training.candidates()["last"]))
        training.set_parameters(before)
        # what cannot win any more is not held
        best = max(best, score.elbo)
        trials = [trial for trial in trials if trial[0] >= best - config.search_min_gain]
        if score.gap < config.search_min_gain:
            break
    elbo, chosen, values = trials[0]
    if trainer.schedule.end is not None or not math.isfinite(elbo):
        return trainer.new(chosen.step_size), num_taken
    chosen.set_parameters(values)
    return chosen, num_taken - chosen.num_steps


def select_parameters(training: Training) -> str:
    """Leaves the parameters at the candidate with the largest ELBO on common noise; returns its name.

    Another one with a clearly smaller k-hat is taken if its ELBO is next to equal.
    """
    config, candidates = training.schedule.config, training.candidates()
    if len(candidates) == 1:  # no step was taken
        return next(iter(candidates))
    state = torch.get_rng_state()
    scores = {}
    for name, values in candidates.items():
        torch.set_rng_state(state)
        training.set_parameters(values)
        scores[name] = score_of(training.objective, config.selection_draws)
    best = best_of(scores, config)
    training.set_parameters(candidates[best])
    return best


def best_of(scores: dict[str, Score], config: OptimizationConfig) -> str:
    """The name of the best score: of the largest ELBO, less a price for k-hat among those next to it."""
    best, best_value = "", -math.inf
    least = max(scores.values()).elbo - config.selection_as_good
    for name, score in scores.items():
        price = config.khat_price * max(score.khat, config.selection_good_khat)
        excess = max(score.khat - config.selection_bad_khat, 0.0)
        value = score.elbo - (price + config.khat_price_without_variance * excess)
        if score.elbo >= least and (not best or value > best_value):
            best, best_value = name, value
    return best
