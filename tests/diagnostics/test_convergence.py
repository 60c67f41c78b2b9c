# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Effective numbers of draws and R-hat, beside ArviZ."""

import math

import arviz
import numpy as np
import pytest
import torch

from pyro_artransform.diagnostics.convergence import Convergence, mean_ess

# numbers are computed alike, but for the order of sums
EXACT = 1e-9


def autoregressive(num_chains, count, memory):
    """Chains ``(num_chains, count, 3)`` that begin at their stationary law; the third one has ties."""
    draws = torch.randn(num_chains, count, 3)
    for i in range(1, count):
        noise = (1 - memory**2) ** 0.5 * draws[:, i]
        draws[:, i] = memory * draws[:, i - 1] + noise
    draws[..., 2] = (2 * draws[..., 2]).round()
    return draws


def by_arviz(function, draws, **options):
    values = [function(part.numpy(), **options) for part in draws.unbind(-1)]
    return torch.tensor(np.array(values, dtype=float))


def ess_by_arviz(draws, method):
    return by_arviz(arviz.ess, draws, method=method)


def rhat_by_arviz(draws):
    ranked = by_arviz(arviz.rhat, draws, method="rank")
    return torch.maximum(ranked, by_arviz(arviz.rhat, draws, method="split"))


SHAPES = [(4, 8), (4, 9), (4, 24), (5, 25), (16, 60), (64, 101)]


@pytest.mark.parametrize("memory", [-0.9, 0.0, 0.5, 0.99])
@pytest.mark.parametrize(("num_chains", "count"), SHAPES)
def test_numbers_are_those_of_arviz(num_chains, count, memory):
    """Of antithetic chains, independent draws, and chains that hardly move; of values with a variance."""
    draws = autoregressive(num_chains, count, memory)
    mean = ess_by_arviz(draws, "mean")
    assert torch.allclose(mean_ess(draws), mean, rtol=EXACT)
    found = Convergence.of(draws)
    assert torch.allclose(found.bulk, mean.minimum(ess_by_arviz(draws, "bulk")), rtol=EXACT)
    assert torch.allclose(found.tail, ess_by_arviz(draws, "tail"), rtol=EXACT)
    assert torch.allclose(found.rhat, rhat_by_arviz(draws), rtol=EXACT)


def test_without_a_variance_ranks_alone_count():
    """The mean of Cauchy draws says nothing of chains."""
    draws = torch.distributions.Cauchy(0.0, 1.0).sample((16, 100, 3))
    found = Convergence.of(draws)
    assert torch.allclose(found.bulk, ess_by_arviz(draws, "bulk"), rtol=EXACT)
    assert torch.allclose(found.rhat, by_arviz(arviz.rhat, draws, method="rank"), rtol=EXACT)


def test_chains_that_stay_apart():
    """By their means and by their scales: the latter is what folded draws are for."""
    draws = torch.randn(8, 100, 2)
    draws[:4, :, 0] += 2
    draws[:4, :, 1] *= 4
    found = Convergence.of(draws)
    assert (found.rhat > 1.2).all()
    assert found.bulk[0] < 20
    # both halves of a chain count
    drifting = torch.randn(8, 100, 1) + torch.linspace(0, 3, 100)[:, None]
    assert Convergence.of(drifting).rhat > 1.2


def test_what_is_constant_or_not_finite():
    draws = torch.randn(4, 50, 3)
    draws[..., 1] = 2.0
    draws[1, 7, 2] = torch.nan
    found = Convergence.of(draws)
    assert found.rhat[1:].tolist() == [1, torch.inf]
    assert found.bulk[1:].tolist() == [200, 0]
    assert found.tail[2] == 0
    # constant by chain, at places that differ
    apart = torch.arange(4.0)[:, None, None].expand(4, 50, 1)
    assert Convergence.of(apart).rhat == torch.inf


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_draws_say_nothing(count):
    draws = torch.randn(4, count, 2)
    assert mean_ess(draws).tolist() == [0.0, 0.0]
    found = Convergence.of(draws)
    assert (found.rhat.tolist(), found.bulk.tolist()) == ([math.inf] * 2, [0.0] * 2)


def test_single_precision_is_as_good():
    draws = autoregressive(16, 60, 0.5)
    rounded = draws.float()
    of_rounded = mean_ess(rounded), *Convergence.of(rounded)
    for found, expected in zip(of_rounded, (mean_ess(draws), *Convergence.of(draws))):
        assert found.dtype == torch.float64
        # ranks of draws that are next to each other may change
        assert torch.allclose(found, expected, rtol=1e-3)
