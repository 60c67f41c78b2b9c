# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Masks of data, which have no part in the density and in its gradient, and of latents."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine

from pyro_artransform.joint import LogJoint
from pyro_artransform.posterior import log_likelihood


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


@pytest.mark.parametrize("mask", [torch.zeros(3).bool(), torch.tensor(False)], ids=["each", "all"])
@pytest.mark.parametrize("strategy", ["plate", "vmap", "loop"])
def test_data_that_are_hidden_as_a_whole(mask, strategy):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            pyro.sample("y", dist.LogNormal(z, 1.0), obs=torch.full((3,), torch.nan))

    z = torch.randn(5, 1, requires_grad=True)
    log_joint = LogJoint(model)
    log_joint.strategy = strategy
    found = log_joint(z)
    assert torch.allclose(found, dist.Normal(0.0, 1.0).log_prob(z[:, 0]))
    (slope,) = torch.autograd.grad(found.sum(), z)
    assert torch.allclose(slope, -z)
    terms = log_likelihood(model, {"z": torch.randn(4)})["y"]
    assert torch.equal(terms, torch.zeros(4, 3))


def test_no_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=torch.zeros(0).bool()):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(0))

    z = torch.randn(5, 1)
    assert torch.allclose(LogJoint(model)(z), dist.Normal(0.0, 1.0).log_prob(z[:, 0]))


def test_masked_latents_have_their_prior():
    def model():
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=z[0], obs_mask=is_there)

    z = torch.randn(4, 2)
    is_there = torch.tensor([True, False])
    expected = dist.Normal(0.0, 1.0).log_prob(z[0, 0]) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_joint = LogJoint(model)
    assert log_joint.strategy == "plate"
    assert torch.allclose(log_joint(z), expected)


@pytest.mark.parametrize("mask", [torch.tensor(False), torch.tensor([True, False])], ids=str)
def test_masked_latents_that_data_depend_on_have_none(mask):
    """As in Pyro: their prior would change the posterior."""
    y = torch.tensor([1.0, 2.0])

    def model():
        with pyro.plate("data", 2):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                other = pyro.sample("other", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        return other

    log_joint, z = LogJoint(model), torch.randn(4, 8)
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    expected = dist.Normal(z[:, :2], 1.0).log_prob(y).sum(-1) + prior[:, 2:].sum(-1)
    expected = expected + (prior[:, :2] * mask).sum(-1)
    assert log_joint.improper == {"z"}
    assert log_joint.strategy == "plate"
    assert torch.allclose(log_joint(z), expected)
    assert torch.allclose(log_joint.with_arguments(())(z), expected)
