# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.univariate import (
    AdditiveTransform,
    Affine,
    GatedAffine,
    GatedAffineTransform,
    MonotonicAffineTransform,
)


def test_affine_transform():
    shift, scale, x = torch.randn(3, 5)
    y, ladj = MonotonicAffineTransform(shift, scale).call_and_ladj(x)
    log_scale = scale / torch.sqrt(1 + scale**2 / 9)
    assert torch.allclose(y, x * log_scale.exp() + shift)
    assert torch.allclose(ladj, log_scale)


def test_params_broadcast_as_in_zuko():
    for shape in ((7, 5), (2, 7, 5)):
        y, ladj = MonotonicAffineTransform(torch.randn(5), torch.randn(5)).call_and_ladj(
            torch.randn(shape)
        )
        assert y.shape == ladj.shape == shape
    y, ladj = MonotonicAffineTransform(torch.randn(7, 5), torch.randn(5)).inv.call_and_ladj(
        torch.randn(5)
    )
    assert y.shape == ladj.shape == (7, 5)


@pytest.mark.parametrize("new", [MonotonicAffineTransform, GatedAffineTransform])
def test_shapes_that_do_not_go_together(new):
    with pytest.raises(ValueError, match=r"broadcast.*got \(5,\), \(4,\)"):
        new(torch.zeros(5), torch.zeros(4))


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan"), "3", None])
def test_bad_bound(bound):
    with pytest.raises(ValueError, match="bound: expected a positive finite number, got"):
        Affine(bound=bound)
    with pytest.raises(ValueError, match="bound: expected a positive finite number, got"):
        MonotonicAffineTransform(torch.zeros(5), torch.zeros(5), bound=bound)


def test_additive_transform():
    shift, x = torch.randn(2, 5)
    y, ladj = AdditiveTransform(shift).call_and_ladj(x)
    assert torch.equal(y, x + shift)
    assert torch.equal(ladj, torch.zeros(5))


def test_gated_transform_of_the_paper():
    mean, gate, x = torch.randn(3, 5)
    y, ladj = GatedAffineTransform(mean, gate).call_and_ladj(x)
    s = torch.sigmoid(gate)
    assert torch.allclose(y, s * x + (1 - s) * mean)
    assert torch.allclose(ladj, s.log())


@pytest.mark.parametrize("gate_bias", [0.0, 2.0, 5.0])
def test_gate_starts_nearly_open_and_never_shuts(gate_bias):
    family = GatedAffine(gate_bias=gate_bias)
    params = torch.zeros(3, 2)
    params[:, 1] = torch.tensor([0.0, -1e6, 1e6])
    ladj = family(params).call_and_ladj(torch.zeros(3))[1]
    assert torch.isclose(ladj[0], torch.tensor(gate_bias).sigmoid().log())
    assert -3.06 < ladj[1] < -3.0
    assert -0.05 < ladj[2] < 0


@pytest.mark.parametrize("gate_bias", [-1.0, float("inf"), float("nan")])
def test_bad_gate_bias(gate_bias):
    with pytest.raises(ValueError, match="gate_bias: expected a finite number of at least 0, got"):
        GatedAffine(gate_bias=gate_bias)
