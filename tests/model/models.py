# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models of all kinds, each without arguments, and the log joint density as Pyro has it."""

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to

from pyro_artransform.model.handlers import UnmaskedLatents
from pyro_artransform.model.traces import support_of_latent


def data():
    return torch.tensor([1.3, 0.2, 2.9, -0.4, 1.7])


def one_plate():
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=data())


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def nested_plates():
    outer, inner = pyro.plate("outer", 4, dim=-1), pyro.plate("inner", 2, dim=-2)
    with outer:
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
        pyro.sample("pairs", dist.HalfNormal(torch.tensor([1.0, 2.0])).to_event(1))
    with inner:
        column = pyro.sample("column", dist.Normal(0.0, 1.0))
    with outer, inner:
        cell = pyro.sample("cell", dist.Beta(2.0, 3.0))
        pyro.sample("y", dist.Normal(row + column, cell), obs=torch.ones(2, 4))


def supports():
    pyro.sample("probs", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(2.0)))
    pyro.sample("unit", dist.Uniform(-1.0, 2.0))
    with pyro.plate("rows", 2):
        rates = pyro.sample("rates", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Poisson(rates).to_event(1), obs=torch.ones(2, 3))
    with pyro.plate("simplices", 2):
        pyro.sample("simplex", dist.Dirichlet(torch.ones(4)))


def scaled_and_masked():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("one", -(pyro.deterministic("square", z**2) ** 2))
    with poutine.scale(scale=2.5), pyro.plate("scaled", 5):
        pyro.sample("y", dist.Normal(z, 1.0), obs=data())
        pyro.factor("many", -((data() - z) ** 2))
    with pyro.plate("masked", 5), poutine.mask(mask=data() > 1):
        local = pyro.sample("local", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(local, 1.0), obs=data())


@poutine.condition(data={"data": torch.tensor([0, 3])})
def given_indices():
    """They are observed, and are not data."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5, subsample_size=2) as indices:
        pyro.sample("y", dist.Normal(z, 1.0), obs=data()[indices])


def mixed_dtypes():
    single = torch.tensor([0.5, 1.5], dtype=torch.float32)
    pyro.sample("single", dist.Normal(single, 1.0).to_event(1))
    pyro.sample("double", dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64)))


def accumulated():
    """Its mean is a sum in place, on a number that depends on no draw; then a diagonal."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    mean = torch.full((5,), 0.1)
    for k in range(3):
        mean += beta[k] * data() ** k
    covariance = torch.exp(-((data()[:, None] - data()) ** 2))
    covariance.view(-1)[::6] += noise
    pyro.sample("y", dist.MultivariateNormal(mean, covariance), obs=data())


def silently_wrong_in_a_plate():
    """A sum over everything mixes draws, and no shape tells."""
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.3))


def python_branch():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if z > 0 else 2.0
    pyro.sample("y", dist.Normal(z, scale), obs=torch.tensor(0.3))


def python_number():
    """Another number for each draw, without a gradient."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1 + float(z.detach()) ** 2), obs=torch.tensor(0.3))


SIZE, Y = 7, torch.linspace(-1.0, 2.0, 7)


def of_batch(y, scale=1.0):
    """A model of whole data or of a mini-batch of :data:`Y`."""
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 3.0))
    width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", SIZE, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(loc, width * scale), obs=y)


def trace_of(model):
    return poutine.trace(model).get_trace()


def by_trace(model, z, trace_of=trace_of):
    """The log joint density at one draw, from Pyro's trace of the conditioned model, and the Jacobian.

    Masked elements of latents have their prior density, as the package documents.
    """
    values, total, start = {}, 0.0, 0
    for name, site in trace_of(model).iter_stochastic_nodes():
        if site_is_subsample(site):
            continue
        bijection = biject_to(support_of_latent(site["fn"]))
        shape = bijection.inverse_shape(site["value"].shape)
        part = z[start : start + shape.numel()].reshape(shape).to(site["value"].dtype)
        values[name] = bijection(part)
        total = total + bijection.log_abs_det_jacobian(part, values[name]).sum()
        start += shape.numel()
    assert start == len(z)
    return total + trace_of(poutine.condition(UnmaskedLatents()(model), values)).log_prob_sum()
