# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Errors of a guide's means and standard deviations, with standard errors, from chains or weights.

All values are in units of their own, near those of the guide, so that round-off does not matter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chains import Averages, Stretched, ToLatent

MOST_MEMORY = 0.5  #: chains that remember more of their start have moved less than half of the way

_NUM_PAIRS, _AT_A_TIME = 4000, 500  # of opposite draws: an sd is known to 1 %, most means better


class Expectation(NamedTuple):
    """Estimates of an expectation under the guide and under the companions' distribution, ``(D,)``."""

    guide: Tensor
    known: Tensor
    guide_variance: Tensor
    known_variance: Tensor
    covariance: Tensor

    def error_variance(self, share: Tensor) -> Tensor:
        """The variance of the one less a share of the other."""
        both = self.guide_variance + share.square() * self.known_variance
        return (both - 2 * share * self.covariance).clamp_min(0)


class PairedMoments(NamedTuple):
    """The means and the mean squares."""

    mean: Expectation
    square: Expectation


def moments_of_draws(draws: Tensor, stretched: Stretched) -> PairedMoments:
    """The moments of standardized draws, and those of a standard normal that was stretched."""
    widened = stretched.directions.square() @ (stretched.factors.square() - 1)
    zeros = torch.zeros_like(widened)
    first, second = draws, draws.square()
    return PairedMoments(
        Expectation(first.mean(0), zeros, first.var(0) / len(draws), zeros, zeros),
        Expectation(second.mean(0), 1 + widened, second.var(0) / len(draws), zeros, zeros),
    )


def moments_of_transform(
    transform: ToLatent, stretched: Stretched, loc: Tensor, scale: Tensor
) -> PairedMoments:
    """The moments of a transformed standard normal, and of one that was stretched before that."""
    means = squares = torch.zeros((5, 1), dtype=loc.dtype, device=loc.device)
    for _ in range(_NUM_PAIRS // _AT_A_TIME):
        base = torch.randn((_AT_A_TIME, len(loc)), dtype=loc.dtype, device=loc.device)
        of_guide = known = _mean_of_pairs(transform, base, loc, scale)
        if len(stretched.factors):
            known = _mean_of_pairs(transform, stretched(base), loc, scale)
        means = means + _sums_of_pairs(of_guide[0], known[0])
        squares = squares + _sums_of_pairs(of_guide[1], known[1])
    return PairedMoments(_expectation(means), _expectation(squares))


def _sums_of_pairs(one: Tensor, other: Tensor) -> Tensor:
    """The sums of paired values, of their squares and of their products: ``(5, D)`` from ``(n, D)``."""
    return torch.stack([one, other, one.square(), other.square(), one * other]).sum(1)


def _expectation(sums: Tensor) -> Expectation:
    guide, known, squares, known_squares, products = sums / _NUM_PAIRS
    variance, known_variance = squares - guide.square(), known_squares - known.square()
    moments = variance, known_variance, products - guide * known
    return Expectation(guide, known, *(moment / (_NUM_PAIRS - 1) for moment in moments))


def _mean_of_pairs(
    transform: ToLatent, base: Tensor, loc: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The values and squares at pairs of opposite points, whose odd parts cancel."""
    one, other = ((transform(points)[0] - loc) / scale for points in (base, -base))
    return (one + other) / 2, (one.square() + other.square()) / 2


class MarginalErrors(NamedTuple):
    """The errors in :class:`~pyro_artransform.diagnostics.Marginals`, shape ``(D,)`` each."""

    mean_shift: Tensor
    mean_shift_se: Tensor
    sd_ratio: Tensor
    sd_ratio_se: Tensor
    memory: Tensor
    sure_memory: Tensor  #: without what may be noise, zero at least


def marginal_errors(
    chains: Averages, companions: Averages, moments: PairedMoments, start: Tensor
) -> MarginalErrors:
    """Errors of a guide from chains that started at its draws, of values ``start``, ``(C, D)``.

    The memory is the slope of a chain's mean in its start. What chains remember beyond noise, and up
    to :data:`MOST_MEMORY`, is extrapolated: where a share m of a difference of means is left, a share
    m^2 of one of variances is, as for a Gaussian.
    """
    memory, memory_se = _slope(chains.first, start)
    sure_memory = (memory - 2 * memory_se).clamp_min(0)
    left = sure_memory.clamp_max(MOST_MEMORY)
    mean, variance, slope = _controlled(chains.first, companions.first, moments.mean.known)
    shift = (moments.mean.guide - mean) / (1 - left)
    shift_se = (variance + moments.mean.error_variance(slope)).sqrt() / (1 - left)
    squares, controls = chains.about(mean), companions.about(moments.mean.known)
    known = moments.square.known - moments.mean.known.square()
    found, variance, slope = _controlled(squares, controls, known)
    guide = moments.square.guide - moments.mean.guide.square()
    # an extrapolated variance below zero is not known
    posterior = guide + (found - guide) / (1 - left.square())
    posterior = torch.where(posterior > 0, posterior, torch.nan)
    sd, ratio = posterior.sqrt(), (guide / posterior).sqrt()
    share = guide / posterior
    noise = (share * variance.sqrt()).square() + moments.square.error_variance(share * slope)
    # of the log of the ratio of variances, with that of the extrapolation
    log_se = noise.sqrt() / guide / (1 - left.square())
    return MarginalErrors(shift / sd, shift_se / sd, ratio, ratio * log_se / 2, memory, sure_memory)


def errors_by_weights(draws: Tensor, log_weights: Tensor) -> MarginalErrors:
    """Errors of the guide that draws, ``(n, D)``, are of, by their weights and the delta method."""
    weights, parts = (len(draws) * log_weights.softmax(0))[:, None], []
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
        shift, memory = (other - mean) / sd, torch.zeros_like(mean)
        parts.append((shift, shift_se, ratio, ratio * log_se, memory, memory))
    return MarginalErrors(*map(torch.cat, zip(*parts)))


def critical_value(num_statements: int, num_chains: int, confidence: float) -> float:
    """The half width of two-sided intervals that are all right, in standard errors (Bonferroni).

    By the expansion of Student's quantile (Abramowitz and Stegun, 26.7.5), whose degrees of freedom
    are the chains less two, for a mean and a slope.
    """
    tail = (1 - confidence) / (2 * num_statements)
    z = -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64, device="cpu")))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / (num_chains - 2) ** power for power, term in enumerate(terms, 1))


def _controlled(values: Tensor, controls: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of values, ``(C, D)``, by control variates of known mean, their variances, and the slopes."""
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
