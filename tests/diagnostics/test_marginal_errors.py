# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from scipy import stats

from pyro_artransform.diagnostics.marginals import (
    MarginalErrors,
    critical_value,
    errors_by_chains,
    indices_along_rays,
    known,
)

DIM = 300


@pytest.mark.parametrize("memory", [-0.3, 0.0, 0.6])
def test_standard_errors_of_chains_are_right(memory):
    """Of 300 latents: z scores have a sd of one, within five standard errors of a sd."""
    draws = torch.randn(32, 60, DIM)
    for i in range(1, 60):
        draws[:, i] = memory * draws[:, i - 1] + (1 - memory**2) ** 0.5 * draws[:, i]
    found = errors_by_chains(0.3 + 1.25 * draws, torch.randn(2000, DIM))
    z = (found.mean_shift + 0.3 / 1.25) / found.mean_shift_se
    assert abs(z.mean()) < 5 / DIM**0.5
    assert abs(z.std() - 1) < 5 / (2 * DIM) ** 0.5
    z = (found.sd_ratio - 0.8) / found.sd_ratio_se
    assert abs(z.mean()) < 7 / DIM**0.5
    assert abs(z.std() - 1) < 5 / (2 * DIM) ** 0.5


# the shares of errors of means and of sds that are not known, of 100 latents. An index is known to about a
# tenth, so that near a half (2 degrees) and a quarter (4 degrees) some are stated that should not be
@pytest.mark.parametrize(
    ("degrees", "means", "sds"),
    [
        (1.0, (0.98, 1.0), (0.98, 1.0)),
        (1.3, (0.9, 1.0), (0.98, 1.0)),
        (2.0, (0.0, 0.35), (0.95, 1.0)),
        (3.0, (0.0, 0.02), (0.3, 0.8)),
        (5.0, (0.0, 0.01), (0.0, 0.08)),
        (30.0, (0.0, 0.0), (0.0, 0.01)),
    ],
)
def test_no_error_of_a_moment_that_does_not_exist(degrees, means, sds):
    """Student's t: a standard error of a mean needs more than 2 degrees, that of a sd more than 4."""
    student = torch.distributions.StudentT(degrees)
    chains, of_guide = student.sample((64, 100, 100)), student.sample((10_000, 100))
    found = errors_by_chains(chains, of_guide)
    assert means[0] <= found.mean_shift.isnan().double().mean() <= means[1]
    assert sds[0] <= found.sd_ratio.isnan().double().mean() <= sds[1]


LAWS = {
    "Cauchy": (torch.distributions.Cauchy(0.0, 1.0), False, False),
    "t of 1.8": (torch.distributions.StudentT(1.8), False, False),
    "t of 3": (torch.distributions.StudentT(3.0), True, False),
    "t of 5": (torch.distributions.StudentT(5.0), True, True),
    "normal": (torch.distributions.Normal(0.0, 1.0), True, True),
    "Laplace": (torch.distributions.Laplace(0.0, 1.0), True, True),
    "Gumbel": (torch.distributions.Gumbel(0.0, 1.0), True, True),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_density_far_outside_says_what_is_known(name):
    """Whatever the draws say: beside a normal coordinate, of any unit."""
    law, has_mean, has_sd = LAWS[name]
    unit = torch.tensor([1e3, 1e-3])

    def log_density(z):
        x = z / unit
        return law.log_prob(x[:, 0]) + torch.distributions.Normal(0.0, 1.0).log_prob(x[:, 1])

    index = indices_along_rays(log_density, 2 * unit * torch.tensor([[-1.0], [0.0], [1.0]]))
    found = known(MarginalErrors(*torch.ones(4, 2)), index)
    assert found.mean_shift.isfinite().tolist() == [has_mean, True]
    assert found.sd_ratio.isfinite().tolist() == [has_sd, True]


def test_no_density_far_outside_is_no_tail():
    def log_density(z):
        return torch.where(z.abs() < 40, -z.square() / 2, -torch.inf).sum(-1)

    for density in (log_density, lambda z: torch.full((len(z),), torch.nan)):
        assert indices_along_rays(density, torch.tensor([[-1.0], [0.0], [1.0]])) == 0


def test_critical_values_are_students():
    for count, chains in ((1, 128), (2000, 128), (2000, 34), (60, 18)):
        expected = stats.t.ppf(1 - 0.025 / (2 * count), chains - 2)
        assert critical_value(count, chains, 0.975) == pytest.approx(expected, rel=0.02)
