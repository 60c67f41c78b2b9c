# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Data that a mask hides have no part in the density and in its gradient, whatever they are."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine

from pyro_artransform.joint import LogJoint


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, 0.0, -1.0])
@pytest.mark.parametrize(
    "distribution",
    [
        lambda z: dist.Normal(z, 1.0),
        lambda z: dist.LogNormal(z, 1.0),
        lambda z: dist.Beta(z.exp(), 2.0),
        lambda z: dist.Weibull(1.0, z.exp()),
        lambda z: dist.Normal(z[..., None], torch.ones(2)).to_event(1),
        lambda z: dist.Dirichlet(z.exp()[..., None] * torch.ones(2)),
    ],
    ids=["Normal", "LogNormal", "Beta", "Weibull", "vectors", "Dirichlet"],
)
def test_what_a_mask_hides_is_not_in_the_gradient(distribution, hidden):
    event = distribution(torch.zeros(())).event_shape
    y = torch.tensor([0.3, 0.7, 0.4])
    y = torch.stack([y, 1 - y], -1) if event else y
    mask = torch.tensor([False, True, True])

    def model(y, mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", distribution(z), obs=y)

    z = torch.randn(5, 1, requires_grad=True)
    expected = LogJoint(model, (y[1:], True))(z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    spoilt = y.clone()
    spoilt[0] = hidden
    for draws in (z, z[:1]):
        given = LogJoint(model, (spoilt, mask))(draws)
        assert torch.allclose(given, expected[: len(draws)])
        (found,) = torch.autograd.grad(given.sum(), z)
        assert torch.allclose(found[: len(draws)], slope[: len(draws)])


def test_data_that_are_hidden_as_a_whole():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=torch.zeros(3).bool()):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(3))

    z = torch.randn(5, 1)
    assert torch.allclose(LogJoint(model)(z), dist.Normal(0.0, 1.0).log_prob(z[:, 0]))


def test_no_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=torch.zeros(0).bool()):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(0))

    z = torch.randn(5, 1)
    assert torch.allclose(LogJoint(model)(z), dist.Normal(0.0, 1.0).log_prob(z[:, 0]))
