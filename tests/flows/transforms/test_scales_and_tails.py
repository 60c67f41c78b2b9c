# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.flows.transforms import CompressedTails, FlowModule, LocationScale
from pyro_artransform.testing import check_transform, redraw


class SmallKnot(CompressedTails):
    """Most of the draws of the contract are beyond it."""

    knot, width = 0.3, 0.5


MADE = {
    "learnable, D = 1": (lambda: LocationScale(torch.zeros(1), 0.1, full_rank=True), 1),
    "learnable, diagonal": (lambda: LocationScale(torch.zeros(3), 0.1, full_rank=False), 3),
    "learnable": (lambda: LocationScale(torch.zeros(3), 0.1, full_rank=True), 3),
    "tails beyond a small knot": (SmallKnot, 4),
}


@pytest.mark.parametrize(("make", "dim"), MADE.values(), ids=MADE)
def test_contract_and_score(make, dim):
    check_transform(make, dim)
    check_transform(lambda: make().inv, dim)
    transform, x = redraw(make()), torch.randn(20, dim)
    expected = FlowModule.call_and_score(transform, x, -x)
    torch.testing.assert_close(transform.call_and_score(x, -x), expected)


# Learnable


def test_starts_as_the_normal():
    loc, x = torch.tensor([1.0, -40.0, 0.0]), torch.randn(7, 3)
    y, ladj = LocationScale(loc, 0.1, full_rank=True).call_and_ladj(x)
    assert torch.allclose(y, loc + 0.1 * x)
    assert torch.allclose(ladj, torch.full((7,), 0.1).log() * 3)


def test_the_names_in_files_and_no_parameter_that_cannot_act():
    one, three = (LocationScale(torch.zeros(dim), 1, full_rank=True) for dim in (1, 3))
    assert set(one.state_dict()) == {"loc", "log_scale"}
    assert set(three.state_dict()) == {"loc", "log_scale", "lower"}


def test_set_becomes_that_gaussian():
    loc, x = torch.randn(4), torch.randn(9, 4)
    scale_tril = torch.randn(4, 4).tril(-1) + torch.tensor([1e-4, 1.0, 1e4, 2.0]).diag()
    layer = LocationScale(torch.zeros(4), 0.1, full_rank=True)
    before = [id(p) for p in layer.parameters()]
    layer.set_(loc, scale_tril)
    assert [id(p) for p in layer.parameters()] == before
    assert torch.allclose(layer(x), dist.transforms.LowerCholeskyAffine(loc, scale_tril)(x))
    diagonal = LocationScale(torch.zeros(4), 0.1, full_rank=False)
    diagonal.set_(loc, scale_tril.diagonal().diag())
    assert torch.allclose(diagonal(x), loc + scale_tril.diagonal() * x)


@pytest.mark.parametrize(
    ("loc", "scale_tril", "message"),
    [
        (torch.zeros(2), torch.eye(3), r"scale_tril: expected shape \(2, 2\), got \(3, 3\)"),
        (torch.tensor([0.0, float("nan")]), torch.eye(2), "loc: expected finite"),
        (torch.zeros(2), torch.ones(2, 2), "lower-triangular"),
        (torch.zeros(2), torch.tensor([1.0, 0.0]), "positive diagonal"),
        (torch.zeros(2), torch.ones(2, 2).tril(), "full_rank=True"),
    ],
)
def test_what_is_not_a_location_and_scale(loc, scale_tril, message):
    layer = LocationScale(torch.zeros(2), 0.1, full_rank=False)
    with pytest.raises(ValueError, match=message):
        layer.set_(loc, scale_tril)
    assert torch.equal(layer.loc, torch.zeros(2))


def test_crosses_orders_of_magnitude_quickly():
    """A floor under the scale hides a tight posterior, and a cap a wide one.

    Gradients are clipped, as by Pyro's ClippedAdam: the first ones are of size 1e8.
    """
    layer, target = LocationScale(torch.zeros(2), 1.0, full_rank=True), torch.tensor([1e-4, 1e4])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 500) ** 2
        y, ladj = layer.call_and_ladj(torch.randn(256, 2))
        optimizer.zero_grad()
        ((y / target).square().sum(-1) / 2 - ladj).mean().backward()
        torch.nn.utils.clip_grad_value_(layer.parameters(), 10.0)
        optimizer.step()
    assert (layer.log_scale.exp() / target - 1).abs().max() < 0.1


# Tails


def test_tails_are_exactly_the_identity_up_to_the_knot_and_compressed_beyond():
    x = torch.linspace(-40.0, 40.0, 101)[:, None]
    y, ladj = CompressedTails().call_and_ladj(x)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros(101))
    y = CompressedTails()(torch.tensor([42.0, -1000.0]))
    expected = torch.tensor([40 + 2 * math.asinh(1.0), -40 - 2 * math.asinh(480.0)])
    torch.testing.assert_close(y, expected)


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


@pytest.mark.parametrize("scale", [torch.ones(3), 0.0, -1.0, "wide"])
def test_a_scale_that_is_no_positive_number(scale):
    with pytest.raises(ValueError, match="scale: expected a positive finite number, got"):
        LocationScale(torch.zeros(3), scale, full_rank=True)
