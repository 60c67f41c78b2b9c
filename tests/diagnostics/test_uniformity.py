# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import itertools

import pytest
import torch

from pyro_artransform.diagnostics import simultaneous_bands, uniformity_pvalue


@pytest.mark.parametrize(("num_ranks", "num_draws"), [(3, 2), (4, 3), (5, 1)])
def test_pvalue_by_enumeration(num_ranks, num_draws):
    """Of all outcomes of a few ranks: the share of those that are as far out."""
    outcomes = torch.tensor(list(itertools.product(range(num_draws + 1), repeat=num_ranks))).T
    worst = torch.stack([_worst_tail(ranks, num_draws) for ranks in outcomes.T])
    expected = torch.stack([(worst <= w * (1 + 1e-6)).double().mean() for w in worst])
    assert torch.allclose(uniformity_pvalue(outcomes, num_draws), expected)


def _worst_tail(ranks, num_draws):
    """The smallest two-sided binomial tail probability, by adding up probabilities."""
    size, tails = len(ranks), []
    for r in range(num_draws):
        distribution = torch.distributions.Binomial(size, torch.tensor((r + 1) / (num_draws + 1)))
        mass = distribution.log_prob(torch.arange(size + 1.0)).exp()
        count = int((ranks <= r).sum())
        tails.append(min(1.0, 2 * min(mass[: count + 1].sum(), mass[count:].sum())))
    return torch.tensor(tails).min()


def test_level_of_the_test():
    """Of 2,000 sets of uniform ranks; four standard errors."""
    ranks = torch.randint(0, 100, (150, 2000))
    pvalues = uniformity_pvalue(ranks, 99)
    for alpha in (0.01, 0.1, 0.5):
        share = (pvalues <= alpha).double().mean()
        assert abs(share - alpha) < 4 * (alpha * (1 - alpha) / 2000) ** 0.5


def test_small_pvalues_are_exact():
    """No simulation is behind them, so that many coordinates can be tested together."""
    ranks = torch.zeros(50, 1, dtype=torch.long)
    assert uniformity_pvalue(ranks, 99).item() < 1e-12


@pytest.mark.parametrize("num_draws", [1, 9, 99, 1000])
def test_bands_hold_the_whole_function(num_draws):
    ranks = torch.randint(0, num_draws + 1, (100, 2000))
    points, lower, upper = simultaneous_bands(100, num_draws, 0.9)
    assert points.shape == lower.shape == upper.shape
    assert len(points) == min(num_draws, 100)
    below = torch.stack([(ranks < p * (num_draws + 1) - 1e-6).double().mean(0) for p in points])
    inside = (below >= lower[:, None] - 1e-9) & (below <= upper[:, None] + 1e-9)
    # 0.9 at least; where the function has few values, by a step more
    assert inside.all(0).double().mean() > 0.9 - 4 * (0.09 / 2000) ** 0.5
    if num_draws >= 99:
        assert inside.all(0).double().mean() < 0.95


def test_bands_and_pvalues_agree():
    ranks = torch.randint(0, 20, (60, 500))
    points, lower, upper = simultaneous_bands(60, 19, 0.8)
    below = torch.stack([(ranks < p * 20 - 1e-6).double().mean(0) for p in points])
    inside = ((below >= lower[:, None] - 1e-9) & (below <= upper[:, None] + 1e-9)).all(0)
    assert torch.equal(inside, uniformity_pvalue(ranks, 19) > 0.2)


def test_bands_of_hardly_any_level():
    _, lower, upper = simultaneous_bands(3, 4, 1 - 1e-9)
    assert lower.tolist() == [0, 0, 0, 0]
    assert upper.tolist() == [1, 1, 1, 1]
