# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import copy
import math
import pickle
import random
import traceback
from unittest import mock

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value
from torch import nn

from pyro_artransform import iaf, spline_autoregressive
from pyro_artransform.guides import AutoAutoregressive, AutoIAF
from tests.guides import models
from tests.guides.training import parameters, train, trains, unmoved


def new_guide():
    return AutoIAF(models.regression, num_transforms=2, hidden_dims=8, nonlinearity=nn.Tanh())


def score(guide):
    grid = torch.linspace(-2, 2, 7 * guide.latent_dim).reshape(7, -1).sin() * 2
    with torch.no_grad():
        return guide.get_posterior().log_prob(grid)


# Copies


def test_deepcopy_keeps_the_model_and_pickle_says_that_it_does_not():
    guide = new_guide()
    with pytest.raises(RuntimeError, match="does not know the model's latents yet: call it"):
        guide.save("guide")
    unpickled = pickle.loads(pickle.dumps(guide))
    unpickled.model = models.regression
    with pytest.raises(RuntimeError, match="pickled before its first call, without its flow"):
        unpickled(models.data())
    for use in (lambda: None, lambda: guide(models.data()), lambda: train(guide, 2)):
        use()
        model = guide.model
        twin, unpickled = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))
        assert twin.model is model
        assert guide.model is model, "the original has lost its model"
        with pytest.raises(RuntimeError, match="this AutoIAF has no model, since pickle"):
            _ = unpickled.model
    unpickled.model = models.regression
    module = torch.nn.Linear(1, 1)
    twin.model = module
    assert copy.deepcopy(twin).model is twin.model, "a model that is a module was copied"
    assert not any(part is module for part in twin.modules())
    trains(unpickled, [guide, twin])


def test_copies_of_a_guide_that_was_used():
    """F18."""
    guide = new_guide()
    uses = {
        "called": lambda: guide(models.data()),
        "trained": lambda: train(guide, 2),
        "inverted": lambda: guide.get_transform().inv(torch.zeros(2)),
        "scored": lambda: guide.log_prob(guide.sample_posterior(3)).sum().backward(),
        "path": lambda: guide.rsample_and_log_prob(2, path=True)[1].sum().backward(),
    }
    for name, use in uses.items():
        use()
        for way in (copy.deepcopy, copy.copy, lambda g: pickle.loads(pickle.dumps(g))):
            assert torch.equal(score(way(guide)), score(guide)), name


def test_pickle_holds_neither_the_data_nor_local_functions():
    guide = AutoAutoregressive(
        lambda values: models.regression(values[:8]), flow=lambda dim: iaf(dim, 1, 8)
    )
    guide(torch.randn(100_000))
    pickled = pickle.dumps(guide)
    assert len(pickled) < 30_000
    trains(pickle.loads(pickled))


# State dicts


def test_state_dict_of_other_sites():
    guide, other = AutoIAF(models.regression), AutoIAF(models.gaussian)
    guide(models.data())
    other(models.data())
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(guide.state_dict())


def test_a_state_dict_needs_a_guide_that_was_called():
    guide, other = new_guide(), new_guide()
    guide(models.data())
    with pytest.raises(
        RuntimeError, match=r"the model's latents yet: call it, .*load_state_dict; or"
    ):
        other.load_state_dict(guide.state_dict())
    other(models.data())
    other.load_state_dict(guide.state_dict())
    assert torch.equal(score(other), score(guide))


# Files


def test_file_of_all_kinds_of_sites(tmp_path):
    guide = AutoIAF(models.shapes, hidden_dims=8)
    guide(models.data(torch.float32))
    guide.save(tmp_path / "guide")
    loaded = AutoIAF.load(tmp_path / "guide")
    pyro.set_rng_seed(1)
    expected = guide.sample_posterior(5)
    pyro.set_rng_seed(1)
    draws = loaded.sample_posterior(5)
    assert list(draws) == list(expected)
    for name, value in draws.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
    # the plates are in the file: a call enters them, and NeuTraReparam asks for them
    values = loaded()
    assert {name: tuple(v.shape) for name, v in values.items()} == models.SHAPES
    assert {name: plate.dim for name, plate in loaded.plates.items()} == {"outer": -1, "inner": -2}


def test_custom_flow_is_given_to_load_again(tmp_path):
    guide = AutoAutoregressive(models.regression, flow=spline_autoregressive)
    guide(models.data())
    guide.save(tmp_path / "guide")
    loaded = AutoAutoregressive.load(tmp_path / "guide", flow=spline_autoregressive)
    assert torch.equal(score(loaded), score(guide))
    with pytest.raises(ValueError, match=r"guide: expected .* missing a required argument: 'flow'"):
        AutoAutoregressive.load(tmp_path / "guide")
    with pytest.raises(ValueError, match=r"and the guide's flow, got: .* loading state_dict"):
        AutoAutoregressive.load(tmp_path / "guide", flow=lambda dim: iaf(dim, 1, 8))


