# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.univariate import MonotoneNeural, MonotoneNeuralTransform


def _random(count, gain=1.0, dtype=torch.float64):
    family = MonotoneNeural()
    return family(gain * torch.randn(count, family.num_params, dtype=dtype))


def test_slope_goes_from_the_first_to_the_last():
    slopes = torch.randn(5, 9)
    transform = MonotoneNeuralTransform(torch.randn(5), slopes, torch.randn(5, 8), torch.randn(5))
    ends = torch.tensor([[-1e6], [1e6]])
    ladj = transform.call_and_ladj(ends)[1]
    bounded = slopes / torch.sqrt(1 + (slopes / 2.5) ** 2)
    assert torch.allclose(ladj, torch.stack([bounded[:, 0], bounded[:, -1]]), atol=1e-6)


def test_slope_stays_between_the_smallest_and_the_largest():
    family = MonotoneNeural()
    params = 3 * torch.randn(200, family.num_params)
    slopes = params[:, 1:10]
    bounded = slopes / torch.sqrt(1 + (slopes / 2.5) ** 2)
    ladj = family(params).call_and_ladj(torch.linspace(-6, 6, 501).unsqueeze(-1))[1]
    assert (ladj >= bounded.amin(-1) - 1e-9).all()
    assert (ladj <= bounded.amax(-1) + 1e-9).all()


def test_units_are_told_apart_from_the_first_step():
    params = torch.zeros(1, MonotoneNeural().num_params, requires_grad=True)
    y, ladj = MonotoneNeural()(params).call_and_ladj(torch.randn(200, 1))
    (y**3 - ladj).sum().backward()
    slopes = params.grad[0, 1:10]
    assert len(slopes.unique()) == 9
    assert (slopes != 0).all()


def test_bracket_holds_the_root():
    transform = _random(500, gain=3.0)
    for x in (torch.randn(500), 1e4 * torch.randn(500)):
        low, high = transform.bracket(transform(x))
        assert (low <= x + 1e-9 * (1 + x.abs())).all()
        assert (x <= high + 1e-9 * (1 + x.abs())).all()


@pytest.mark.parametrize("gain", [1.0, 10.0, 1000.0])
def test_true_inverse_everywhere(gain):
    transform = _random(1000, gain=gain)
    y = torch.cat([torch.linspace(-10, 10, 11), torch.tensor([1e4, -1e4, 1e30, -1e30])])
    y = y.unsqueeze(-1)
    x = transform.inv(y)
    assert torch.allclose(transform(x), y.expand_as(x), rtol=1e-9, atol=1e-9)


def test_bad_count_units():
    for count in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="count_units: expected a positive integer"):
            MonotoneNeural(count_units=count)


def test_shapes_that_do_not_go_together():
    one = torch.zeros(5)
    for slopes, knots in (((5, 8), (5, 8)), ((5, 1), (5, 0)), ((), (5, 8)), ((5, 9), ())):
        with pytest.raises(ValueError, match=r"K \+ 1.*got"):
            MonotoneNeuralTransform(one, torch.zeros(slopes), torch.zeros(knots), one)
    with pytest.raises(ValueError, match="broadcast"):
        MonotoneNeuralTransform(torch.zeros(4), torch.zeros(5, 9), torch.zeros(5, 8), one)


def test_repr_tells_the_size():
    assert repr(_random(3)) == "MonotoneNeuralTransform(units=8)"
    assert repr(MonotoneNeural()) == "MonotoneNeural(count_units=8)"
