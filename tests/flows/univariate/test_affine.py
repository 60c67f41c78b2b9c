# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from functools import partial

import pytest
import torch

from pyro_artransform.flows.univariate import (
    Affine,
    Hinged,
    HingedTransform,
    MonotonicAffineTransform,
    soft_bound,
    split_params,
)


def test_soft_bound_follows_its_formula():
    x = torch.linspace(-20, 20, 401, requires_grad=True)
    y = soft_bound(x, 3.0)
    assert torch.allclose(y, 6 / math.pi * torch.atan(math.pi * x / 6))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope, 1 / (1 + (math.pi * x / 6) ** 2))


@pytest.mark.parametrize("value", [1.0, -1e4, 1e5])
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_soft_bound_keep_their_digits_and_never_die(value, order):
    """F7, in float32, where the automatic derivative of x / sqrt(1 + x^2) is zero at 1e5."""

    def slope(dtype):
        x = torch.tensor(value, dtype=dtype, requires_grad=True)
        y = soft_bound(x, 3.0)
        for _ in range(order):
            (y,) = torch.autograd.grad(y, x, create_graph=True)
        return y.detach().double()

    single, double = slope(torch.float32), slope(torch.float64)
    assert double != 0
    assert torch.isclose(single, double, rtol=1e-5, atol=0.0)


def test_soft_bound_does_not_overflow():
    x = torch.tensor([1e30, -1e30, torch.inf, 0.0, torch.nan], dtype=torch.float32)
    y = soft_bound(x, 3.0)
    assert y[:4].tolist() == pytest.approx([3.0, -3.0, 3.0, 0.0], rel=1e-5, abs=0.0)
    assert y[4].isnan()


def test_split_params_gives_views_in_order():
    params = torch.randn(4, 3, 7, requires_grad=True)
    for source in (params, params.mT.contiguous().mT, params[0, 0]):
        parts = split_params(source, (1, 4, 2))
        assert [part.shape[-1] for part in parts] == [1, 4, 2]
        assert torch.equal(torch.cat(parts, -1), source)
        assert parts[0].data_ptr() == source.data_ptr()
        loss = sum(part.square().sum() for part in parts)
        assert torch.allclose(torch.autograd.grad(loss, source)[0], 2 * source)


def test_affine_transform_and_broadcasting_as_in_zuko():
    shift, scale, x = torch.randn(3, 5)
    y, ladj = MonotonicAffineTransform(shift, scale).call_and_ladj(x)
    log_scale = soft_bound(scale, 3.0)
    assert torch.allclose(y, x * log_scale.exp() + shift)
    assert torch.allclose(ladj, log_scale)
    for shape in ((7, 5), (2, 7, 5)):
        transform = MonotonicAffineTransform(torch.randn(5), torch.randn(5))
        y, ladj = transform.call_and_ladj(torch.randn(shape))
        assert y.shape == ladj.shape == shape
    transform = MonotonicAffineTransform(torch.randn(7, 5), torch.randn(5))
    y, ladj = transform.inv.call_and_ladj(torch.randn(5))
    assert y.shape == ladj.shape == (7, 5)


def test_a_hinge_has_a_slope_on_each_side():
    log_slope = torch.tensor([0.8, -0.5])
    t = HingedTransform([log_slope], [torch.zeros(2)], [1.0], width=0.1)
    far = torch.tensor([[-40.0], [40.0]]).expand(2, 2)
    slopes = t.call_and_ladj(far)[1]
    assert torch.allclose(slopes[0], torch.zeros(2), atol=1e-4)
    assert torch.allclose(slopes[1], log_slope, atol=1e-4)


def test_sides_are_mirror_images():
    a, b = torch.randn(2, 3, 5)
    x = torch.randn(20, 5)
    right = HingedTransform(a, torch.zeros_like(b), [0.0, 1.0, 2.0])
    left = HingedTransform(torch.zeros_like(b), a, [0.0, 1.0, 2.0])
    assert torch.allclose(right(x), -left(-x))


def test_the_slopes_of_all_knots_are_bounded_together():
    family = Hinged()
    params = torch.full((1, family.num_params), 10000.0)
    x = torch.tensor([[-50.0], [50.0]])
    assert torch.allclose(family(params).call_and_ladj(x)[1], torch.tensor(3.0), atol=1e-2)
    assert torch.allclose(family(-params).call_and_ladj(x)[1], torch.tensor(-3.0), atol=2e-2)


def test_bad_arguments():
    zeros = torch.zeros(5)
    for make in (Affine, partial(MonotonicAffineTransform, zeros, zeros)):
        with pytest.raises(ValueError, match="bound: expected a positive finite number, got"):
            make(bound=float("nan"))
    with pytest.raises(ValueError, match=r"broadcast.*got \(5,\), \(4,\)"):
        MonotonicAffineTransform(zeros, torch.zeros(4))
    for make in (Hinged, partial(HingedTransform, [], [])):
        with pytest.raises(ValueError, match="knots"):
            make(knots=[])
    for options in ({"knots": [-1.0]}, {"knots": [float("inf")]}, {"width": 0.0}):
        with pytest.raises(ValueError, match=r"knots|width"):
            Hinged(**options)


@pytest.mark.parametrize("family", [Affine(), Hinged(knots=[0.0, 1.5])], ids=["affine", "hinged"])
def test_derivatives_by_hand_are_those_of_the_formula(family):
    def function(params, x):
        y, ladj = family(params).call_and_ladj(x)
        return y, ladj.contiguous()  # gradcheck writes into each element by itself

    shapes = ((2, family.num_params), (4, 2)), ((1, 3, family.num_params), (2, 1))
    for params_shape, shape in shapes:  # the second x broadcasts
        inputs = (5 * torch.randn(params_shape)).requires_grad_(), torch.randn(shape)
        inputs[1].requires_grad_()
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
