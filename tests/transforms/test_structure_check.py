# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Nonlinearities and networks that the check at the first call is to find."""

import pytest
import torch
from torch import nn

from pyro_artransform import (
    AutoIAF,
    affine_autoregressive,
    conditional_affine_autoregressive,
)
from pyro_artransform.conditioners import MaskedInput
from pyro_artransform.transforms import AutoregressiveTransform, ConditionedUnivariate
from pyro_artransform.univariate import Affine
from tests.guides.models import gaussian
from tests.transforms.metas import Dense
from tests.transforms.test_autoregressive import structure_warnings


@pytest.mark.parametrize(
    "nonlinearity",
    [nn.LayerNorm(8, elementwise_affine=False), nn.Softmax(-1)],
    ids=["norm", "softmax"],
)
def test_an_activation_that_mixes_units_is_found(nonlinearity):
    t = affine_autoregressive(3, 8, nonlinearity=nonlinearity)
    (message,) = structure_warnings(t, torch.randn(5, 3))
    assert "not autoregressive" in message
    with pytest.raises(ValueError, match="not autoregressive"):
        AutoIAF(gaussian, hidden_dims=8, nonlinearity=nonlinearity)(torch.zeros(1))


def centered(h):
    return h - h.mean(0)


OTHERS_IN_TRAINING = {
    "dropout": (lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.2)), "is random"),
    "rrelu": (nn.RReLU, "is random"),
    "batch norm": (lambda: nn.BatchNorm1d(8), "mixes the rows of a batch"),
}


@pytest.mark.parametrize(
    ("make", "message"),
    [*OTHERS_IN_TRAINING.values(), (lambda: centered, "mixes the rows of a batch")],
    ids=[*OTHERS_IN_TRAINING, "centered"],
)
def test_an_activation_that_is_random_or_mixes_rows_is_found(make, message):
    x = torch.randn(5, 3)
    t = affine_autoregressive(3, 8, nonlinearity=make())
    conditional = conditional_affine_autoregressive(3, 2, 8, nonlinearity=make())
    for transform in (t, conditional.condition(torch.randn(5, 2))):
        (found,) = structure_warnings(transform, x)
        assert message in found
        assert structure_warnings(transform, x) == []


@pytest.mark.parametrize(
    "make", [make for make, _ in OTHERS_IN_TRAINING.values()], ids=OTHERS_IN_TRAINING
)
def test_in_evaluation_it_is_right(make):
    t = affine_autoregressive(3, 8, nonlinearity=make()).eval()
    assert structure_warnings(t, torch.randn(5, 3)) == []


def test_looking_for_randomness_leaves_random_numbers_alone():
    t = affine_autoregressive(3, 8, nonlinearity=nn.Dropout(0.5))
    state = torch.get_rng_state()
    assert "is random" in t.structure.fault(t.meta, torch.zeros(5, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_activation_is_refused_in_a_guide():
    guide = AutoIAF(gaussian, hidden_dims=8, nonlinearity=nn.Dropout(0.5))
    with pytest.raises(ValueError, match="is random"):
        guide(torch.zeros(1))


def test_dropout_in_a_masked_input_is_found():
    conditioner = MaskedInput(nn.Sequential(Dense(3, 2), nn.Dropout(0.5)))
    t = AutoregressiveTransform(ConditionedUnivariate(conditioner, Affine()))
    (found,) = structure_warnings(t, torch.randn(5, 3))
    assert "is random" in found
    assert conditioner.eval().autoregressive


@pytest.mark.parametrize("nonlinearity", [torch.sin, nn.functional.silu], ids=["sin", "silu"])
def test_an_activation_of_ones_own_is_as_good(nonlinearity):
    t = affine_autoregressive(3, 8, nonlinearity=nonlinearity)
    assert structure_warnings(t, torch.randn(5, 3)) == []
    assert torch.allclose(t.inv(t(torch.ones(3))), torch.ones(3))
