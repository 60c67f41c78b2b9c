# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How far means and standard deviations of a guide are off, one latent at a time, by chains or weights.

An error is not known where the moments that it and its standard error rest on do not exist, as far as the
tail's index says: a mean needs a second moment, a standard deviation a fourth one, and by weights both do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_integer
from ..joint import Latents, LogJoint
from ..sampling import GOOD_RHAT, Ensemble
from ..sampling.convergence import mean_ess
from .base_space import ensemble_of
from .defensive_mixture import MixtureDraws
from .importance import CONFIDENCE, GOOD_MEAN_SHIFT, GOOD_SD_ERROR, KHAT_OF_VARIANCE
from .importance_weights import ModelAndGuide, Values
from .psis import fit_tail, fit_tails

_NUM_DRAWS = 10_000  # of the guide whose means and sds are compared with those of chains
# that of 20 degrees of freedom; of an exponential tail along rays it is at most 0.01
_INDEX_OF_LIGHT_TAIL = 0.05
# the largest tail indices of values with a second and a fourth moment
_INDEX_OF_SECOND, _INDEX_OF_FOURTH = 0.5, 0.25
_NUM_FOR_SDS = 1000  # draws of a guide that say what an sd is there
_RADII = (30.0, 300.0)  # sds between which the fall of a density says what its tail is


class MarginalErrors(NamedTuple):
    """The errors in :class:`Marginals`, shape ``(D,)`` each."""

    mean_shift: Tensor
    mean_shift_se: Tensor
    sd_ratio: Tensor
    sd_ratio_se: Tensor


@dataclass(frozen=True, eq=False)
class Marginals:
    """How far the means and standard deviations of a guide are from those of the posterior.

    Everything is of single coordinates on the unconstrained space, and by site of the shape that the
    site has there. An error is ``nan`` where it is not known: where the weights have no variance, or the
    latent, by the index of its tail, lacks the moments that the error and its standard error rest on.

    :param mean_shift: the guide's mean less the posterior's, in sds of the posterior.
    :param mean_shift_se: its standard error, of the noise of draws.
    :param sd_ratio: the guide's standard deviation over the posterior's, also with a standard error.
    :param mean_bound: no mean is off by more than this, in sds of the posterior, with a probability
        of 97.5 % for all means and sds together (Bonferroni's bound); infinite where one is not known.
    :param sd_bound: the same for the relative errors of standard deviations.
    :param num_chains: the number of chains; 0 where ``fit`` took errors from weights.
    :param max_rhat: the largest R-hat of the chains; 1 without.
    :param trusted: whether no mean is known to be off by more than 0.15 sd and no sd by more than
        15 %, all are known to be off by less than twice that, and chains agree; where chains find all of
        the posterior this is wrong with a probability of 2.5 %.
    :param words: the same in words.
    """

    mean_shift: Values
    mean_shift_se: Values
    sd_ratio: Values
    sd_ratio_se: Values
    mean_bound: float
    sd_bound: float
    num_chains: int
    max_rhat: float
    trusted: bool
    words: str = field(repr=False)

    def __repr__(self) -> str:
        source = f"by {self.num_chains} chains" if self.num_chains else "by weights"
        width = max(map(len, ["site", *self.mean_shift]))
        head = f"  {'site':{width}}  largest shift of a mean  sds of the guide's"
        lines = [f"Marginals: {self.words}", f"  {source}", head]
        for name, shift in self.mean_shift.items():
            ratio = self.sd_ratio[name]
            ratios = f"{ratio.min():8.3f} to {ratio.max():5.3f}"
            lines.append(f"  {name:{width}}  {shift.abs().max():20.3f} sd  {ratios}")
        return "\n".join(lines)


