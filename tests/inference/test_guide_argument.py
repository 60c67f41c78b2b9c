# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The guide of a fit: in second place, by name, or chosen."""

from functools import partial, wraps

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader

from pyro_artransform import AutoAmortized, AutoIAF, inference
from pyro_artransform.inference.fit import check_model
from tests.inference.conftest import QUICK, quick_fit

fit = partial(quick_fit, num_particles=4, progress=False)


def location(y, scale=1.0):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 12, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def with_link(link, y):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(link(loc), 1.0), obs=y)


def groups(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 12, subsample_size=4) as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


Y = 2 + torch.linspace(-1, 1, 12, dtype=torch.float64)


@pytest.fixture
def guide():
    return AutoNormal(location)


# In second place, or by name


def test_the_users_guide_is_in_the_result(guide):
    for result in (
        fit(location, guide, Y, num_steps=2),
        fit(location, Y, guide=guide, num_steps=2),
    ):
        assert result.guide is guide
        assert result.guide_reason == ""
        assert "guide" not in result.rows()


def test_a_callable_of_the_models_goes_by_its_name():
    chosen = AutoNormal(with_link)
    assert fit(with_link, torch.exp, Y, guide=chosen, num_steps=2).guide is chosen
    assert isinstance(fit(with_link, link=torch.exp, y=Y, num_steps=2).guide, AutoIAF)
    with pytest.raises(TypeError, match=r"missing a required argument: 'y'.*by its name"):
        fit(with_link, torch.exp, Y, num_steps=2)


@pytest.mark.parametrize("wrong", [(AutoNormal,), (AutoIAF, Y)])
def test_a_class_is_no_guide(wrong):
    with pytest.raises(TypeError, match=r"a guide of the model, such as AutoIAF\(model\)"):
        fit(location, *wrong)


def test_what_cannot_be_called_is_no_guide():
    with pytest.raises(TypeError, match="guide: expected a guide of the model"):
        fit(location, Y, guide=3)


@pytest.mark.parametrize("args", [(None, None, None), (Y, 1.0, 2.0), ("auto", Y, 1.0)])
def test_arguments_that_the_model_does_not_take(args):
    with pytest.raises(TypeError, match="expected the arguments that the model takes"):
        fit(location, *args)


def test_decorated_models_take_what_their_decorator_takes():
    @wraps(location)
    def decorated():
        return location(Y)

    check_model(decorated, (), {})
    with pytest.raises(TypeError, match="too many positional arguments"):
        check_model(decorated, (Y,), {})


# Chosen


def test_the_choice_is_in_the_result_and_as_good_as_the_same_guide_given():
    given = fit(location, AutoIAF(location), Y, 0.5, num_steps=5, seed=0)
    pyro.clear_param_store()
    result = fit(location, Y, 0.5, num_steps=5, seed=0)
    assert isinstance(result.guide, AutoIAF)
    assert "  guide         AutoIAF, for 1 latent\n" in repr(result)
    assert result.guide.sample_posterior(5)["loc"].shape == (5,)
    assert (result.history, result.elbo) == (given.history, given.elbo)


def test_another_way_to_choose():
    """That of ``pyro_artransform`` is also the default of ``inference.fit``."""
    asked = []

    def choose(model, args, kwargs, *, is_minibatch):
        asked.append((args, kwargs, is_minibatch))
        return AutoNormal(model), "for a test"

    result = fit(location, Y, scale=0.5, choose_guide=choose, num_steps=2)
    assert asked == [((Y,), {"scale": 0.5}, False)]
    assert result.rows()["guide"] == "AutoNormal, for a test"
    result = inference.fit(location, Y, num_steps=2, config=QUICK, progress=False)
    assert result.rows()["guide"] == "AutoIAF, for 1 latent"


def test_sub_sampled_plate_of_latents():
    result = fit(groups, Y, num_steps=3)
    assert isinstance(result.guide, AutoAmortized)
    assert "guide         AutoAmortized, for latents in the sub-sampled plate 'groups'" in repr(
        result
    )


def test_loader():
    loader = DataLoader(Y, batch_size=4, shuffle=True)
    result = fit(location, loader=loader, epochs=2, scale=0.5)
    assert isinstance(result.guide, AutoIAF)
    assert result.rows()["guide"] == "AutoIAF, for 1 latent and sub-sampled data"
    assert result.num_steps == 6


def test_many_latents_and_batches_that_are_scaled_by_hand():
    """No plate of the model is sub-sampled, and a batch lacks dependencies all the same."""

    def pairs(i, y):
        z = pyro.sample("z", dist.Normal(y.new_zeros(60), 1.0).to_event(1))
        with poutine.scale(scale=12 / len(y)), pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z[..., i] - z[..., i + 1], 1.0), obs=y)

    batches = list(zip(torch.arange(12).split(4), Y.split(4)))
    result = fit(pairs, loader=batches, num_steps=2)
    assert result.rows()["guide"] == "AutoIAF, for 60 latents and sub-sampled data"


def test_a_model_without_latents():
    with pytest.raises(ValueError, match="no continuous latent: expected at least one"):
        fit(lambda: None)
