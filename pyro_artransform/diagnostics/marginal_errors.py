# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Errors of a guide's means and standard deviations, with standard errors, from chains or weights.

All values are in units of their own, near those of the guide, so that round-off does not matter. An error
is not known where the moments that it and its standard error rest on do not exist, as far as the tail's
index says: a mean needs a second moment, a standard deviation a fourth one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .convergence import mean_ess
from .importance import KHAT_OF_VARIANCE
from .psis import fit_tail, fit_tails

# the largest tail indices of values with a second and a fourth moment
_INDEX_OF_SECOND, _INDEX_OF_FOURTH = 0.5, 0.25
# sds between which the fall of a density says what its tail is
_RADII = (30.0, 300.0)


class MarginalErrors(NamedTuple):
    """The errors in :class:`~pyro_artransform.diagnostics.Marginals`, shape ``(D,)`` each."""

    mean_shift: Tensor
    mean_shift_se: Tensor
    sd_ratio: Tensor
    sd_ratio_se: Tensor


def errors_by_chains(draws: Tensor, of_guide: Tensor) -> MarginalErrors:
    """Errors of the guide that draws ``(n, D)`` are of, by those of chains ``(C, m, D)``."""
    loc, scale = of_guide.mean(0), of_guide.std(0)
    flat = ((draws - loc) / scale).flatten(0, 1)
    mean, var, own = flat.mean(0), flat.var(0), (of_guide - loc) / scale
    sd, squares = var.sqrt(), (flat - mean).square()
    count, count_of_squares = mean_ess(draws), mean_ess(squares.reshape(draws.shape))
    mean_se = (1 / count + 1 / (len(own) * var)).sqrt()
    # of the log of a variance
    log_var = squares.var(0) / var.square() / count_of_squares
    log_var = log_var + own.square().var(0) / len(own)
    ratio = 1 / sd
    errors = MarginalErrors(-mean / sd, mean_se, ratio, ratio * log_var.sqrt() / 2)
    of_draws, of_own = (_tail_indices(each.abs().log()) for each in (flat, own))
    return known(errors, torch.maximum(of_draws, of_own))


def errors_by_weights(draws: Tensor, log_weights: Tensor) -> MarginalErrors:
    """Errors of the guide that draws, ``(n, D)``, are of, by their weights and the delta method.

    None of an error is known where the weights, or these times squares, have no variance.
    """
    weights, khat = (len(draws) * log_weights.softmax(0))[:, None], fit_tail(log_weights).khat
    parts = []
    for part in draws.split(256, 1):  # of 4,000 draws each array takes 8 MB
        mean, other = (weights * part).mean(0), part.mean(0)
        squares, others = (part - mean).square(), (part - other).square()
        variance, own = (weights * squares).mean(0), others.mean(0)
        sd, ratio = variance.sqrt(), (own / variance).sqrt()
        # what each draw adds to an error
        of_log_sd = 0.5 * weights * (squares / variance - 1)
        of_shift = ((part - other) - weights * (part - mean)) / sd - (other - mean) / sd * of_log_sd
        of_log_ratio = 0.5 * (others / own - 1) - of_log_sd
        shift_se, log_se = (each.std(0) / len(draws) ** 0.5 for each in (of_shift, of_log_ratio))
        of_weights = _tail_indices(squares.log() + log_weights[:, None]).clamp(min=khat)
        index = _tail_indices(others.log() / 2)
        index = index.masked_fill(of_weights > KHAT_OF_VARIANCE, torch.inf)
        errors = MarginalErrors((other - mean) / sd, shift_se, ratio, ratio * log_se)
        parts.append(known(errors, index))
    return MarginalErrors(*map(torch.cat, zip(*parts)))


@torch.no_grad()
def indices_along_rays(
    log_density: Callable[[Tensor], Tensor], center: Tensor, scale: Tensor
) -> Tensor:
    """The index of each latent's tail ``(D,)``, as far as a density far outside of all draws tells.

    Along each coordinate, both ways from a center ``(D,)``, in units of a scale ``(D,)``: a density that
    falls as the power -1 - 1 / k of the distance has the index k. Draws of a guide, and short chains, do
    not get there.
    """
    near, far = (radius * torch.diag_embed(scale) for radius in _RADII)
    found = []
    for sign in (1, -1):
        fall = log_density(center + sign * near) - log_density(center + sign * far)
        power = fall / math.log(_RADII[1] / _RADII[0])
        index = torch.where(power > 1, 1 / (power - 1), torch.inf)
        # zero density, or none that can be evaluated, is no tail
        found.append(index.masked_fill(power.isnan(), 0))
    return torch.stack(found).amax(0)


def known(errors: MarginalErrors, index: Tensor) -> MarginalErrors:
    """Not a number where the tail of this index ``(D,)`` has no moments that an error rests on."""
    by_second = torch.where(index <= _INDEX_OF_SECOND, 0.0, torch.nan)
    by_fourth = torch.where(index <= _INDEX_OF_FOURTH, 0.0, torch.nan)
    shift, shift_se, ratio, ratio_se = errors
    return MarginalErrors(shift + by_second, shift_se, ratio + by_fourth, ratio_se)


def _tail_indices(log_values: Tensor) -> Tensor:
    """The Pareto index of each column ``(n, D)``, less its standard error."""
    return log_values.new_tensor([t.khat - t.khat_se for t in fit_tails(log_values)])


def critical_value(num_statements: int, num_chains: int, confidence: float) -> float:
    """The half width of two-sided intervals that are all right, in standard errors (Bonferroni).

    By the expansion of Student's quantile (Abramowitz and Stegun, 26.7.5), whose degrees of freedom
    are the chains less two: fewer than those of all their draws.
    """
    tail = (1 - confidence) / (2 * num_statements)
    z = -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64, device="cpu")))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / (num_chains - 2) ** power for power, term in enumerate(terms, 1))
