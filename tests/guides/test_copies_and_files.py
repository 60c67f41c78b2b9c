# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import copy
import math
import pickle
import subprocess
import sys

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value
from torch import nn

from pyro_artransform import iaf
from pyro_artransform.guides import AutoAutoregressive, AutoIAF
from tests.guides import models, saved
from tests.guides.training import parameters, redraw, train, trains, unmoved


def new_guide():
    return AutoIAF(models.regression, num_transforms=2, hidden_dims=8, nonlinearity=nn.Tanh())


def score(guide):
    grid = torch.linspace(-2, 2, 7 * guide.latent_dim).reshape(7, -1).sin() * 2
    with torch.no_grad():
        return guide.get_posterior().log_prob(grid)


# Copies


def test_deepcopy_keeps_the_model_and_pickle_says_that_it_does_not():
    guide = new_guide()
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
        with pytest.raises(RuntimeError, match="this AutoIAF has no model, since pickle drops it"):
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


# State dicts and files


def test_another_process_reads_the_same_guides(tmp_path):
    """Of another seed, and set up on other data: densities are equal to the last bit."""
    expected = {}
    for name, guide in saved.kinds().items():
        guide.set_up(saved.Y)
        redraw(guide, "")
        if guide.prior_coordinates:
            guide.coordinates.centered[-1] = 0.3
        guide.save(tmp_path / f"{name}.pt")
        draws = guide.sample_posterior(5, saved.Y)
        torch.save(draws, tmp_path / f"{name}.draws")
        expected[name] = guide.log_prob(draws, saved.Y)
    command = [sys.executable, "-m", "tests.guides.saved", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    found = torch.load(tmp_path / "found")
    assert {name: torch.equal(found[name], value) for name, value in expected.items()} == (
        dict.fromkeys(expected, True)
    )


def test_a_file_is_a_state_dict(tmp_path):
    guide, other = new_guide(), new_guide()
    guide.set_up(models.data())
    guide.save(tmp_path / "guide.pt")
    other.set_up(models.data())
    other.load_state_dict(torch.load(tmp_path / "guide.pt"))
    assert torch.equal(score(other), score(guide))
    trains(other, [guide])


def logistic(x, y=None):
    """A regression whose data are discrete."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_discrete_sites_that_are_predicted(is_loaded, tmp_path):
    guide, x = AutoIAF(logistic, hidden_dims=8), models.data()
    data = x, (x > 1).to(x.dtype)
    guide(*data)
    if is_loaded:
        guide.save(tmp_path / "guide")
        guide = AutoIAF(logistic, hidden_dims=8)
        guide.set_up(*data)
        guide.load(tmp_path / "guide")
    for new in (x, x[:3]):
        predictive = Predictive(logistic, guide=guide, num_samples=4, parallel=new is x)
        assert predictive(new)["y"].shape == (4, len(new))


def test_what_is_read_into_a_trained_guide_counts():
    """The param store holds the same tensors."""
    guide = new_guide()
    guide(models.data())
    first, before = copy.deepcopy(guide.state_dict()), parameters(guide)
    train(guide)
    guide.load_state_dict(first)
    guide(models.data())
    assert len(unmoved(guide, before)) == len(before)


def test_a_guide_must_be_set_up(tmp_path):
    guide, other = new_guide(), new_guide()
    guide.set_up(models.data())
    guide.save(tmp_path / "guide")
    for use in (
        lambda: other.save(tmp_path / "guide"),
        lambda: other.load(tmp_path / "guide"),
        lambda: other.load_state_dict(guide.state_dict()),
        lambda: other.start_at(0.0),
        other.get_posterior,
        other.step_scales,
    ):
        with pytest.raises(
            RuntimeError, match="does not know the model's latents yet: call it, or set_up"
        ):
            use()


@pytest.mark.parametrize(
    "other",
    [
        AutoIAF(models.gaussian, num_transforms=2, hidden_dims=8),
        AutoIAF(models.regression, num_transforms=2, hidden_dims=16),
        AutoAutoregressive(models.regression, flow=lambda dim: iaf(dim, 2, 8)),
    ],
    ids=["model", "width", "class"],
)
def test_state_dicts_of_another_guide(other):
    guide = new_guide()
    guide.set_up(models.data())
    other.set_up(models.data())
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        other.load_state_dict(guide.state_dict())


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


def test_another_model_keeps_the_users_start():
    guide = AutoIAF(models.regression, init_loc_fn=init_to_value(values={"loc": torch.tensor(3.0)}))
    guide.model = models.regression
    guide.set_up(models.data())
    assert abs(guide.median()["loc"] - 3.0) < 0.2
