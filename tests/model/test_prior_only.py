# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior that is the prior, since there are no data."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import AutoAmortized, AutoIAF
from pyro_artransform.model import LogJoint
from tests.inference.conftest import quick_fit

Y = torch.linspace(-1.0, 2.0, 12)


def normal(y=None, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, scale))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def by_factor():
    pyro.factor("f", -(pyro.sample("z", dist.Normal(0.0, 1.0)) ** 2))


def computed():
    pyro.deterministic("twice", 2 * pyro.sample("z", dist.Normal(0.0, 1.0)))


@pytest.mark.parametrize(
    ("model", "has_data"),
    [
        (lambda: normal(Y), True),
        (poutine.condition(normal, {"y": Y}), True),
        (by_factor, True),
        (normal, False),
        (computed, False),
    ],
)
def test_an_observed_site_or_a_factor(model, has_data):
    assert LogJoint(model).has_data == has_data


def of_rows(y, is_observed=True):
    with pyro.plate("rows", len(Y), subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y if is_observed else None)


@pytest.mark.parametrize("is_observed", [True, False])
def test_of_an_amortized_guide_with_a_loader(is_observed):
    def model(y):
        of_rows(y, is_observed)

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


def test_of_a_guide_that_was_set_up():
    """Whose set-up hides the data."""
    guide = AutoIAF(normal)
    guide(Y)
    assert "prior" not in quick_fit(normal, guide, Y, num_steps=2, progress=False).verdict
