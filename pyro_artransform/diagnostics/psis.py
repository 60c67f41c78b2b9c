# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Pareto-smoothed importance sampling: the tail of log weights and its index, k-hat."""

from math import ceil, isfinite, log, nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

KHAT_OF_VARIANCE = 0.5  #: the largest tail index of weights with finite variance
WORST_KHAT = 10.0  #: the largest k-hat, also used if the tail cannot be fitted


class ParetoTail(NamedTuple):
    """The generalized Pareto distribution of ``weight / cutoff - 1`` for the ``size`` largest weights.

    Its index is ``khat``; its ``scale`` is NaN if nothing was fitted.
    """

    khat: float
    scale: float
    log_cutoff: float
    size: int

    @property
    def khat_se(self) -> float:
        """The standard error of k-hat; the prior counts as ten draws in addition to ``size``."""
        return max(1 + self.khat, 0.5) / sqrt(self.size + 10)  # asymptotic, for k > -1/2


def fit_tail(log_weights: Tensor) -> ParetoTail:
    """Fits a Pareto tail to importance weights; k-hat is always finite.

    The tail has the largest ``min(S / 5, 3 sqrt(S))`` of S weights. It is fitted with the method of Zhang
    and Stephens and the prior of Vehtari et al. Special cases:

    - If the weights are constant up to round-off, or three quarters of the tail are tied at the largest,
      k-hat is 0, or 10 if that round-off is half a nat or more.
    - Zero weights (``-inf``) count like others, as do up to 1 % of NaN, from failures of the model.
    - With more NaN, any ``+inf``, only zeros, 20 weights or fewer, or fewer than ten tail weights within
      a factor of 1e15 of the largest, k-hat is 10, its maximum.

    :param log_weights: log weights, up to a constant, of shape ``(S,)``.

    **References**

    1. Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024),
       https://arxiv.org/abs/1507.02646
    2. A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang, Stephens,
       2009), https://doi.org/10.1198/tech.2009.08017
    """
    if log_weights.dim() != 1 or not len(log_weights):
        raise ValueError(f"log_weights: expected shape (S,), got {tuple(log_weights.shape)}")
    return fit_tails(log_weights[:, None])[0]


def fit_tails(log_weights: Tensor) -> list[ParetoTail]:
    """Applies :func:`fit_tail` to each column of log weights ``(S, D)``."""
    # for 16 columns of 10,000 weights each array of a fit takes 2 MB
    return [tail for part in log_weights.split(16, 1) for tail in _fit_at_once(part)]


def _fit_at_once(log_weights: Tensor) -> list[ParetoTail]:
    weights = log_weights.detach().to("cpu", torch.float64).T
    count = weights.shape[1]
    size = ceil(min(0.2 * count, 3 * sqrt(count)))
    finite = torch.where(weights.isfinite(), weights, -torch.inf)
    ordered = finite.topk(min(size + 1, count)).values.flip(1)
    log_cutoff, largest = ordered[:, 0], ordered[:, -1]
    is_failed = (weights.isnan().double().mean(1) > 0.01) | (weights == torch.inf).any(1)
    is_failed |= largest.isinf()
    round_off = _round_off(largest, log_weights.dtype)
    is_flat = (largest - log_cutoff <= round_off) | (size < 5)
    is_unknown = is_failed | is_flat & ((round_off >= 0.5) | (size < 5))
    negligible = largest - 15 * log(10)
    is_cut = ~is_flat & (log_cutoff < negligible)
    log_cutoff = torch.where(is_cut, negligible, log_cutoff)
    above = ordered > log_cutoff[:, None]
    num_above = above.sum(1).clamp(min=1)
    is_unknown |= is_cut & (num_above < min(size, 10))
    # the lower quartile of the weights above the cutoff, which come last
    quartile = ordered.gather(1, (ordered.shape[1] - num_above + num_above // 4)[:, None])[:, 0]
    is_flat |= (num_above >= 10) & (largest - quartile <= round_off)
    excess = torch.where(above, (ordered - log_cutoff[:, None]).expm1(), 0.0)
    khat, scale = _fit_generalized_pareto(excess, num_above.double())
    is_unknown |= ~is_flat & ~khat.isfinite()
    is_fitted = ~is_flat & ~is_unknown
    khat = torch.where(is_fitted, khat.clamp(max=WORST_KHAT), 0.0)
    columns = (
        khat.masked_fill(is_unknown, WORST_KHAT),
        scale.masked_fill(~is_fitted, nan),
        log_cutoff.masked_fill(is_failed, nan),
        torch.where(is_fitted, num_above, size),
    )
    return [ParetoTail(*row) for row in zip(*(column.tolist() for column in columns))]


def _fit_generalized_pareto(excess: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and scales of the last ``count`` entries of each ascending row of ``(D, n)``; others are 0.

    As in Pyro's ``fit_generalized_pareto`` for a single row, it averages k / scale over a grid with weights
    from the profile likelihood, and adds a prior on k that counts as ten observations of 0.5.
    """
    num_points = 30 + count.sqrt().floor()
    at = excess.shape[1] - count + ((count - 2) / 4).floor().clamp(min=0)
    lower_quartile = excess.gather(1, at.long()[:, None])
    grid = torch.arange(1, int(num_points.max()) + 1, dtype=torch.float64, device="cpu") - 0.5
    ratios = (1 - (num_points[:, None] / grid).sqrt()) / (3 * lower_quartile) + 1 / excess[:, -1:]
    k = torch.log1p(-ratios[..., None] * excess[:, None]).sum(-1) / count[:, None]
    log_likelihood = count[:, None] * ((-ratios / k).log() - k - 1)
    log_likelihood = log_likelihood.masked_fill(grid > num_points[:, None], -torch.inf)
    ratio = (log_likelihood.nan_to_num(-torch.inf).softmax(1) * ratios).sum(1, keepdim=True)
    k = torch.log1p(-ratio * excess).sum(1) / count
    return (count * k + 5) / (count + 10), -k / ratio[:, 0]


def share_above(log_weights: Tensor, log_cutoff: Tensor) -> Tensor:
    """The excess of weights ``(S, D)`` above cutoffs, as a share of their sum; 1 if unknown."""
    excess = log_weights.softmax(0) - (log_cutoff - log_weights.logsumexp(0)).exp()
    return excess.clamp_min(0).sum(0).nan_to_num(1.0)


def round_off_of(log_weights: Tensor) -> float:
    """The round-off error of the largest log weight in its dtype, in nats."""
    largest = log_weights[log_weights.isfinite()].double().max()
    return float(_round_off(largest, log_weights.dtype))


def _round_off(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return 16 * torch.finfo(dtype).eps * largest.abs().clamp(min=1.0)


def smooth_tail(log_weights: Tensor, tail: ParetoTail) -> Tensor:
    """Log weights ``(S,)`` in float64 on the CPU, with the largest replaced by quantiles of the tail.

    Non-finite log weights become ``-inf``, and none exceeds the original maximum.
    """
    weights = log_weights.detach().to("cpu", torch.float64)
    weights = torch.where(weights.isfinite(), weights, -torch.inf)
    if isfinite(tail.scale):
        khat = tail.khat or 1e-9  # approximates the limit at an index of zero
        levels = (weights.new_ones(tail.size).cumsum(0) - 0.5) / tail.size
        quantiles = tail.scale * torch.expm1(-khat * torch.log1p(-levels)) / khat
        smoothed = tail.log_cutoff + quantiles.log1p()
        weights[weights.argsort()[-tail.size :]] = smoothed.clamp(max=weights.max().item())
    return weights