def test_parameters_that_are_not_finite(tmp_path):
    guide = new_guide()
    guide(models.data())
    before = parameters(guide)
    name = "transform.transforms.1.log_scale"
    state = {**guide.state_dict(), name: torch.tensor([0.0, math.nan])}
    message = f"parameter '{name}': expected finite numbers, got 1 of 2"
    with pytest.raises(ValueError, match=message):
        guide.load_state_dict(state)
    assert len(unmoved(guide, before)) == len(before)
    with torch.no_grad():
        guide.transform.transforms[1].log_scale[1] = math.nan
    with pytest.raises(ValueError, match=message):
        guide.save(tmp_path / "guide")
    assert not (tmp_path / "guide").exists()


def test_damaged_files(tmp_path):
    """Truncated anywhere, or with a byte changed anywhere: the same error, or nothing has changed."""
    path = tmp_path / "guide"
    guide = AutoIAF(models.regression, num_transforms=1, hidden_dims=2)
    guide(models.data())
    guide.save(path)
    whole, expected = path.read_bytes(), guide.state_dict()
    generator, num_found = random.Random(0), 0
    for at in range(0, len(whole), 97):
        place = generator.randrange(len(whole))
        byte = bytes([whole[place] ^ generator.randrange(1, 256)])
        for damaged in (whole[:at], whole[:place] + byte + whole[place + 1 :]):
            path.write_bytes(damaged)
            try:
                state = AutoIAF.load(path).state_dict()
            except ValueError as error:
                assert "got another kind of file, a damaged one" in str(error)  # noqa: PT017
                num_found += 1
            else:
                assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert num_found > len(whole) // 97


FOREIGN = {
    "text": lambda path: path.write_text("sites: loc, scale"),
    "module": lambda path: torch.save(nn.Linear(2, 2), path),
    "param store": lambda path: pyro.get_param_store().save(str(path)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_save_did_not_write(name, tmp_path):
    new_guide()(models.data())
    FOREIGN[name](tmp_path / "guide")
    wanted = "expected a guide of class AutoIAF, format 9, got another kind of file"
    with pytest.raises(ValueError, match=wanted) as error:
        AutoIAF.load(tmp_path / "guide")
    assert "weights_only" not in "".join(traceback.format_exception(error.value))


# Another model than that of the file


def model_of(loc=None, scale=None, **extra):
    """A regression whose sites may be others."""
    loc = loc or dist.Normal(torch.tensor(0.0), 3.0)
    scale = scale or dist.Uniform(torch.tensor(0.1), torch.tensor(5.0))
    sites = {"loc": loc, "scale": scale, **extra}

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
    "missing": (model_of(scale="none"), "site 'scale': the model has no such latent: expected the"),
    "extra": (model_of(more=NORMAL), "site 'more': the guide has no such site: expected"),
    "shape": (model_of(loc=NORMAL.expand((2,)).to_event(1)), r"'loc': .* \(\), got \(2,\)"),
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
    for loaded in (guide, later):
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                loaded(models.data(), models.data())
    with pytest.raises(RuntimeError, match=r"AutoIAF\.load\(path, model\)"):
        _ = AutoIAF.load(path).model
    # without the model it goes on
    assert set(guide.sample_posterior(2)) == {"loc", "scale"}


def test_its_own_model(path):
    model = mock.Mock(side_effect=model_of())
    guide = AutoIAF.load(path, model)
    guide(models.data(), models.data())
    guide(models.data(), models.data())
    assert model.call_count == 1
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
        predictive = Predictive(logistic, guide=guide, num_samples=4, parallel=new is x)
        assert predictive(new)["y"].shape == (4, len(new))


def test_bounds_in_another_dtype(path):
    low, high = (torch.tensor(bound, dtype=torch.float32) for bound in (0.1, 5.0))
    guide = AutoIAF.load(path, model_of(scale=dist.Uniform(low, high)))
    guide(models.data(), models.data())


def test_another_model_keeps_the_users_start():
    guide = AutoIAF(models.regression, init_loc_fn=init_to_value(values={"loc": torch.tensor(3.0)}))
    guide.model = models.regression
    guide.set_up(models.data())
    assert abs(guide.median()["loc"] - 3.0) < 0.2


def test_coordinates_are_those_of_the_file(tmp_path):
    guide = AutoIAF(models.regression)
    guide.set_up(models.data())
    guide.save(tmp_path / "guide.pt")
    with pytest.raises(ValueError, match="coordinates: expected none, as the file holds"):
        AutoIAF.load(tmp_path / "guide.pt", models.regression, coordinates="model")
