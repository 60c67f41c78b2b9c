# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from functools import partial

import pytest
import torch
from pyro.distributions import transforms
from torch import nn

from pyro_artransform import affine_autoregressive, conditional_affine_autoregressive, fit, iaf
from pyro_artransform.guides import AutoAutoregressive, AutoIAF
from pyro_artransform.transforms import AutoregressiveTransform, MonotonicAffineTransform
from tests.guides import models
from tests.transforms.metas import Shift


def test_bad_kinds():
    with pytest.raises(TypeError, match="model: expected a callable, got str"):
        AutoIAF("model")
    with pytest.raises(TypeError, match=r"init_loc_fn: expected a callable, got \{"):
        AutoIAF(models.regression, init_loc_fn={"loc": 0.0})
    with pytest.raises(TypeError, match="flow: expected a callable, got int"):
        AutoAutoregressive(models.regression, flow=3)
    with pytest.raises(TypeError, match="got the module AutoregressiveTransform; write flow="):
        AutoAutoregressive(models.regression, flow=affine_autoregressive(2))
    with pytest.raises(ValueError, match="full_rank: expected None, True or False, got 'full'"):
        AutoIAF(models.regression, full_rank="full")
    for scale in (0, float("nan"), True):
        with pytest.raises(ValueError, match="init_scale: expected a positive finite number, got"):
            AutoIAF(models.regression, init_scale=scale)


@pytest.mark.parametrize("transform", [iaf(3), conditional_affine_autoregressive(3, 2)])
def test_a_transform_in_place_of_the_model(transform):
    message = (
        rf"a Pyro model.*transform {type(transform).__name__}.*AutoAutoregressive\(model, flow"
    )
    with pytest.raises(TypeError, match=message):
        AutoIAF(transform)


class Doubled(transforms.AffineTransform, nn.Module):
    def __init__(self):
        nn.Module.__init__(self)
        super().__init__(0.0, 2.0)

    __hash__ = nn.Module.__hash__


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (lambda dim: transforms.affine_autoregressive(dim).inv, "got _InverseTransform"),
        (
            lambda dim: torch.distributions.ComposeTransform([affine_autoregressive(dim)]),
            r"got ComposeTransform.*chain\(",
        ),
        (lambda dim: nn.Linear(dim, dim), "got Linear"),
        (lambda dim: Doubled(), "parameters to train, got one without"),
        (
            lambda dim: affine_autoregressive(dim).requires_grad_(False),
            "parameters to train, got one without",
        ),
    ],
)
def test_flows_that_are_none(flow, message):
    """F16: in Pyro such a guide runs and nothing learns."""
    guide = AutoAutoregressive(models.regression, flow=flow)
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            guide(models.data())


class Unmasked(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        shift, scale = self.linear(x).chunk(2, -1)
        return MonotonicAffineTransform(shift, scale)


def test_flow_that_is_not_autoregressive():
    flow = lambda dim: AutoregressiveTransform(Unmasked(dim))  # noqa: E731
    guide = AutoAutoregressive(models.regression, flow=flow)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"not autoregressive.*\[0, 1\]"):
            guide(models.data())


def test_flow_follows_the_models_device_not_the_default():
    guide = AutoIAF(models.regression, hidden_dims=8)
    with torch.device("meta"):
        guide.set_up(models.data().new_zeros(3, device="cpu"))
    assert {p.device.type for p in guide.parameters()} == {"cpu"}


def test_a_flow_that_preserves_volume():
    flow = partial(iaf, num_transforms=2, hidden_dims=8, univariate=Shift)
    guide = AutoAutoregressive(models.gaussian, flow=flow)
    assert math.isfinite(
        fit(models.gaussian, guide, models.data(), num_steps=5, progress=False).elbo
    )
