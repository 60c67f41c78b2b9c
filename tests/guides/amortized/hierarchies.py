# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models with plates, of which guides can be pickled, and what is done with guides of them."""

from functools import partial

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from tests.guides import training

SIZE = 12


def data(size=SIZE):
    return torch.linspace(-1.0, 2.0, size) + torch.linspace(0.0, 7.0, size).sin()


def groups(y, force=0.0):
    """One global, with a constant force on it, and one local, the whole data at once."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 3.0))
    if force:
        pyro.factor("force", force * mean)
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def minibatch(y, size=4):
    """The same on a mini-batch that the plate takes."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 3.0))
    with pyro.plate("groups", len(y), subsample_size=size):
        batch = pyro.subsample(y, event_dim=0)
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=batch)


def batched(y, total=SIZE):
    """The same on a mini-batch that is the argument; without data, which are predicted."""
    values = y[:, 0] if y.dim() > 1 else y
    mean = pyro.sample("mean", dist.Normal(values.new_zeros(()), 3.0))
    with pyro.plate("groups", total, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=values)


def nested(y=None):
    """Locals of all kinds in nested plates, sub-sampled, some of one dimension and some of more."""
    pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("outer", 6, subsample_size=3, dim=-1):
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("inner", 4, subsample_size=2, dim=-2):
            pyro.sample("cell", dist.Uniform(-1.0, 2.0))
    with pyro.plate("column", 5, dim=-2):
        pyro.sample("alone", dist.Normal(0.0, 1.0))


NESTED = {
    "scale": (),
    "vector": (2,),
    "rate": (6,),
    "probs": (6, 3),
    "cell": (4, 6),
    "alone": (5, 1),
}


def standard():
    """A prior that is the standard Normal, in all coordinates, and no data."""
    pyro.sample("global", dist.Normal(0.0, 1.0))
    with pyro.plate("items", 20, subsample_size=5, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("inner", 4, subsample_size=2, dim=-2):
            pyro.sample("cell", dist.Normal(0.0, 1.0))


def autoencoder(x, decoder):
    """A latent vector for each row, no globals, and binary data that may be missing."""
    pyro.module("decoder", decoder)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        obs = None if x.isnan().any() else x
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=obs)


class Encoder(nn.Module):
    """Two features of each number."""

    def __init__(self, inputs=1, outputs=2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    def forward(self, y, *_):
        return self.net(y[:, None] if y.dim() == 1 else y)


class BatchEncoder(Encoder):
    """The same of a mini-batch that the plates take."""

    def forward(self, y, *_):
        return self.net(pyro.subsample(y, event_dim=0)[:, None])


def traces(model, guide, *args):
    guide_trace = poutine.trace(guide).get_trace(*args)
    return guide_trace, poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)


def train(model, guide, *args, steps=4, **elbo):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(**elbo))
    return [svi.step(*args) for _ in range(steps)]


redraw = partial(training.redraw, part="")
