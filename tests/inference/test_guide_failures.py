# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A guide that fails after the chains have ended leaves their draws."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal

from pyro_artransform.diagnostics.checks import Check
from pyro_artransform.inference import FitError, stages
from pyro_artransform.inference.optimization.training import Training
from pyro_artransform.inference.stages import FAILED_GUIDE
from tests.inference.conftest import quick_fit as fit
from tests.inference.models import location, small

OPTIONS = {"seed": 0, "progress": False}


def test_a_guide_without_a_finite_start():
    """Its initial values are outside, where chains soon leave for the half line with density."""

    def half():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(z > 0, 0.0, -torch.inf))

    result = fit(half, **OPTIONS, draws=100)
    assert (result.draws["z"] > 0).all()
    assert not result.trusted
    assert [failed.check for failed in result.judged.failed] == [Check.FAILED]
    assert "ValueError: expected a finite log density near the initial values" in result.verdict
    assert "edge is not finite there" in " ".join(repr(result).split())
    assert (result.stopped_because, result.num_steps) == (FAILED_GUIDE, 0)
    assert math.isnan(result.elbo)
    assert result.importance is None


def test_steps_that_are_not_finite():
    """The model has no density any more once its guide takes steps."""
    is_broken = False

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("data", -0.5 * (z - 1.0) ** 2 + (torch.nan if is_broken else 0.0))

    def callback(step, elbo):
        nonlocal is_broken
        is_broken = True

    options = {**OPTIONS, "num_steps": 1000, "callback": callback}
    result = fit(model, AutoNormal(model), **options, draws=100)
    assert result.chains.trusted
    assert not result.trusted
    assert "FitError: the fit stopped" in result.verdict
    assert result.num_steps < 1000
    is_broken = False
    pyro.clear_param_store()
    guide = AutoNormal(model)
    with pytest.raises(FitError, match=r"the fit stopped.* in a row, because of data\."):
        fit(model, guide, **options, draws=0)
    assert all(parameter.isfinite().all() for parameter in guide.parameters())


def out_of_memory(*_):
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("place", ["find_start", "check_start", "step", "finish", "evaluate"])
def test_any_failure_of_a_guide_leaves_the_draws(monkeypatch, place):
    target = stages if place in ("find_start", "evaluate") else Training
    monkeypatch.setattr(target, place, lambda *_, **__: out_of_memory())
    result = fit(location, small(location), **OPTIONS, draws=100, num_steps=3)
    assert result.chains.trusted
    assert not result.trusted
    assert "OutOfMemoryError: no memory" in result.verdict
    with pytest.raises(torch.OutOfMemoryError):
        fit(location, small(location), **OPTIONS, draws=0, num_steps=3)


def test_an_error_of_a_callback_is_raised():
    def callback(step, elbo):
        raise ValueError("of the user")

    with pytest.raises(ValueError, match="of the user"):
        fit(location, small(location), **OPTIONS, draws=100, num_steps=3, callback=callback)
