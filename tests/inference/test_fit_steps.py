# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The steps of a fit: callbacks, optimizers, steps that are not finite."""

import gc
import math
import re
import signal
import weakref
from functools import partial

import numpy as np
import pyro
import pyro.optim
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_artransform import AutoAmortized, AutoIAF
from pyro_artransform._base import time_limit
from pyro_artransform.inference import FitError
from pyro_artransform.inference.initialization.start import UNCHANGED
from pyro_artransform.inference.optimization.schedule import _DECAY
from pyro_artransform.model.replay import capture
from tests.inference import models
from tests.inference.conftest import SOON, with_step_size
from tests.inference.conftest import quick_fit as fit
from tests.inference.models import small
from tests.inference.test_fit import fitted


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_ends_by_itself(kind):
    model = models.regression  # a flow guide of a Gaussian starts at its end
    result = fitted(model, kind(model), num_steps=None, numbers=SOON)
    assert 36 < result.num_steps <= 100 + _DECAY
    assert "ELBO" in result.stopped_because
    # steps for the tails have twice as many draws
    assert result.num_gradients - 8 * result.num_steps in (0, 8 * _DECAY)


def test_callback_that_logs():
    model, log = models.regression, {}
    result = fitted(model, small(model), num_steps=7, callback=log.__setitem__)
    assert log == dict(enumerate(result.history, start=1))
    assert "number of steps (7)" in result.stopped_because


@pytest.mark.parametrize(
    ("answer", "stops"),
    [
        *((answer, True) for answer in (True, np.bool_(True), torch.tensor(True))),
        *((answer, False) for answer in (None, 1, "stop", np.bool_(False), torch.tensor(1.0))),
    ],
)
def test_answers_of_callbacks(answer, stops):
    """A comparison of NumPy or PyTorch is no ``bool``, and stops a fit all the same."""
    callback = lambda step, elbo: step >= 3 and answer  # noqa: E731
    model = models.location
    result = fitted(model, AutoNormal(model), num_steps=4, callback=callback)
    assert result.num_steps == (3 if stops else 4)
    assert (result.stopped_because == "the callback asked to stop") == stops
    assert "interrupted" not in result.verdict
    assert math.isfinite(result.elbo)


@pytest.mark.parametrize(
    ("kind", "options", "ways"),
    [
        (
            AutoNormal,
            {"draws": 0},
            "Use draws=1000 (chains do not need a small k-hat), or a flow guide, such",
        ),
        (
            AutoNormal,
            {"draws": 5, "num_steps": 100},
            "Use result.draws, or a flow guide, such as AutoIAF, or more steps.",
        ),
        (
            partial(small, coordinates="model"),
            {"draws": 0, "num_steps": 100},
            "do not need a small k-hat), or more layers (num_transforms) or wider ones, or more steps",
        ),
    ],
)
def test_what_to_use_where_the_guide_is_not_the_posterior(kind, options, ways):
    settled = {**SOON, "optimization.schedule._MIN_IMPROVEMENT": 1e6}
    given = {"num_steps": None, "seed": 0, "numbers": settled, **options}
    result = fitted(models.funnel, kind(models.funnel), **given)
    assert ways in result.verdict
    assert ("more steps" in result.verdict) == ("num_steps" in options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"num_steps": 5},
            "the requested number of steps (5) was taken: set a larger number, or none, so",
        ),
        (
            {"callback": lambda *_: True},
            "the callback asked to stop after step 1: let it continue; ",
        ),
        ({"max_seconds": 1e-6}, "the time limit was reached after step 0: increase max_seconds; "),
    ],
)
def test_a_fit_that_is_cut_short_tells_nothing_of_its_guide(options, words):
    result = fitted(models.funnel, AutoNormal(models.funnel), seed=0, draws=0, **options)
    assert result.verdict.startswith(f"Not trusted: {words}")
    assert "Use " not in result.verdict


