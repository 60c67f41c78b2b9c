# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""R-hat and effective sample sizes of chains, of all coordinates at once, as ArviZ defines them.

**References**

1. Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC
   (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021), https://arxiv.org/abs/1903.08008
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

GOOD_RHAT = 1.02  #: the largest R-hat of chains that agree
_TAILS = (0.05, 0.95)
_MANY = 2**21
_MOST_TAIL = 0.5  # the tail index of values with a variance


class Convergence(NamedTuple):
    """R-hat and effective numbers of draws of each latent, shape ``(D,)``, in its bulk and its tails.

    R-hat is the largest of bulk and tails, rank-normalized, and of the values themselves: 1 where all are
    the same. The number of the bulk is the smaller one with ranks and without, which is that for the mean;
    that of the tails the smaller one of the quantiles of 5 and 95 %. Where a value is not finite, and of
    fewer than 4 draws, R-hat is infinite and the numbers are 0.
    """

    rhat: Tensor
    bulk: Tensor
    tail: Tensor

    @classmethod
    def of(cls, draws: Tensor) -> "Convergence":
        """That of chains ``(C, n, D)``."""
        if draws.shape[1] < 4:
            none = draws.new_zeros(draws.shape[-1])
            return cls(torch.full_like(none, torch.inf), none, none)
        halves, ordered = _split(draws), draws.flatten(0, 1).sort(0).values.double()
        scores, has_variance = _normal_scores(halves), _has_variance(halves)
        flat = halves.flatten(0, 1)
        # the mean of the two values in the middle, of which PyTorch takes the lower one
        middle = 0.5 * (flat.median(0).values - (-flat).median(0).values)
        folded = _normal_scores((halves - middle).abs())
        rhat = torch.stack([_rhat(scores), _rhat(folded), plain_rhat(draws)]).amax(0)
        bulk = _ess(scores)
        bulk = torch.where(has_variance, torch.minimum(bulk, _ess(halves)), bulk)
        quantiles = [ordered[math.floor(share * (len(ordered) - 1))] for share in _TAILS]
        tail = torch.minimum(*(_ess((halves <= quantile).to(halves)) for quantile in quantiles))
        is_finite = halves.isfinite().all(1).all(0)
        found = zip((rhat, bulk, tail), (torch.inf, 0.0, 0.0))
        return cls(*(torch.where(is_finite, values, otherwise) for values, otherwise in found))

    def is_enough(self, num_samples: int) -> bool:
        """Whether there are so many effective draws of each latent, and chains agree."""
        return self.min_ess >= num_samples and float(self.rhat.max()) <= GOOD_RHAT

    @property
    def min_ess(self) -> float:
        """The smallest effective number of draws, of bulk and tails: Vehtari et al. ask it of both."""
        return float(torch.minimum(self.bulk, self.tail).min())


def plain_rhat(draws: Tensor) -> Tensor:
    """The split R-hat without ranks, shape ``(D,)``; 1 of a coordinate without a variance."""
    halves = _split(draws)
    return torch.where(_has_variance(halves), _rhat(halves), 1.0)


def mean_ess(draws: Tensor) -> Tensor:
    """The effective number of draws ``(C, n, D)`` for the mean, without ranks, shape ``(D,)``."""
    return _ess(_split(draws))


def _split(draws: Tensor) -> Tensor:
    """Both halves of each chain as chains of their own, shape ``(2 C, n // 2, D)``."""
    half = draws.shape[1] // 2
    halves = torch.cat([draws[:, :half], draws[:, draws.shape[1] - half :]])
    # single precision is enough for ranks, and takes half the time where there are millions
    if halves.numel() > _MANY:
        return ((halves - halves.mean((0, 1))) / halves.std((0, 1))).float()
    return halves.double()


def _has_variance(draws: Tensor) -> Tensor:
    """Which coordinates have a variance, by Hill's estimate of their tails, shape ``(D,)``."""
    flat = draws.flatten(0, 1)
    distances = (flat - flat.median(0).values).abs()
    count = max(len(distances) // 50, 2)
    largest = distances.topk(count, 0).values.clamp_min(torch.finfo(draws.dtype).tiny).log()
    return largest.mean(0) - largest[-1] < _MOST_TAIL


def _normal_scores(draws: Tensor) -> Tensor:
    """Normal quantiles of the ranks, ties in their mean."""
    values, order = draws.flatten(0, 1).sort(0)
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
    power = torch.fft.rfft(centered, 2 * count, dim=1).abs().square()
    covariance = torch.fft.irfft(power, 2 * count, dim=1)[:, :count].mean(0) / count
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
