# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.univariate import Hinged, HingedTransform


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


@pytest.mark.parametrize("knots", [[], [-1.0], [float("inf")]])
def test_knots_are_checked(knots):
    with pytest.raises(ValueError, match="knots"):
        Hinged(knots=knots)


def test_width_is_checked():
    with pytest.raises(ValueError, match="width"):
        Hinged(width=0.0)


def test_derivatives_by_hand_are_those_of_the_formula():
    family = Hinged()
    for params_shape, shape in (((2, 6), (4, 2)), ((1, 3, 6), (2, 1))):  # the second x broadcasts
        inputs = (5 * torch.randn(params_shape)).requires_grad_(), torch.randn(shape)
        inputs[1].requires_grad_()
        assert torch.autograd.gradcheck(lambda p, x: family(p).call_and_ladj(x), inputs)
        assert torch.autograd.gradgradcheck(lambda p, x: family(p).call_and_ladj(x), inputs)
