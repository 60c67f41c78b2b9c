# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.arguments import values_can_be_read
from pyro_artransform.univariate import MonotoneNeural, MonotoneTransform


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


def test_first_and_second_derivatives_of_the_inverse_are_exact():
    a = torch.tensor([0.1, 0.7], requires_grad=True)
    y = torch.tensor([0.3, -2.0], requires_grad=True)

    def inverse(a, y):
        return Cubic(a).inverse_and_ladj(y)

    assert torch.autograd.gradcheck(inverse, (a, y))
    assert torch.autograd.gradgradcheck(inverse, (a, y))


def test_graph_does_not_grow_with_the_search():
    a = torch.tensor([1e-3], requires_grad=True)
    transform = Cubic(a)
    transform.inverse_and_ladj(torch.tensor([2.0]))
    assert transform.count > 6
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        Cubic(a).inverse_and_ladj(torch.tensor([2.0]))
    few = len(kept)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        Cubic(a).inverse_and_ladj(torch.tensor([1e9]))
    assert len(kept) == few


def test_easy_roots_take_few_steps(monkeypatch):
    family = MonotoneNeural()
    transform = family(torch.randn(1000, family.num_params))
    evaluate, calls = transform.call_and_ladj, []

    def counted(x):
        calls.append(x)
        return evaluate(x)

    monkeypatch.setattr(transform, "call_and_ladj", counted)
    y = torch.randn(1000)
    x = transform.inv(y)
    assert torch.allclose(evaluate(x)[0], y, atol=1e-12)
    # one for the bracket, two that polish the root, and one for its log-determinant
    assert len(calls) <= 15 + 4


def test_fixed_steps_suffice_where_values_cannot_be_read(monkeypatch):
    family = MonotoneNeural()
    transform = family(3 * torch.randn(2000, family.num_params))
    y = 10 * torch.randn(2000)
    expected = transform.inv(y)
    monkeypatch.setattr(
        "pyro_artransform.univariate.root.values_can_be_read", lambda *tensors: False
    )
    assert torch.allclose(transform.inv(y), expected, rtol=1e-10, atol=1e-10)


def test_one_bad_element_does_not_keep_the_others_waiting():
    transform = Cubic(torch.tensor([1.0, torch.nan, 1.0]))
    x = transform.inv(torch.tensor([10.0, 1.0, torch.nan]))
    assert torch.allclose(x[:1], torch.tensor(2.0))
    assert x[1:].isnan().all()
    assert transform.count < 40


def test_values_are_not_read_in_function_transforms():
    assert values_can_be_read()
    seen = []

    def function(x):
        seen.append(values_can_be_read())
        return x.sum()

    torch.func.grad(function)(torch.ones(3))
    torch.func.vmap(function)(torch.ones(3, 2))
    torch.jit.trace(function, torch.ones(3), check_trace=False)
    assert seen == [False, False, False]


def test_values_are_not_read_on_the_meta_device():
    assert values_can_be_read(torch.ones(2), torch.ones(3))
    assert not values_can_be_read(torch.ones(2), torch.ones(3, device="meta"))
    family = MonotoneNeural()
    params = torch.zeros(3, family.num_params, device="meta")
    assert family(params).inv(torch.zeros(3, device="meta")).is_meta


def test_the_contract_is_abstract():
    with pytest.raises(NotImplementedError):
        MonotoneTransform().inv(torch.zeros(3))
