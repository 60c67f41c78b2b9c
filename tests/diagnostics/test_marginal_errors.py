# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from scipy import stats

from pyro_artransform.diagnostics.chains import Averages, Stretched
from pyro_artransform.diagnostics.marginal_errors import (
    Expectation,
    PairedMoments,
    critical_value,
    errors_by_weights,
    marginal_errors,
    moments_of_transform,
    sums_of_pairs,
)

CHAINS, STEPS, DIM = 128, 12, 400


# Moments


def test_noise_that_two_distributions_share_cancels():
    draws = torch.randn(1000, 3)
    same = Expectation.of_sums(sums_of_pairs(draws, draws), 1000)
    ones = torch.ones(3)
    assert torch.allclose(same.error_variance(ones, ones), torch.zeros(3))
    assert torch.allclose(same.error_variance(ones, 0 * ones), draws.var(0) / 1000)
    other = Expectation.of_sums(sums_of_pairs(draws, torch.randn(1000, 3)), 1000)
    assert torch.allclose(other.error_variance(ones, ones), torch.tensor(2e-3), rtol=0.25)


AXIS = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
WIDENED = (
    1 + 8 * AXIS[:, 0] ** 2
)  # the variances of a standard normal stretched by 3 along the axis


def test_moments_of_a_transform():
    """Of an affine map means have no noise, by opposite pairs; mean squares are known to 3 %."""
    loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    stretched = Stretched(AXIS, torch.tensor([3.0]))
    mean, square = moments_of_transform(
        lambda x: (loc + scale * x, x.sum(-1)), stretched, loc, scale
    )
    assert mean.guide.abs().max() < 1e-12
    assert mean.known.abs().max() < 1e-12
    assert (square.guide - 1).abs().max() < 5 * square.guide_variance.sqrt().max()
    assert ((square.known - WIDENED).abs() < 5 * square.known_variance.sqrt()).all()
    assert square.guide_variance.sqrt().max() < 0.03


# Errors


def averages(values):
    """The averages of given steps, each of shape ``(C, D)``."""
    found = Averages(values[0])
    always = torch.ones(len(values[0]))
    for value in values:
        found.move(value, always, always > 0, counts=True)
    return found


def errors(chains, companions, start=None):
    """Those of a guide and companions that are both standard normal, known without error."""
    zeros = torch.zeros(DIM)
    first, second = (Expectation(*[zeros + value] * 2, *[zeros] * 3) for value in (0.0, 1.0))
    start = torch.randn(CHAINS, DIM) if start is None else start
    return marginal_errors(chains, companions, PairedMoments(first, second), start)


def pair(coupling, loc=0.0, scale=1.0):
    """Independent steps of chains and companions of a given correlation."""
    noise = torch.randn(STEPS, CHAINS, DIM)
    other = coupling * noise + (1 - coupling**2) ** 0.5 * torch.randn_like(noise)
    return averages(loc + scale * noise), averages(other)


@pytest.mark.parametrize("coupling", [0.0, 0.9, 0.999])
def test_intervals_cover(coupling):
    """Of 400 latents: z scores have a sd of one, within five standard errors of a sd."""
    found = errors(*pair(coupling, loc=0.3, scale=1.25))
    left = found.sure_memory.clamp(0, 0.5)
    z = (found.mean_shift * (1 - left) + 0.3 / 1.25) / found.mean_shift_se
    assert abs(z.mean()) < 5 / DIM**0.5
    assert abs(z.std() - 1) < 5 / (2 * DIM) ** 0.5
    z = (found.sd_ratio - 0.8) / found.sd_ratio_se
    assert abs(z.mean()) < 7 / DIM**0.5
    assert abs(z.std() - 1) < 5 / (2 * DIM) ** 0.5


def test_memory_is_extrapolated():
    """Chains that keep 0.4 of a distance of 1, and so 0.16 of a difference of variances."""
    start, companions = torch.randn(CHAINS, DIM), averages(torch.randn(STEPS, CHAINS, DIM))
    noise = (4 - 0.16 * 3 - 0.16) ** 0.5 * torch.randn(STEPS, CHAINS, DIM)
    found = errors(averages(0.4 * start + 0.6 + noise), companions, start)
    assert abs(found.memory.mean() - 0.4) < 0.01
    # a mean of 1 and a sd of 2, less what the noise of the memory hides
    assert abs(found.mean_shift.mean() + 0.5) < 0.08
    assert abs(found.sd_ratio.mean() - 0.5) < 0.02
    # chains that stay where they are
    found = errors(averages(start.expand(STEPS, -1, -1)), companions, start)
    assert torch.allclose(found.memory, torch.ones(DIM))
    assert (found.sure_memory > 0.99).all()


def test_critical_values_are_students():
    for count, chains in ((1, 128), (2000, 128), (2000, 34), (60, 18)):
        expected = stats.t.ppf(1 - 0.025 / (2 * count), chains - 2)
        assert critical_value(count, chains, 0.975) == pytest.approx(expected, rel=0.02)


def test_errors_by_weights_are_those_of_two_gaussians():
    """The posterior of two coordinates is N(0.2, 1) and N(0, 0.9^2), that of a third the guide's."""
    draws = torch.randn(20_000, 3)
    loc, scale = torch.tensor([0.2, 0.0, 0.0]), torch.tensor([1.0, 0.9, 1.0])
    posterior, guide = (torch.distributions.Normal(*of) for of in ((loc, scale), (0.0, 1.0)))
    log_weights = (posterior.log_prob(draws) - guide.log_prob(draws)).sum(-1)
    found = errors_by_weights(draws, log_weights)
    # within 4 standard errors, which are those that are given
    shift_off = found.mean_shift - torch.tensor([-0.2, 0.0, 0.0])
    ratio_off = found.sd_ratio - torch.tensor([1.0, 1 / 0.9, 1.0])
    assert bool((shift_off.abs() < 4 * found.mean_shift_se).all())
    assert bool((ratio_off.abs() < 4 * found.sd_ratio_se).all())
    # weights have a variance of 0.05: standard errors are far below those of 20,000 draws, 0.007
    assert float(found.mean_shift_se.max()) < 0.005
    assert float(found.sure_memory.max()) == 0.0


def test_standard_errors_by_weights_are_those_of_repetitions():
    found = []
    for _ in range(200):
        draws = torch.randn(500, 1)
        found.append(errors_by_weights(draws, 0.3 * draws[:, 0] - 0.045))
    shift, shift_se, ratio, ratio_se, *_ = (torch.stack(parts) for parts in zip(*found))
    # an sd from 200 values is known to 5 %
    assert abs(shift.std() / shift_se.mean() - 1) < 0.2
    assert abs(ratio.std() / ratio_se.mean() - 1) < 0.2
