# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Nested R-hat of superchains, ArviZ's effective sample sizes, by coordinate, and the mass of modes.

**References**

1. Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of MCMC
   (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021), https://arxiv.org/abs/1903.08008
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._base.arguments import first_of
from .psis import KHAT_OF_VARIANCE

GOOD_RHAT = 1.02  #: the largest R-hat of chains that agree
MODES_RHAT = 1.1  #: the nested R-hat above which chains may be in different modes
#: share of divergent trajectories above which step sizes are halved, and finally draws are not trusted: a
#: model of two factors and 28 persons has 3 %, and its draws miss a corner
MANY_DIVERGENT = 0.01
_TAILS = (0.05, 0.95)
_OUTER = (0.03, 0.97)  # tail probabilities on which superchains have to agree


class Convergence(NamedTuple):
    """Nested R-hat and effective sample sizes (ESS) of each latent, shape ``(D,)``.

    The bulk ESS is the minimum with and without rank normalization, where the latter is the ESS of the mean.
    The tail ESS is the minimum over the 5 % and 95 % quantiles. With fewer than 4 draws, or where a value is
    not finite, R-hat is infinite and both ESS are 0.
    """

    rhat: Tensor
    bulk: Tensor
    tail: Tensor

    def is_enough(self, num_samples: int) -> bool:
        """Whether chains have mixed and the ESS of each latent is at least ``num_samples``."""
        return self.min_ess >= num_samples and self.has_mixed

    @property
    def has_mixed(self) -> bool:
        """Whether R-hat of each latent is at most ``GOOD_RHAT``."""
        return float(self.rhat.max()) <= GOOD_RHAT

    @property
    def least(self) -> Tensor:
        """The smaller of bulk and tail ESS, ``(D,)``: Vehtari et al. require both."""
        return torch.minimum(self.bulk, self.tail)

    @property
    def min_ess(self) -> float:
        """The minimum of bulk and tail ESS over all latents."""
        return float(self.least.min())


