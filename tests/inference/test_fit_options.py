# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The options and the guide of a fit, and parameters of a model of their names."""

import inspect
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_artransform import AutoIAF, fit
from pyro_artransform._base.arguments import check_call, check_flag
from pyro_artransform._base.progress import ProgressBar
from pyro_artransform.diagnostics.checks import Check
from pyro_artransform.inference.stages import NO_DATA
from pyro_artransform.sampling import mcmc
from tests.inference import models
from tests.inference.conftest import QUICK, quick_fit, with_numbers

few = partial(quick_fit, num_particles=4, progress=False)
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
        z = pyro.sample("z", dist.Normal(0.0, float(num_steps)))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(()))

    for bound in (
        partial(model, num_steps=3),
        partial(model, 3),
        poutine.scale(partial(model, 3), scale=1.0),
    ):
        guide = AutoIAF(partial(model, num_steps=3), num_transforms=1, hidden_dims=4)
        result = quick_fit(bound, guide, num_steps=2, num_particles=4, progress=False)
        assert result.num_steps == 2


@pytest.mark.parametrize("make_guide", [None, AutoIAF], ids=["chosen", "given"])
def test_a_new_guide_is_new_whatever_was_fitted_before(make_guide):
    """Pyro's store has the parameters of the last fit under its name."""
    histories = []
    for model in (models.scaled, models.location, models.location):
        guide = [] if make_guide is None else [make_guide(model)]
        result = quick_fit(model, *guide, num_steps=5, seed=1, progress=False)
        histories.append(result.history)
        del guide, result
    assert histories[1] == histories[2]
    assert {name.split(".")[0] for name in pyro.get_param_store()} == {"AutoIAF"}


def test_a_new_guide_goes_on_from_a_store_that_was_loaded(tmp_path):
    quick_fit(models.regression, num_steps=5, progress=False)
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


def test_inference_mode():
    """There are no gradients in it, and it cannot be left for what was made in it."""
    guide = AutoIAF(models.location)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"expected .* outside torch\.inference_mode"),
    ):
        fit(models.location, guide, num_steps=2, progress=False)


@pytest.mark.parametrize("run", [partial(fit), partial(mcmc, draws=4)])
def test_handlers_around_a_fit_are_an_error(run):
    """They would not reach the model where many draws are evaluated at once."""
    expected = (
        r"outside of Pyro's handlers, got ConditionMessenger.*poutine\.condition\(model, data\)"
    )
    with (
        poutine.condition(data={"z": torch.tensor(0.0)}),
        pytest.raises(RuntimeError, match=expected),
    ):
        run(models.location)


def test_fits_in_threads_wait_for_each_other():
    with with_numbers(QUICK), ThreadPoolExecutor(2) as pool:
        fits = [pool.submit(fit, models.location, num_steps=5, progress=False) for _ in range(2)]
        assert [found.result().num_steps for found in fits] == [5, 5]


def location(y, scale=1.0):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 12, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def with_link(link, y):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(link(loc), 1.0), obs=y)


Y = 2 + torch.linspace(-1, 1, 12, dtype=torch.float64)


def test_the_users_guide_is_in_the_result():
    guide = AutoNormal(location)
    for result in (
        few(location, guide, Y, num_steps=2),
        few(location, Y, guide=guide, num_steps=2),
    ):
        assert result.guide is guide
        assert result.guide_reason == ""
        assert "guide" not in result.rows()


def test_a_callable_of_the_models_goes_by_its_name():
    chosen = AutoNormal(with_link)
    assert few(with_link, torch.exp, Y, guide=chosen, num_steps=2).guide is chosen
    assert isinstance(few(with_link, link=torch.exp, y=Y, num_steps=2).guide, AutoIAF)
    with pytest.raises(TypeError, match=r"missing a required argument: 'y'"):
        few(with_link, torch.exp, Y, num_steps=2)


def taking_draws(draws=3):
    models.location()


