# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Errors of a guide's means and standard deviations, from pairs of chains, with standard errors.

All values are in units of their own, near those of the guide, so that round-off does not matter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .hamiltonian import Averages
from .known_moments import PairedMoments

#: chains that remember more than this of their start have moved less than half of the way
MOST_MEMORY = 0.5
# coordinates that are weighed at once: each array of 4,000 draws of them takes 8 MB
_COORDINATES = 256
# standard errors of a memory that are its noise: each of a thousand latents would be extrapolated by it
_NOISE_OF_MEMORY = 2.0


class MarginalErrors(NamedTuple):
    """Errors of each mean and standard deviation of a guide, shape ``(D,)`` each.

    :param mean_shift: the guide's mean less the posterior's, in sds of the posterior.
    :param mean_shift_se: its standard error.
    :param sd_ratio: the guide's sd over the posterior's.
    :param sd_ratio_se: its standard error.
    :param memory: the slope of a chain's mean in its start: 0 where it is forgotten.
    :param memory_se: its standard error, which is large where a guide is narrow.
    """

    mean_shift: Tensor
    mean_shift_se: Tensor
    sd_ratio: Tensor
    sd_ratio_se: Tensor
    memory: Tensor
    memory_se: Tensor

    @property
    def sure_memory(self) -> Tensor:
        """The memory less its noise, zero at least."""
        return (self.memory - _NOISE_OF_MEMORY * self.memory_se).clamp_min(0)


def marginal_errors(
    chains: Averages, companions: Averages, moments: PairedMoments, start: Tensor
) -> MarginalErrors:
    """Errors of a guide from chains that started at its draws.

    What chains remember of the start, beyond noise, is extrapolated: where a share m of a difference
    of means is left, a share m^2 of one of variances is, as for a Gaussian. Beyond a memory of
    :data:`MOST_MEMORY` errors are extrapolated as if from there, so that they are those of the
    posterior or smaller.

    :param chains: the averages of chains of the posterior.
    :param companions: those of the chains that they are paired with.
    :param start: the first values of the chains, shape ``(C, D)``.
    """
    ones = torch.ones_like(moments.mean.guide)
    memory, memory_se = _slope(chains.first, start)
    left = (memory - _NOISE_OF_MEMORY * memory_se).clamp(0, MOST_MEMORY)
    mean, variance, slope = _controlled(chains.first, companions.first, moments.mean.known)
    shift = (moments.mean.guide - mean) / (1 - left)
    shift_se = (variance + moments.mean.error_variance(ones, slope)).sqrt() / (1 - left)
    squares, controls = chains.about(mean), companions.about(moments.mean.known)
    known = moments.square.known - moments.mean.known.square()
    found, variance, slope = _controlled(squares, controls, known)
    guide = moments.square.guide - moments.mean.guide.square()
    # an extrapolated variance below zero is not known
    posterior = guide + (found - guide) / (1 - left.square())
    posterior = torch.where(posterior > 0, posterior, torch.nan)
    sd, ratio = posterior.sqrt(), (guide / posterior).sqrt()
    share = guide / posterior
    noise = (share * variance.sqrt()).square() + moments.square.error_variance(ones, share * slope)
    # of the log of the ratio of variances, with that of the extrapolation
    log_se = noise.sqrt() / guide / (1 - left.square())
    return MarginalErrors(shift / sd, shift_se / sd, ratio, ratio * log_se / 2, memory, memory_se)


def errors_by_weights(draws: Tensor, log_weights: Tensor) -> MarginalErrors:
    """Errors of the guide that draws are of, from their importance weights, by the delta method.

    :param draws: shape ``(n, D)``.
    :param log_weights: shape ``(n,)``.
    """
    weights = (len(draws) * log_weights.softmax(0))[:, None]
    # a few coordinates at a time, which bounds the memory
    parts = [_errors_by_weights(part, weights) for part in draws.split(_COORDINATES, 1)]
    return MarginalErrors(*map(torch.cat, zip(*parts)))


def _errors_by_weights(draws: Tensor, weights: Tensor) -> MarginalErrors:
    count = len(draws)
    mean, other = (weights * draws).mean(0), draws.mean(0)
    squares, others = (draws - mean).square(), (draws - other).square()
    variance, own = (weights * squares).mean(0), others.mean(0)
    sd, ratio = variance.sqrt(), (own / variance).sqrt()
    # what each draw adds to an error
    of_log_sd = 0.5 * weights * (squares / variance - 1)
    of_shift = ((draws - other) - weights * (draws - mean)) / sd - (other - mean) / sd * of_log_sd
    of_log_ratio = 0.5 * (others / own - 1) - of_log_sd
    shift_se, log_se = (part.std(0) / count**0.5 for part in (of_shift, of_log_ratio))
    forgotten = torch.zeros_like(mean)
    return MarginalErrors(
        (other - mean) / sd, shift_se, ratio, ratio * log_se, forgotten, forgotten
    )


def critical_value(num_statements: int, num_chains: int, confidence: float) -> float:
    """How many standard errors all of many two-sided intervals have to be wide (Bonferroni's bound).

    By the expansion of Student's quantile in the normal one (Abramowitz and Stegun, 26.7.5).

    :param num_chains: independent chains behind a standard error; two are lost to a mean and a slope.
    :param confidence: the least probability that all are right.
    """
    tail = (1 - confidence) / (2 * num_statements)
    z = -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64, device="cpu")))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    degrees = num_chains - 2
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def _controlled(values: Tensor, controls: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of values by control variates of known mean, their variances, and the slopes, ``(D,)``.

    :param values: shape ``(C, D)``, a row for each independent chain; controls as well.
    """
    slope, _ = _slope(values, controls)
    mean = values.mean(0) - slope * (controls.mean(0) - known)
    residuals = values - values.mean(0) - slope * (controls - controls.mean(0))
    variance = residuals.square().sum(0) / (len(values) - 2) / len(values)
    return mean, variance, slope


def _slope(values: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
    """The slope of values in controls, and its standard error, shape ``(D,)``."""
    deviations = controls - controls.mean(0)
    total = deviations.square().sum(0).clamp_min(torch.finfo(controls.dtype).tiny)
    slope = (deviations * values).sum(0) / total
    residuals = values - values.mean(0) - slope * deviations
    return slope, (residuals.square().sum(0) / (len(values) - 2) / total).sqrt()
