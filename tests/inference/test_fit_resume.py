# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A fit that goes on from a file is as if nothing had been."""

import math
import os
from functools import partial

import pyro
import pyro.optim
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_artransform import AutoAmortized, AutoAutoregressive, affine_autoregressive
from pyro_artransform._base import files
from pyro_artransform.model.replay import capture
from tests.guides.amortized import hierarchies
from tests.inference import models
from tests.inference.conftest import QUICK, SOON
from tests.inference.conftest import quick_fit as fit
from tests.inference.models import small
from tests.inference.test_fit import parameters


def fresh(model, kind, seed=0):
    """As in a new process: neither store nor guide know anything."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model = model() if isinstance(model, type) else model
    return model, kind(model)


def fitted(model, guide, num_steps=24, **kwargs):
    options = {"num_steps": num_steps, "num_particles": 4, "draws": 0, "progress": False}
    return fit(model, guide, **{**options, **kwargs})


def stop_at(at):
    return lambda step, elbo: step == at


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def any_order(model):
    """A guide whose order is drawn when it is made: a buffer, and no parameter."""
    flow = lambda dim: affine_autoregressive(dim, 8, order=torch.randperm(dim))  # noqa: E731
    return AutoAutoregressive(model, flow=flow)


CASES = {
    "ours, any order": (models.gaussian, any_order),
    "stock": (models.regression, AutoMultivariateNormal),
    "function": (models.regression, lambda model: models.hand_written),
    "model with a parameter, stock": (models.with_param, AutoNormal),
    "module": (models.Decoder, small),
}


@pytest.mark.parametrize("name", CASES)
def test_no_step_is_lost(name, tmp_path):
    (model, kind), path = CASES[name], tmp_path / "fit.pt"
    whole = fitted(*fresh(model, kind), seed=3)
    expected = parameters()
    part = fitted(*fresh(model, kind), seed=3, checkpoint=path, callback=stop_at(11))
    assert part.num_steps == 11
    assert not same(expected, parameters())
    rest = fitted(*fresh(model, kind, seed=1), resume=path)
    assert rest.history == whole.history
    assert expected
    assert same(expected, parameters())
    assert (rest.elbo, rest.khat) == (whole.elbo, whole.khat)
    for field in ("num_steps", "num_gradients", "start", "stopped_because"):
        assert getattr(rest, field) == getattr(whole, field), field


def test_no_step_of_an_amortized_guide_is_lost(tmp_path):
    """Its gradients differ by round-off where memory is aligned otherwise; other draws by nats."""
    model, path = partial(hierarchies.minibatch, hierarchies.data()), tmp_path / "fit.pt"
    options = {"num_steps": 8, "seed": 3}
    whole = fitted(*fresh(model, AutoAmortized), **options)
    fitted(*fresh(model, AutoAmortized), **options, checkpoint=path, callback=stop_at(5))
    rest = fitted(*fresh(model, AutoAmortized, seed=1), num_steps=8, resume=path)
    assert rest.history == pytest.approx(whole.history, rel=1e-3)


def test_a_fit_that_ends_by_itself(tmp_path):
    path = tmp_path / "fit.pt"
    whole = fitted(*fresh(models.regression, small), seed=3, num_steps=None, numbers=SOON)
    expected = parameters()
    options = {"num_steps": None, "numbers": SOON}
    part = {"checkpoint": path, "callback": stop_at(whole.num_steps - 15)}
    fitted(*fresh(models.regression, small), seed=3, **options, **part)
    rest = fitted(*fresh(models.regression, small), resume=path, **options)
    assert rest.history == whole.history
    assert rest.stopped_because == whole.stopped_because
    assert same(expected, parameters())


def test_skipped_steps_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "_PATIENCE", 10**9)  # the model runs in each step
    path = tmp_path / "fit.pt"

    def model():
        models.location()
        pyro.factor("odd", torch.tensor(math.nan if model.is_bad else 0.0))

    def callback(step, elbo):
        model.is_bad = step in (3, 5)
        return step == 8

    model.is_bad = False
    with pyro.validation_enabled(False):
        part = fitted(*fresh(model, small), seed=1, checkpoint=path, callback=callback)
        rest = fitted(*fresh(model, small), resume=path)
    assert part.num_skipped == rest.num_skipped == 2
    assert part.culprits == rest.culprits == {"odd": 2}
    assert [step for step, elbo in enumerate(rest.history, 1) if math.isnan(elbo)] == [4, 6]


def test_a_disk_that_is_full_ends_no_fit(tmp_path):
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "fit.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    numbers = {**QUICK, "optimization.steps._CHECKPOINT_EVERY": 5}

    def callback(step, elbo):
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    options = {"num_steps": 12, "numbers": numbers, "seed": 3}
    given = {"checkpoint": path, "callback": callback, **options}
    try:
        with pytest.warns(UserWarning, match=r"fit\.pt.*continues without") as caught:
            whole = fitted(*fresh(models.regression, small), **given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {warning.filename.split("/")[-1] for warning in caught} == {"conftest.py"}
    assert os.listdir(tmp_path) == ["fit.pt"]
    assert len(files.read(path, "a checkpoint of fit, format 11")["training"]["losses"]) == 5
    rest = fitted(*fresh(models.regression, small), resume=path, **options)
    assert rest.history == whole.history


def test_a_place_for_checkpoints_that_is_none(tmp_path):
    steps = {}
    for path in (tmp_path / "missing" / "fit.pt", tmp_path):
        options = {"checkpoint": path, "callback": steps.__setitem__}
        with pytest.raises(
            ValueError, match="checkpoint: expected a file in an existing directory"
        ):
            fitted(*fresh(models.regression, small), **options)
    assert not steps


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "fit.pt"
    fitted(*fresh(models.regression, small), checkpoint=path, callback=stop_at(5))
    return path


def test_of_another_model_or_guide(path):
    others = {
        "another model": (models.gaussian, small),
        "another guide": (models.regression, AutoNormal),
        "a function": (models.regression, lambda model: models.hand_written),
        "more parameters": (models.with_param, small),
    }
    for name, case in others.items():
        with pytest.raises(ValueError, match=r"resume: expected|checkpoint: expected"):
            pytest.fail(f"{name}: {fitted(*fresh(*case), resume=path)}")
    files.write(path, "another file", {})
    with pytest.raises(
        ValueError, match=r"fit\.pt: expected a checkpoint of fit, format 11, got another"
    ):
        fitted(*fresh(models.regression, small), resume=path)


def test_with_other_options(path):
    with pytest.raises(ValueError, match="num_steps=24, as before, got 30"):
        fitted(*fresh(models.regression, small), num_steps=30, resume=path)
    with pytest.raises(ValueError, match="num_particles=4, as before, got 5"):
        fit(*fresh(models.regression, small), num_particles=5, progress=False, resume=path)
    # it need not be given again
    rest = fit(*fresh(models.regression, small), num_particles=4, progress=False, resume=path)
    assert rest.num_steps == 24
