# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What can be fitted, and what is left behind."""

import math
import re
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoNormal,
)

import pyro_artransform
from pyro_artransform import AutoMAF
from tests.inference import loaders, models
from tests.inference.conftest import quick_fit as fit
from tests.inference.conftest import with_step_size
from tests.inference.models import small


def fitted(model, guide, *args, num_steps=20, num_particles=8, **kwargs):
    options = {"num_steps": num_steps, "num_particles": num_particles, "progress": False}
    return fit(model, guide, *args, **{**options, **kwargs})


def guide_list(model):
    guide = AutoGuideList(model)
    guide.append(small(poutine.block(model, hide=["scale"])))
    guide.append(AutoNormal(poutine.block(model, expose=["scale"])))
    return guide


GUIDES = {
    "diagonal": partial(small, full_rank=False),
    "AutoMAF": lambda model: AutoMAF(model, num_transforms=1, hidden_dims=8),
    "AutoIAFNormal": AutoIAFNormal,
    "a function": lambda model: models.hand_written,
    "a list with one of ours": guide_list,
}


def check(result):
    assert len(result.history) == result.num_steps
    assert all(map(math.isfinite, (result.elbo, result.log_evidence, result.khat)))
    assert result.num_skipped == 0
    return result


def parameters():
    """Copies of all there are, the guide's and the model's."""
    store = pyro.get_param_store()
    return {name: store[name].detach().clone() for name in store.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", GUIDES)
def test_guides(name):
    guide = GUIDES[name](models.regression)
    with poutine.block():
        guide()
    before = parameters()
    result = check(fitted(models.regression, guide))
    after = parameters()
    assert any(not torch.equal(after[k], before[k]) for k in before)
    assert all(value.isfinite().all() for value in after.values())
    assert -60 < result.elbo < -11.9


@pytest.mark.parametrize("kind", [AutoDelta, AutoLaplaceApproximation])
def test_a_point_is_no_posterior(kind):
    guide = kind(models.regression)
    result = fitted(models.regression, guide, num_steps=40)
    assert not result.trusted
    assert "AutoDelta" in result.verdict
    assert math.isfinite(result.khat)
    assert result.history[-1] > result.history[0]


@pytest.mark.parametrize(
    ("name", "kind"), [("scaled", AutoNormal), ("masked", small), ("partly_observed", AutoNormal)]
)
def test_scales_and_masks(name, kind):
    model = getattr(models, name)
    result = check(fitted(model, kind(model), num_steps=30))
    observed = models.data().repeat(2) if name == "scaled" else models.data()[models.data() > 0]
    covariance = torch.eye(len(observed)) + 9 * torch.ones(len(observed), 1)
    distribution = dist.MultivariateNormal(torch.zeros(len(observed)), covariance)
    truth = distribution.log_prob(observed).item()
    assert result.elbo < truth + 0.1
    assert kind is AutoNormal or result.elbo > truth - 0.5


@pytest.mark.parametrize("make", [small, lambda m: AutoNormal(poutine.block(m, hide=["kind"]))])
def test_enumerated(make):
    guide = make(models.mixture)
    result = check(fitted(models.mixture, guide, num_steps=40))
    assert -20 < result.history[-1] < -9
    assert result.elbo < result.log_evidence + 4 * result.log_evidence_se


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_single_precision(kind):
    dtype = torch.float32
    torch.set_default_dtype(torch.float64 if kind is small else dtype)
    values = models.data().to(dtype)
    guide = kind(models.regression)
    check(fitted(models.regression, guide, values))
    assert all(value.dtype == dtype for value in guide.parameters())


def test_arguments():
    def model(x, *, y, scale=1.0):
        slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, scale), obs=y)

    x = torch.linspace(0, 1, 8)
    for kind in (small, AutoNormal):
        guide = kind(model)
        check(fitted(model, guide, x, y=2 * x, scale=0.1, num_steps=50))
        if kind is small:
            assert abs(guide.sample_posterior(100)["slope"].mean() - 2) < 0.1


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_parameters_of_the_model_are_trained(kind):
    """The noise goes from 4 to about the deviation of the data."""
    numbers = with_step_size(0.05)
    fitted(models.with_param, kind(models.with_param), num_steps=100, numbers=numbers)
    assert 0.5 < pyro.param("noise").item() < 3.0


