# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Whether ranks are uniform: an exact test by their whole empirical distribution function."""

import torch
from torch import Tensor

_MAX_POINTS = 100
_AT_A_TIME = 64
# ties count as being as far out as the worst point, despite round-off
_ABOVE_TIES = 1 + 1e-9


def uniformity_pvalue(ranks: Tensor, num_draws: int) -> Tensor:
    r"""The p-value of uniform ranks, by the point where their distribution function fits worst.

    The number of ranks up to r is binomial if ranks are uniform. The statistic is the smallest
    two-sided binomial tail probability over r. Its p-value is the probability that these numbers are
    as far out at any r, which a recursion over r gives exactly.

    :param ranks: integers from 0 to ``num_draws``, of shape ``(S, K)``: S ranks of each of K
        quantities.
    :param num_draws: the largest rank.
    :return: shape ``(K,)``.

    **References**

    1. Graphical Test for Discrete Uniformity and Its Applications in Goodness of Fit Evaluation and
       Multiple Sample Comparison (Säilynoja, Bürkner, Vehtari, 2022),
       https://arxiv.org/abs/2103.10522
    """
    ranks = ranks.to("cpu")
    points = _points(num_draws)
    counts = torch.stack([(ranks <= point).sum(0) for point in points])
    levels = (points + 1) / (num_draws + 1)
    tails = _two_sided_tails(levels, len(ranks))
    worst = tails.gather(1, counts.long()).amin(0)
    return _probability_of_reaching(worst * _ABOVE_TIES, tails, levels)


def simultaneous_bands(
    num_ranks: int, num_draws: int, level: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Simultaneous confidence bands of the distribution function of uniform ranks.

    :param num_ranks: the number of ranks, S.
    :param num_draws: the largest rank.
    :param level: the least probability that the whole function is between the bands.
    :return: points between 0 and 1, and the lower and the upper proportion of ranks there, each of
        shape ``(P,)``.
    """
    levels = (_points(num_draws) + 1) / (num_draws + 1)
    tails = _two_sided_tails(levels, num_ranks)
    inside = (tails > _largest_rare(tails, levels, 1 - level)).long()
    lower = inside.argmax(1)
    upper = inside.shape[1] - 1 - inside.flip(1).argmax(1)
    return levels, lower.to(levels) / num_ranks, upper.to(levels) / num_ranks


def _largest_rare(tails: Tensor, levels: Tensor, alpha: float) -> Tensor:
    """The largest tail probability that is the worst one at most this often; -1 if there is none."""
    candidates = tails.flatten().unique()
    candidates = candidates[candidates <= alpha] * _ABOVE_TIES
    found = candidates.new_tensor(-1.0)
    while len(candidates):
        spread = torch.linspace(0, 1, _AT_A_TIME, dtype=torch.float64, device="cpu")
        chosen = (spread * (len(candidates) - 1)).long().unique()
        rare = _probability_of_reaching(candidates[chosen], tails, levels) <= alpha
        num_rare = int(rare.sum())
        if not num_rare:
            break
        found = candidates[chosen[num_rare - 1]]
        # what is left is between this one and the next
        end = chosen[num_rare] if num_rare < len(chosen) else 0
        candidates = candidates[chosen[num_rare - 1] + 1 : end]
    return found


def _points(num_draws: int) -> Tensor:
    """Ranks, all of them or evenly spaced ones, at which distribution functions are compared."""
    num_points = min(num_draws, _MAX_POINTS)
    steps = torch.arange(1, num_points + 1, device="cpu")
    return (num_draws * steps // num_points - 1).double()


def _log_choices(num: Tensor, hits: Tensor) -> Tensor:
    """Log binomial coefficients, ``-inf`` where there are none."""
    left = (num - hits).clamp(min=0)
    choices = (num + 1).lgamma() - (hits.clamp(min=0) + 1).lgamma() - (left + 1).lgamma()
    return torch.where((hits >= 0) & (hits <= num), choices, -torch.inf)


def _two_sided_tails(levels: Tensor, num_ranks: int) -> Tensor:
    """Tail probabilities of each number of ranks up to each point, shape ``(P, S + 1)``."""
    hits = levels.new_ones(num_ranks + 1).cumsum(0) - 1
    probability = levels[:, None]
    log_mass = hits * probability.log() + (num_ranks - hits) * (-probability).log1p()
    mass = (_log_choices(levels.new_tensor(num_ranks), hits) + log_mass).exp()
    below, above = mass.cumsum(1), mass.flip(1).cumsum(1).flip(1)
    return (2 * below.minimum(above)).clamp(max=1)


def _probability_of_reaching(worst: Tensor, tails: Tensor, levels: Tensor) -> Tensor:
    """The probability that the worst tail probability of uniform ranks is so small, shape ``(K,)``."""
    num_ranks = tails.shape[1] - 1
    hits = levels.new_ones(num_ranks + 1).cumsum(0) - 1
    # from as many hits as a row says to as many as a column says
    log_choices = _log_choices(num_ranks - hits[:, None], hits - hits[:, None])
    stayed = levels.new_zeros(len(worst), num_ranks + 1)
    stayed[:, 0] = 1
    before = levels.new_zeros(())
    for level, tail in zip(levels, tails):
        chance = (level - before) / (1 - before)
        log_step = (hits - hits[:, None]) * chance.log() + (num_ranks - hits) * (-chance).log1p()
        stayed = stayed @ (log_choices + log_step).exp() * (tail > worst[:, None])
        before = level
    return (1 - stayed.sum(1)).clamp(min=0, max=1)
