# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.guides.distributions import LocationScale
from pyro_artransform.testing import check_transform


@pytest.mark.parametrize("full_rank", [False, True])
@pytest.mark.parametrize("input_dim", [1, 2, 5])
def test_contract(input_dim, full_rank):
    check_transform(
        lambda: LocationScale(torch.zeros(input_dim), 0.1, full_rank=full_rank), input_dim
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_starts_as_the_normal(dtype):
    loc = torch.tensor([1.0, -40.0, 0.0], dtype=dtype)
    layer = LocationScale(loc, 0.1, full_rank=True)
    x = torch.randn(7, 3, dtype=dtype)
    y, ladj = layer.call_and_ladj(x)
    assert torch.allclose(y, loc + 0.1 * x)
    assert torch.allclose(ladj, torch.full((7,), 0.1, dtype=dtype).log() * 3)
    assert y.dtype == ladj.dtype == dtype


def test_no_parameter_that_cannot_act():
    assert {
        name for name, _ in LocationScale(torch.zeros(1), 1, full_rank=True).named_parameters()
    } == {
        "loc",
        "log_scale",
    }
    assert LocationScale(torch.zeros(2), 1, full_rank=False).lower is None
    assert LocationScale(torch.zeros(2), 1, full_rank=True).lower.shape == (2, 2)


def test_set_becomes_that_gaussian():
    loc = torch.randn(4)
    scale_tril = torch.randn(4, 4).tril(-1) + torch.tensor([1e-4, 1.0, 1e4, 2.0]).diag()
    layer = LocationScale(torch.zeros(4), 0.1, full_rank=True)
    before = [id(p) for p in layer.parameters()]
    layer.set_(loc, scale_tril)
    assert [id(p) for p in layer.parameters()] == before
    x = torch.randn(9, 4)
    assert torch.allclose(layer(x), dist.transforms.LowerCholeskyAffine(loc, scale_tril)(x))
    diagonal = LocationScale(torch.zeros(4), 0.1, full_rank=False)
    diagonal.set_(loc, scale_tril.diagonal().diag())
    assert torch.allclose(diagonal(x), loc + scale_tril.diagonal() * x)


@pytest.mark.parametrize(
    ("loc", "scale_tril", "message"),
    [
        (torch.zeros(3), torch.eye(2), r"loc: expected shape \(2,\), got \(3,\)"),
        (torch.zeros(2), torch.eye(3), r"scale_tril: expected shape \(2, 2\), got \(3, 3\)"),
        (torch.tensor([0.0, float("nan")]), torch.eye(2), "loc: expected finite"),
        (torch.zeros(2), torch.eye(2) / 0, "scale_tril: expected finite"),
        (torch.zeros(2), torch.ones(2, 2), "lower-triangular"),
        (torch.zeros(2), -torch.eye(2), "positive diagonal"),
        (torch.zeros(2), torch.ones(2, 2).tril(), "full_rank=True"),
    ],
)
def test_set_refuses(loc, scale_tril, message):
    layer = LocationScale(torch.zeros(2), 0.1, full_rank=False)
    with pytest.raises(ValueError, match=message):
        layer.set_(loc, scale_tril)
    assert torch.equal(layer.loc, torch.zeros(2))


@pytest.mark.parametrize("target", [1e-4, 1e4])
def test_crosses_orders_of_magnitude_quickly(target):
    """F8: a floor under the scale hides a tight posterior, and a cap a wide one.

    Gradients are clipped, as by Pyro's ClippedAdam: the first ones are of size 1e8.
    """
    layer = LocationScale(torch.zeros(2), 1.0, full_rank=True)
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
