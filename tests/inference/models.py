# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models and guides of all the kinds that a fit is given."""

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex

from pyro_artransform import AutoIAF

DATA = (1.3, 0.2, 2.9, -0.4, 1.7, 0.8)


def data():
    return torch.tensor(DATA)


def small(model, **options):
    return AutoIAF(model, num_transforms=2, hidden_dims=8, **options)


def regression(values=None):
    """A location and a positive scale; a bent posterior in two dimensions."""
    values = data() if values is None else values
    loc = pyro.sample("loc", dist.Normal(values.new_zeros(()), 3.0))
    scale = pyro.sample("scale", dist.LogNormal(values.new_zeros(()), 1.0))
    with pyro.plate("data", len(values)):
        pyro.sample("y", dist.Normal(loc, scale), obs=values)


def hand_written(values=None):
    """A guide of :func:`regression`."""
    loc = pyro.param("its_loc", torch.zeros(2))
    scale = pyro.param("its_scale", torch.ones(2), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(loc[0], scale[0]))
    pyro.sample("scale", dist.LogNormal(loc[1], scale[1]))


def location():
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(DATA)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data())


def scaled():
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with poutine.scale(scale=2.0), pyro.plate("data", len(DATA)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data())


def masked():
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(DATA)), poutine.mask(mask=data() > 0):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data())


def partly_observed():
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(DATA)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data(), obs_mask=data() > 0)


def subsampled():
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(DATA), subsample_size=3) as indices:
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data()[indices])


def branching():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if float(z.detach()) > 0 else 2.0
    pyro.sample("y", dist.Normal(z, scale), obs=torch.tensor(0.3))


@config_enumerate
def mixture():
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("data", len(DATA)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("y", dist.Normal(Vindex(locs)[..., kind], 1.0), obs=data())


def with_param():
    noise = pyro.param("noise", torch.tensor(4.0), constraint=dist.constraints.positive)
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(DATA)):
        pyro.sample("y", dist.Normal(loc, noise), obs=data())


class Decoder(PyroModule):
    """A network between latents and data."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, len(DATA))

    def forward(self):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(self.linear(z), 0.5).to_event(1), obs=data())


SCALE_TRIL = ((2.0, 0.0, 0.0), (1.5, 0.5, 0.0), (-0.3, 0.2, 0.1))


def gaussian():
    """A correlated Gaussian, of log evidence 0."""
    scale_tril = torch.tensor(SCALE_TRIL)
    scales = 2 * scale_tril, scale_tril
    tilted("z", *(dist.MultivariateNormal(torch.ones(3), scale_tril=s) for s in scales))


def raw_data():
    rows = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    columns = rows * torch.tensor([1e4, 1.0, 1e-4])
    return columns, columns @ torch.tensor([1e-4, -1.0, 2e4]), torch.tensor([1.0, 10.0, 1e5])


def raw_scales():
    """A regression on columns of scale 1e4 and 1e-4: its posterior is Gaussian."""
    columns, y, scales = raw_data()
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), scales).to_event(1))
    mean = (columns * beta.unsqueeze(-2)).sum(-1)
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def raw_scales_evidence():
    """Its log evidence, in closed form."""
    columns, y, scales = raw_data()
    prior = scales * columns
    distribution = dist.MultivariateNormal(torch.zeros(30), torch.eye(30) + prior @ prior.T)
    return distribution.log_prob(y).item()


def tilted(name, prior, posterior):
    """A latent site with a posterior that is known: its data are a factor, and of log evidence 0."""
    value = pyro.sample(name, prior)
    pyro.factor(f"data of {name}", posterior.log_prob(value) - prior.log_prob(value))
    return value


def funnel():
    """Of log evidence 0, with a neck that no Gaussian enters."""
    v = tilted("v", dist.Normal(0.0, 5.0), dist.Normal(0.0, 3.0))
    with pyro.plate("below", 2):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def student():
    """Independent, with heavy tails; of log evidence 0."""
    prior, posterior = (dist.StudentT(1.5, torch.zeros(2), s).to_event(1) for s in (3.0, 1.0))
    tilted("z", prior, posterior)


class Faulty(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.full_like(gradient, torch.nan)
