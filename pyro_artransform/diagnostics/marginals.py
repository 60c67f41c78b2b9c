# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Errors of the marginal means and standard deviations of a guide, estimated from draws of an ensemble.

An error is unknown if, according to the tail index, it or its standard error depends on moments that do not
exist: a mean needs a second moment, a standard deviation a fourth moment.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Latents, LogJoint
from .convergence import mean_ess
from .importance_sampling import CONFIDENCE, GOOD_ERROR
from .importance_weights import Values
from .psis import KHAT_OF_VARIANCE, fit_tails

_NUM_DRAWS = 4000  # of the guide, limited since each costs as much as a draw of chains


class MarginalErrors(NamedTuple):
    """The errors in :class:`Marginals`, each of shape ``(D,)``."""

    mean_shift: Tensor
    mean_shift_se: Tensor
    sd_ratio: Tensor
    sd_ratio_se: Tensor


@dataclass(frozen=True, eq=False)
class Marginals:
    """Errors of the marginal means and standard deviations of a guide.

    All values are for single coordinates on the unconstrained space, by site and in the site's shape
    there. An error is ``nan`` if, according to the tail index of the latent, moments needed for the error
    or its standard error do not exist.

    :param mean_shift: the guide's mean minus the posterior's, in posterior sds.
    :param mean_shift_se: the Monte Carlo standard error of ``mean_shift``.
    :param sd_ratio: the guide's standard deviation over the posterior's, with a standard error too.
    :param mean_bound: an upper bound on the error of all means, in posterior sds, that holds with a
        probability of 97.5 % jointly with ``sd_bound`` (Bonferroni); infinite if an error is unknown.
    :param sd_bound: the same for the relative errors of standard deviations.
    :param trusted: whether no mean is known to be off by more than 0.15 sd and no sd by more than
        15 %, and all are known to be off by less than twice that. If chains explore the whole posterior,
        this is wrong with a probability of 2.5 %.
    :param is_off: whether any mean or sd is known to be off by more than these thresholds.
    :param words: the result in words.
    """

    mean_shift: Values
    mean_shift_se: Values
    sd_ratio: Values
    sd_ratio_se: Values
    mean_bound: float
    sd_bound: float
    trusted: bool
    is_off: bool
    words: str = field(repr=False)

    def __repr__(self) -> str:
        width = max(map(len, ["site", *self.mean_shift]))
        head = f"  {'site':{width}}  largest error of a mean  guide sd / posterior sd"
        lines = [f"Marginals: {self.words}", head]
        for name, shift in self.mean_shift.items():
            ratio = self.sd_ratio[name]
            ratios = f"{ratio.min():8.3f} to {ratio.max():5.3f}"
            lines.append(f"  {name:{width}}  {shift.abs().max():20.3f} sd  {ratios}")
        return "\n".join(lines)


@torch.no_grad()
def marginals_of(log_joint: LogJoint, draws: Tensor, of_guide: Tensor) -> Marginals:
    """Compares finite unconstrained draws of a guide ``(n, D)`` with chains ``(C, m, D)`` that have mixed."""
    index = indices_along_rays(log_joint.with_coordinates(None), draws.flatten(0, 1))
    errors = known(errors_by_chains(draws, of_guide[:_NUM_DRAWS]), index)
    return _judged(errors, len(draws), log_joint.latents)


def bounds_in_words(mean: float, sd: float) -> str:
    """Words for bounds on errors of means, in sds, and on relative errors of sds, both rounded up."""
    means = sds = "not all known"
    if math.isfinite(mean):
        means = f"within {math.ceil(round(100 * mean, 3)) / 100:.2f} posterior sd"
    if math.isfinite(sd):
        sds = f"within {math.ceil(round(100 * sd, 3))} %"
    return f"means {means}, sds {sds}"


