# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
from torch import nn

from pyro_artransform.guides import AutoIAF
from pyro_artransform.guides.persistence.spec import GuideSpec
from pyro_artransform.guides.prototype import prototype_trace
from tests.guides import models


@pytest.fixture
def spec():
    guide = AutoIAF(models.shapes, hidden_dims=8, nonlinearity=nn.Tanh())
    guide(models.data(torch.float32))
    return guide._spec


def test_there_and_back(spec):
    plain = json.loads(json.dumps(spec.to_plain()))
    back = GuideSpec.from_plain(plain, spec.device)
    assert back.to_plain() == spec.to_plain()
    assert back.shapes() == spec.shapes() == models.SHAPES
    assert isinstance(back.arguments["nonlinearity"], nn.Tanh)
    assert back.arguments["full_rank"] is True
    assert back.latents.latent_dim == len(back.zeros())


def test_what_is_not_known_stays_so(spec):
    plain = {**spec.to_plain(), "observed": None}
    assert GuideSpec.from_plain(plain, spec.device).observed is None


def test_conversion(spec):
    double = spec.to(torch.Tensor.double)
    assert spec.dtype == torch.float32
    assert double.dtype == double.zeros().dtype == torch.float64
    assert {site.dtype for site in double.sites} == {torch.float64}
    assert spec.to(lambda t: t.to("meta")).device.type == "meta"


def test_the_vector_has_the_widest_dtype():
    guide = AutoIAF(models.mixed_dtypes, hidden_dims=8)
    guide(models.data())
    assert guide._spec.dtype == torch.float64
    assert {site.dtype for site in guide._spec.sites} == {torch.float32, torch.float64}


def test_prototype_values_are_inside_the_supports(spec):
    trace = prototype_trace(spec.latents, spec.latents.constrain(spec.zeros()))
    for name, node in trace.nodes.items():
        assert node["fn"].support.check(node["value"]).all(), name
        assert node["value"].shape == node["fn"].shape() == models.SHAPES[name]
