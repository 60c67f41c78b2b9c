# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Draws of hierarchies whose prior has another density than the family that it looks like, by quadrature."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.sampling import mcmc

MASK = torch.tensor([True, False, True])
Y = torch.tensor([1.0, 5.0, -1.0])


class Shifted(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value - 1.0)


def hierarchy(make):
    def model():
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", 3):
            x = pyro.sample("x", make(torch.zeros(3), tau))
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y)

    return model


masked_hierarchy = hierarchy(lambda m, s: dist.Normal(m, s).mask(MASK))
shifted_hierarchy = hierarchy(Shifted)


def moments(loc, counted):
    """Means and sds of tau and of x by quadrature over tau, with x ~ Normal(loc, tau) where it is counted."""
    tau = torch.linspace(1e-4, 20.0, 20_001, dtype=torch.float64)
    y, width = Y.double(), (1 + tau.square()).sqrt()
    by_group = dist.Normal(loc, width[:, None]).log_prob(y) * counted
    weights = (dist.HalfNormal(2.0).log_prob(tau) + by_group.sum(-1)).softmax(0)[:, None]
    share = torch.where(counted, (tau / width)[:, None].square(), 1.0)
    mean, variance = loc + share * (y - loc), share
    found = torch.cat([tau[:, None], mean], -1)
    squares = torch.cat([tau[:, None].square(), mean.square() + variance], -1)
    loc = (weights * found).sum(0)
    return loc, ((weights * squares).sum(0) - loc.square()).sqrt()


CASES = {
    "masked": (masked_hierarchy, 0.0, MASK),
    "shifted": (shifted_hierarchy, 1.0, torch.ones(3, dtype=torch.bool)),
}


def check_draws(case, result):
    """Means and sds within 5 standard errors of 400 independent draws, which trusted ones are worth."""
    _, loc, counted = CASES[case]
    mean, sd = moments(loc, counted)
    draws = torch.cat([result.draws["tau"][:, None], result.draws["x"]], -1).double()
    assert result.trusted, result.verdict
    assert ((draws.mean(0) - mean).abs() < 5 * sd / 20).all(), (draws.mean(0), mean)
    assert ((draws.std(0) / sd - 1).abs() < 5 / 400**0.5).all(), (draws.std(0), sd)


@pytest.mark.parametrize("case", [pytest.param("masked", marks=pytest.mark.slow), "shifted"])
def test_chains_have_the_density_as_written(case):
    model, *_ = CASES[case]
    # with seed 0 trajectories of the funnel have 60 steps in the end, and take 25 s
    check_draws(case, mcmc(model, draws=400, seed=1, progress=False))


@pytest.mark.slow
def test_a_scale_without_a_positive_prior_is_said():
    """A part of its prior has no density: draws are right, and trajectories end there."""

    def model():
        tau = pyro.sample("tau", dist.Normal(1.0, 2.0))
        with pyro.plate("groups", 6):
            z = pyro.sample("z", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.linspace(-1.0, 1.0, 6))

    found = mcmc(model, draws=20, seed=0, progress=False)
    assert "use a prior on positive numbers" in found.verdict