A_GUIDE = r"guide: expected a guide for the model, such as AutoIAF\(model\)"
A_PART = poutine.block(models.regression, hide=["scale"])
LOADER = Y.split(4)
REFUSED = [
    (TypeError, (location, AutoNormal), {}, A_GUIDE),
    (TypeError, (location, AutoIAF, Y), {}, A_GUIDE),
    (TypeError, (location, Y), {"guide": 3}, A_GUIDE),
    (TypeError, (location, None, None, None), {}, "expected the arguments that the model takes"),
    (TypeError, (location, Y, 1.0, 2.0), {}, "expected the arguments that the model takes"),
    (TypeError, (location, Y), {"callback": 3}, "callback: expected a function, got 3"),
    (
        TypeError,
        (location, Y),
        {"num_step": 3},
        r"argument 'num_step'\). The options of fit are .*, num_steps, ",
    ),
    *(
        (ValueError, (models.location,), {name: value}, f"{name}: expected {words}")
        for name, value, words in (
            ("num_steps", 0, "a positive integer, got 0"),
            ("num_steps", 1.5, "a positive integer, got 1.5"),
            ("num_particles", True, "a positive integer, got True"),
            ("seed", -1, "an integer of at least 0, got -1"),
            ("seed", "7", "an integer of at least 0, got '7'"),
            ("draws", -1, ".*, got -1"),
            ("draws", 1.5, ".*, got 1.5"),
            ("max_seconds", -1.0, "a positive"),
            ("epochs", 3, "a loader"),
        )
    ),
    *((ValueError, (location,), {"loader": LOADER, "epochs": n}, "epochs") for n in (0, -1, 1.5)),
    (
        ValueError,
        (location,),
        {"loader": LOADER, "epochs": 3, "num_steps": 5},
        "epochs or num_steps, got both",
    ),
    (ValueError, (location, Y), {"loader": LOADER}, r"no positional arguments.*got 1"),
    (ValueError, (taking_draws,), {}, "a parameter 'draws', which is also an option of fit"),
]
REFUSED_AFTER_A_RUN = [
    (ValueError, (models.subsampled,), {"draws": 400}, "a model that sees all data"),
    (
        ValueError,
        (location,),
        {"loader": LOADER[:2], "epochs": 1, "draws": 400},
        "draws: expected a model that sees all data.*mini-batches",
    ),
    (
        ValueError,
        (models.regression, AutoNormal(A_PART)),
        {},
        r"expected all latents of the model.*scale",
    ),
    (ValueError, (models.regression, AutoIAF(A_PART)), {}, "expected a guide for this model"),
]


@pytest.mark.parametrize(("error", "args", "options", "words"), REFUSED)
def test_what_is_refused(error, args, options, words):
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        few(*args, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("error", "args", "options", "words"), REFUSED_AFTER_A_RUN)
def test_what_a_run_of_the_model_tells(error, args, options, words):
    with pytest.raises(error, match=words):
        few(*args, **options)


BATCHES = [
    ([(Y, 1.0, Y)], {}, r"\(y, scale=1.0\), got 3 by position.*too many positional"),
    ([{"data": Y}], {}, r"got 0 by position and \['data'\] by keyword"),
    ([(Y,)], {"lr": 0.1}, "argument 'lr'"),
]


@pytest.mark.parametrize(("loader", "options", "words"), BATCHES)
@pytest.mark.parametrize("guide", [None, AutoIAF(location)], ids=["chosen", "given"])
def test_batches_that_are_not_the_models_arguments(loader, options, words, guide):
    with pytest.raises(TypeError, match=words):
        few(location, guide=guide, loader=2 * loader, **options)


def test_a_distribution_is_data():
    """Although it can be called: it is an argument of the model, and no guide."""

    def model(prior):
        pyro.sample("y", dist.Normal(pyro.sample("z", prior), 1.0), obs=torch.ones(()))

    assert "z" in few(model, dist.Normal(0.0, 1.0), num_steps=2).guide.median()


@pytest.mark.parametrize("verb", [few, partial(mcmc, progress=False)])
@pytest.mark.parametrize("guide", [AutoNormal, AutoIAF])
def test_a_guide_is_no_model(verb, guide):
    """As in ``fit(AutoIAF(model))``, also with the model in place of the guide."""
    words = rf"the first argument is the model, got the guide {guide.__name__}.* fit\(model, guide"
    for rest in ((), (models.location,)):
        with pytest.raises(TypeError, match=words):
            verb(guide(models.location), *rest)


