# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle
import weakref

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_artransform import iaf
from pyro_artransform.guides import AutoAutoregressive, AutoIAF
from tests.guides import models
from tests.guides.training import parameters, train, trains, unmoved


def new_guide(**options):
    return AutoIAF(models.regression, num_transforms=2, hidden_dims=8, **options)


def entries(name):
    return {k: v for k, v in pyro.get_param_store().named_parameters() if k.startswith(f"{name}.")}


def in_the_store(guide):
    own = [id(p) for p in guide.parameters()]
    return own == [id(p) for p in entries(guide._pyro_name).values()]


def latent_names(guide):
    trace = pyro.poutine.trace(guide).get_trace(models.data())
    return [name for name in trace.nodes if name.endswith("_latent")]


def test_living_guides_take_suffixes():
    """F15."""
    guides = [new_guide() for _ in range(3)]
    names = [name for guide in guides for name in latent_names(guide)]
    assert names == ["_AutoIAF_latent", "_AutoIAF_1_latent", "_AutoIAF_2_latent"]
    for guide in guides:
        trains(guide, [g for g in guides if g is not guide])
        assert in_the_store(guide)


def test_module_local_params():
    with pyro.settings.context(module_local_params=True):
        guides = [new_guide() for _ in range(2)]
        for guide in guides:
            trains(guide, [g for g in guides if g is not guide and list(g.parameters())])
            assert latent_names(guide) == ["_AutoIAF_latent"]
        loss = Trace_ELBO()(models.regression, guides[0])
        assert len(list(loss.parameters())) == len(list(guides[0].parameters()))
        loss(models.data()).backward()
    assert len(pyro.get_param_store()) == 0


def test_a_dead_guides_entries_are_adopted():
    guide = new_guide()
    train(guide)
    before, name = parameters(guide), guide._pyro_name
    gone = weakref.ref(guide)
    del guide
    assert gone() is None, "a guide must not be in a reference cycle"
    second = new_guide()
    second(models.data())
    assert second._pyro_name == name
    assert len(unmoved(second, before)) == len(before)
    trains(second)
    assert in_the_store(second)


def test_store_cleared_while_a_guide_lives():
    first = new_guide()
    train(first)
    pyro.clear_param_store()
    second = new_guide()
    train(second)
    assert second._pyro_name == "AutoIAF"
    before = parameters(first)
    first(models.data())
    assert len(unmoved(first, before)) == len(before)
    assert first._pyro_name == "AutoIAF_1"
    trains(first, [second])
    trains(second, [first])


def test_drawing_registers_nothing():
    old = new_guide()
    train(old)
    pyro.clear_param_store()
    old.sample_posterior(3)
    assert len(pyro.get_param_store()) == 0
    fresh = new_guide()
    fresh.sample_posterior(3, models.data())
    assert len(pyro.get_param_store()) == 0
    trains(fresh, [old])
    assert fresh._pyro_name == "AutoIAF"


@pytest.mark.parametrize("plain_tensors", [False, True])
def test_loaded_store_goes_on_training(tmp_path, plain_tensors):
    """F14, in one process; a guide that lives, and one that was pickled. A new one is in test_contract."""
    living = new_guide()
    train(living)
    state = pyro.get_param_store().get_state()
    if plain_tensors:
        state["params"] = {k: v.detach().clone() for k, v in state["params"].items()}
    torch.save(state, tmp_path / "store")
    saved = parameters(living)
    train(living)
    pyro.get_param_store().load(str(tmp_path / "store"))
    living.sample_posterior(2)
    assert len(unmoved(living, saved)) == len(saved)
    assert in_the_store(living)
    trains(living)
    # what was pickled counts more than a store that was loaded
    twin, values = pickle.loads(pickle.dumps(living)), parameters(living)
    del living
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    twin(models.data())
    assert len(unmoved(twin, values)) == len(values)
    trains(twin)
    # nothing that was replaced is kept by the store's other index
    assert len(pyro.get_param_store()._param_to_name) == len(pyro.get_param_store())


def test_loaded_store_of_another_guide(tmp_path):
    train(new_guide())
    pyro.get_param_store().save(str(tmp_path / "store"))
    for count, width, message in (
        (2, 16, r"does not match: expected \(\(16,\).* got \(\(8,\)"),
        (1, 8, r"does not match: expected None, got \(\(8,"),
        (3, 8, r"does not match: expected \(\(8,.*, got None"),
    ):
        pyro.clear_param_store()
        pyro.get_param_store().load(str(tmp_path / "store"))
        guide = AutoIAF(models.regression, num_transforms=count, hidden_dims=width)
        with pytest.raises(ValueError, match=f"{message}.*clear_param_store"):
            guide(models.data())


def test_a_copy_keeps_its_values_when_the_original_dies():
    guide = new_guide()
    train(guide)
    best, pickled, before = copy.deepcopy(guide), pickle.dumps(guide), parameters(guide)
    train(guide)
    del guide
    for twin in (best, pickle.loads(pickled)):
        twin.sample_posterior(2)
        assert len(unmoved(twin, before)) == len(before)
        twin(models.data())
        assert len(unmoved(twin, before)) == len(before)
        trains(twin)


def test_parameters_that_are_not_contiguous():
    """The store keeps a copy of such a parameter and would train that."""

    def flow(dim):
        transform = iaf(dim, 1, 8)
        for module in transform.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.T.contiguous().T
        return transform

    guide = AutoAutoregressive(models.regression, flow=flow)
    trains(guide)
    assert in_the_store(guide)


def test_parameters_used_twice():
    def flow(dim):
        transform = iaf(dim, 2, 8)
        one, two = (t.meta.conditioner for t in transform.transforms)
        two.layers[1].weight = one.layers[1].weight
        return transform

    guide = AutoAutoregressive(models.regression, flow=flow)
    train(guide)
    pyro.get_param_store().set_state(copy.deepcopy(pyro.get_param_store().get_state()))
    trains(guide)
    one, two = (t.meta.conditioner for t in guide.transform.transforms[0].transforms)
    assert one.layers[1].weight is two.layers[1].weight
    assert in_the_store(guide)