def _judged(errors: MarginalErrors, num_chains: int, latents: Latents) -> Marginals:
    """The marginals with bounds on their errors and a judgement in words."""
    width = critical_value(2 * latents.latent_dim, num_chains, CONFIDENCE)
    shift, shift_width = errors.mean_shift, width * errors.mean_shift_se
    ratio, ratio_width = errors.sd_ratio, width * errors.sd_ratio_se
    # upper confidence bounds; infinite if an error is unknown
    most = torch.stack([shift.abs() + shift_width, (ratio - 1).abs() + ratio_width])
    mean_bound, sd_bound = most.nan_to_num(torch.inf, torch.inf).amax(1).tolist()
    objections = []
    is_off = shift.abs() - shift_width > GOOD_ERROR
    if is_off.any():
        at, those, name = _worst(shift.abs(), is_off, "means", latents)
        worst = f"{name} by {shift[at]:.2f} ± {shift_width[at]:.2f}"
        objections.append(f"{those} off by more than {GOOD_ERROR} posterior sd ({worst})")
    is_off = (ratio - 1).abs() - ratio_width > GOOD_ERROR
    if is_off.any():
        at, those, name = _worst(ratio.log().abs(), is_off, "sds", latents)
        worst = f"{name}: {ratio[at]:.2f} ± {ratio_width[at]:.2f} times that of the posterior"
        objections.append(f"{those} off by more than {100 * GOOD_ERROR:.0f} % ({worst})")
    is_known = max(mean_bound, sd_bound) <= 2 * GOOD_ERROR
    if objections:
        words = "; ".join(objections)
    elif is_known:
        words = f"all {bounds_in_words(mean_bound, sd_bound)}"
    elif (is_unknown := (shift + ratio).isnan()).any():
        name = latents.name_of(int(is_unknown.int().argmax()))
        words = (
            f"errors of {int(is_unknown.sum()):,} of {len(is_unknown):,} latents are unknown, such as that "
            f"of {name}, whose tails are too heavy"
        )
    else:
        words = (
            f"no error was found, but the bounds are wide ({bounds_in_words(mean_bound, sd_bound)}): set a "
            "larger draws="
        )
    judged = mean_bound, sd_bound, is_known and not objections, bool(objections), words
    shifts, shift_ses, ratios, ratio_ses = map(latents.split, errors)
    return Marginals(shifts, shift_ses, ratios, ratio_ses, *judged)


def _worst(values: Tensor, is_off: Tensor, what: str, latents: Latents) -> tuple[int, str, str]:
    """The index of the largest value that is off, a phrase with the number off, and its name."""
    at = int(values.nan_to_num(torch.inf).where(is_off, -torch.inf).argmax())
    count = int(is_off.sum())
    those = f"{count:,} of {len(is_off):,} {what} {'is' if count == 1 else 'are'}"
    return at, those, latents.name_of(at)


def errors_by_chains(draws: Tensor, of_guide: Tensor) -> MarginalErrors:
    """Errors of a guide with draws ``(n, D)``, estimated from draws of chains ``(C, m, D)``."""
    loc, scale = of_guide.mean(0), of_guide.std(0)
    flat = ((draws - loc) / scale).flatten(0, 1)
    mean, var, scaled = flat.mean(0), flat.var(0), (of_guide - loc) / scale
    sd, squares = var.sqrt(), (flat - mean).square()
    count, count_of_squares = mean_ess(draws), mean_ess(squares.reshape(draws.shape))
    mean_se = (1 / count + 1 / (len(scaled) * var)).sqrt()
    # the squared standard error of the log of a variance
    log_var = squares.var(0) / var.square() / count_of_squares
    log_var = log_var + scaled.square().var(0) / len(scaled)
    ratio = 1 / sd
    errors = MarginalErrors(-mean / sd, mean_se, ratio, ratio * log_var.sqrt() / 2)
    # the Pareto index of each tail minus its standard error
    tails = [[t.khat - t.khat_se for t in fit_tails(each.abs().log())] for each in (flat, scaled)]
    return known(errors, flat.new_tensor(tails).amax(0))


@torch.no_grad()
def indices_along_rays(log_density: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    """The tail index of each latent, ``(D,)``, from the density far outside of draws ``(n, D)``.

    The density is evaluated along each coordinate in both directions from the median, at 30 and 300 sds. If
    it decays with the power -1 - 1 / k of the distance, the index is k. Draws of guides and short chains do
    not get there.
    """
    center = draws.median(0).values
    near, far = (radius * torch.diag_embed(draws.std(0)) for radius in (30, 300))
    indices = []
    for sign in (1, -1):
        fall = log_density(center + sign * near) - log_density(center + sign * far)
        power = fall / math.log(10)
        index = torch.where(power > 1, 1 / (power - 1), torch.inf)
        # a zero or undefined density counts as no tail
        indices.append(index.masked_fill(power.isnan(), 0))
    return torch.stack(indices).amax(0)


def known(errors: MarginalErrors, index: Tensor) -> MarginalErrors:
    """Sets errors to NaN if, at this tail index ``(D,)``, the moments that they need do not exist."""
    shift = errors.mean_shift.masked_fill(~(index <= KHAT_OF_VARIANCE), torch.nan)
    ratio = errors.sd_ratio.masked_fill(~(2 * index <= KHAT_OF_VARIANCE), torch.nan)
    return errors._replace(mean_shift=shift, sd_ratio=ratio)


def critical_value(num_statements: int, num_chains: int, confidence: float) -> float:
    """The half-width of simultaneous two-sided intervals, in standard errors (Bonferroni).

    It uses the expansion of Student's quantile (Abramowitz and Stegun, 26.7.5), with two degrees of
    freedom fewer than chains, which is conservative.
    """
    z = -NormalDist().inv_cdf((1 - confidence) / (2 * num_statements))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / (num_chains - 2) ** power for power, term in enumerate(terms, 1))
