# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_artransform.diagnostics.chains import Stretched
from pyro_artransform.diagnostics.marginal_errors import (
    Expectation,
    moments_of_draws,
    moments_of_transform,
    sums_of_pairs,
)


def test_noise_that_two_distributions_share_cancels():
    draws = torch.randn(1000, 3)
    same = Expectation.of_sums(sums_of_pairs(draws, draws), 1000)
    ones = torch.ones(3)
    assert torch.allclose(same.error_variance(ones, ones), torch.zeros(3))
    assert torch.allclose(same.error_variance(ones, 0 * ones), draws.var(0) / 1000)
    other = Expectation.of_sums(sums_of_pairs(draws, torch.randn(1000, 3)), 1000)
    assert torch.allclose(other.error_variance(ones, ones), torch.tensor(2e-3), rtol=0.25)


def test_moments_of_a_transform():
    """Of an affine map means have no noise, by opposite pairs; mean squares are known to 3 %."""
    axis = torch.tensor([[0.6], [0.8]])
    stretched = Stretched(axis, torch.tensor([3.0]))
    loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    moments = moments_of_transform(lambda x: (loc + scale * x, x.sum(-1)), stretched, loc, scale)
    assert moments.mean.guide.abs().max() < 1e-12
    assert moments.mean.known.abs().max() < 1e-12
    assert (moments.square.guide - 1).abs().max() < 5 * moments.square.guide_variance.sqrt().max()
    # a variance of nine along the axis
    expected = 1 + 8 * axis[:, 0] ** 2
    assert (
        (moments.square.known - expected).abs() < 5 * moments.square.known_variance.sqrt()
    ).all()
    assert moments.square.guide_variance.sqrt().max() < 0.03


def test_moments_of_draws():
    axis = torch.tensor([[0.6], [0.8]])
    draws = torch.randn(10_000, 2)
    moments = moments_of_draws(draws, Stretched(axis, torch.tensor([3.0])))
    assert torch.allclose(moments.square.known, 1 + 8 * axis[:, 0] ** 2)
    assert torch.equal(moments.mean.guide, draws.mean(0))
    assert torch.allclose(moments.mean.guide_variance, torch.tensor(1e-4), rtol=0.1)
