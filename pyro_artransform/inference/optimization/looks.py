# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Looks at parameters by fresh draws: how good they are, and what is left to win."""

import math
from typing import NamedTuple

from torch import Tensor

from ...diagnostics import fit_tail
from ...diagnostics.importance import GOOD_KHAT
from ..config import OptimizationConfig
from ..objectives.objective import Objective


class Score(NamedTuple):
    """What parameters are judged by; the gap to the evidence is infinite where it is not known."""

    elbo: float = -math.inf
    khat: float = math.inf
    gap: float = math.inf


def score_of(objective: Objective, num_draws: int) -> Score:
    """The score of the present parameters, by so many draws."""
    draws = objective.elbo_draws(num_draws)
    elbo = draws.mean().item()
    if not math.isfinite(elbo):
        return Score()
    if not objective.has_weights:
        return Score(elbo, 0.0)
    khat = fit_tail(draws).khat
    # weights with a heavy tail know too little of the evidence
    return Score(elbo, khat, gap_of(draws) if khat < GOOD_KHAT else math.inf)


def look(objective: Objective, config: OptimizationConfig) -> Score:
    """The score of parameters that little may be left to win at; nothing is known of others.

    Few draws tell that a guide is far off: for small gaps half the variance of the log weights is one.
    """
    few = objective.elbo_draws(config.look_draws)
    if not 0.5 * few.var() <= 2 * config.min_improvement:  # NaN is far off as well
        return Score()
    return score_of(objective, config.selection_draws)


def is_good(score: Score, config: OptimizationConfig) -> bool:
    """Whether nothing is left to win, as far as the weights tell."""
    return score.gap <= config.good_gap and score.khat <= config.tail_good_khat


def gap_of(log_weights: Tensor) -> float:
    """How far the ELBO is from the log evidence, in nats, by importance sampling.

    :param log_weights: of draws of the guide, shape ``(n,)``.
    """
    log_evidence = log_weights.logsumexp(0) - math.log(len(log_weights))
    return float(log_evidence - log_weights.mean())
