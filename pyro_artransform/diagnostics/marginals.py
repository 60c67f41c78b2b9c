# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How far means and standard deviations of a guide are off, one latent at a time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..arguments import check_integer
from ..joint import Latents, LogJoint
from ..joint.handlers import hidden_sites
from ..transforms import Standardize
from .chains import PairedChains, PulledBack, guide_transform, misjudged_directions
from .importance import CONFIDENCE, GOOD_MEAN_SHIFT, GOOD_SD_ERROR
from .importance_weights import Values, check_same_latents, log_weights
from .marginal_errors import (
    MOST_MEMORY,
    MarginalErrors,
    critical_value,
    errors_by_weights,
    marginal_errors,
    moments_of_draws,
    moments_of_transform,
)


@dataclass(frozen=True, eq=False)
class Marginals:
    """How far the means and standard deviations of a guide are from those of the posterior.

    Everything is of single coordinates on the unconstrained space, and by site of the shape that the
    site has there. Where a guide is off by several sds chains are still on their way: its errors are
    then larger than given here.

    :param mean_shift: the guide's mean less the posterior's, in sds of the posterior.
    :param mean_shift_se: its standard error, of the noise of chains.
    :param sd_ratio: the guide's standard deviation over the posterior's, also with a standard error.
    :param memory: how much chains remember of their start, from 0 to 1. Beyond 0.5 the errors above
        are too small, in general.
    :param mean_bound: no mean is off by more than this, in sds of the posterior, with a probability
        of 97.5 % for all means and sds together (Bonferroni's bound).
    :param sd_bound: the same for the relative errors of standard deviations.
    :param num_chains: the number of independent chains; 0 where ``fit`` took errors from weights.
    :param trusted: whether no mean is known to be off by more than 0.15 sd and no sd by more than
        15 %, all are known to be off by less than twice that, and chains have forgotten their start;
        where chains find all of the posterior this is wrong with a probability of 2.5 %.
    :param words: the same in words.
    """

    mean_shift: Values
    mean_shift_se: Values
    sd_ratio: Values
    sd_ratio_se: Values
    memory: Values
    mean_bound: float
    sd_bound: float
    num_chains: int
    trusted: bool
    words: str = field(repr=False)

    def __repr__(self) -> str:
        source = f"by {self.num_chains} chains" if self.num_chains else "by weights"
        width = max(map(len, ["site", *self.mean_shift]))
        head = f"  {'site':{width}}  largest shift of a mean  sds of the guide's  memory"
        lines = [f"Marginals: {self.words}", f"  {source}", head]
        for name, shift in self.mean_shift.items():
            ratio, memory = self.sd_ratio[name], self.memory[name].max()
            ratios = f"{ratio.min():8.3f} to {ratio.max():5.3f}"
            lines.append(f"  {name:{width}}  {shift.abs().max():20.3f} sd  {ratios}  {memory:6.2f}")
        return "\n".join(lines)


