# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A guide wherever Pyro's autoguides go: SVI, Predictive, NeuTra, lists of guides."""

import copy
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_artransform.conditioners import Conditioner
from pyro_artransform.guides import AutoIAF
from tests.guides import models
from tests.guides.named import GUIDES
from tests.guides.training import parameters, redraw_after_call, train, trains, unmoved


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Trace_ELBO, {"num_particles": 3}),
        (Trace_ELBO, {"num_particles": 3, "vectorize_particles": True}),
        (TraceGraph_ELBO, {}),
        (TraceGraph_ELBO, {"num_particles": 3, "vectorize_particles": True}),
        (TraceEnum_ELBO, {}),
        (TraceMeanField_ELBO, {}),
        (JitTrace_ELBO, {"ignore_jit_warnings": True}),
    ],
)
def test_elbos(kind, options):
    guide, elbo = AutoIAF(models.shapes, hidden_dims=8), kind(max_plate_nesting=2, **options)
    guide(models.data())
    before = parameters(guide)
    assert all(math.isfinite(loss) for loss in train(guide, 3, models.shapes, elbo))
    assert not unmoved(guide, before)


def test_enumerated_model():
    model = config_enumerate(models.mixture)
    guide = AutoIAF(model, hidden_dims=8)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    losses = train(guide, 100, model, elbo)
    assert sum(losses[-20:]) < sum(losses[:20])
    assert set(guide(models.data())) == {"locs", "probs"}


def test_in_a_list():
    lists = [AutoGuideList(models.regression) for _ in range(2)]
    for guides in lists:
        guides.append(AutoNormal(poutine.block(models.regression, expose=["scale"])))
        guides.append(AutoIAF(poutine.block(models.regression, hide=["scale"]), hidden_dims=8))
        train(guides, 2)
    for guides, other in (lists, lists[::-1]):
        before, theirs = parameters(guides[1]), parameters(other[1])
        train(guides, 4)
        assert not [name for name in unmoved(guides[1], before) if "transforms.0" not in name]
        assert len(unmoved(other[1], theirs)) == len(theirs)
        assert set(guides(models.data())) == {"loc", "scale"}
        assert guides.quantiles([0.1, 0.9], models.data())["loc"].shape == (2,)


def test_one_evaluation_of_each_network_in_a_step():
    guide = AutoIAF(models.regression, num_transforms=2, hidden_dims=8)
    guide(models.data())
    calls = []
    conditioners = [part for part in guide.modules() if isinstance(part, Conditioner)]
    for conditioner in conditioners:
        conditioner.register_forward_hook(lambda *_: calls.append(1))
    assert len(conditioners) == 3  # that of the noise, and one for each layer
    train(guide, 3)
    guide.rsample_and_log_prob(5)
    guide.sample_posterior(5)
    assert len(calls) == 3 * (3 + 1 + 1)


def test_no_growing_state():
    """F29."""
    guide = AutoIAF(models.regression, num_transforms=1, hidden_dims=4)
    found = []
    for count in (3, 60):
        for size in range(count):
            guide(models.data()[: 1 + size % 8])
            guide.sample_posterior(2)
        held = {name: len(v) for name, v in vars(guide).items() if hasattr(v, "__len__")}
        found.append((held, len(pyro.get_param_store())))
    assert found[0] == found[1]


def test_before_the_first_call():
    guide = AutoIAF(models.regression)
    for use in (guide.get_posterior, lambda: guide.start_at(0.0), guide.step_scales):
        with pytest.raises(RuntimeError, match="call it, or set_up, with the model's arguments"):
            use()
    guide.set_up(models.data())
    transform = guide.get_transform()
    guide.set_up()
    assert guide.get_transform() is transform


def test_guides_that_were_set_up_loaded_and_copied_in_inference_mode_train(tmp_path):
    guide = AutoIAF(models.regression, hidden_dims=8)
    with torch.inference_mode():
        guide.sample_posterior(3, models.data())
    trains(guide)
    guide.save(tmp_path / "guide")
    with torch.inference_mode():
        loaded, twin = AutoIAF.load(tmp_path / "guide", models.regression), copy.deepcopy(guide)
    trains(loaded)
    trains(twin, [guide])


@pytest.mark.parametrize("name", ["iaf", "maf", "structured"])
def test_draws_and_densities_in_inference_mode(name):
    guide = redraw_after_call(GUIDES[name](models.regression))
    posterior = guide.get_posterior()
    with torch.inference_mode():
        draws = guide.sample_posterior(4)
        log_prob = guide.log_prob(draws)
        assert guide.median(num_samples=10)["scale"] > 0
        trace = poutine.trace(guide).get_trace(models.data())
        assert trace.log_prob_sum().isfinite()
        latent, log_q = guide.rsample_and_log_prob(4)
        assert torch.allclose(posterior.log_prob(latent), log_q)
    assert torch.allclose(guide.log_prob({k: v.clone() for k, v in draws.items()}), log_prob)
    trains(guide)
