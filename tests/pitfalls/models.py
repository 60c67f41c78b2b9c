# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of the cases: at the top level of a module, so that a guide of one can be pickled."""

import pyro
import torch
from pyro import distributions as dist

DATA = (1.3, 0.2, 2.9, -0.4, 1.7, 0.8, 3.1, 1.1)


def regression():
    """A location and a positive scale, given eight numbers; two latent dimensions, bent."""
    data = torch.tensor(DATA)
    loc = pyro.sample("loc", dist.Normal(torch.zeros(()), torch.full((), 3.0)))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), torch.ones(())))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(loc, scale), obs=data)


def regression_on(data):
    """The same with the data as an argument."""
    loc = pyro.sample("loc", dist.Normal(data.new_zeros(()), data.new_full((), 3.0)))
    scale = pyro.sample("scale", dist.LogNormal(data.new_zeros(()), data.new_ones(())))
    with pyro.plate("data", len(data)):
        return pyro.sample("obs", dist.Normal(loc, scale), obs=data)


def predictive_on(data, observed=None):
    """The same with what is observed apart from what it is observed at."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(()), torch.full((), 3.0)))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), torch.ones(())))
    with pyro.plate("data", len(data)):
        return pyro.sample("obs", dist.Normal(slope * data, scale), obs=observed)


def locals_on(data):
    """One latent for each datum."""
    loc = pyro.sample("loc", dist.Normal(data.new_zeros(()), data.new_full((), 3.0)))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(loc, data.new_ones(())))
        return pyro.sample("obs", dist.Normal(z, data.new_ones(())), obs=data)


def far_target():
    """Far from zero, and nothing else is hard about it."""
    pyro.sample("z", dist.Normal(torch.full((2,), -300.0), torch.ones(2)).to_event(1))


def wide_prior():
    """Two dimensions, one of them positive, for starting values."""
    pyro.sample("z", dist.Normal(torch.zeros(()), torch.full((), 10.0)))
    pyro.sample("s", dist.LogNormal(torch.zeros(()), torch.full((), 10.0)))


def subsampled():
    """Local latents in a plate that is sub-sampled, and no data."""
    with pyro.plate("items", 20, subsample_size=5):
        pyro.sample("z", dist.Normal(torch.zeros(()), torch.ones(())))


def dynamic_support():
    """The support of one latent depends on another one."""
    upper = pyro.sample("upper", dist.LogNormal(torch.zeros(()), torch.ones(())))
    inner = pyro.sample("inner", dist.Uniform(torch.zeros(()), upper))
    pyro.sample("obs", dist.Normal(inner, 0.1), obs=torch.full((), 0.7))
