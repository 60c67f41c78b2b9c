# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models whose evidence and posterior are known."""

import math

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate

COUNTS = (3.0, 1.0, 4.0, 2.0, 2.0)
REALS = (0.4, 1.9, 1.1)


def counts():
    return torch.tensor(COUNTS)


def gamma_poisson(data):
    """A positive latent: the Jacobian matters."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("y", dist.Poisson(rate), obs=data)


def gamma_posterior(data):
    return dist.Gamma(2.0 + data.sum(), 1.0 + len(data))


def gamma_guide(data):
    pyro.sample("rate", gamma_posterior(data))


def gamma_poisson_evidence():
    """By Bayes' rule at any rate."""
    data = counts()
    rate = torch.tensor(1.7)
    trace = poutine.trace(poutine.condition(gamma_poisson, {"rate": rate})).get_trace(data)
    return (trace.log_prob_sum() - gamma_posterior(data).log_prob(rate)).item()


def local_normals(data=None):
    """A global and a local latent."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(REALS)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(REALS) if data is None else data)


def local_normals_evidence():
    covariance = 4.0 * torch.ones(3, 3) + (1.0 + 0.25) * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(torch.tensor(REALS)).item()


def local_guide(data=None):
    mean = pyro.sample("mean", dist.Normal(1.0, 0.9))
    with pyro.plate("data", len(REALS)):
        pyro.sample("z", dist.Normal(0.8 * torch.tensor(REALS) + 0.2 * mean, 0.55))


@config_enumerate
def mixture(data):
    """A discrete latent for each datum."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        kind = pyro.sample("kind", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(loc + 2 * kind, 1.0), obs=data)


def mixture_evidence():
    """By quadrature over the location."""
    loc = torch.linspace(-8, 8, 20_001)[:, None]
    data = torch.tensor(REALS)
    parts = [dist.Normal(loc + 2 * k, 1.0).log_prob(data) for k in (0, 1)]
    likelihood = torch.logaddexp(parts[0] + math.log(0.7), parts[1] + math.log(0.3)).sum(1)
    log_joint = dist.Normal(0.0, 1.0).log_prob(loc[:, 0]) + likelihood
    return torch.trapezoid(log_joint.exp(), loc[:, 0]).log().item()


def mixture_guide(data):
    """With a draw of each discrete latent, as the posterior has it."""
    loc = pyro.sample("loc", dist.Normal(0.4, 0.7))
    with pyro.plate("data", len(data)):
        odds = dist.Normal(loc + 2, 1.0).log_prob(data) - dist.Normal(loc, 1.0).log_prob(data)
        pyro.sample("kind", dist.Bernoulli(logits=odds + math.log(0.3 / 0.7)))
