# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A guide from a file and a model that may be another one."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Predictive

from pyro_artransform.guides import AutoAmortized, AutoIAF
from tests.guides import models
from tests.guides.training import train


def model_of(loc=None, scale=None, **extra):
    """A regression whose sites may be others."""
    sites = {
        "loc": loc or dist.Normal(torch.tensor(0.0), 3.0),
        "scale": scale or dist.Uniform(torch.tensor(0.1), torch.tensor(5.0)),
        **extra,
    }

    def model(values, obs=None):
        z = {name: pyro.sample(name, fn) for name, fn in sites.items() if fn != "none"}
        with pyro.plate("data", len(values)):
            pyro.sample("obs", dist.Normal(z["loc"].sum(), 1.0), obs=obs)

    return model


@pytest.fixture
def path(tmp_path):
    guide = AutoIAF(model_of(), hidden_dims=8)
    guide(models.data(), models.data())
    guide.save(tmp_path / "guide")
    return tmp_path / "guide"


NORMAL = dist.Normal(torch.tensor(0.0), 1.0)
OTHERS = {
    "missing": (
        model_of(scale="none"),
        r"site 'scale': the model has no such latent: expected the sites of the guide, "
        r"\['loc', 'scale'\], got \['loc'\]",
    ),
    "extra": (
        model_of(more=NORMAL),
        r"site 'more': the guide has no such site: expected .*, got \['loc', 'more', 'scale'\]",
    ),
    "shape": (
        model_of(loc=dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        r"site 'loc': .* expected \(\), got \(2,\)",
    ),
    "support": (
        model_of(scale=dist.HalfNormal(torch.tensor(1.0))),
        r"site 'scale': expected the support Interval\(.*\), .* got GreaterThan",
    ),
    "bound": (
        model_of(scale=dist.Uniform(torch.tensor(0.1), torch.tensor(6.0))),
        r"site 'scale': expected the support .*upper_bound=5.0\), .* got .*upper_bound=6.0",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("validate", [False, True])
def test_another_model(path, name, validate):
    model, message = OTHERS[name]
    pyro.enable_validation(validate)
    guide = AutoIAF.load(path, model)
    later = AutoIAF.load(path)
    later.model = model
    fresh = AutoIAF(model, hidden_dims=8)
    fresh.load_state_dict(torch.load(path)["state"])
    known = [guide, later] if name == "extra" else [guide, later, fresh]
    for loaded in known:
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                loaded(models.data(), models.data())
    # without the model it goes on
    assert set(guide.sample_posterior(2)) == {"loc", "scale"}


def test_its_own_model(path):
    calls = []
    model = model_of()

    def counted(*args):
        calls.append(1)
        return model(*args)

    guide = AutoIAF.load(path, counted)
    guide(models.data(), models.data())
    guide(models.data(), models.data())
    assert len(calls) == 1
    train(guide, 2, lambda values: model(values, values))


def logistic(x, y=None):
    """A regression whose data are discrete."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)


@pytest.mark.parametrize("loaded_with", ["not loaded", None, logistic])
def test_discrete_sites_that_are_predicted(loaded_with, tmp_path):
    guide, x = AutoIAF(logistic, hidden_dims=8), models.data()
    guide(x, (x > 1).to(x.dtype))
    if loaded_with != "not loaded":
        guide.save(tmp_path / "guide")
        guide = AutoIAF.load(tmp_path / "guide", loaded_with)
    for new in (x, x[:3]):
        assert set(guide(new)) == {"slope"}
        predictive = Predictive(logistic, guide=guide, num_samples=4, parallel=new is x)
        assert predictive(new)["y"].shape == (4, len(new))


@pytest.mark.parametrize("kind", [AutoIAF, AutoAmortized])
def test_discrete_data_that_a_new_guide_lacks(kind):
    with pytest.raises(ValueError, match=r"'y' is discrete.* call the guide with the data first"):
        Predictive(logistic, guide=kind(logistic), num_samples=4)(models.data())


def test_bounds_in_another_dtype(path):
    low, high = (torch.tensor(bound, dtype=torch.float32) for bound in (0.1, 5.0))
    guide = AutoIAF.load(path, model_of(scale=dist.Uniform(low, high)))
    guide(models.data(), models.data())
