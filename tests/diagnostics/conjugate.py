# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models whose evidence and posterior are known, and guides of them."""

import math

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate

from pyro_artransform.model.protocols import FlowGuide

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


# A stationary Gaussian path of any length, and guides that are wrong as wanted

SLOPE = 0.95


def path(dim):
    """A model of a path of ``dim`` unit variances, without data."""
    z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
    noise = z[..., 1:] - SLOPE * z[..., :-1]
    steps = dist.Normal(0.0, (1 - SLOPE**2) ** 0.5).log_prob(noise).sum(-1)
    pyro.factor("path", dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + steps)


def alternating(x):
    """Too wide and too narrow by 15 % in turns, which cancels along a path, but not at its start.

    So the weights are useless, and each mean and sd is right.
    """
    scale = 1 + 0.15 * (1 - 2 * (torch.arange(x.shape[-1]) % 2))
    scale = torch.cat([torch.ones(1), scale[1:]])
    return scale * x, scale.log().sum().expand(len(x))


class PathGuide(FlowGuide):
    """The posterior of :func:`path`, wider by a factor and shifted: a guide by protocol only.

    :param shift: as the factor a number or shape ``(dim,)``; in sds of the posterior.
    :param distort: a function of standard normal draws that is applied before all else.
    """

    def __init__(self, dim, factor=1.0, shift=0.0, distort=lambda x: (x, torch.zeros(len(x)))):
        self.dim, self.distort = dim, distort
        self.factor, self.shift = torch.as_tensor(factor).expand(dim), torch.as_tensor(shift)

    def call_and_ladj(self, x):
        x, ladj = self.distort(x)
        z = torch.cat([x[:, :1], (1 - SLOPE**2) ** 0.5 * x[:, 1:]], 1)
        # sums of all earlier noise by doubling: exact up to a length of 2048
        for power in range(11):
            lag = 2**power
            z = z + SLOPE**lag * torch.nn.functional.pad(z, (lag, 0))[:, : self.dim]
        ladj = (
            ladj + self.factor.log().sum() + (self.dim - 1) * 0.5 * torch.tensor(1 - SLOPE**2).log()
        )
        return self.shift + self.factor * z, ladj

    def rsample_and_log_prob(self, n, path=False):
        x = torch.randn(n, self.dim)
        z, ladj = self.call_and_ladj(x)
        return z, dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - ladj

    def __call__(self, *args, **kwargs):
        z, _ = self.rsample_and_log_prob(1)
        return {"z": pyro.sample("z", dist.Delta(z[0], event_dim=1))}
