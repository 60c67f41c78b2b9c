# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""R-hat and effective sample sizes of chains, of all coordinates at once, as ArviZ defines them.

**References**

1. Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC
   (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021), https://arxiv.org/abs/1903.08008
"""

import math

import torch
from torch import Tensor

_TAILS = (0.05, 0.95)
_MANY = 2**21
_MOST_TAIL = 0.5  # the tail index of values with a variance


def rhat(draws: Tensor) -> Tensor:
    """The split R-hat of draws ``(C, n, D)``, shape ``(D,)``: the largest of bulk, tails and the values.

    Those of bulk and tails are rank-normalized. It is 1 where a coordinate is constant, and infinite
    where a value is not finite.
    """
    halves = _split(draws)
    return _largest_rhat(halves, _normal_scores(halves))


def _largest_rhat(halves: Tensor, scores: Tensor) -> Tensor:
    folded = (halves - _median(_flat(halves))).abs()
    found = torch.maximum(_rhat(scores), _rhat(_normal_scores(folded)))
    found = torch.maximum(found, _plain_rhat(halves))
    return _where_finite(halves, found, torch.inf)


def plain_rhat(draws: Tensor) -> Tensor:
    """The split R-hat without ranks, shape ``(D,)``; 1 of a coordinate without a variance."""
    return _plain_rhat(_split(draws))


def _plain_rhat(halves: Tensor) -> Tensor:
    return torch.where(_has_variance(halves), _rhat(halves), 1.0)


def rhat_and_ess(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rhat`, :func:`bulk_ess` and :func:`tail_ess`, with one ranking for the first two."""
    halves = _split(draws)
    scores = _normal_scores(halves)
    return _largest_rhat(halves, scores), _smallest_ess(halves, scores), tail_ess(draws)


def bulk_ess(draws: Tensor) -> Tensor:
    """The effective number of draws ``(C, n, D)`` for the centre of each coordinate, shape ``(D,)``.

    The smaller one with ranks and without, which is that for the mean.
    """
    halves = _split(draws)
    return _smallest_ess(halves, _normal_scores(halves))


def _smallest_ess(halves: Tensor, scores: Tensor) -> Tensor:
    found = _ess(scores)
    found = torch.where(_has_variance(halves), torch.minimum(found, _ess(halves)), found)
    return _where_finite(halves, found, 0.0)


def tail_ess(draws: Tensor) -> Tensor:
    """The same for its tails: the smaller one of the quantiles of 5 and 95 %."""
    halves, flat = _split(draws), _flat(draws).sort(0).values.double()
    found = []
    for share in _TAILS:
        quantile = flat[math.floor(share * (len(flat) - 1))]
        found.append(_ess((halves <= quantile).to(halves)))
    return _where_finite(halves, torch.minimum(*found), 0.0)


def mean_ess(draws: Tensor) -> Tensor:
    """The same for the mean, without ranks."""
    return _ess(_split(draws))


def _split(draws: Tensor) -> Tensor:
    """Both halves of each chain as chains of their own, shape ``(2 C, n // 2, D)``."""
    half = draws.shape[1] // 2
    halves = torch.cat([draws[:, :half], draws[:, draws.shape[1] - half :]])
    # single precision is enough for ranks, and takes half the time where there are millions
    if halves.numel() > _MANY:
        return ((halves - halves.mean((0, 1))) / halves.std((0, 1))).float()
    return halves.double()


def _flat(draws: Tensor) -> Tensor:
    return draws.reshape(-1, draws.shape[-1])


def _median(flat: Tensor) -> Tensor:
    """The mean of the two values in the middle, of which PyTorch takes the lower one."""
    return 0.5 * (flat.median(0).values - (-flat).median(0).values)


def _where_finite(draws: Tensor, found: Tensor, otherwise: float) -> Tensor:
    return torch.where(draws.isfinite().all(1).all(0), found, otherwise)


def _has_variance(draws: Tensor) -> Tensor:
    """Which coordinates have a variance, by Hill's estimate of their tails, shape ``(D,)``."""
    distances = (_flat(draws) - _flat(draws).median(0).values).abs()
    count = max(len(distances) // 50, 2)
    largest = distances.topk(count, 0).values.clamp_min(torch.finfo(draws.dtype).tiny).log()
    return largest.mean(0) - largest[-1] < _MOST_TAIL


def _normal_scores(draws: Tensor) -> Tensor:
    """Normal quantiles of the ranks, ties in their mean."""
    values, order = _flat(draws).sort(0)
    count = len(values)
    position = torch.arange(1.0, count + 1, dtype=draws.dtype, device=draws.device)[:, None]
    is_new = torch.ones_like(values, dtype=torch.bool)
    is_new[1:] = values[1:] != values[:-1]
    if not bool(is_new.all()):
        is_last = is_new.roll(-1, 0)
        is_last[-1] = True
        first = torch.where(is_new, position, 0.0).cummax(0).values
        last = torch.where(is_last, position, math.inf).flip(0).cummin(0).values.flip(0)
        position = (first + last) / 2
    ranks = torch.empty_like(values).scatter_(0, order, position.expand_as(values))
    return torch.special.ndtri((ranks - 0.375) / (count + 0.25)).reshape(draws.shape)


def _rhat(chains: Tensor) -> Tensor:
    within, between = chains.var(1).mean(0), chains.mean(1).var(0)
    count = chains.shape[1]
    found = (between / within + (count - 1) / count).sqrt()
    return torch.where(within > 0, found, torch.where(between > 0, torch.inf, 1.0))


def _ess(chains: Tensor) -> Tensor:
    """By Geyer's initial monotone sequence of autocorrelations, shape ``(D,)``."""
    num_chains, count, _ = chains.shape
    total = num_chains * count
    centered = chains - chains.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centered, 2 * count, dim=1)
    covariance = (
        torch.fft.irfft(spectrum.abs().square(), 2 * count, dim=1)[:, :count].mean(0) / count
    )
    within = covariance[0] * count / (count - 1)
    variance = covariance[0] + (chains.mean(1).var(0) if num_chains > 1 else 0.0)
    correlation = 1 - (within - covariance) / variance
    correlation[0] = 1.0
    # the sequence ends with the first pair that is not positive, or with the last lags
    most = max((count - 3) // 2, 0)
    pairs = correlation[: 2 * most + 2].reshape(most + 1, 2, -1).sum(1)
    last = (pairs > 0).cummin(0).values.sum(0).clamp_max(most)
    is_before = torch.arange(most + 1, device=last.device)[:, None] < last
    before = torch.where(is_before, pairs.cummin(0).values, 0.0).sum(0)
    # the even lag of the last pair improves the estimate of antithetic chains
    even, pair = correlation.gather(0, 2 * last[None])[0], pairs.gather(0, last[None])[0]
    even = torch.where((even > 0) | (pair >= 0), even, 0.0)
    time = (2 * before - 1 + even).clamp_min(1 / math.log10(total))
    return torch.where(variance > 0, total / time, float(total))
