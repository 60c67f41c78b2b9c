# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Chains of densities that are finite in few places."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_value

from pyro_artransform.sampling import StartError
from tests.sampling.test_mcmc import mcmc


def narrow():
    """A density that is finite between 4.8 and 5.2 alone, far from the prior."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    left = 1 - ((z - 5) / 0.2).square()
    pyro.factor("region", torch.where(left > 0, 4 * left.abs().log(), -torch.inf).sum(-1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([6.0, 9.0]))


AT_FIVE = init_to_value(values={"z": torch.tensor([5.0, 5.1])})


def narrow_moments():
    """The means and sds, by quadrature."""
    z = torch.linspace(4.8, 5.2, 2001)[1:-1, None]
    data = dist.Normal(z, 1.0).log_prob(torch.tensor([6.0, 9.0]))
    region = 4 * (1 - ((z - 5) / 0.2).square()).log()
    weights = (data + dist.Normal(0.0, 1.0).log_prob(z) + region).softmax(0)
    mean = (weights * z).sum(0)
    return mean, (weights * (z - mean).square()).sum(0).sqrt()


def test_a_start_that_the_user_gives():
    with pytest.raises(StartError, match=r"region is not finite.* Give an init_loc_fn"):
        mcmc(narrow, draws=100)
    chains = mcmc(narrow, draws=400, init_loc_fn=AT_FIVE)
    assert chains.trusted, chains
    (mean, sd), draws = narrow_moments(), chains.by_chain["z"].flatten(0, 1)
    assert ((draws.mean(0) - mean).abs() < 5 * sd / chains.ess["z"].sqrt()).all()
    assert ((draws.std(0) / sd - 1).abs() < 5 / chains.ess["z"].sqrt()).all()


def test_a_vague_prior_whose_quantiles_have_no_density():
    """Of a Poisson regression: the posterior is nearly the Gaussian of the maximum likelihood."""
    x = torch.randn(200, 2)
    y = torch.poisson((2 + x @ torch.tensor([0.5, -0.3])).exp())

    def model():
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1000.0))
        with pyro.plate("columns", 2):
            slopes = pyro.sample("slopes", dist.Normal(0.0, 1000.0))
        with pyro.plate("rows", 200):
            pyro.sample("y", dist.Poisson((intercept + x @ slopes).exp()), obs=y)

    chains = mcmc(model, draws=400)
    assert chains.trusted, chains
    columns, beta = torch.cat([torch.ones(200, 1), x], 1), torch.zeros(3)
    for _ in range(50):
        rate = (columns @ beta).exp()
        covariance = torch.linalg.inv(columns.T @ (rate[:, None] * columns))
        beta = beta + covariance @ columns.T @ (y - rate)
    draws = chains.draws
    found = torch.cat([draws["intercept"][:, None], draws["slopes"]], 1)
    # of 1,500 counts: a few percent of an sd beside the Monte Carlo error
    sd = covariance.diagonal().sqrt()
    assert ((found.mean(0) - beta).abs() < (5 / 20 + 0.05) * sd).all()
    assert ((found.std(0) / sd - 1).abs() < 5 / 800**0.5 + 0.03).all()


@pytest.mark.parametrize("make", [lambda a: dist.Pareto(a, 3.0), lambda a: dist.Uniform(0.0, a)])
def test_a_support_that_depends_on_another_latent_is_refused(make):
    def model():
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        b = pyro.sample("b", make(a))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(
        ValueError, match=r"support of site 'b' depends on other latents: .*u ~ Unif"
    ):
        mcmc(model, progress=False)
