# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Latents with an improper prior, which has no draws to start from."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value

from pyro_artransform import AutoIAF
from pyro_artransform.joint import LogJoint
from tests.inference.conftest import quick_fit

SUPPORTS = {
    "real": (constraints.real, (), ()),
    "positive": (constraints.positive, (), ()),
    "interval": (constraints.interval(-1.0, 2.0), (), ()),
    "vector": (constraints.real_vector, (), (3,)),
    "ordered": (constraints.ordered_vector, (), (3,)),
    "simplex": (constraints.simplex, (), (3,)),
    "correlation": (constraints.corr_cholesky, (), (3, 3)),
}


def model_on(name):
    support, batch_shape, event_shape = SUPPORTS[name]

    def model(y):
        z = pyro.sample("z", dist.ImproperUniform(support, batch_shape, event_shape))
        loc = z.sum(tuple(range(-len(event_shape), 0))) if event_shape else z
        distribution = dist.Normal(z, 1.0).to_event(len(event_shape))
        pyro.factor("bounded", distribution.log_prob(torch.full(event_shape, 0.3)))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(loc.unsqueeze(-1), 1.0), obs=y)

    return model


@pytest.mark.parametrize("name", SUPPORTS)
def test_steps(name):
    """Pyro's guides need a value to start from, these begin at the origin of the unconstrained space."""
    model, y = model_on(name), torch.tensor([0.5, 0.2, 0.9, 0.4])
    latents = LogJoint(model, (y,)).latents
    value = latents.constrain(torch.zeros(latents.latent_dim))
    start = init_to_value(values={name: draw.clone() for name, draw in value.items()})
    for guide in (AutoNormal(model, init_loc_fn=start), AutoIAF(model)):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert all(math.isfinite(svi.step(y)) for _ in range(3))
        assert SUPPORTS[name][0].check(guide(y)["z"]).all()
    assert guide.sample_posterior(4)["z"].shape == (4, *SUPPORTS[name][2])


def test_posterior():
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