def rows_of(y):
    with pyro.plate("rows", 12, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


AT_THE_POSTERIOR = {
    "flow": lambda: (linear, small(linear), {}),
    "stock": lambda: (linear, AutoNormal(linear, init_scale=0.5), {}),
    "amortized": lambda: (
        rows_of,
        AutoAmortized(rows_of, lambda y: y[:, None]),
        {"loader": torch.linspace(-1.0, 1.0, 12).split(4), "numbers": {}},
    ),
}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("flow", "the time limit was reached"),
        ("stock", "the callback asked to stop"),
        pytest.param("amortized", "the callback asked to stop", marks=pytest.mark.slow),
    ],
)
def test_a_good_guide_of_a_fit_that_was_cut_short_is_not_trusted(name, end):
    """Weights see no fault: the fit did not come to its end all the same."""
    model, guide, options = AT_THE_POSTERIOR[name]()
    fitted(model, guide, **{"num_steps": 600, "seed": 0, **options})

    def callback(step, _):
        if end == "the time limit was reached":
            time_limit._present.get().enter_phase(0.0)
        return end != "the time limit was reached"

    options = {"callback": callback, "max_seconds": 600, "num_steps": 9, "draws": 0, **options}
    result = fitted(model, guide, **options)
    assert not result.trusted
    assert re.match(rf"Not trusted: {end} after step 1: [\w ]+\.", result.verdict), result


def test_a_fit_begins_at_the_values_of_a_guide_that_a_callback_saved(tmp_path):
    path, model, guide = tmp_path / "guide.pt", models.regression, small(models.regression)

    def callback(step, elbo):
        if step % 30 == 0:
            torch.save(guide.state_dict(), path)
        return step == 60

    first = fitted(model, guide, num_steps=100, seed=0, callback=callback, draws=0)
    assert first.num_steps == 60
    pyro.clear_param_store()
    again = small(model)
    again.set_up()
    again.load_state_dict(torch.load(path))
    result = fitted(model, again, num_steps=1, seed=1, draws=0)
    assert result.start == UNCHANGED
    assert result.elbo > first.elbo - 3 * (first.elbo_se + result.elbo_se) - 0.05


def test_interrupt_keeps_what_was_learned():
    """The draws, which were before the steps, and these."""
    told = []

    def interrupt(step, elbo):
        told.append(step)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    guide = small(models.regression)
    result = fitted(models.regression, guide, seed=0, draws=400, callback=interrupt)
    assert told == [1, 2, 3, 4]
    assert result.num_steps == 4
    assert result.chains.trusted
    assert math.isfinite(result.elbo)
    assert not result.trusted
    assert "interrupted" in result.verdict
    assert "interrupted" in result.stopped_because
    assert guide.sample_posterior(3)["loc"].shape == (3,)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def faulty(at, kind=math.nan):
    """A regression whose likelihood is NaN, or has a gradient of NaN, in its at-th runs."""
    runs = [0]

    def model():
        runs[0] += 1
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        pyro.sample("fine", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))
        value = loc
        if model.is_on and runs[0] in at:
            value = models.Faulty.apply(loc) if kind == "gradient" else loc * kind
        pyro.sample("y", dist.Normal(value, 1.0), obs=torch.tensor(1.0))

    model.is_on = False
    return model, runs


@pytest.mark.parametrize(
    ("kind", "fault"), [(small, "gradient"), (small, math.nan), (AutoNormal, math.nan)]
)
def test_a_fault_at_a_step(kind, fault, monkeypatch):
    """Parameters stay finite, the step is counted, and the fit goes on."""
    monkeypatch.setattr(capture, "_PATIENCE", 10**9)  # the model runs in each step
    at = set()
    model, runs = faulty(at, fault)
    guide = kind(model)

    def callback(step, elbo):
        model.is_on = True
        at.clear()
        if step == 9:
            at.update(range(runs[0] + 1, runs[0] + 10_000))
        assert all(p.isfinite().all() for p in guide.parameters())

    result = fitted(model, guide, num_steps=30, callback=callback)
    assert result.num_steps == 30
    assert result.num_skipped == 1
    assert [step for step, elbo in enumerate(result.history, 1) if math.isnan(elbo)] == [10]
    site = "the gradient" if fault == "gradient" else "y"
    assert result.culprits == {site: 1}
    assert f"{site} (1)" in repr(result)
    assert math.isfinite(result.elbo)


def test_many_faults_are_not_trusted(monkeypatch):
    monkeypatch.setattr(capture, "_PATIENCE", 10**9)  # the model runs in each step
    at = set()
    model, runs = faulty(at)

    def callback(step, elbo):
        model.is_on = step % 2 == 1 and step < 40
        at.clear()
        at.update(range(runs[0] + 1, runs[0] + 10_000))

    result = fitted(model, small(model), num_steps=40, callback=callback)
    assert 15 < result.num_skipped <= 20
    assert not result.trusted
    assert "of the steps were skipped" in result.verdict


