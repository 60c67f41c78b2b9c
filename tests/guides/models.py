# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of these tests, at the top level of a module: a guide of one can be pickled."""

import pyro
import torch
from pyro import distributions as dist

DATA = (1.3, 0.2, 2.9, -0.4, 1.7, 0.8, 3.1, 1.1)


def data(dtype=None):
    return torch.tensor(DATA, dtype=dtype)


def regression(values):
    """A location and a positive scale; two latents, bent."""
    loc = pyro.sample("loc", dist.Normal(values.new_zeros(()), 3.0))
    scale = pyro.sample("scale", dist.LogNormal(values.new_zeros(()), 1.0))
    with pyro.plate("data", len(values)):
        return pyro.sample("obs", dist.Normal(loc, scale), obs=values)


def one_dimensional(values):
    """One latent."""
    rate = pyro.sample("rate", dist.Gamma(values.new_ones(()), 1.0))
    with pyro.plate("data", len(values)):
        pyro.sample("obs", dist.Exponential(rate), obs=values.abs())


def shapes(values):
    """Latents of all kinds of shapes and supports: plates, nested plates, events, a matrix."""
    new = values.new_tensor
    pyro.sample("probs", dist.Dirichlet(new([1.0, 2.0, 3.0])))
    pyro.sample("corr", dist.LKJCholesky(3, new(1.0)))
    pyro.sample("unit", dist.Uniform(new(-1.0), new(2.0)))
    pyro.sample("vector", dist.Normal(new([0.0, 5.0]), 1.0).to_event(1))
    outer, inner = pyro.plate("outer", 4, dim=-1), pyro.plate("inner", 2, dim=-2)
    with outer:
        pyro.sample("row", dist.Normal(new(0.0), 1.0))
        pyro.sample("pairs", dist.HalfNormal(new([1.0, 2.0])).to_event(1))
    with inner:
        pyro.sample("column", dist.Normal(new(0.0), 1.0))
    with outer, inner:
        pyro.sample("cell", dist.Beta(new(2.0), new(3.0)))


SHAPES = {
    "probs": (3,),
    "corr": (3, 3),
    "unit": (),
    "vector": (2,),
    "row": (4,),
    "pairs": (4, 2),
    "column": (2, 1),
    "cell": (2, 4),
}


def mixed_dtypes(values):
    """One latent in each of two dtypes."""
    pyro.sample("single", dist.Normal(values.new_zeros(2, dtype=torch.float32), 1.0).to_event(1))
    pyro.sample("double", dist.HalfNormal(values.new_ones((), dtype=torch.float64)))


def mixture(values):
    """A discrete latent for each datum."""
    locs = pyro.sample("locs", dist.Normal(values.new_tensor([-1.0, 2.0]), 1.0).to_event(1))
    probs = pyro.sample("probs", dist.Dirichlet(values.new_ones(2)))
    with pyro.plate("data", len(values)):
        kind = pyro.sample("kind", dist.Categorical(probs))
        pyro.sample("obs", dist.Normal(locs[kind], 1.0), obs=values)


def locals_of(values):
    """A latent for each datum."""
    with pyro.plate("data", len(values)):
        z = pyro.sample("z", dist.Normal(values.new_zeros(()), 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=values)


def gaussian(values):
    """A posterior that is a correlated Gaussian: :func:`gaussian_tril` is its scale."""
    scale_tril = gaussian_tril(values)
    loc = values.new_tensor([3.0, -2.0, 0.5])
    pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


def gaussian_tril(values):
    return values.new_tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [-0.3, 0.2, 0.1]])


def no_latents(values):
    with pyro.plate("data", len(values)):
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=values)