def marginals(
    model: Callable[..., object],
    guide: Callable[..., object],
    *args: object,
    num_chains: int = 128,
    num_steps: int = 12,
    **kwargs: object,
) -> Marginals:
    """How far the mean and the standard deviation of each latent are off, by short chains of HMC.

    k-hat judges all latents at once: of a thousand latents that are each right to a few percent the
    weights are useless all the same. Here many chains start at draws of the guide and move towards the
    posterior; how far means and standard deviations move says how far the guide's are off.

    Any guide of continuous latents will do. Chains do not find modes that are far from the guide, nor
    do they reach deep into a funnel, as no diagnostic does that starts from the guide.

    The cost is some 20,000 gradients for a thousand latents, half as much again where that leaves the
    verdict open, and grows with the fourth root of their number.

    :param model: a Pyro model that sees all its data.
    :param guide: a guide of it; ``args`` and ``kwargs`` are the arguments of both.
    :param num_chains: how many chains, 16 at least. Standard errors fall with the square root.
    :param num_steps: how many trajectories of each chain count, after 12 that do not; twice that where
        they leave the verdict open.
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
    # with fewer, Student's quantiles are expanded with an error of over a percent
    check_integer("num_chains", num_chains, 16)
    check_integer("num_steps", num_steps)
    with torch.no_grad(), hidden_sites():
        guide(*args, **kwargs)  # so that it knows the latents of its model
    log_joint = LogJoint(model, args, kwargs)
    return marginals_of(model, guide, args, kwargs, log_joint, num_chains, num_steps)


@torch.no_grad()
def marginals_of(
    model: Callable[..., object],
    guide: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    log_joint: LogJoint,
    num_chains: int,
    num_steps: int,
) -> Marginals:
    """The same, of a model whose log joint density is known already."""
    log_joint = log_joint.with_coordinates(None)  # as the errors of latents are meant
    if log_joint.is_random:
        raise ValueError(
            "model: expected one that sees all its data, got one that sub-samples them, or whose "
            "density is random otherwise"
        )
    # an error if it is not a guide of this model
    log_weights(model, guide, 1, args, kwargs, log_joint)
    transform, num_draws = guide_transform(guide, args, kwargs), 1000
    if transform is not None:
        check_same_latents(log_joint, partial(guide, *args, **kwargs))
    else:
        num_draws = 10_000  # a mean is known to 0.01 sd, an sd to 0.7 %
    draws, _ = log_weights(model, guide, max(num_draws, num_chains), args, kwargs, log_joint)
    draws = draws[draws.isfinite().all(-1)]
    if len(draws) < num_chains:
        raise ValueError(
            f"guide: expected at least {num_chains} finite draws, got {len(draws)}: train it first, or "
            "check supports"
        )
    loc, scale = draws.mean(0), draws.std(0)
    if not (scale > 0).all():
        raise ValueError("guide: expected draws that differ, got one value of a latent in all")
    companions = torch.randn_like(draws[:num_chains])
    to_latent = transform or Standardize(loc, scale).call_and_ladj
    points = companions if transform else (draws[:num_chains] - loc) / scale
    target = PulledBack(log_joint, to_latent)
    stretched = misjudged_directions(target, points)
    target.to_latent = lambda base: to_latent(stretched(base))
    chains = PairedChains(target, stretched.inverse(points), companions, loc, scale)
    start = chains.values.values
    chains.run(12, num_steps)
    if transform is None:
        moments = moments_of_draws((draws - loc) / scale, stretched)
    else:
        moments = moments_of_transform(transform, stretched, loc, scale)
    paired, latents = (chains.values, chains.companion_values, moments, start), log_joint.latents
    found, is_known = _judged(marginal_errors(*paired), num_chains, latents)
    if not is_known:
        chains.run(0, num_steps)
        found, _ = _judged(marginal_errors(*paired), num_chains, latents)
    return replace(found, num_chains=num_chains)


def marginals_by_weights(draws: Tensor, log_weights: Tensor, latents: Latents) -> Marginals:
    """By finite weights ``(n,)`` of draws ``(n, D)``, in place of chains; where these can be trusted."""
    return _judged(errors_by_weights(draws, log_weights), len(draws), latents)[0]


def bounds_in_words(mean: float, sd: float, of: str = "") -> str:
    """Bounds of the errors of means, in sds, and of the relative ones of sds, both rounded up."""
    hundredths = [math.ceil(round(100 * b, 3)) if math.isfinite(b) else b for b in (mean, sd)]
    return f"means{of} within {hundredths[0] / 100:.2f} sd, sds within {hundredths[1]:.0f} %"


def _judged(errors: MarginalErrors, num_samples: int, latents: Latents) -> tuple[Marginals, bool]:
    """What errors of ``num_samples`` independent chains or draws amount to, and if they suffice."""
    width = critical_value(2 * latents.latent_dim, num_samples, CONFIDENCE)
    shift, shift_width = errors.mean_shift, width * errors.mean_shift_se
    ratio, ratio_width = errors.sd_ratio, width * errors.sd_ratio_se
    bounds = _bound(shift, shift_width), _bound(ratio - 1, ratio_width)
    objections = []
    is_off = shift.abs() - shift_width > GOOD_MEAN_SHIFT
    if is_off.any():
        worst, name = _worst(shift.abs(), is_off, latents)
        objections.append(
            f"{_count(is_off, 'means')} off by more than {GOOD_MEAN_SHIFT} sd (that of {name} by "
            f"{shift[worst]:.2f} ± {shift_width[worst]:.2f})"
        )
    is_off = (ratio - 1).abs() - ratio_width > GOOD_SD_ERROR
    if is_off.any():
        worst, name = _worst(ratio.log().abs(), is_off, latents)
        objections.append(
            f"{_count(is_off, 'sds')} off by more than {100 * GOOD_SD_ERROR:.0f} % (that of {name} is "
            f"{ratio[worst]:.2f} ± {ratio_width[worst]:.2f} of the posterior's)"
        )
    is_slow = ~(errors.sure_memory <= MOST_MEMORY)
    if is_slow.any():
        _, name = _worst(errors.memory, is_slow, latents)
        objections.append(
            f"{_count(is_slow, 'latents')} hardly moved by the chains, as {name} is, and errors may be "
            "larger: take more num_steps, or fit the guide for longer"
        )
    dim = latents.latent_dim
    of = " of the only latent" if dim == 1 else f" of all {dim:,} latents"
    words, is_known = "; ".join(objections) or bounds_in_words(*bounds, of), True
    if not objections and (bounds[0] > 2 * GOOD_MEAN_SHIFT or bounds[1] > 2 * GOOD_SD_ERROR):
        words, is_known = f"errors are known too little ({bounds_in_words(*bounds)})", False
        words = f"{words}: diagnostics.marginals with more num_chains knows more"
    trusted = is_known and not objections
    shifts, shift_ses, ratios, ratio_ses, memories = map(latents.split, errors[:5])
    by_site = shifts, shift_ses, ratios, ratio_ses, memories
    return Marginals(*by_site, *bounds, 0, trusted, words), is_known


def _bound(errors: Tensor, widths: Tensor) -> float:
    """All errors are within this, beyond doubt; infinite where one is not known."""
    return float((errors.abs() + widths).nan_to_num(torch.inf, torch.inf).max())


def _count(chosen: Tensor, what: str) -> str:
    count = int(chosen.sum())
    return f"{count:,} of {len(chosen):,} {what} {'is' if count == 1 else 'are'}"


def _worst(values: Tensor, chosen: Tensor, latents: Latents) -> tuple[int, str]:
    """The place of the largest value of those chosen, also by site as in ``z[3, 1]``."""
    worst = int(torch.where(chosen, values.nan_to_num(torch.inf), -torch.inf).argmax())
    is_worst = latents.split(torch.arange(latents.latent_dim, device="cpu") == worst)
    name = next(name for name, place in is_worst.items() if place.any())
    return worst, f"{name}{is_worst[name].nonzero()[0].tolist() or ''}"
