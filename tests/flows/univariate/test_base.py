# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.flows.univariate import soft_bound, split_params


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
