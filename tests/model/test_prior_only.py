# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A posterior that is the prior, since the data are missing or say nothing about the latents."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import AutoAmortized
from pyro_artransform.model import LogJoint, prior_only
from pyro_artransform.model.prior_only import warn_of_prior, why_prior
from tests.inference.conftest import quick_fit

Y = torch.linspace(-1.0, 2.0, 12)


def normal(y=None, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, scale))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_all_draws_of_the_prior_are_seen():
    """Those near the start and the origin, those far from these, and as many of the prior."""
    values = [draw["z"] for draw in prior_only._draws(LogJoint(lambda: normal(Y)))]
    num_of_each = len(prior_only._DISTANCES) * prior_only._NUM_DRAWS
    assert len(values) == 2 * num_of_each + prior_only._NUM_DRAWS


def by_factor():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", -(z**2))


def by_a_step():
    """The density of the data is constant near the start, with a gradient of zero everywhere."""
    z = pyro.sample("z", dist.Normal(0.0, 100.0))
    pyro.sample("y", dist.Normal((z.abs() > 20.0).float(), 1.0), obs=torch.ones(()))


def mixture(apart=3.0):
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate("rows", len(Y)):
        k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(apart * k, 1.0), obs=Y)


def computed():
    pyro.deterministic("twice", 2 * pyro.sample("z", dist.Normal(0.0, 1.0)))


def empty():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([0]).to_event(1), obs=Y[:0])


def of_others():
    pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=Y)


def masked():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(Y)), poutine.mask(mask=torch.zeros(len(Y), dtype=torch.bool)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y)


WITH_DATA = {
    "obs": lambda: normal(Y),
    "condition": poutine.condition(normal, {"y": Y}),
    "factor": by_factor,
    "step": by_a_step,
    "mixture": mixture,
}
WITHOUT = {"none": normal, "deterministic": computed}
CONSTANT = {
    "empty": empty,
    "others": of_others,
    "enumerated": lambda: mixture(0.0),
    "masked": masked,
}


@pytest.mark.parametrize("model", WITH_DATA.values(), ids=list(WITH_DATA))
def test_data_that_depend_on_latents(model):
    assert why_prior(LogJoint(model)) == ""


@pytest.mark.parametrize("model", WITHOUT.values(), ids=list(WITHOUT))
def test_no_observed_site(model):
    assert "has no observed site" in why_prior(LogJoint(model))


@pytest.mark.parametrize("model", CONSTANT.values(), ids=list(CONSTANT))
def test_data_that_depend_on_no_latent(model):
    assert "(y) do not depend on any latent" in why_prior(LogJoint(model))


def test_it_leaves_the_random_numbers_alone():
    log_joint, state = LogJoint(mixture), torch.get_rng_state()
    warn_of_prior(log_joint)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("is_observed", [True, False])
def test_of_an_amortized_guide_with_a_loader(is_observed):
    def model(y):
        with pyro.plate("rows", len(Y), subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y if is_observed else None)

    guide = AutoAmortized(model, lambda y: y[:, None])
    loader = DataLoader(TensorDataset(Y), batch_size=4)

    def fitted():
        return quick_fit(model, guide, loader=loader, num_steps=2, progress=False)

    if is_observed:
        assert "prior" not in fitted().verdict
        return
    with pytest.warns(UserWarning, match="no observed site"):
        result = fitted()
    assert result.verdict.startswith("The model has no observed site")
    assert not result.trusted


def test_data_of_one_batch_are_enough():
    """Rows of the first batch are masked, those of the second are not."""

    def model(y, mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 8, subsample_size=len(y)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    batches = [(Y[:4], torch.zeros(4).bool()), (Y[4:8], torch.ones(4).bool())]
    assert "prior" not in quick_fit(model, loader=batches, num_steps=2, progress=False).verdict
