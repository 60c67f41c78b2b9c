# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Importance sampling with a guide: the tail of its weights, what they say, and better draws.

The bounds of trust of the whole package stand here as well.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, inf, isfinite, log, nan, sqrt
from typing import NamedTuple

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from ..arguments import check_integer
from .importance_weights import Values, weighted_draws

GOOD_KHAT = 0.7  #: the largest k-hat at which estimates with the weights are reliable
KHAT_OF_VARIANCE = 0.5  #: the largest k-hat of weights with a variance (Vehtari et al. 2024)
GOOD_GAP = 0.1  #: the largest distance of an ELBO from the evidence, in nats
GOOD_ELBO_SE = 0.05  #: the largest standard error of an ELBO, in nats
GOOD_LOST_MASS = 0.05  #: the largest share of a posterior in modes that the guide has missed
GOOD_MEAN_SHIFT = 0.15  #: the largest error of a mean, in sds of the posterior
GOOD_SD_ERROR = 0.15  #: the largest relative error of a standard deviation
CONFIDENCE = 0.975  #: the probability that the bounds of all errors of means and sds hold
WORST_KHAT = 10.0  #: the largest k-hat, also where a fit of the tail is meaningless

_PRIOR_SIZE = 10  # draws that Pyro's prior on k, with its mean of 0.5, counts as
_LOG_RANGE = 15 * log(10)  # weights that are smaller than the largest by this are negligible
_LEAST_CUT = 10  # a tail that is cut there needs this many weights
_LEAST_TAIL = 5  # a tail of fewer weights says nothing, even if they are the same
_MOST_ROUND_OFF = 0.5  # nats of round-off beyond which weights are not known to be constant
_NAN_SHARE = 0.01


class ParetoTail(NamedTuple):
    """The generalized Pareto distribution of ``weight / cutoff - 1``, of the ``size`` largest weights.

    Its index is ``khat``; its ``scale`` is NaN where nothing was fitted.
    """

    khat: float
    khat_se: float
    scale: float
    log_cutoff: float
    size: int


def fit_tail(log_weights: Tensor) -> ParetoTail:
    r"""The Pareto tail of importance weights, by Pyro's routine; k-hat is always finite.

    The tail is the largest ``min(S / 5, 3 sqrt(S))`` of S weights. Where the routine does not apply:

    - weights that are constant to round-off, or three quarters of the tail tied at the largest, have a
      k-hat of 0, and one of 10 where that round-off is half a nat or more;
    - weights of zero (``-inf``) count like others, as up to 1 % of NaN do, where the model has failed;
    - with more, with one of ``+inf``, where all are zero, of 20 weights or fewer, and with fewer than
      ten tail weights within a factor of 1e15 of the largest, k-hat is 10, which is its maximum.

    The standard error is that of an index from M draws, :math:`(1 + k) / \sqrt{M}`, where the prior
    that shrinks k-hat towards 0.5 counts as ten more draws.

    :param log_weights: log weights, up to a constant, of shape ``(S,)``.

    **References**

    1. Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024),
       https://arxiv.org/abs/1507.02646
    2. A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang, Stephens,
       2009), https://doi.org/10.1198/tech.2009.08017
    """
    if log_weights.dim() != 1 or not len(log_weights):
        raise ValueError(f"log_weights: expected shape (S,), got {tuple(log_weights.shape)}")
    khat, scale, log_cutoff, size = _fit(log_weights.detach())
    # the asymptotic variance holds for k > -1/2
    khat_se = max(1 + khat, 0.5) / sqrt(size + _PRIOR_SIZE)
    return ParetoTail(khat, khat_se, scale, log_cutoff, size)


