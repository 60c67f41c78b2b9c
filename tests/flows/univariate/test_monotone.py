# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform._base.arguments import values_can_be_read
from pyro_artransform.flows.univariate import (
    MonotoneNeural,
    MonotoneNeuralTransform,
    MonotoneTransform,
    soft_bound,
)

FAMILY = MonotoneNeural()


def _random(count, gain=1.0):
    return FAMILY(gain * torch.randn(count, FAMILY.num_params))


def test_slopes_are_between_the_smallest_and_the_largest_and_end_at_the_outer_ones():
    params = 3 * torch.randn(200, FAMILY.num_params)
    bounded = soft_bound(params[:, 1:10], 2.5)
    x = torch.cat([torch.tensor([-1e6, 1e6]), torch.linspace(-6, 6, 501)]).unsqueeze(-1)
    ladj = FAMILY(params).call_and_ladj(x)[1]
    assert torch.allclose(ladj[:2], torch.stack([bounded[:, 0], bounded[:, -1]]), atol=1e-5)
    assert (ladj >= bounded.amin(-1) - 1e-9).all()
    assert (ladj <= bounded.amax(-1) + 1e-9).all()


def test_units_are_told_apart_from_the_first_step():
    params = torch.zeros(1, FAMILY.num_params, requires_grad=True)
    y, ladj = FAMILY(params).call_and_ladj(torch.randn(200, 1))
    (y**3 - ladj).sum().backward()
    slopes = params.grad[0, 1:10]
    assert len(slopes.unique()) == 9
    assert (slopes != 0).all()


@pytest.mark.parametrize("gain", [1.0, 10.0, 1000.0])
def test_true_inverse_everywhere_within_its_bracket(gain):
    transform = _random(300, gain=gain)
    y = torch.cat([torch.linspace(-10, 10, 11), torch.tensor([1e4, -1e4, 1e30, -1e30])])
    y = y.unsqueeze(-1)
    x = transform.inv(y)
    assert torch.allclose(transform(x), y.expand_as(x), rtol=1e-9, atol=1e-9)
    low, high = transform.bracket(y)
    assert (low <= x + 1e-9 * (1 + x.abs())).all()
    assert (x <= high + 1e-9 * (1 + x.abs())).all()


def test_float16_is_as_good_as_its_precision():
    params = torch.randn(200, FAMILY.num_params).half()
    x = torch.linspace(-50, 50, 401).half().unsqueeze(-1)
    expected = FAMILY(params.float()).call_and_ladj(x.float())
    for found, value in zip(FAMILY(params).call_and_ladj(x), expected):  # 20 units of float16
        assert ((found - value).abs() < 0.02 * (1 + value.abs())).all()


def test_sizes_are_checked_and_shown():
    with pytest.raises(ValueError, match="count_units: expected a positive integer"):
        MonotoneNeural(count_units=0)
    one = torch.zeros(5)
    for slopes, knots in (((5, 8), (5, 8)), ((5, 1), (5, 0)), ((), (5, 8)), ((5, 9), ())):
        with pytest.raises(ValueError, match=r"K \+ 1.*got"):
            MonotoneNeuralTransform(one, torch.zeros(slopes), torch.zeros(knots), one)
    with pytest.raises(ValueError, match="broadcast"):
        MonotoneNeuralTransform(torch.zeros(4), torch.zeros(5, 9), torch.zeros(5, 8), one)
    assert repr(FAMILY) == "MonotoneNeural(count_units=8)"


# The inverse of a transform that has none in closed form


class Cubic(MonotoneTransform):
    """y = a x + x^3: Newton alone overshoots where a is small."""

    def __init__(self, a):
        super().__init__()
        self.a = a
        self.count = 0

    def call_and_ladj(self, x):
        self.count += 1
        return self.a * x + x**3, torch.log(self.a + 3 * x**2).expand_as(x)

    def bracket(self, y):
        end = (1 + y.abs()) * torch.ones_like(self.a) / self.a.clamp(max=1)
        return -end, end


def test_a_third_party_transform_needs_only_a_bracket():
    transform = Cubic(torch.tensor([1e-3, 0.1, 1.0, 10.0]))
    y = torch.tensor([-30.0, -1e-3, 0.0, 2.0, 1e3]).unsqueeze(-1)
    x, ladj = transform.inverse_and_ladj(y)
    assert torch.allclose(transform(x), y.expand_as(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(ladj, -transform.call_and_ladj(x)[1])
    with pytest.raises(NotImplementedError):
        MonotoneTransform().inv(torch.zeros(3))


def test_first_and_second_derivatives_of_the_inverse_are_exact():
    a = torch.tensor([0.1, 0.7], requires_grad=True)
    y = torch.tensor([0.3, -2.0], requires_grad=True)

    def inverse(a, y):
        return Cubic(a).inverse_and_ladj(y)

    assert torch.autograd.gradcheck(inverse, (a, y))
    assert torch.autograd.gradgradcheck(inverse, (a, y))


def test_graph_does_not_grow_with_the_search():
    a, kept = torch.tensor([1e-3], requires_grad=True), []
    for y in (2.0, 1e9):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
            Cubic(a).inverse_and_ladj(torch.tensor([y]))
        kept.append(len(saved))
    assert kept[0] == kept[1]


def test_easy_roots_take_few_steps_and_a_bad_one_does_not_keep_them_waiting():
    transform = Cubic(torch.tensor([1.0, torch.nan, 1.0]))
    x = transform.inv(torch.tensor([10.0, 1.0, torch.nan]))
    assert torch.allclose(x[:1], torch.tensor(2.0))
    assert x[1:].isnan().all()
    # the search, then two steps that polish the root, and its log-determinant
    assert transform.count <= 15 + 3


def test_fixed_steps_suffice_where_values_cannot_be_read(monkeypatch):
    transform = _random(1000, gain=3.0)
    y = 10 * torch.randn(1000)
    expected = transform.inv(y)
    monkeypatch.setattr(
        "pyro_artransform.flows.univariate.monotone.values_can_be_read", lambda *tensors: False
    )
    assert torch.allclose(transform.inv(y), expected, rtol=1e-10, atol=1e-10)


def test_values_are_not_read_in_function_transforms_and_on_the_meta_device():
    assert values_can_be_read()

    def function(x):
        assert not values_can_be_read()
        return x.sum()

    torch.func.grad(function)(torch.ones(3))
    torch.func.vmap(function)(torch.ones(3, 2))
    torch.jit.trace(function, torch.ones(3), check_trace=False)
    assert not values_can_be_read(torch.ones(2), torch.ones(3, device="meta"))
    params = torch.zeros(3, FAMILY.num_params, device="meta")
    assert FAMILY(params).inv(torch.zeros(3, device="meta")).is_meta
