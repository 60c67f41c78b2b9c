# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Effective numbers of draws and R-hat, beside ArviZ."""

import math

import arviz
import numpy as np
import pytest
import torch

from pyro_artransform.diagnostics.convergence import (
    GOOD_RHAT,
    effective_draws,
    mean_ess,
    nested_rhat,
)

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


SHAPES = [(4, 8), (4, 9), (4, 24), (5, 25), (16, 60), (64, 101)]


@pytest.mark.parametrize("memory", [-0.9, 0.0, 0.5, 0.99])
@pytest.mark.parametrize(("num_chains", "count"), SHAPES)
def test_numbers_are_those_of_arviz(num_chains, count, memory):
    """Of antithetic chains, independent draws, and chains that hardly move; of values with a variance."""
    draws = autoregressive(num_chains, count, memory)
    mean = ess_by_arviz(draws, "mean")
    assert torch.allclose(mean_ess(draws), mean, rtol=EXACT)
    bulk, tail = effective_draws(draws)
    assert torch.allclose(bulk, mean.minimum(ess_by_arviz(draws, "bulk")), rtol=EXACT)
    assert torch.allclose(tail, ess_by_arviz(draws, "tail"), rtol=EXACT)


def test_without_a_variance_ranks_alone_count():
    """The mean of Cauchy draws says nothing of chains."""
    draws = torch.distributions.Cauchy(0.0, 1.0).sample((16, 100, 3))
    assert torch.allclose(effective_draws(draws)[0], ess_by_arviz(draws, "bulk"), rtol=EXACT)


def test_what_is_constant_or_not_finite():
    draws = torch.randn(4, 50, 3)
    draws[..., 1] = 2.0
    draws[1, 7, 2] = torch.nan
    bulk, tail = effective_draws(draws)
    assert bulk[1:].tolist() == [200, 0]
    assert tail[2] == 0


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_draws_say_nothing(count):
    draws = torch.randn(4, count, 2)
    assert mean_ess(draws).tolist() == [0.0, 0.0]
    assert effective_draws(draws)[0].tolist() == [0.0, 0.0]


def test_single_precision_is_as_good():
    draws = autoregressive(16, 60, 0.5)
    rounded = draws.float()
    of_rounded = mean_ess(rounded), *effective_draws(rounded)
    for found, expected in zip(of_rounded, (mean_ess(draws), *effective_draws(draws))):
        assert found.dtype == torch.float64
        # ranks of draws that are next to each other may change
        assert torch.allclose(found, expected, rtol=1e-3)


# Nested R-hat


def nested_by_definition(draws, num_superchains):
    """Equations 6 to 9 of Margossian et al., of one latent: draws ``(K * M, n)``."""
    chains = draws.numpy().reshape(num_superchains, -1, draws.shape[1])
    of_chains = chains.mean(2)
    between = of_chains.mean(1).var(ddof=1)
    within = [
        (np.var(means, ddof=1) if len(means) > 1 else 0) + np.var(each, axis=1, ddof=1).mean()
        for each, means in zip(chains, of_chains)
    ]
    return math.sqrt(1 + between / np.mean(within))


@pytest.mark.parametrize("shape", [(32, 5), (16, 40), (4, 100)])
@pytest.mark.parametrize("num_superchains", [4, 2])
def test_nested_rhat_by_its_definition(shape, num_superchains):
    """Of values, of folded ones, and of which are in the outer 3 %: the largest of these."""
    draws = torch.randn(*shape, 3) + torch.tensor([0.0, 0.5, 2.0]) * torch.randn(shape[0], 1, 3)
    found = nested_rhat(draws, num_superchains)
    for values, rhat in zip(draws.unbind(-1), found):
        ordered = values.flatten().sort().values
        last = len(ordered) - 1
        outer = [values <= ordered[int(share * last)] for share in (0.03, 0.97)]
        each = [values, (values - ordered[last // 2]).abs(), *(part.double() for part in outer)]
        expected = max(nested_by_definition(part, num_superchains) for part in each)
        assert float(rhat) == pytest.approx(expected, rel=EXACT)


def test_nested_rhat_of_short_chains():
    """Twenty draws of 512 chains tell whether superchains agree, where the R-hat of each does not."""
    draws = autoregressive(512, 20, 0.9)[..., :2]
    assert (by_arviz(arviz.rhat, draws) > 1.2).all()
    assert (nested_rhat(draws, 8) < GOOD_RHAT).all()
    # all chains of a superchain are still near the place where they began
    draws[..., 1] = 0.3 * draws[..., 1] + torch.arange(8.0).repeat_interleave(64)[:, None]
    agree, apart = nested_rhat(draws, 8)
    assert agree < GOOD_RHAT
    assert apart > 3


@pytest.mark.parametrize("sign", [-1, 1])
def test_nested_rhat_of_an_outer_quantile_alone(sign):
    """One of eight superchains has a longer tail on one side, which means and scales hardly show."""
    draws = torch.randn(64, 400)
    longer = draws[56:]
    longer[longer > 1] += 1.2
    draws *= sign
    folded = (draws - draws.median()).abs()
    assert max(nested_by_definition(each, 8) for each in (draws, folded)) < 1.01
    assert nested_rhat(draws[..., None], 8) > GOOD_RHAT


def test_nested_rhat_of_what_is_constant_or_not_finite():
    draws = torch.randn(8, 50, 4)
    draws[..., 1] = 2.0
    draws[1, 7, 2] = torch.nan
    draws[..., 3] = torch.arange(4.0).repeat_interleave(2)[:, None]
    assert nested_rhat(draws, 4)[1:].tolist() == [1, torch.inf, torch.inf]
    # of a single draw nothing is known of chains
    assert not nested_rhat(draws[:, :1, :1], 8).isfinite().any()