@pytest.mark.parametrize("is_local", [False, True])
def test_module_in_the_model_is_trained(is_local):
    with pyro.settings.context(module_local_params=is_local):
        decoder = models.Decoder()
        before = {name: value.detach().clone() for name, value in decoder.named_parameters()}
        result = check(fitted(decoder, small(decoder), num_steps=40))
        for name, value in decoder.named_parameters():
            assert not torch.equal(value, before[name])
        assert sum(result.history[-10:]) > sum(result.history[:10])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_model_that_is_looped_over(kind):
    model = models.branching
    with pytest.warns(UserWarning, match="one draw at a time, which is slow") as caught:
        result = pyro_artransform.fit(
            model, kind(model), num_steps=2, num_particles=2, progress=False
        )
    check(result)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "one draw at a time" in repr(result)


def test_a_model_that_is_looped_over_says_how_long_a_step_takes():
    def model():
        models.branching()
        time.sleep(0.002)

    guide, state = small(model), torch.get_rng_state()
    with pytest.warns(UserWarning, match="A step of 2 draws takes about") as caught:
        fitted(model, guide, num_steps=1, num_particles=2, seed=0, max_seconds=0.2)
    words = str(caught[0].message)
    assert "models.py, line" in words
    assert 0.004 <= float(re.search(r"about (\S+) seconds", words)[1]) < 4
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_minibatches_that_a_model_draws_are_trained_on_and_not_judged(kind):
    result = fitted(models.subsampled, kind(models.subsampled), num_steps=30)
    assert not result.trusted
    assert result.importance is None
    assert math.isnan(result.khat)
    assert math.isfinite(result.elbo)
    table = " ".join(str(result).split())
    assert "failed not judged, since the model subsamples its data" in table
    assert "remedy Pass loader=" in table
    assert "k-hat" not in table


def test_nothing_to_train():
    guide = AutoLaplaceApproximation(models.location)
    fitted(models.location, guide, num_steps=3)
    with pytest.raises(ValueError, match="nothing to train"):
        fitted(models.location, guide.laplace_approximation())


@pytest.mark.parametrize("name", ["all data", "shuffled", "weighted"])
def test_seed(name):
    def run(seed):
        pyro.clear_param_store()
        torch.manual_seed(7)
        model, options = models.regression, {"num_steps": 5}
        if name != "all data":
            model, options["loader"] = loaders.regression, loaders.KNOWN[name](*loaders.rows())
        guide = small(model)
        pyro.set_rng_seed(99)
        result = fitted(model, guide, seed=seed, **options)
        drawn = torch.rand(3).tolist(), np.random.rand(3).tolist()
        return result, {name: value.tolist() for name, value in parameters().items()}, drawn

    pyro.set_rng_seed(99)
    untouched = torch.rand(3).tolist(), np.random.rand(3).tolist()
    (a, a_state, drawn), (b, b_state, _) = run(1), run(1)
    assert a.history == b.history
    assert repr((a.elbo, a.khat, a.verdict)) == repr((b.elbo, b.khat, b.verdict))  # NaN is itself
    assert a_state == b_state
    assert drawn == untouched
    assert run(2)[0].history != a.history


def test_settings_stay():
    """And parameters are in the store, as after SVI: whoever saves it saves the guide."""
    guide = small(models.regression)
    fitted(models.regression, guide, num_steps=3)
    held = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert {id(value) for value in guide.parameters()} <= held
    assert pyro.distributions.is_validation_enabled()
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in guide.parameters())
    with poutine.trace() as traced:
        fitted(models.location, AutoNormal(models.location), num_steps=3)
    assert "sample" not in {node["type"] for node in traced.trace.nodes.values()}


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_under_no_grad_and_prints_nothing(kind, capfd, caplog):
    with torch.no_grad():
        check(fitted(models.regression, kind(models.regression), num_steps=3))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


WITHOUT_SYMPY = """
import sys

from pyro_artransform import AutoStructuredFlow, fit
from tests.inference.models import regression

fit(regression, AutoStructuredFlow(regression), num_steps=2, draws=0, progress=False)
assert "sympy" not in sys.modules
"""


def test_sympy_is_not_imported():
    """PyTorch imports it for gradients of tensors that are no scalars, which takes up to two seconds."""
    subprocess.run([sys.executable, "-c", WITHOUT_SYMPY], check=True, timeout=120)
