# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Predictions at draws of a posterior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_artransform.posterior import predict

N, NUM_GROUPS = 400, 3


def regression(x, y=None, group=None):
    """A product with a vector, a scalar, groups, and two plates."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", NUM_GROUPS, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    mean = pyro.deterministic("mean", x @ b)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean + a[group, 0], sigma), obs=y)


def draws_of(n):
    return {
        "b": torch.randn(n, 2),
        "sigma": torch.full((n,), 0.5),
        "a": torch.arange(3.0).reshape(3, 1).expand(n, 3, 1),
    }


@pytest.mark.parametrize("data", [None, torch.zeros(5)], ids=["new predictors", "the data"])
def test_data_are_drawn_at_each_draw(data):
    """Their mean is that of the draw, and their sd its sigma, to five standard errors of 2,000 numbers."""
    pyro.set_rng_seed(0)
    x, group, draws = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]), draws_of(N)
    found = predict(regression, draws, x, data, group=group)
    assert {name: value.shape for name, value in found.items()} == {"y": (N, 5), "mean": (N, 5)}
    torch.testing.assert_close(found["mean"], draws["b"] @ x.T)
    residual = found["y"] - found["mean"] - group
    assert residual.mean().abs() < 5 * 0.5 / (5 * N) ** 0.5
    assert (residual.std() - 0.5).abs() < 5 * 0.5 / (10 * N) ** 0.5


def test_latents_without_draws_are_drawn_from_their_priors():
    pyro.set_rng_seed(0)
    x, group = torch.zeros(3, 2), torch.arange(3)
    draws = draws_of(N)
    del draws["a"]
    found = predict(regression, draws, x, group=group)
    assert found["a"].shape == (N, NUM_GROUPS, 1)
    assert (found["a"].std() - 1).abs() < 5 / (6 * N) ** 0.5
    assert ((found["y"] - found["a"][..., 0]).std() - 0.5).abs() < 5 * 0.5 / (6 * N) ** 0.5


def test_factors_are_no_data_and_discrete_latents_are_drawn():
    @config_enumerate
    def mixture(y):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.factor("penalty", -p)
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(10 * k, 1.0), obs=y)

    pyro.set_rng_seed(0)
    found = predict(mixture, {"p": torch.full((N,), 0.25)}, torch.zeros(2))
    assert found.keys() == {"k", "y"}
    # five standard errors of 800 draws
    assert (found["k"].mean() - 0.25).abs() < 5 * (0.1875 / (2 * N)) ** 0.5
    assert torch.equal(found["y"] > 5, found["k"] == 1)


@pytest.mark.parametrize(
    ("draws", "words"),
    [
        ({"b": torch.zeros(5, 3)}, "expected 'b' of shape"),
        ({}, "got none; for draws of the prior use"),
    ],
)
def test_what_is_refused(draws, words):
    with pytest.raises(ValueError, match=words):
        predict(regression, draws, torch.zeros(3, 2), group=torch.arange(3))


def test_a_plate_that_takes_a_part_of_its_rows():
    """As models of mini-batches have it: predictions need no data."""

    def model(x, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(b * x, 0.1), obs=y)

    found = predict(model, {"b": torch.full((50,), 2.0)}, torch.ones(3))["y"]
    assert found.shape == (50, 3)
    assert found.mean() == pytest.approx(2.0, abs=0.05)  # six standard errors
