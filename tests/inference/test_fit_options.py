# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The options of a fit, and parameters of a model of their names."""

import inspect
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import nn

from pyro_artransform import AutoIAF, fit
from pyro_artransform.inference import FitConfig
from tests.inference import models
from tests.inference.conftest import quick_fit

OPTIONS = sorted(
    name
    for name, parameter in inspect.signature(fit).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


class Model(nn.Module):
    def forward(self, seed):
        """Nothing."""


def with_parameter(name):
    space = {}
    exec(f"def model(x=None, {name}=None): pass", space)
    return space["model"]


@pytest.mark.parametrize("name", [*OPTIONS, "a partial", "a module"])
def test_model_with_a_parameter_of_an_options_name(name):
    models_ = {"a partial": partial(with_parameter("seed"), x=1.0), "a module": Model()}
    model = models_.get(name) or with_parameter(name)
    name = "seed" if name in models_ else name
    with pytest.raises(ValueError, match=rf"'{name}'.*functools.partial\(model, {name}="):
        fit(model, AutoIAF(model))


def test_bound_parameters_are_none():
    def model(num_steps):
        pyro.sample("z", dist.Normal(0.0, float(num_steps)))

    for bound in (
        partial(model, num_steps=3),
        partial(model, 3),
        poutine.scale(partial(model, 3), scale=1.0),
    ):
        guide = AutoIAF(partial(model, num_steps=3), num_transforms=1, hidden_dims=4)
        result = quick_fit(bound, guide, num_steps=2, num_particles=4, progress=False)
        assert result.num_steps == 2


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_steps", 0, "a positive integer, got 0"),
        ("num_steps", 1.5, "a positive integer, got 1.5"),
        ("num_particles", True, "a positive integer, got True"),
        ("seed", -1, "an integer of at least 0, got -1"),
        ("seed", "7", "an integer of at least 0, got '7'"),
    ],
)
def test_numbers_out_of_range(name, value, expected):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"{name}: expected {expected}"):
        fit(models.regression, **{name: value})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make_guide", [None, AutoIAF], ids=["chosen", "given"])
def test_a_new_guide_is_new_whatever_was_fitted_before(quick, make_guide):
    """Pyro's store has the parameters of the last fit under its name."""
    histories = []
    for model in (models.scaled, models.location, models.location):
        guide = [] if make_guide is None else [make_guide(model)]
        result = fit(model, *guide, num_steps=5, seed=1, progress=False, config=quick)
        histories.append(result.history)
        del guide, result
    assert histories[1] == histories[2]
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {"AutoIAF"}


def test_a_new_guide_goes_on_from_a_store_that_was_loaded(quick, tmp_path):
    fit(models.regression, num_steps=5, progress=False, config=quick)
    store = pyro.get_param_store()
    saved = {name: value.detach().clone() for name, value in store.items()}
    store.save(str(tmp_path / "store"))
    store.clear()
    store.load(str(tmp_path / "store"))
    guide = AutoIAF(models.regression)
    guide.drop_orphans()
    guide()
    for name, value in guide.transform.named_parameters():
        assert torch.equal(value, saved[f"AutoIAF.transform$$${name}"])
    guide.drop_orphans()
    assert len(store) == len(saved)


def test_what_is_not_a_setting_or_a_callback():
    for config in ({"num_steps": 3}, FitConfig):
        with pytest.raises(TypeError, match="config: expected a FitConfig, got"):
            fit(models.regression, config=config)
    with pytest.raises(TypeError, match="callback: expected a function, got 3"):
        fit(models.regression, callback=3)


def test_inference_mode():
    """There are no gradients in it, and it cannot be left for what was made in it."""
    guide = AutoIAF(models.location)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"expected .* outside of torch\.inference_mode"),
    ):
        fit(models.location, guide, num_steps=2, progress=False)
    with torch.no_grad():
        quick_fit(models.location, guide, num_steps=2, progress=False)


def test_settings_are_public():
    config = FitConfig()
    config = replace(config, optimization=replace(config.optimization, tail_steps=0))
    counts = {}
    for name, settings in (("default", None), ("without tails", config)):
        guide = models.small(models.location)
        options = {"num_steps": 20, "num_particles": 4, "progress": False, "config": settings}
        options["optim"] = pyro.optim.Adam({"lr": 1e-3})  # no search of a step size
        counts[name] = fit(models.location, guide, **options).num_gradients
    assert counts["without tails"] < counts["default"]


IN_A_NEW_PROCESS = """
import sys
import pyro
import torch
from pyro import distributions as dist
from pyro_artransform import AutoIAF, fit

def model():
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    pyro.sample("y", dist.Poisson(rate), obs=torch.tensor(7.0))

fit(model, AutoIAF(model), num_steps=3, progress=False)
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_imports_no_compiler():
    # the first optimizer of PyTorch in a process does, which takes 0.7 s of CPU time
    command = [sys.executable, "-W", "ignore", "-c", IN_A_NEW_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
