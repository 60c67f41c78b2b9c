# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Data that Pyro's validation refuses are refused here, too, and where it is off they are not."""

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine

from pyro_artransform.joint import LogJoint
from pyro_artransform.posterior import log_likelihood

X, LABELS = torch.ones(5, 2), torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0])


def likelihood(distribution, y, *, mask=None):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=True if mask is None else mask):
            pyro.sample("y", distribution(z), obs=y)

    return model


@pytest.mark.parametrize(
    ("distribution", "y"),
    [
        (lambda z: dist.Bernoulli(logits=z), LABELS),
        (lambda z: dist.Bernoulli(logits=z).mask(True), LABELS),
        (lambda z: dist.Poisson(z.exp()), torch.tensor([1.0, 1.5])),
        (lambda z: dist.Binomial(3, logits=z), torch.tensor([1.0, 4.0])),
        (lambda z: dist.Exponential(z.exp()), torch.tensor([1.0, -1.0])),
        (lambda z: dist.Beta(z.exp(), 1.0), torch.tensor([0.5, 1.5])),
        (lambda z: dist.Normal(z, 1.0), torch.tensor([0.5, torch.nan])),
        (lambda z: dist.Normal(z + torch.zeros(2), 1.0).to_event(1), X * torch.nan),
    ],
    ids=[
        "labels",
        "masked distribution",
        "count",
        "of three",
        "negative",
        "above one",
        "NaN",
        "NaN of event",
    ],
)
def test_data_outside_of_the_support(distribution, y):
    model = likelihood(distribution, y)
    with pytest.raises(
        ValueError, match=r"site 'y': expected data within the support of \w+ .*got"
    ):
        LogJoint(model)
    with pyro.validation_enabled(False):
        LogJoint(model)


@pytest.mark.parametrize("in_plate", [False, True])
def test_data_that_broadcast_against_their_distribution(in_plate):
    """(20,) beside (20, 1): 400 terms, whose posterior is another one."""
    x, y = torch.randn(20, 1), torch.randn(20)

    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        distribution = dist.Normal(b * x, 1.0)
        if in_plate:
            with pyro.plate("data", 20):
                pyro.sample("y", distribution.to_event(1), obs=y)
        else:
            pyro.sample("y", distribution, obs=y)

    message = r"'y'.* data of shape \(20,\) and a distribution of shape \(20, 1\).* 400 terms"
    with pytest.raises(ValueError, match=message):
        LogJoint(model, (x, y))
    with pytest.raises(ValueError, match=message):
        log_likelihood(model, {"b": torch.zeros(5)}, x, y)
    LogJoint(model, (x, y[:, None]))


def test_one_distribution_of_many_data_and_one_datum_of_many():
    def model(y, size):
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    LogJoint(model, (torch.zeros(20), 1))
    LogJoint(model, (torch.zeros(()), 20))


@pytest.mark.parametrize("y", [np.zeros(5), [0.0] * 5, 0.0], ids=["array", "list", "number"])
def test_data_that_are_no_tensor(y):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'y': expected data as a tensor, got .*torch\.as_tensor"):
        LogJoint(model, (y,))


def test_masked_data_may_be_anything():
    y, mask = torch.tensor([0.5, torch.nan]), torch.tensor([True, False])
    LogJoint(likelihood(lambda z: dist.Normal(z, 1.0), y, mask=mask))


def test_a_support_that_depends_on_a_latent():
    """The start may be outside of it."""
    LogJoint(likelihood(lambda z: dist.Uniform(0.0, z.exp()), torch.tensor([0.1, 50.0])))


def test_data_that_broadcast():
    """Twenty-five terms in place of five, of another posterior."""

    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal((X * b).sum(-1), 1.0), obs=y)

    LogJoint(model, (torch.zeros(5),))
    with pytest.raises(ValueError, match=r'site "y", invalid log_prob shape'):
        LogJoint(model, (torch.zeros(5, 1),))


def test_a_latent_that_broadcasts():
    def model():
        with pyro.plate("groups", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0))

    with pytest.raises(ValueError, match=r'site "z", invalid log_prob shape'):
        LogJoint(model)


def test_sites_in_no_plate_are_summed():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))

    expected = 2 * dist.Normal(0.0, 1.0).log_prob(torch.zeros(3)).sum()
    assert LogJoint(model)(torch.zeros(1, 3)).item() == pytest.approx(expected.item())


def test_a_last_batch_of_one_row():
    """It would count for all elements that a mini-batch has."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 101, subsample_size=50):
            pyro.sample(
                "y", dist.Normal(z, torch.ones(y.shape[1:])).to_event(max(y.dim() - 1, 0)), obs=y
            )

    message = r"'y': expected data of 50 elements of the sub-sampled plate 'data', got one"
    for event in ((), (2,)):
        log_joint = LogJoint(model, (torch.zeros(50, *event),))
        with pytest.raises(ValueError, match=message):
            log_joint.with_arguments((torch.zeros(1, *event),))
        with pytest.raises(ValueError, match=message):
            LogJoint(model, (torch.zeros(1, *event),))
    LogJoint(model, (torch.tensor(0.0),))