def effective_draws(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Bulk and tail ESS of chains ``(C, n, D)``, see :class:`Convergence`."""
    if draws.shape[1] < 4:
        none = draws.new_zeros(draws.shape[-1])
        return none, none
    halves, values = _split(draws), draws.flatten(0, 1).T
    bulk = _ess(_normal_scores(halves))
    bulk = torch.where(_has_variance(halves), torch.minimum(bulk, _ess(halves)), bulk)
    ranks = [math.floor(share * (values.shape[1] - 1)) + 1 for share in _TAILS]
    quantiles = [values.kthvalue(rank, 1).values for rank in ranks]
    tail = torch.minimum(*(_ess(_split(draws <= quantile)) for quantile in quantiles))
    is_finite = halves.flatten(1).isfinite().all(1)
    return torch.where(is_finite, bulk, 0.0), torch.where(is_finite, tail, 0.0)


def mean_ess(draws: Tensor) -> Tensor:
    """ESS of the mean of draws ``(C, n, D)``, without ranks; 0 for fewer than 4 draws per chain."""
    if draws.shape[1] < 4:
        return draws.new_zeros(draws.shape[-1])
    return _ess(_split(draws))


def _split(draws: Tensor) -> Tensor:
    """Splits each chain into two halves, shape ``(D, 2 C, n // 2)``."""
    half = draws.shape[1] // 2
    halves = torch.cat([draws[:, :half], draws[:, draws.shape[1] - half :]]).permute(2, 0, 1)
    # single precision suffices for ranks, and halves the time for millions of draws
    if halves.numel() <= 2**21:
        return halves.double().contiguous()
    if not halves.is_floating_point():
        return halves.float().contiguous()
    flat = halves.flatten(1)
    return ((halves - _in_rows(flat.mean(1))) / _in_rows(flat.std(1))).float().contiguous()


def _in_rows(values: Tensor) -> Tensor:
    """One value per coordinate, broadcastable to chains."""
    return values[:, None, None]


def _has_variance(chains: Tensor) -> Tensor:
    """Whether coordinates have a finite variance, by Hill's tail index estimator, shape ``(D,)``."""
    flat = chains.flatten(1)
    distances = (flat - flat.median(1).values[:, None]).abs()
    count = max(distances.shape[1] // 50, 2)
    largest = distances.topk(count, 1).values.clamp_min(torch.finfo(chains.dtype).tiny).log()
    return largest.mean(1) - largest[:, -1] < KHAT_OF_VARIANCE


def _normal_scores(chains: Tensor) -> Tensor:
    """Normal scores of the ranks, with ties averaged."""
    values, order = chains.flatten(1).sort(1)
    count = values.shape[1]
    position = torch.arange(1.0, count + 1, dtype=chains.dtype, device=chains.device)[None]
    is_new = values[:, 1:] != values[:, :-1]
    if not bool(is_new.all()):
        first = torch.where(pad(is_new, (1, 0), value=1.0), position, 0.0)
        last = torch.where(pad(is_new, (0, 1), value=1.0), position, math.inf)
        position = (first.cummax(1).values + last.flip(1).cummin(1).values.flip(1)) / 2
    scores = torch.special.ndtri((position - 0.375) / (count + 0.25))
    return torch.empty_like(values).scatter_(1, order, scores.expand_as(values)).view_as(chains)


def _ess(chains: Tensor) -> Tensor:
    """ESS by Geyer's initial monotone sequence of autocorrelations, shape ``(D,)``."""
    _, num_chains, count = chains.shape
    total = num_chains * count
    centered = chains - chains.mean(2, keepdim=True)
    # a power of two, for a fast transform
    length = 2 ** math.ceil(math.log2(2 * count))
    power = torch.fft.rfft(centered, length).abs().square().mean(1)
    covariance = torch.fft.irfft(power, length).T[:count] / count
    within = covariance[0] * count / (count - 1)
    variance = covariance[0] + (chains.mean(2).var(1) if num_chains > 1 else 0.0)
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


def nested_rhat(draws: Tensor, num_superchains: int) -> Tensor:
    """The maximum nested R-hat of values, folded values and outer tail indicators, shape ``(D,)``.

    Chains of a superchain share their initial point, so the variance between superchains measures how far
    chains still depend on it, however short they are. See Nested R-hat: Assessing the Convergence of Markov
    Chain Monte Carlo When Running Many Short Chains (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari,
    Gelman, 2024), https://arxiv.org/abs/2110.13017

    :param draws: shape ``(C, n, D)``, with chains of a superchain contiguous.
    :return: infinite where a value is not finite, and for fewer than 4 draws.
    """
    found, flat = [nested_rhat_of_values(draws, num_superchains)], draws.flatten(0, 1)
    if draws.shape[1] < 4:
        return found[0]
    found.append(_nested((draws - flat.median(0).values).abs(), num_superchains))
    for share in _OUTER:
        rank = math.floor(share * (len(flat) - 1)) + 1
        below = draws <= flat.kthvalue(rank, 0).values
        found.append(_nested(below.to(draws.dtype), num_superchains))
    return torch.stack(found).nan_to_num(torch.inf, torch.inf).amax(0)


def nested_rhat_of_values(draws: Tensor, num_superchains: int) -> Tensor:
    """Nested R-hat of the values alone, in a tenth of the time of :func:`nested_rhat`."""
    if draws.shape[1] < 4:
        return torch.full_like(draws[0, 0], torch.inf)
    is_finite = draws.isfinite().all(1).all(0)
    return torch.where(is_finite, _nested(draws, num_superchains), torch.inf)


def _nested(draws: Tensor, num_superchains: int) -> Tensor:
    size, dim = len(draws) // num_superchains, draws.shape[-1]
    means = draws.mean(1).reshape(num_superchains, size, dim)
    within = draws.var(1).reshape(means.shape).mean(1)
    if size > 1:
        within = within + means.var(1)
    between, within = means.mean(1).var(0), within.mean(0)
    constant = torch.where(between > 0, torch.inf, 1.0)
    return torch.where(within > 0, (1 + between / within).sqrt(), constant)


class ModeShares(NamedTuple):
    """The modes that were found, none of which is an image of another one, and the mass of each.

    Others may exist: no search is exhaustive.
    """

    share: Tensor  #: the share of each mode, ``(num_modes,)``
    #: standard errors; ``nan`` for the approximation by a Gaussian for each mode
    se: Tensor
    names: tuple[str, ...]  #: the latents in which modes differ

    def __str__(self) -> str:
        shares = [*map(_percent, self.share.tolist(), self.se.tolist())]
        return (
            f"{len(shares)} modes with {', '.join(shares)} of the posterior, which differ in "
            f"{first_of(self.names)}"
        )


def _percent(share: float, se: float) -> str:
    """A share in percent, with as many digits as its standard error determines."""
    if math.isnan(se):
        return f"about {100 * share:.3g} %"
    digits = max(0, -math.floor(math.log10(max(100 * se, 1e-3))))
    return f"{100 * share:.{digits}f} ± {100 * se:.{digits}f} %"
