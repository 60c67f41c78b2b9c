# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models of the failures of guides: at the top level of a module, so that guides of them are pickled."""

import pyro
import torch
from pyro import distributions as dist

DATA = (1.3, 0.2, 2.9, -0.4, 1.7, 0.8, 3.1, 1.1)


def regression(data=None):
    """A location and a positive scale."""
    data = torch.tensor(DATA) if data is None else data
    loc = pyro.sample("loc", dist.Normal(data.new_zeros(()), 3.0))
    scale = pyro.sample("scale", dist.LogNormal(data.new_zeros(()), 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(loc, scale), obs=data)


def locals_on(data):
    """A latent for each datum."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=data)


def far_target():
    pyro.sample("z", dist.Normal(torch.full((2,), -300.0), torch.ones(2)).to_event(1))


def wide_prior():
    pyro.sample("z", dist.Normal(0.0, 10.0))
    pyro.sample("s", dist.LogNormal(0.0, 10.0))


def subsampled():
    with pyro.plate("items", 20, subsample_size=5):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def dynamic_support():
    upper = pyro.sample("upper", dist.LogNormal(0.0, 1.0))
    inner = pyro.sample("inner", dist.Uniform(torch.zeros(()), upper))
    pyro.sample("obs", dist.Normal(inner, 0.1), obs=torch.tensor(0.7))


def standard():
    """Its own posterior."""
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def local_linear_trend(num=4):
    """Levels and slopes that are random walks, step by step."""
    scales = [pyro.sample(f"s{k}", dist.HalfNormal(torch.ones(()))) for k in range(3)]
    level = slope = torch.zeros(())
    for t in range(num):
        level = pyro.sample(f"level_{t}", dist.Normal(level + slope, scales[0]))
        slope = pyro.sample(f"slope_{t}", dist.Normal(slope, scales[1]))
        pyro.sample(f"y_{t}", dist.Normal(level, scales[2]), obs=torch.tensor(t).sin())


class Shifted(dist.Normal):
    """A Normal distribution whose location is one more than it says."""

    def log_prob(self, value):
        return super().log_prob(value - 1.0)


def hierarchy_of(make):
    """A hierarchy whose prior has another density than the family that it looks like."""

    def model():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 3):
            x = pyro.sample("x", make(torch.zeros(()), tau))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([1.0, 5.0, -1.0]))

    return model


def two_modes(apart, weight=0.7):
    """A density with evidence 1, and the mean and sd of its first latent."""
    locs = torch.tensor([[-apart / 2, 0.0], [apart / 2, 0.0]])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 30.0).to_event(1))
        parts = dist.Normal(locs, 1.0).to_event(1).log_prob(z.unsqueeze(-2))
        log_density = (parts + torch.tensor([weight, 1 - weight]).log()).logsumexp(-1)
        prior = dist.Normal(torch.zeros(2), 30.0).to_event(1).log_prob(z)
        pyro.factor("target", log_density - prior)

    mean = (0.5 - weight) * apart
    return model, mean, (1 + weight * (1 - weight) * apart**2) ** 0.5


def correlated():
    """The same of a Gaussian."""
    tril = torch.tensor([[1.0, 0.0], [0.9, 0.19**0.5]])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 30.0).to_event(1))
        density = dist.MultivariateNormal(torch.ones(2), scale_tril=tril).log_prob(z)
        prior = dist.Normal(torch.zeros(2), 30.0).to_event(1).log_prob(z)
        pyro.factor("target", density - prior)

    return model, 1.0, 1.0
