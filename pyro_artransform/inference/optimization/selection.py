# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit ends with: the best of the last, the averaged and the best parameters."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics import fit_tail
from .training import Training

_NUM_DRAWS = 5000
# of k-hat: so small that a smaller one is no better, and where weights have no variance any more
_GOOD_KHAT, _BAD_KHAT = 0.25, 0.5
# ELBOs as near to each other as this, in nats, are as good where k-hat is larger
_AS_GOOD = 0.02
# the nats that one unit of k-hat costs, and so many more above the bad one; the noise of k-hat is 0.1
_PRICE, _PRICE_WITHOUT_VARIANCE = 0.04, 0.2


class _Score(NamedTuple):
    elbo: float
    khat: float


def keep_the_best(training: Training) -> str:
    """Leaves the parameters at the candidate with the largest ELBO on common noise.

    Another one with a clearly smaller k-hat is kept if its ELBO is next to equal.

    :param training: a training that is over.
    :return: the name of the candidate.
    """
    candidates = training.candidates()
    state = torch.get_rng_state()
    scores = {}
    for name, values in candidates.items():
        torch.set_rng_state(state)
        training.set_parameters(values)
        draws = training.objective.elbo_draws(_NUM_DRAWS)
        scores[name] = _score(draws, training.objective.has_weights)
    best = _best(scores)
    training.set_parameters(candidates[best])
    return best


def _score(draws: Tensor, are_weights: bool) -> _Score:
    elbo = draws.mean().item()
    if not math.isfinite(elbo):
        return _Score(-math.inf, math.inf)
    return _Score(elbo, fit_tail(draws).khat if are_weights else 0.0)


def _best(scores: dict[str, _Score]) -> str:
    highest = max(score.elbo for score in scores.values())
    as_good = [name for name, score in scores.items() if score.elbo >= highest - _AS_GOOD]
    return max(as_good, key=lambda name: _worth(scores[name]))


def _worth(score: _Score) -> float:
    price = _PRICE * max(score.khat, _GOOD_KHAT)
    price += _PRICE_WITHOUT_VARIANCE * max(score.khat - _BAD_KHAT, 0.0)
    return score.elbo - price
