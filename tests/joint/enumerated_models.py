# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models whose discrete latents are summed out, and index from the left, so that no plate of draws fits."""

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import config_enumerate

STATES = 3


def gaussian_chain(length=60):
    """A hidden Markov model with normal emissions."""
    y = torch.linspace(-2.0, 2.0, length)
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(STATES, STATES)).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    x = 0
    for t in pyro.markov(range(length)):
        x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]))
        pyro.sample(f"y_{t}", dist.Normal(locs[x], scale), obs=y[t])


def two_levels():
    """A class of each group, and one of each element that depends on it."""
    table = pyro.sample("table", dist.Dirichlet(torch.ones(2, STATES)).to_event(1))
    rate = pyro.sample("rate", dist.Gamma(torch.tensor([1.0, 4.0, 9.0]), 1.0).to_event(1))
    with pyro.plate("groups", 3, dim=-1):
        group = pyro.sample("group", dist.Bernoulli(0.4)).long()
        with pyro.plate("elements", 4, dim=-2):
            kind = pyro.sample("kind", dist.Categorical(table[group]))
            pyro.sample("y", dist.Poisson(rate[kind]), obs=torch.arange(12.0).reshape(4, 3))


def changepoint():
    """Rates of counts before and after an unknown year, all at once in the one site of data."""
    early, late = (
        pyro.sample("early", dist.Exponential(1.0)),
        pyro.sample("late", dist.Exponential(1.0)),
    )
    year = pyro.sample("year", dist.Categorical(torch.ones(8)))
    with pyro.plate("years", 8) as t:
        rates = torch.stack([early, late])
        is_late = (t >= year).long()
        pyro.sample("y", dist.Poisson(rates[is_late]), obs=torch.tensor([4.0, 5, 4, 1, 0, 1, 2, 0]))


MODELS = {
    model.__name__: config_enumerate(model) for model in (gaussian_chain, two_levels, changepoint)
}
