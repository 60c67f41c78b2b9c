# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.testing import check_transform
from pyro_artransform.transforms import CompressedTails, FlowModule

# with a small knot, most of the draws of the contract are beyond it
MADE = {
    "by default": CompressedTails,
    "beyond a small knot": lambda: CompressedTails(0.3, 0.5),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("dim", [1, 4])
def test_contract(make, dim):
    check_transform(make, dim)
    check_transform(lambda: make().inv, dim)


def test_it_is_exactly_the_identity_up_to_the_knot():
    x = torch.linspace(-40.0, 40.0, 101)[:, None]
    y, ladj = CompressedTails().call_and_ladj(x)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros(101))


def test_values_beyond_the_knot():
    y = CompressedTails(10.0, 10.0)(torch.tensor([20.0, -1000.0]))
    expected = torch.tensor([10 + 10 * math.asinh(1.0), -10 - 10 * math.asinh(99.0)])
    torch.testing.assert_close(y, expected)


def test_two_derivatives_are_continuous_at_the_knot():
    t = CompressedTails(1.0, 2.0)
    x = torch.tensor([[1 - 1e-9], [1 + 1e-9]], requires_grad=True)
    y, ladj = t.call_and_ladj(x)
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (curvature,) = torch.autograd.grad(ladj.sum(), x)
    torch.testing.assert_close(slope, torch.ones(2, 1))
    torch.testing.assert_close(curvature, torch.zeros(2, 1), atol=1e-8, rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_overflows(dtype):
    t = CompressedTails()
    far = torch.tensor([[torch.finfo(dtype).max], [-1e30]], dtype=dtype, requires_grad=True)
    for direction in (t, t.inv):
        y, ladj = direction.call_and_ladj(far)
        (gradient,) = torch.autograd.grad((y.sum() + ladj.sum()), far)
        assert all(value.isfinite().all() for value in (y, ladj, gradient))
    assert all(value.isfinite().all() for value in t.call_and_score(far, torch.ones_like(far)))
    assert t(torch.full((1,), math.nan, dtype=dtype)).isnan()


def test_the_score_is_that_of_the_inverse():
    t, x = CompressedTails(0.3, 0.5), torch.randn(20, 3)
    expected = FlowModule.call_and_score(t, x, -x)
    torch.testing.assert_close(t.call_and_score(x, -x), expected)


def test_traced_and_mapped_it_is_the_same():
    t, x = CompressedTails(0.3, 0.5), torch.randn(4, 3)
    expected = t.call_and_ladj(x)
    torch.testing.assert_close(torch.func.vmap(t.call_and_ladj)(x), expected)
    traced = torch.jit.trace(lambda v: t.call_and_ladj(v), torch.randn(2, 3), check_trace=False)
    torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("options", [{"knot": 0.0}, {"width": -1.0}, {"width": math.inf}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CompressedTails(**options)
