# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models under Pyro's handlers, and improper priors: the density that is fitted is that of the model."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam

from pyro_artransform import AutoIAF
from tests.guides.idioms.models import GUIDES
from tests.inference.conftest import quick_fit

Y = (1.3, 0.2, 2.9, -0.4, 1.7, 0.8)
SD = 3.0


def data():
    return torch.tensor(Y)


def observe(loc, noise=1.0):
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(loc, noise), obs=data())


def location(noise=1.0, handler=None):
    loc = pyro.sample("loc", dist.Normal(0.0, SD))
    if handler is None:
        return observe(loc, noise)
    with handler:
        return observe(loc, noise)


def with_noise():
    location(pyro.sample("noise", dist.LogNormal(0.0, 1.0)))


def with_more_data():
    location()
    pyro.sample("more", dist.Normal(100.0, 1.0), obs=torch.tensor(0.0))


def with_parameter():
    observe(pyro.param("loc", torch.tensor(0.0)))


def conjugate(weights=1.0, noise=1.0, power=1.0, given=0.0):
    """Mean, sd and log evidence where each datum has a weight, and all of the density a power.

    :param given: the log density of other values.
    """
    weights = torch.as_tensor(weights).expand(len(Y))
    precision = SD**-2 + (weights / noise**2).sum()
    mean = (weights * data() / noise**2).sum() / precision
    log_p = dist.Normal(0.0, SD).log_prob(mean)
    log_p = log_p + weights @ dist.Normal(mean, noise).log_prob(data())
    sd = (power * precision) ** -0.5
    return mean, sd, power * log_p + math.log(math.sqrt(2 * math.pi)) + sd.log() + given


CASES = {
    "scale": (poutine.scale(location, scale=2.0), {"power": 2.0}),
    "scale of data": (lambda: location(handler=poutine.scale(scale=0.5)), {"weights": 0.5}),
    "mask": (poutine.mask(location, mask=torch.tensor(True)), {}),
    "mask of data": (
        lambda: location(handler=poutine.mask(mask=data() > 1)),
        {"weights": [1.0 if y > 1 else 0.0 for y in Y]},
    ),
    "condition": (
        poutine.condition(with_noise, {"noise": torch.tensor(2.0)}),
        # a value that is given counts with its prior
        {"noise": 2.0, "given": dist.LogNormal(0.0, 1.0).log_prob(torch.tensor(2.0)).item()},
    ),
    "block": (poutine.block(with_more_data, hide=["more"]), {}),
    "reparam": (poutine.reparam(location, {"loc": LocScaleReparam(0.0)}), {}),
    "lift": (
        poutine.lift(with_parameter, {"loc": dist.Normal(torch.tensor(0.0).double(), SD)}),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_posterior(name):
    """Gaussian, so that the fit is exact from its start, and the ELBO the evidence for each draw."""
    model, options = CASES[name]
    mean, sd, log_evidence = conjugate(**options)
    guide = GUIDES["AutoIAF"](model)
    result = quick_fit(model, guide, progress=False)
    assert not result.one_at_a_time
    assert abs(result.elbo - log_evidence) < 1e-6
    z, log_q = guide.rsample_and_log_prob(100)
    latent, unit = ("loc_decentered", SD) if name == "reparam" else ("loc", 1.0)
    assert torch.allclose(dist.Normal(mean / unit, sd / unit).log_prob(z[:, 0]), log_q, atol=1e-4)
    assert latent in guide()


SUPPORTS = {
    "real": (constraints.real, ()),
    "positive": (constraints.positive, ()),
    "interval": (constraints.interval(-1.0, 2.0), ()),
    "vector": (constraints.real_vector, (3,)),
    "ordered": (constraints.ordered_vector, (3,)),
    "simplex": (constraints.simplex, (3,)),
    "correlation": (constraints.corr_cholesky, (3, 3)),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_steps_with_an_improper_prior(name):
    """It has no draws to start from: the guide starts at the origin of the unconstrained space."""
    support, shape = SUPPORTS[name]

    def model(y):
        z = pyro.sample("z", dist.ImproperUniform(support, (), shape))
        loc = z.sum(tuple(range(-len(shape), 0))) if shape else z
        bounded = dist.Normal(z, 1.0).to_event(len(shape))
        pyro.factor("bounded", bounded.log_prob(torch.full(shape, 0.3)))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(loc.unsqueeze(-1), 1.0), obs=y)

    guide = AutoIAF(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(torch.linspace(0.2, 0.9, 4))) for _ in range(3))
    draws = guide.sample_posterior(4)["z"]
    assert support.check(draws).all()
    assert draws.shape == (4, *shape)


def test_posterior_of_an_improper_prior():
    """Gaussian: that of the mean under a flat prior, which is where the fit starts."""

    def model():
        loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(loc, 2.0), obs=torch.tensor([1.0, 2.0, 4.0, 5.0]))

    guide = AutoIAF(model)
    result = quick_fit(model, guide, progress=False)
    assert result.trusted
    z, log_q = guide.rsample_and_log_prob(50)
    assert torch.allclose(dist.Normal(3.0, 1.0).log_prob(z[:, 0]), log_q, atol=1e-4)
