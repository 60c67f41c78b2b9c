# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What holds for every univariate family."""

import copy
import pickle

import pytest
import torch

from pyro_artransform.flows.univariate import (
    Affine,
    Hinged,
    MonotoneNeural,
    MonotoneTransform,
    RationalQuadraticSpline,
    Standardizing,
)
from pyro_artransform.testing import check_univariate

# a new family is one more line
FAMILIES = {
    "affine": Affine,
    "affine, narrow": lambda: Affine(bound=0.5),
    "standardizing": Standardizing,
    "hinged": Hinged,
    "hinged, one knot": lambda: Hinged(knots=[0.5], width=0.1),
    "spline": RationalQuadraticSpline,
    "spline, two bins": lambda: RationalQuadraticSpline(count_bins=2, bound=3),
    "monotone": MonotoneNeural,
    "monotone, one unit": lambda: MonotoneNeural(count_units=1),
}

every_family = pytest.mark.parametrize("new", FAMILIES.values(), ids=FAMILIES.keys())
# one of each class, without the others' sizes
KINDS = {name: new for name, new in FAMILIES.items() if "," not in name}
KINDS["monotone"] = FAMILIES["monotone, one unit"]
every_kind = pytest.mark.parametrize("new", KINDS.values(), ids=KINDS.keys())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_contracts(new, dtype):
    check_univariate(new(), dtype=dtype)


@every_family
def test_zero_params_are_the_identity_bit_by_bit(new):
    """F10: a start that is said to be the identity has to be."""
    family = new()
    points = [0.0, 1e-8, 1e-6, 1e-2, 1.0, 3.0, 5.0, 8.0, 1e2, 1e4, 1e30]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(points + [-point for point in points], dtype=dtype).unsqueeze(-1)
        transform = family(torch.zeros(1, family.num_params, dtype=dtype))
        for function in (transform, transform.inv):
            y, ladj = function.call_and_ladj(x)
            assert torch.equal(y, x)
            assert torch.equal(ladj, torch.zeros_like(x))


@every_family
def test_params_move_the_map_from_the_first_step(new):
    family = new()
    params = torch.zeros(64, family.num_params, requires_grad=True)
    y, ladj = family(params).call_and_ladj(torch.linspace(-2.9, 2.9, 64))
    (y.square() - ladj).sum().backward()
    assert (params.grad != 0).any(-1).all()


@every_family
def test_log_derivative_is_bounded_to_about_three(new):
    """F7: a scale that explodes; also what keeps plain SVI finite."""
    family = new()
    params = 1e3 * torch.randn(500, family.num_params)
    x = torch.cat([torch.linspace(-8, 8, 33), torch.tensor([-1e4, 1e4])]).unsqueeze(-1)
    ladj = family(params).call_and_ladj(x)[1]
    assert ladj.abs().max() < 3.5


@every_family
def test_infinity_and_nan_pass_and_raise_nothing(new):
    family = new()
    transform = family(torch.randn(2, family.num_params))
    undefined = family(torch.full((3, family.num_params), torch.nan))
    x = torch.tensor([-torch.inf, torch.inf])
    for function, other in ((transform, undefined), (transform.inv, undefined.inv)):
        assert torch.equal(function(x), x)
        assert other(torch.ones(3)).isnan().all()


@every_family
def test_sizes_of_params(new):
    family = new()
    transform = family(torch.zeros(0, 3, family.num_params))
    for function in (transform, transform.inv):
        y, ladj = function.call_and_ladj(torch.zeros(0, 3))
        assert y.shape == ladj.shape == (0, 3)
    with pytest.raises(ValueError, match=rf"expected .*{family.num_params}.*got \(4, 99\)"):
        family(torch.zeros(4, 99))


def _both_directions(family):
    def function(params, x):
        y, ladj = family(params).call_and_ladj(x)
        back, back_ladj = family(params).inv.call_and_ladj(x)
        return y, ladj, back, back_ladj

    return function


@every_kind
def test_trace(new, monkeypatch):
    """F23: TorchScript differentiates slices, and not the output of a split."""
    # A trace unrolls the search for a root, and TorchScript is slow on long graphs.
    monkeypatch.setattr(MonotoneTransform, "fixed_steps", 8)
    family = new()
    function = _both_directions(family)
    params, x = torch.randn(4, 3, family.num_params), torch.randn(4, 3)
    traced = torch.jit.trace(function, (params, x), check_trace=False)
    for _ in range(3):
        params = (0.5 * torch.randn_like(params)).requires_grad_()
        expected = function(params, x)
        (expected_grad,) = torch.autograd.grad(sum(part.sum() for part in expected), params)
        got = traced(params, x)
        (grad,) = torch.autograd.grad(sum(part.sum() for part in got), params)
        assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True))
        assert torch.allclose(grad, expected_grad)


@pytest.mark.parametrize(
    "name",
    [
        "affine",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("hinged", "spline", "monotone")),
    ],
)
def test_compile(name):
    family = KINDS[name]()
    function = _both_directions(family)
    params, x = torch.randn(4, 3, family.num_params), torch.randn(4, 3)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(params, x), function(params, x), strict=True):
        assert torch.allclose(got, expected)


@every_kind
def test_function_transforms(new):
    family = new()
    params, x = torch.randn(4, family.num_params), torch.randn(4)

    def total(params, x):
        return sum(part.sum() for part in _both_directions(family)(params, x))

    for function in (torch.func.jacrev(total), torch.func.jacfwd(total)):
        got = torch.func.vmap(function)(params.unsqueeze(1), x.unsqueeze(1)).squeeze(1)
        expected = torch.autograd.functional.jacobian(lambda p: total(p, x), params)
        assert torch.allclose(got, expected)


@every_kind
def test_inverse_is_a_transform_with_the_same_interface(new):
    family = new()
    params, y = torch.randn(3, family.num_params), torch.randn(3)
    transform = family(params)
    assert transform.with_cache() is transform
    x, ladj = transform.inv.call_and_ladj(y)
    assert torch.allclose(transform.inv.log_abs_det_jacobian(y, x), ladj)
    for twin in (copy.deepcopy(family), pickle.loads(pickle.dumps(family))):
        assert torch.equal(twin(params).inv(y), x)
    assert torch.equal(pickle.loads(pickle.dumps(transform.inv))(y), x)
