# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.distributions import StudentT

from pyro_artransform.diagnostics.defensive_mixture import (
    base_draws,
    log_base_density,
    mixture_draws,
)
from pyro_artransform.diagnostics.marginals import errors_by_weights
from pyro_artransform.joint import LogJoint

SCALES = torch.tensor([0.5, 3.0])


def normal(df=None, dim=2):
    def model():
        law = dist.Normal(0.0, 1.0) if df is None else dist.StudentT(df)
        pyro.sample("z", law.expand([dim]).to_event(1))

    return LogJoint(model)


def scaled(base):
    return SCALES * base, SCALES.log().sum().expand(len(base))


def as_they_are(base):
    return base, torch.zeros(len(base), dtype=base.dtype)


def test_weights_are_densities_over_that_of_the_mixture():
    """The mean weight of the posterior is its evidence, here 1, and so is that of the guide's own."""
    sample = mixture_draws(normal(), scaled, torch.zeros(1, 2), 40_000)
    for log_weights in (sample.of_posterior, sample.of_guide):
        weights = log_weights.double().exp()
        assert abs(float(weights.mean()) - 1) < 4 * float(weights.std()) / 200
    # no draw counts more than twice of what it does among those of the guide alone
    assert float(sample.of_guide.max()) <= math.log(2) + 1e-6


@pytest.mark.parametrize("dim", [1, 2, 50])
def test_half_of_the_draws_are_further_out_in_all_coordinates_or_in_one(dim):
    far = (base_draws(torch.zeros(20_000, dim)).abs() > 6).sum(1)
    # 10.5 % of a Cauchy's draws are beyond six units, none of 20,000 normal ones, and of all coordinates
    # of a multivariate Cauchy one at least
    of_one = 2 / math.pi * math.atan(1 / 6)
    of_all = ((torch.randn(100_000, dim) / torch.randn(100_000, 1)).abs() > 6).sum(1)
    for count in (1, 2, dim):
        expected = 0.25 * float((of_all == count).double().mean()) + 0.25 * of_one * (count == 1)
        # within four standard errors of 20,000 draws
        assert (far == count).double().mean() == pytest.approx(expected, abs=0.006)


def test_a_tail_that_the_guide_does_not_draw_is_known():
    """A standard normal in the place of Student's t, whose sd is 1.29: the guide's is 0.775 of it.

    By draws of the guide alone the posterior has an sd of 1.1 or less.
    """
    torch.manual_seed(0)
    log_joint = normal(5.0)
    sample = mixture_draws(log_joint, as_they_are, torch.zeros(1, 2), 10_000)
    found, exact = errors_by_weights(sample), float(1 / StudentT(5.0).stddev)
    assert bool(((found.sd_ratio - exact).abs() < 4 * found.sd_ratio_se).all())
    assert float(found.sd_ratio_se.max()) < 0.02


def test_standard_errors_are_those_of_repetitions():
    """Two means and two sds of a guide whose scales are off, each of 300 repetitions."""
    log_joint, found = normal(8.0), []
    for seed in range(300):
        torch.manual_seed(seed)
        sample = mixture_draws(log_joint, as_they_are, torch.zeros(1, 2), 2_000)
        found.append(errors_by_weights(sample))
    shift, shift_se, ratio, ratio_se = (torch.stack(each) for each in zip(*found))
    exact = float(1 / StudentT(8.0).stddev)
    # an sd of 300 values is known to 4 %, their mean to 0.06 of it
    for error, se in ((shift, shift_se), (ratio - exact, ratio_se)):
        z = error / se
        assert bool(((z.std(0) - 1).abs() < 0.17).all())
        assert bool((z.mean(0).abs() < 0.3).all())


def test_draws_without_a_value_do_not_count():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("fails", torch.where(z[..., 0] > 20, torch.nan, 0.0))

    def overflowing(base):
        return base * (1 + 1e200 * (base.abs() > 30)), torch.zeros(len(base))

    sample = mixture_draws(LogJoint(model), overflowing, torch.zeros(1, 2), 4_000)
    found = errors_by_weights(sample)
    assert all(bool(each.isfinite().all()) for each in found)
    assert float((found.sd_ratio - 1).abs().max()) < 0.02


@pytest.mark.parametrize("dim", [1, 10, 1000])
def test_single_precision_far_out(dim):
    """A million sds away in one coordinate the density is right to a thousandth."""
    base = torch.randn(200, dim, dtype=torch.float64)
    base[:, 0] = torch.logspace(0, 6, 200, dtype=torch.float64)
    found = log_base_density(base.float()).double()
    assert float((found - log_base_density(base.float().double())).abs().max()) < 1e-3


@pytest.mark.parametrize("at", [0.0, -1.0])
def test_what_a_guide_has_beyond_a_wall_is_its_own(at):
    """A standard normal for one that is cut off: both its moments are of all its draws."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(z < at, -torch.inf, 0.0))

    with pyro.validation_enabled(False):
        sample = mixture_draws(LogJoint(model), as_they_are, torch.zeros(1, 1), 20_000)
    normal = torch.distributions.Normal(0.0, 1.0)
    wall = torch.tensor(at)
    hazard = normal.log_prob(wall).exp() / (1 - normal.cdf(wall))
    sd = (1 + wall * hazard - hazard**2).sqrt()
    found = errors_by_weights(sample)
    assert abs(float(found.mean_shift + hazard / sd)) < 4 * float(found.mean_shift_se)
    assert abs(float(found.sd_ratio - 1 / sd)) < 4 * float(found.sd_ratio_se)


def test_a_density_that_fails_at_many_draws_is_not_known():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("fails", torch.where(z < -1, torch.nan, 0.0))

    with pyro.validation_enabled(False):
        sample = mixture_draws(LogJoint(model), as_they_are, torch.zeros(1, 1), 4_000)
    assert all(bool(each.isnan().all()) for each in errors_by_weights(sample))
