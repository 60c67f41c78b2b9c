# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""An amortized guide in the param store, in copies, state dicts and files."""

import copy
import pickle

import pyro
import pytest
import torch

from pyro_artransform import AutoAmortized, AutoIAF, conditional_iaf
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import Encoder, data, redraw, train
from tests.guides.training import parameters, unmoved


def trained(encoder=None, model=hierarchies.groups, **options):
    guide = AutoAmortized(model, encoder, **options)
    train(model, guide, data())
    return redraw(guide)


def trains(guide, *others):
    """Whether a guide trains, and others stay as they are."""
    before, rest = parameters(guide), [parameters(other) for other in others]
    train(hierarchies.groups, guide, data())
    stay = [unmoved(other, old) == list(old) for other, old in zip(others, rest, strict=True)]
    return len(unmoved(guide, before)) < len(before) and all(stay)


def score(guide):
    values = {"mean": torch.linspace(-1, 1, 5), "z": torch.linspace(-2, 2, 60).reshape(5, 12)}
    with torch.no_grad():
        return guide.log_prob(values, data())


both = pytest.mark.parametrize("new", [lambda: None, Encoder], ids=["embeddings", "encoder"])


@both
def test_copies(new):
    guide = trained(new())
    guide(data())
    density = score(guide)
    twin, unpickled = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="this AutoAmortized has no model: pickle drops it"):
        _ = unpickled.model
    unpickled.model = hierarchies.groups
    for other in (twin, unpickled):
        assert torch.equal(score(other), density)
        assert trains(other, guide)


def test_copies_of_a_guide_that_was_never_called():
    guide = AutoAmortized(hierarchies.groups, local_flow=lambda d, c: conditional_iaf(d, c, 1, 8))
    copy.deepcopy(guide)(data())
    unpickled = pickle.loads(pickle.dumps(AutoAmortized(hierarchies.groups)))
    with pytest.raises(RuntimeError, match="has no model"):
        unpickled(data())
    unpickled.model = hierarchies.groups
    for _ in range(2):
        with pytest.raises(RuntimeError, match="pickled before its first call, without its flow"):
            unpickled(data())


def plates(y):
    return pyro.plate("groups", 12, dim=-1)


def test_copies_with_plates():
    guide = trained(create_plates=plates, coordinates="model")
    assert copy.deepcopy(guide).create_plates is plates
    unpickled = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="has no create_plates: pickle drops it"):
        unpickled(data())
    unpickled.create_plates = plates
    assert unpickled(data())["z"].shape == (12,)


def test_without_a_model_the_plates_stay_as_they_are():
    guide = pickle.loads(pickle.dumps(trained(Encoder(), hierarchies.batched, coordinates="model")))
    assert guide(data())["z"].shape == (12,)
    assert guide.sample_posterior(2, data(5))["z"].shape == (2, 5)
    with pytest.raises(ValueError, match=r"plate 'groups' \(12\).*got \(5, 2\)"):
        guide(data(5))


@both
def test_state_dict(new):
    guide = trained(new(), embedding_dim=3)
    other, called = (AutoAmortized(hierarchies.groups, new(), embedding_dim=d) for d in (8, 3))
    called(data())
    for loaded in (other, called):
        loaded.load_state_dict(guide.state_dict())
        assert torch.equal(score(loaded), score(guide))


@both
def test_save_and_load(new, tmp_path):
    """F13, F17: without the model and, where there are embeddings, without data."""
    options = {"init_scale": 0.2, "embedding_dim": 3, "coordinates": "model"}
    guide, path = trained(new(), **options), tmp_path / "guide.pt"
    guide.save(path)
    loaded = AutoAmortized.load(path, encoder=new())
    assert torch.equal(score(loaded), score(guide))
    if new is not Encoder:
        assert loaded.sample_posterior(3)["z"].shape == (3, 12)
    assert trains(AutoAmortized.load(path, hierarchies.groups, encoder=new()))
    nested = AutoAmortized(hierarchies.nested)
    nested()
    redraw(nested).save(path)
    draws, loaded = nested.sample_posterior(4), AutoAmortized.load(path, hierarchies.nested)
    assert torch.equal(loaded.log_prob(draws), nested.log_prob(draws))


def test_what_does_not_load(tmp_path):
    def flow(d, c):
        return conditional_iaf(d, c, 1, 8)

    trained(Encoder()).save(tmp_path / "encoder.pt")
    trained(local_flow=flow).save(tmp_path / "flow.pt")
    with pytest.raises(ValueError, match="had an encoder for plate 'groups': expected it as"):
        AutoAmortized.load(tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="expected a guide of class AutoIAF, got AutoAmortized"):
        AutoIAF.load(tmp_path / "flow.pt")
    with pytest.raises(ValueError, match="expected a guide with this flow"):
        AutoAmortized.load(tmp_path / "flow.pt")
    guide = AutoAmortized.load(tmp_path / "flow.pt", hierarchies.standard, local_flow=flow)
    with pytest.raises(ValueError, match="site 'cell': the guide has no such site"):
        guide()
    with pytest.raises(RuntimeError, match="call it, or set_up"):
        AutoAmortized(hierarchies.groups).save(tmp_path / "never.pt")
