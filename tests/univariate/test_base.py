# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.univariate import soft_bound, split_params


def test_soft_bound_is_the_quotient_of_its_formula():
    x = torch.linspace(-20, 20, 401, requires_grad=True)
    y = soft_bound(x, 3.0)
    assert torch.allclose(y, x / torch.sqrt(1 + (x / 3) ** 2))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope, (1 + (x / 3) ** 2) ** -1.5)


@pytest.mark.parametrize("value", [1.0, -1e4, 1e5])
def test_gradient_of_soft_bound_never_dies(value):
    """F7. The automatic derivative of the quotient is 8 % off at 1e4 and zero at 1e5."""
    x = torch.tensor(value, dtype=torch.float32, requires_grad=True)
    (slope,) = torch.autograd.grad(soft_bound(x, 3.0), x)
    expected = torch.tensor((1 + (value / 3) ** 2) ** -1.5, dtype=torch.float32)
    assert torch.isclose(slope, expected, rtol=1e-3, atol=0.0)


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