def _fit(log_weights: Tensor) -> tuple[float, float, float, int]:
    weights = log_weights.to("cpu", torch.float64)
    size = ceil(min(0.2 * len(weights), 3 * sqrt(len(weights))))
    ordered = torch.where(weights.isfinite(), weights, -torch.inf).sort().values
    largest = ordered[-1].item()
    is_failed = weights.isnan().double().mean().item() > _NAN_SHARE
    if is_failed or not isfinite(largest) or bool((weights == torch.inf).any()):
        return WORST_KHAT, nan, nan, size
    log_cutoff = ordered[max(-size - 1, -len(ordered))].item()
    round_off = round_off_of(log_weights)
    if size < _LEAST_TAIL or largest - log_cutoff <= round_off:
        is_known = size >= _LEAST_TAIL and round_off < _MOST_ROUND_OFF
        return 0.0 if is_known else WORST_KHAT, nan, log_cutoff, size
    is_cut = log_cutoff < largest - _LOG_RANGE
    log_cutoff = max(log_cutoff, largest - _LOG_RANGE)
    above = ordered[ordered > log_cutoff]
    if is_cut and len(above) < min(size, _LEAST_CUT):
        return WORST_KHAT, nan, log_cutoff, size
    # where even the quartile is the maximum the routine may divide by zero
    if len(above) >= _LEAST_CUT and largest - above[len(above) // 4].item() <= round_off:
        return 0.0, nan, log_cutoff, size
    # the routine makes its grid on the default device
    with torch.device("cpu"):
        khat, scale = fit_generalized_pareto((above - log_cutoff).expm1())
    if not isfinite(khat):
        return WORST_KHAT, nan, log_cutoff, len(above)
    return min(khat, WORST_KHAT), scale, log_cutoff, len(above)


def round_off_of(log_weights: Tensor) -> float:
    """By how many nats round-off may blur the largest of some log weights, in their own dtype."""
    largest = log_weights[log_weights.isfinite()].double().max().item()
    return 16 * torch.finfo(log_weights.dtype).eps * max(1.0, abs(largest))


def smooth_tail(log_weights: Tensor, tail: ParetoTail | None = None) -> Tensor:
    """Log weights, the largest replaced by quantiles of their Pareto tail, up to the largest.

    :param log_weights: log weights, up to a constant, of shape ``(S,)``.
    :param tail: the result of :func:`fit_tail`, where that is known.
    :return: shape ``(S,)``, in float64 on the CPU, ``-inf`` where weights are not finite.
    """
    tail = fit_tail(log_weights) if tail is None else tail
    weights = log_weights.detach().to("cpu", torch.float64)
    weights = torch.where(weights.isfinite(), weights, -torch.inf)
    if isfinite(tail.scale):
        khat = tail.khat or 1e-9  # an index of zero is a limit
        levels = (weights.new_ones(tail.size).cumsum(0) - 0.5) / tail.size
        quantiles = tail.scale * torch.expm1(-khat * torch.log1p(-levels)) / khat
        smoothed = tail.log_cutoff + quantiles.log1p()
        weights[weights.argsort()[-tail.size :]] = smoothed.clamp(max=weights.max().item())
    return weights


@dataclass(frozen=True, eq=False)
class Importance:
    """What importance weights say of the guide that made them.

    Draws whose weight is zero or not finite are counted in ``num_nonfinite`` and left out: the ELBO is
    that of the guide without them. The evidence and ``ess`` are those of Pareto-smoothed weights.

    :param elbo: the evidence lower bound, in nats.
    :param elbo_se: its standard error.
    :param log_evidence: the log of the mean weight.
    :param log_evidence_se: its standard error, too small where ``khat`` exceeds 0.5; beyond 0.7 the
        evidence rests on a few draws and is most often too small, by more than this says.
    :param khat: the Pareto index of the weights' tail: up to 0.5 they have a variance, up to 0.7
        estimates with them are reliable (see :func:`~pyro_artransform.diagnostics.fit_tail`).
    :param khat_se: its standard error.
    :param ess: the effective number of draws, from 0 to ``num_samples``.
    :param num_samples: the number of draws.
    :param num_nonfinite: how many of them were left out.
    :param log_weights: the log weights themselves, of shape ``(num_samples,)``.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    khat: float
    khat_se: float
    ess: float
    num_samples: int
    num_nonfinite: int
    log_weights: Tensor = field(repr=False)

    @classmethod
    def from_log_weights(cls, log_weights: Tensor) -> "Importance":
        """The diagnosis of log weights, log p - log q at draws of the guide, shape ``(S,)``."""
        tail = fit_tail(log_weights)
        finite = log_weights.detach().to("cpu", torch.float64)
        finite = finite[finite.isfinite()]
        elbo, elbo_se, log_evidence, log_evidence_se, ess = -inf, inf, -inf, inf, 0.0
        if len(finite):
            share = len(finite) / len(log_weights)
            variance = finite.var().item() if len(finite) > 1 else inf
            # of the guide without the draws whose weight is not finite
            elbo = finite.mean().item() + log(share)
            elbo_se = sqrt((variance + 1 - share) / len(finite))
            smoothed = smooth_tail(log_weights, tail)
            weights = (smoothed - smoothed.max()).exp()
            log_evidence = (smoothed.max() + weights.mean().log()).item()
            ess = (weights.sum() ** 2 / weights.square().sum()).item()
            log_evidence_se = sqrt(max(1 / ess - 1 / len(weights), 0.0))
        estimates = elbo, elbo_se, log_evidence, log_evidence_se, tail.khat, tail.khat_se, ess
        num_samples, num_nonfinite = len(log_weights), len(log_weights) - len(finite)
        return cls(*estimates, num_samples, num_nonfinite, log_weights.detach())

    @property
    def trusted(self) -> bool:
        """Whether k-hat is at most 0.7, so that estimates with the weights are reliable."""
        return self.khat <= GOOD_KHAT

    def __repr__(self) -> str:
        word = "acceptable" if self.trusted else "bad"
        word = "good" if self.khat <= KHAT_OF_VARIANCE else word
        lines = [
            f"{'ELBO':14}{self.elbo:10.3f} ± {self.elbo_se:.3f}",
            f"{'log evidence':14}{self.log_evidence:10.3f} ± {self.log_evidence_se:.3f}",
            f"{'k-hat':14}{self.khat:10.2f} ± {self.khat_se:.2f} ({word})",
            f"{'ESS':14}{self.ess:10.0f} of {self.num_samples}",
        ]
        if self.num_nonfinite:
            lines.append(f"{'left out':14}{self.num_nonfinite:10} draws without a finite weight")
        return "\n".join(lines)


def importance(
    model: Callable[..., object],
    guide: Callable[..., object],
    num_samples: int = 10_000,
    *args: object,
    **kwargs: object,
) -> Importance:
    """Weighs draws of a guide by the model: ELBO, evidence, k-hat and effective sample size.

    Any Pyro guide will do. Discrete latents of the model that are marked for enumeration are summed
    out; others need a guide that draws them. If the model sub-samples its data, or its density is
    random otherwise, each draw sees another mini-batch, whose noise is in the weights: the ELBO is
    right, k-hat and the evidence mean nothing.

    :param model: a Pyro model.
    :param guide: a guide of it.
    :param num_samples: how many draws.
    :param args: the arguments of both.
    :param kwargs: their keyword arguments.
    :raises ValueError: if the guide lacks a latent of the model or was made for another model, or
        ``num_samples`` is not a positive integer.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_artransform.diagnostics import importance
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> result = importance(model, model, 1000)
        >>> result.elbo, result.khat, result.ess
        (0.0, 0.0, 1000.0)

    **References**

    1. Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman,
       2018), https://arxiv.org/abs/1802.02538
    """
    check_integer("num_samples", num_samples)
    chunks = weighted_draws(model, guide, num_samples, args, kwargs)
    return Importance.from_log_weights(torch.cat([chunk.log_weights for chunk in chunks]))


def psis_resample(
    model: Callable[..., object],
    guide: Callable[..., object],
    n: int,
    *args: object,
    num_proposals: int | None = None,
    **kwargs: object,
) -> Values:
    """Draws of a guide resampled by their Pareto-smoothed weights: closer to the posterior.

    The resampling is systematic: a draw appears ``n`` times its weight, rounded up or down, so that
    means over the result are weighted means with the least possible noise. The other arguments and
    errors are those of :func:`importance`.

    :param n: how many draws to return; their order is random.
    :param num_proposals: how many draws of the guide to choose from; by default ``5 n``, and 10,000
        at least.
    :return: for each site a tensor of shape ``(n,) + site shape``.
    :raises ValueError: if all weights are zero or not finite.

    **References**

    1. Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models (Kitagawa,
       1996), https://doi.org/10.2307/1390750
    """
    check_integer("n", n)
    num_proposals = max(10_000, 5 * n) if num_proposals is None else num_proposals
    check_integer("num_proposals", num_proposals)
    chunks = list(weighted_draws(model, guide, num_proposals, args, kwargs))
    weights = torch.cat([chunk.log_weights for chunk in chunks])
    tail = fit_tail(weights)
    if not weights.isfinite().any():
        raise ValueError(
            f"guide: expected draws with finite weights, got none of {num_proposals}: train it first, or "
            "check supports and data"
        )
    if tail.khat > GOOD_KHAT:
        warnings.warn(
            f"k-hat is {tail.khat:.2f}: above {GOOD_KHAT} resampling is no better than the guide. Fit "
            "the guide for longer, or a more expressive one",
            stacklevel=2,
        )
    # a systematic sample, in random order
    cumulative = smooth_tail(weights, tail).softmax(0).cumsum(0)
    marks = (torch.rand_like(cumulative[:1]) + cumulative.new_ones(n).cumsum(0) - 1) / n
    # the sum of the weights is one to round-off only
    chosen = torch.searchsorted(cumulative, marks * cumulative[-1])
    chosen = chosen[torch.randperm(n, device=chosen.device)]
    values = {name: torch.cat([c.values[name] for c in chunks]) for name in chunks[0].values}
    return {name: value[chosen.to(value.device)] for name, value in values.items()}
