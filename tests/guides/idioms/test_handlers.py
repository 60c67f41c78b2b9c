# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models under Pyro's handlers: the density that is fitted is that of the handled model."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.infer.reparam import LocScaleReparam

from pyro_artransform import AutoIAF
from tests.inference.conftest import quick_fit

Y = (1.3, 0.2, 2.9, -0.4, 1.7, 0.8)
SD = 3.0


def data():
    return torch.tensor(Y)


def location(noise=1.0):
    loc = pyro.sample("loc", dist.Normal(0.0, SD))
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(loc, noise), obs=data())


def with_noise():
    location(pyro.sample("noise", dist.LogNormal(0.0, 1.0)))


def with_scaled_data():
    loc = pyro.sample("loc", dist.Normal(0.0, SD))
    with poutine.scale(scale=0.5), pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data())


def with_masked_data():
    loc = pyro.sample("loc", dist.Normal(0.0, SD))
    with pyro.plate("data", len(Y)), poutine.mask(mask=data() > 1):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data())


def with_more_data():
    location()
    pyro.sample("more", dist.Normal(100.0, 1.0), obs=torch.tensor(0.0))


def with_parameter():
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data())


class Gaussian(NamedTuple):
    """The posterior of one latent."""

    mean: float
    sd: float
    log_evidence: float


def conjugate(weights, noise=1.0, power=1.0):
    """The posterior where each datum counts with a weight, and all of the density with a power."""
    weights = torch.as_tensor(weights).expand(len(Y))
    precision = SD**-2 + (weights / noise**2).sum()
    mean = (weights * data() / noise**2).sum() / precision
    log_p = dist.Normal(0.0, SD).log_prob(mean) + weights @ dist.Normal(mean, noise).log_prob(
        data()
    )
    sd = (power * precision) ** -0.5
    log_evidence = power * log_p + math.log(math.sqrt(2 * math.pi)) + sd.log()
    return Gaussian(mean.item(), sd.item(), log_evidence.item())


def conditioned():
    """The value that is given counts with its prior."""
    found, prior = conjugate(1.0, noise=2.0), dist.LogNormal(0.0, 1.0)
    given = prior.log_prob(torch.tensor(2.0)).item()
    return found._replace(log_evidence=found.log_evidence + given)


class Case(NamedTuple):
    """A handled model, the posterior of its location, and its latent, which is that in some unit."""

    model: Callable[[], None]
    posterior: Callable[[], Gaussian] = lambda: conjugate(1.0)
    latent: str = "loc"
    unit: float = 1.0


CASES = {
    "none": Case(location),
    "scale": Case(poutine.scale(location, scale=2.0), lambda: conjugate(1.0, power=2.0)),
    "scale of data": Case(with_scaled_data, lambda: conjugate(0.5)),
    "mask": Case(poutine.mask(location, mask=torch.tensor(True))),
    "mask of data": Case(with_masked_data, lambda: conjugate((data() > 1).to(data()))),
    "condition": Case(poutine.condition(with_noise, {"noise": torch.tensor(2.0)}), conditioned),
    "block": Case(poutine.block(with_more_data, hide=["more"])),
    "reparam": Case(
        poutine.reparam(location, {"loc": LocScaleReparam(0.0)}), latent="loc_decentered", unit=SD
    ),
    "lift": Case(poutine.lift(with_parameter, {"loc": dist.Normal(0.0, SD)})),
}


@pytest.mark.parametrize("name", CASES)
def test_posterior(name):
    """Gaussian, so that the fit is exact from its start, and the ELBO the evidence for each draw."""
    model, posterior, latent, unit = CASES[name]
    expected = posterior()
    guide = AutoIAF(model, num_transforms=2, hidden_dims=8)
    result = quick_fit(model, guide, progress=False)
    assert not result.one_at_a_time
    assert abs(result.elbo - expected.log_evidence) < 1e-6
    z, log_q = guide.rsample_and_log_prob(100)
    distribution = dist.Normal(expected.mean / unit, expected.sd / unit)
    assert torch.allclose(distribution.log_prob(z[:, 0]), log_q, atol=1e-4)
    assert latent in guide()


@pytest.mark.parametrize("name", CASES)
def test_pyros_guide_has_the_same_density(name):
    """At the posterior, Pyro's own ELBO of Pyro's guide is the evidence for each draw."""
    model, posterior, _, unit = CASES[name]
    expected = posterior()
    start = init_to_value(values={"loc": torch.tensor(expected.mean)})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=expected.sd / unit)
    for _ in range(3):
        assert abs(Trace_ELBO().loss(model, guide) + expected.log_evidence) < 1e-6