def test_decorated_models_take_what_their_decorator_takes():
    @wraps(location)
    def decorated():
        return location(Y)

    check_call(fit, decorated, (), {})
    with pytest.raises(TypeError, match="too many positional arguments"):
        check_call(fit, decorated, (Y,), {})


def test_the_choice_is_in_the_result_and_as_good_as_the_same_guide_given():
    given = few(location, AutoIAF(location), Y, 0.5, num_steps=5, seed=0)
    pyro.clear_param_store()
    result = few(location, Y, 0.5, num_steps=5, seed=0)
    assert isinstance(result.guide, AutoIAF)
    assert "  guide         AutoIAF, for 1 latent\n" in repr(result)
    assert result.guide.sample_posterior(5)["loc"].shape == (5,)
    assert (result.history, result.elbo) == (given.history, given.elbo)


def test_parameters_of_the_model_are_point_estimates():
    """And far from their optimum if steps were cut short, which nothing else says."""
    words = "The model's own parameters are point estimates"
    guide = models.small(models.with_param)
    found = quick_fit(models.with_param, guide, num_steps=20, progress=False)
    assert words in found.verdict
    assert [failed.check for failed in found.judged.failed][:1] == [Check.CUT_SHORT]
    assert words not in quick_fit(models.location, num_steps=2, progress=False).verdict


@pytest.mark.usefixtures("quick")
def test_a_model_without_data_is_said_to_be_its_prior():
    """As where the argument with the data was forgotten: then the data are latents."""

    def line(x, y=None):
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 5.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    words, options = "The model has no observed site", {"num_steps": 2, "progress": False}
    with pytest.warns(UserWarning, match=f"{words}.*pass the data") as caught, with_numbers(QUICK):
        result = fit(line, Y, **options)
    assert caught[0].filename == __file__
    assert result.verdict.startswith(words)
    assert not result.trusted
    assert "prior" not in quick_fit(line, Y, Y, **options).verdict
    with pytest.warns(UserWarning, match=words):
        found = mcmc(line, Y, draws=20, progress=False)
    assert found.verdict.startswith(words)
    assert not found.trusted


@pytest.mark.parametrize("phase", ["start", "fit", "verdict"])
@pytest.mark.parametrize("draws", [None, 20])
def test_ctrl_c_in_each_phase_gives_a_verdict(monkeypatch, phase, draws):
    say = ProgressBar.say

    def interrupt(bar, what):
        say(bar, what)
        if what == phase:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressBar, "say", interrupt)
    # more seconds than the test has
    result = quick_fit(
        models.regression,
        seed=0,
        num_steps=10**6 if phase != "verdict" else 3,
        draws=draws,
        progress=False,
    )
    assert result.elbo > -100
    if phase != "verdict":
        assert result.num_steps == 0
        assert result.stopped_because == "it was interrupted"
        assert "it was interrupted after step 0: fit again" in result.verdict
    assert draws is None or len(result.draws["loc"]) > 0


@pytest.mark.parametrize("draws", [None, pytest.param(1000, marks=pytest.mark.slow)])
def test_max_seconds_are_those_of_the_whole_fit(draws):
    began = time.perf_counter()
    limits = {"num_steps": 10**6, "draws": draws, "max_seconds": 1.5}
    result = fit(models.regression, seed=0, progress=False, **limits)
    assert time.perf_counter() - began < 3.0  # a tenth more is promised on an idle machine
    assert 0 < result.num_steps < 10**6
    assert result.stopped_because == "the time limit was reached"


@pytest.mark.parametrize("run", [few, mcmc])
def test_flags(run):
    for name in ("relabel", "progress"):
        for value in (1.0, 1, np.ones(2, dtype=bool)):
            with pytest.raises(ValueError, match=f"{name}: expected True or False, got "):
                run(models.location, **{name: value})
    assert check_flag("relabel", np.bool_(True)) is True


def test_a_model_whose_data_were_forgotten_is_not_trained():
    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(0.0, scale))

    with pytest.warns(UserWarning, match="has no observed site"):
        result = quick_fit(model, progress=False)
    assert (result.num_steps, result.stopped_because) == (0, NO_DATA)
    assert not result.ok
    assert "num_steps" not in result.verdict
    with pytest.warns(UserWarning, match="has no observed site"):
        assert few(model, num_steps=3).num_steps == 3