def test_draws_where_the_model_fails_are_in_the_verdict():
    def model():
        z = pyro.sample("z", dist.Normal(1.0, 1.0))
        pyro.factor("root", 0 * (z + 1.5).sqrt())

    guide = AutoNormal(model, init_scale=0.9)
    with pyro.validation_enabled(False):
        result = fitted(model, guide, num_steps=2)
    assert not result.trusted
    assert "log density of the model is not finite at" in result.verdict


def linear():
    """A posterior that is a Gaussian, as the initial guide is."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor([1.0, 2.0, 3.0]))


def test_a_fit_that_starts_at_the_posterior_takes_no_step():
    guide = small(linear)
    result = fit(linear, guide, progress=False)
    assert (result.num_steps, result.trusted, result.chains.trusted) == (0, True, True)
    assert "About the guide alone: Trusted" in result.verdict
    assert "little difference between guide and posterior" in result.stopped_because
    # the precision is 1 + 3, the mean 6 / 4, the start exact but for round-off
    draws = guide.sample_posterior(10)["loc"]
    expected = dist.Normal(1.5, 0.5).log_prob(draws)
    torch.testing.assert_close(guide.log_prob({"loc": draws}), expected, rtol=1e-6, atol=1e-6)
    # steps that were asked for are taken
    assert fitted(linear, small(linear), num_steps=5).num_steps == 5


def test_a_model_with_parameters_is_trained_wherever_the_guide_starts():
    def model():
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        loc = pyro.sample("loc", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(3.0))

    result = fit(model, small(model), progress=False, callback=lambda step, elbo: step == 3)
    assert result.num_steps == 3


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_a_parameter_that_the_first_run_did_not_have_is_refused(kind):
    """Nobody would train it. In Pyro's SVI it is taken up."""
    is_late = False

    def model():
        shift = pyro.param("shift", torch.zeros(())) if is_late else 0.0
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + shift, 0.1), obs=torch.tensor(3.0))

    def callback(step, elbo):
        nonlocal is_late
        is_late = step >= 5

    with pytest.raises(
        FitError, match=r"appeared at step \d+ and would not be trained: \['shift'\]"
    ):
        fit(model, kind(model), num_steps=200, callback=callback)


@pytest.mark.parametrize("kind", [small, AutoNormal])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_parameter_that_is_unfrozen_later_is_refused(kind, is_known):
    """Whether or not Pyro's store has it from before: it was left as it is, without a word."""
    net = nn.Linear(1, 1).eval()  # Pyro warns of frozen parameters in training mode
    if is_known:
        pyro.module("net", net)
    net.bias.requires_grad_(False)

    def callback(step, elbo):
        net.bias.requires_grad_(step >= 60)

    with pytest.raises(FitError, match=r"appeared at step 61 .*bias.* gradients from the first"):
        model = partial(with_net, net)
        fit(model, kind(model), num_steps=200, callback=callback, progress=False)


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_a_parameter_may_be_frozen_for_a_while(kind):
    net, values = nn.Linear(1, 1).eval(), [torch.zeros(1)]

    def callback(step, elbo):
        net.bias.requires_grad_(not 30 <= step < 60)
        values.append(net.bias.detach().clone())

    model, numbers = partial(with_net, net), with_step_size(0.02)
    options = {"numbers": numbers, "callback": callback, "progress": False, "draws": 0}
    fit(model, kind(model), num_steps=300, **options)
    assert len(set(map(float, values[30:61]))) == 1
    assert values[30] != values[29]
    assert abs(values[-1] - 1.0) < 0.05 < abs(values[60] - 1.0)


def with_net(net):
    pyro.module("net", net)
    z, x = pyro.sample("z", dist.Normal(0.0, 0.01)), torch.linspace(-1.0, 1.0, 20)
    with pyro.plate("rows", 20):
        loc = net(x[:, None])[:, 0] + z
        pyro.sample("y", dist.Normal(loc, 0.1), obs=1 + 2 * x)


def test_a_guide_is_gone_when_it_is_let_go():
    """Its name in Pyro's store is free at once: no captured loss is in a cycle with its objective."""
    guide = AutoIAF(models.location)
    is_gone = weakref.ref(guide)
    gc.disable()
    try:
        result = fit(models.location, guide, num_steps=40)
        del guide, result
        assert is_gone() is None
    finally:
        gc.enable()