def marginals(
    model: Callable[..., object],
    guide: Callable[..., object],
    *args: object,
    num_samples: int = 1000,
    num_chains: int | None = None,
    **kwargs: object,
) -> Marginals:
    """How far the mean and the standard deviation of each latent are off, by chains.

    k-hat judges all latents at once: of a thousand latents that are each right to a few percent the
    weights are useless all the same. Here the means and sds of the guide are compared with those of
    the chains that :func:`~pyro_artransform.inference.mcmc` runs from its draws.

    Any guide of continuous latents will do. Chains do not find modes that are far from the guide.

    :param model: a Pyro model that sees all its data.
    :param guide: a guide of it; ``args`` and ``kwargs`` are the arguments of both.
    :param num_samples: how many effective draws of each latent the chains go on for.
    :param num_chains: how many chains, 4 at least; by default as in ``mcmc``.
    :raises ValueError: if a number is out of its range, the model sub-samples its data, or the guide
        lacks a latent, was made for another model, is a point at some site, has discrete sites, or has
        too few draws of finite density.
    :raises RuntimeError: if it is called in ``torch.inference_mode``.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_artransform.diagnostics import marginals
        >>> def model():
        ...     with pyro.plate("data", 40):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> found = marginals(model, AutoNormal(model, init_scale=0.7))
        >>> found.trusted, found.sd_ratio["z"].shape
        (False, torch.Size([40]))

    **References**

    1. A Targeted Accuracy Diagnostic for Variational Approximations (Wang, Kasprzak, Huggins, 2023),
       https://arxiv.org/abs/2302.12419
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("marginals: expected gradients, got torch.inference_mode: leave it")
    check_integer("num_samples", num_samples)
    subject = ModelAndGuide.of(model, guide, args, kwargs)
    chains = ensemble_of(subject, num_chains=num_chains)
    chains.run(num_samples)
    of_guide, _ = subject.log_joint.to_unconstrained(subject.draws(_NUM_DRAWS))
    return marginals_by_chains(chains, of_guide, subject.log_joint)


@torch.no_grad()
def marginals_by_chains(chains: Ensemble, of_guide: Tensor, log_joint: LogJoint) -> Marginals:
    """By chains from a guide, and draws of it ``(n, D)`` on the unconstrained space."""
    of_guide = of_guide[of_guide.isfinite().all(-1)]
    draws = chains.draws
    index = indices_along_rays(log_joint.with_coordinates(None), draws.flatten(0, 1))
    errors = known(errors_by_chains(draws, of_guide), index)
    return _judged(errors, chains.num_chains, log_joint.latents, chains.convergence().rhat)


def marginals_by_weights(sample: MixtureDraws, log_joint: LogJoint) -> Marginals:
    """By weights of draws on the unconstrained space, in place of chains.

    Nothing is known of latents whose density falls as a power by draws of a guide alone, whose own tails may
    be lighter: it has no draws beyond some distance, and weights that do not show it.
    """
    own = torch.multinomial(sample.of_guide.double().exp(), _NUM_FOR_SDS, replacement=True)
    index = indices_along_rays(log_joint.with_coordinates(None), sample.draws[own])
    if not sample.has_tails:
        index = index.masked_fill(index > _INDEX_OF_LIGHT_TAIL, torch.inf)
    errors = known(errors_by_weights(sample), index)
    return _judged(errors, len(sample.draws), log_joint.latents)


def bounds_in_words(mean: float, sd: float, of: str = "") -> str:
    """Bounds of the errors of means, in sds, and of the relative ones of sds, both rounded up."""
    means = sds = "not all known"
    if math.isfinite(mean):
        means = f"within {math.ceil(round(100 * mean, 3)) / 100:.2f} sd"
    if math.isfinite(sd):
        sds = f"within {math.ceil(round(100 * sd, 3))} %"
    return f"means{of} {means}, sds {sds}"


def _judged(
    errors: MarginalErrors, num_samples: int, latents: Latents, rhat: Tensor | None = None
) -> Marginals:
    """What errors of ``num_samples`` independent chains or draws amount to."""
    width = critical_value(2 * latents.latent_dim, num_samples, CONFIDENCE)
    shift, shift_width = errors.mean_shift, width * errors.mean_shift_se
    ratio, ratio_width = errors.sd_ratio, width * errors.sd_ratio_se
    # beyond doubt; infinite where an error is not known
    most = torch.stack([shift.abs() + shift_width, (ratio - 1).abs() + ratio_width])
    mean_bound, sd_bound = most.nan_to_num(torch.inf, torch.inf).amax(1).tolist()
    objections = []
    is_off = shift.abs() - shift_width > GOOD_MEAN_SHIFT
    if is_off.any():
        at, those, name = _worst(shift.abs(), is_off, "means", latents)
        worst = f"that of {name} by {shift[at]:.2f} ± {shift_width[at]:.2f}"
        objections.append(f"{those} off by more than {GOOD_MEAN_SHIFT} sd ({worst})")
    is_off = (ratio - 1).abs() - ratio_width > GOOD_SD_ERROR
    if is_off.any():
        at, those, name = _worst(ratio.log().abs(), is_off, "sds", latents)
        worst = f"that of {name} is {ratio[at]:.2f} ± {ratio_width[at]:.2f} of the posterior's"
        objections.append(f"{those} off by more than {100 * GOOD_SD_ERROR:.0f} % ({worst})")
    num_chains, max_rhat = (0, 1.0) if rhat is None else (num_samples, float(rhat.max()))
    if rhat is not None and not max_rhat <= GOOD_RHAT:
        name = latents.name_of(int(rhat.argmax()))
        objections.append(
            f"chains do not agree, R-hat is {max_rhat:.2f} for {name}, so that errors may be larger: "
            "give them more time, or fit the guide for longer"
        )
    is_known = mean_bound <= 2 * GOOD_MEAN_SHIFT and sd_bound <= 2 * GOOD_SD_ERROR
    if objections:
        words = "; ".join(objections)
    elif is_known:
        dim = latents.latent_dim
        of = " of the only latent" if dim == 1 else f" of all {dim:,} latents"
        words = bounds_in_words(mean_bound, sd_bound, of)
    elif (is_unknown := (shift + ratio).isnan()).any():
        name = latents.name_of(int(is_unknown.int().argmax()))
        words = (
            f"errors of {int(is_unknown.sum()):,} of {len(is_unknown):,} latents are not known, such as "
            f"that of {name}: its tail, or that of the weights, is too heavy"
        )
    else:
        words = (
            f"errors are known too little ({bounds_in_words(mean_bound, sd_bound)}): "
            "diagnostics.marginals with more num_samples knows more"
        )
    shifts, shift_ses, ratios, ratio_ses = map(latents.split, errors)
    judged = mean_bound, sd_bound, num_chains, max_rhat, is_known and not objections, words
    return Marginals(shifts, shift_ses, ratios, ratio_ses, *judged)


def _worst(values: Tensor, is_off: Tensor, what: str, latents: Latents) -> tuple[int, str, str]:
    """The place of the largest value of those that are off, how many these are, and its name."""
    at = int(values.nan_to_num(torch.inf).where(is_off, -torch.inf).argmax())
    count = int(is_off.sum())
    those = f"{count:,} of {len(is_off):,} {what} {'is' if count == 1 else 'are'}"
    return at, those, latents.name_of(at)


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


def errors_by_weights(sample: MixtureDraws) -> MarginalErrors:
    """Errors of a guide by weights of draws, the posterior's and its own, and the delta method.

    None of an error is known where the weights, or these times squares of distances, have no variance.
    """
    khat = fit_tail(sample.of_posterior).khat
    if khat > KHAT_OF_VARIANCE:
        return MarginalErrors(*4 * [torch.full_like(sample.draws[0].double(), torch.nan)])
    of_posterior, of_guide = (
        log_weights.double().softmax(0)[:, None]
        for log_weights in (sample.of_posterior, sample.of_guide)
    )
    parts = []
    for part in map(Tensor.double, sample.draws.split(256, 1)):  # of 4,000 draws each takes 8 MB
        mean, other = (of_posterior * part).sum(0), (of_guide * part).sum(0)
        squares, others = (part - mean).square(), (part - other).square()
        weighted, own_weighted = of_posterior * squares, of_guide * others
        sd, own_sd = weighted.sum(0).sqrt(), own_weighted.sum(0).sqrt()
        ratio = own_sd / sd
        # what each draw adds to an error
        of_log_sd = 0.5 * (weighted / sd.square() - of_posterior)
        of_own = 0.5 * (own_weighted / own_sd.square() - of_guide)
        shift = (other - mean) / sd
        of_shift = of_guide * (part - other) - of_posterior * (part - mean)
        of_shift = of_shift / sd - shift * of_log_sd
        shift_se, log_se = (
            each.std(0) * len(each) ** 0.5 for each in (of_shift, of_own - of_log_sd)
        )
        tails = [_tail_indices(each.log()) for each in (weighted, own_weighted)]
        has_no_variance = torch.stack(tails).amax(0) > KHAT_OF_VARIANCE
        found = shift, shift_se, ratio, ratio * log_se
        parts.append([each.masked_fill(has_no_variance, torch.nan) for each in found])
    return MarginalErrors(*map(torch.cat, zip(*parts)))


@torch.no_grad()
def indices_along_rays(log_density: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    """The index of each latent's tail ``(D,)``, as far as a density far outside of draws ``(n, D)`` tells.

    Along each coordinate, both ways from their median: a density that falls as the power -1 - 1 / k of the
    distance has the index k. Draws of a guide, and short chains, do not get there.
    """
    center = draws.median(0).values
    near, far = (radius * torch.diag_embed(draws.std(0)) for radius in _RADII)
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
    shift = errors.mean_shift.masked_fill(~(index <= _INDEX_OF_SECOND), torch.nan)
    ratio = errors.sd_ratio.masked_fill(~(index <= _INDEX_OF_FOURTH), torch.nan)
    return errors._replace(mean_shift=shift, sd_ratio=ratio)


def _tail_indices(log_values: Tensor) -> Tensor:
    """The Pareto index of each column ``(n, D)``, less its standard error."""
    return log_values.new_tensor([t.khat - t.khat_se for t in fit_tails(log_values)])


def critical_value(num_statements: int, num_chains: int, confidence: float) -> float:
    """The half width of two-sided intervals that are all right, in standard errors (Bonferroni).

    By the expansion of Student's quantile (Abramowitz and Stegun, 26.7.5), whose degrees of freedom
    are the chains less two: fewer than those of all their draws.
    """
    z = -NormalDist().inv_cdf((1 - confidence) / (2 * num_statements))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / (num_chains - 2) ** power for power, term in enumerate(terms, 1))
