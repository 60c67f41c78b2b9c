# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import sys
import types
import warnings

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam

from pyro_artransform import AutoIAF
from pyro_artransform.posterior import to_inference_data
from tests.model.models import data
from tests.posterior.test_log_likelihood import FACTORS


def model(values=None):
    """A scalar, a vector and a deterministic site, and data in a plate."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("total", beta.sum(-1))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(beta[..., 0], scale), obs=values)


@pytest.fixture(scope="module")
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("arviz")


def sites_of(found):
    """The sites of each group, and what they are of one chain."""
    groups = sorted(found.groups() if callable(found.groups) else found.children)
    values = {k: found[k].data_vars.items() for k in groups}
    return {k: {name: torch.tensor(v.values) for name, v in group} for k, group in values.items()}


@pytest.mark.parametrize("make", [AutoIAF, AutoNormal])
def test_to_inference_data(arviz, make):
    found = sites_of(to_inference_data(model, make(model), 50, data()))
    assert {
        k: {name: tuple(v.shape) for name, v in group.items()} for k, group in found.items()
    } == {
        "posterior": {"scale": (1, 50), "beta": (1, 50, 2), "total": (1, 50)},
        "posterior_predictive": {"y": (1, 50, 5)},
        "log_likelihood": {"y": (1, 50, 5)},
        "observed_data": {"y": (5,)},
    }
    drawn = {name: value[0] for name, value in found["posterior"].items()}
    assert torch.allclose(drawn["total"], drawn["beta"].sum(-1))
    expected = dist.Normal(drawn["beta"][:, :1], drawn["scale"][:, None]).log_prob(data())
    assert torch.allclose(found["log_likelihood"]["y"][0], expected)
    assert torch.allclose(found["observed_data"]["y"], data())
    assert not torch.isin(found["posterior_predictive"]["y"], data()).any()


def test_deterministic_sites_in_plates(arviz):
    """What a reparametrizer computes is one, and no data."""

    @pyro.poutine.reparam(config={"z": LocScaleReparam(0.0)})
    def schools(values):
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(mean, 2.0))
            doubled = pyro.deterministic("doubled", 2 * z)
            pyro.sample("y", dist.Normal(doubled, 1.0), obs=values)

    found = sites_of(to_inference_data(schools, AutoIAF(schools), 6, data()))
    assert set(found["posterior"]) == {"doubled", "mean", "z", "z_decentered"}
    for name in ("posterior_predictive", "log_likelihood", "observed_data"):
        assert list(found[name]) == ["y"]
    group = {name: value[0] for name, value in found["posterior"].items()}
    assert group["z"].shape == group["doubled"].shape == (6, 5)
    assert torch.allclose(group["z"], group["mean"][:, None] + 2 * group["z_decentered"])
    assert torch.allclose(group["doubled"], 2 * group["z"])


def test_deterministic_sites_are_computed_from_the_data(arviz):
    def residuals(values):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        mask = torch.tensor([True, True, False, True, True])
        with pyro.plate("data", 5):
            y = pyro.sample("y", dist.Normal(mean, 1.0), obs=values, obs_mask=mask)
            pyro.deterministic("residual", y - mean)

    found = sites_of(to_inference_data(residuals, AutoIAF(residuals), 5, data()))
    assert list(found["posterior_predictive"]) == ["y_observed"]
    group = {name: value[0] for name, value in found["posterior"].items()}
    expected = data().repeat(5, 1)
    expected[:, 2] = group["y_unobserved"][:, 2]
    assert torch.equal(group["y"], expected)
    assert torch.allclose(group["residual"], expected - group["mean"][:, None])
    assert not torch.isin(found["posterior_predictive"]["y_observed"], data()).any()


@pytest.mark.parametrize(
    ("kind", "seed"), [("deterministic", 0), ("deterministic", 1), ("data", 2)]
)
def test_a_site_at_some_draws_only(arviz, kind, seed):

    def branches(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=values)
        if z > 0 and kind == "data":
            pyro.sample("x", dist.Normal(z, 1.0), obs=values)
        elif z > 0:
            pyro.deterministic("x", z**2)

    guide = AutoIAF(branches, init_scale=1.0)
    pyro.set_rng_seed(seed)
    with pytest.raises(
        ValueError, match="expected the same sites at each draw, got 'x' only at some"
    ):
        to_inference_data(branches, guide, 20, data()[0])


def test_discrete_latents_that_are_summed_out_have_no_likelihood(arviz):
    """Terms without them would be wrong numbers for leave-one-out cross-validation."""

    @config_enumerate
    def mixture(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            kind = pyro.sample("kind", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(z + kind, 1.0), obs=values)
        pyro.sample("other", dist.Normal(z, 1.0), obs=torch.ones(()))

    words = (
        r"left out because of discrete latents .*\(kind\). Draw them by pyro.infer.infer_discrete"
    )
    with pytest.warns(UserWarning, match=words) as caught:
        found = sites_of(to_inference_data(mixture, AutoIAF(mixture), 20, data()))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "log_likelihood" not in found
    assert found["posterior_predictive"]["y"].shape == (1, 20, 5)


@pytest.mark.parametrize("model", FACTORS)
def test_without_terms_of_all_data_there_is_no_likelihood(arviz, model):
    with pytest.warns(UserWarning, match="log_likelihood is left out because of the factor 'soft'"):
        found = sites_of(to_inference_data(model, AutoIAF(model), 20, data()))
    assert "log_likelihood" not in found
    assert "posterior_predictive" in found
    hidden = poutine.block(model, hide=["soft"])
    assert "log_likelihood" in sites_of(to_inference_data(hidden, AutoIAF(model), 20, data()))


def regression_with_mean(x, values=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = pyro.deterministic("mean", x @ beta)
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(mean, 0.01), obs=values)
    pyro.deterministic("residual", y - mean)


def regression_by_loop(x, values=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    for i, row in enumerate(x):
        loc = row[0] * beta[0].item() + row[1] * beta[1].item()
        pyro.sample(f"y_{i}", dist.Normal(loc, 0.01), obs=None if values is None else values[i])


@pytest.mark.parametrize("model", [regression_with_mean, regression_by_loop])
def test_predictions_for_new_rows(arviz, model):
    """As many new rows as coefficients, which would hide a dimension in the wrong place."""
    guide = AutoIAF(model, init_scale=1.0)
    guide(torch.randn(5, 2), torch.zeros(5))
    new = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    found = sites_of(to_inference_data(model, guide, 2, new))
    assert set(found) == {"posterior", "predictions"}
    assert set(found["posterior"]) == {"beta"}
    group = {name: value[0] for name, value in found["predictions"].items()}
    y = group["y"] if "y" in group else torch.stack([group["y_0"], group["y_1"]], -1)
    mean = found["posterior"]["beta"][0] @ new.T
    assert torch.allclose(y, mean, atol=0.1)
    assert not torch.allclose(y, mean, atol=1e-5)
    if model is regression_with_mean:
        assert set(group) == {"y", "mean", "residual"}
        assert torch.allclose(group["mean"], mean, atol=1e-5)
        assert torch.allclose(group["residual"], y - mean, atol=1e-5)


def test_predictions_beside_data(arviz):
    """They follow from the data, not from what the posterior predictive puts in place of these."""

    def walk(first, second=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("first", dist.Normal(z, 1.0), obs=first)
        pyro.sample("second", dist.Normal(y, 0.01), obs=second)

    guide = AutoIAF(walk)
    guide(torch.tensor(9.0), torch.tensor(9.0))
    found = sites_of(to_inference_data(walk, guide, 20, torch.tensor(9.0)))
    assert set(found) == {"posterior", "predictions", "posterior_predictive", "observed_data"}
    assert torch.allclose(found["predictions"]["second"], torch.tensor(9.0), atol=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [(AutoIAF, "with these arguments the model has"), (AutoNormal, "draws: expected 'z'")],
)
def test_predictions_with_latents_of_other_shapes(arviz, make, words):
    def model(size, values=None):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=values)

    guide = make(model)
    guide(5, data())
    with pytest.raises(ValueError, match=rf"{words}.*3.*5"):
        to_inference_data(model, guide, 20, 3)


def test_newer_arviz_takes_one_dict(monkeypatch):
    given = {}

    def from_dict(data, *, name=None):
        given.update(data)
        return "tree"

    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(from_dict=from_dict))
    assert to_inference_data(model, AutoIAF(model), 7, data()) == "tree"
    assert list(given) == ["posterior", "posterior_predictive", "log_likelihood", "observed_data"]
    assert given["posterior"]["beta"].shape == (1, 7, 2)


def test_without_draws_or_without_arviz(monkeypatch):
    with pytest.raises(ValueError, match="num_samples: expected a positive integer, got"):
        to_inference_data(model, AutoIAF(model), 0, data())
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install arviz"):
        to_inference_data(model, AutoIAF(model), 10, data())
