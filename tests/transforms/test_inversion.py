# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform
from torch.func import hessian, jacrev, vmap

from pyro_artransform import (
    affine_autoregressive,
    hinged_marginals,
    iaf,
    maf,
    spline_autoregressive,
)
from pyro_artransform.conditioners import MaskedMLP, masks
from pyro_artransform.testing import redraw
from pyro_artransform.transforms import AutoregressiveTransform, ConditionedUnivariate
from pyro_artransform.univariate import Affine
from tests.conditioners.test_masks import random_dag
from tests.transforms.metas import CumulativeConditioner


def unrolled(t, y):
    """D full passes, differentiated by autograd."""
    x = torch.zeros_like(y)
    for _ in range(y.shape[-1]):
        x = t.meta(x).inv(y)
    return x


@pytest.mark.parametrize("seed", range(4))
def test_passes_as_deep_as_the_graph_are_exact_and_one_fewer_is_not(seed):
    adjacency = random_dag(8, 0.5, seed)
    meta = redraw(ConditionedUnivariate(MaskedMLP(8, 2, adjacency=adjacency), Affine()), 4.0)
    depth = int(masks.levels(adjacency).max()) + 1
    x = torch.randn(20, 8)
    y = AutoregressiveTransform(meta)(x).detach()
    exact = AutoregressiveTransform(meta, passes=depth).inv(y)
    assert torch.allclose(exact, x, atol=1e-10)
    with pytest.warns(RuntimeWarning, match=f"not converged after {depth - 1} passes") as caught:
        AutoregressiveTransform(meta, passes=depth - 1).inv(y)
    assert caught[0].filename == __file__


def test_exact_inverse_says_nothing():
    t = AutoregressiveTransform(
        redraw(ConditionedUnivariate(CumulativeConditioner(6, 2), Affine()))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t.inv(torch.randn(20, 6))


def test_gradients_agree_with_unrolled_autograd():
    t = redraw(affine_autoregressive(6, [16, 16]), 2.0)
    y = torch.randn(5, 6, requires_grad=True)
    weight = torch.randn(5, 6)
    targets = [y, *t.parameters()]
    expected = torch.autograd.grad((weight * unrolled(t, y)).sum(), targets, allow_unused=True)
    given = torch.autograd.grad((weight * t.inv(y.clone())).sum(), targets, allow_unused=True)
    for a, b in zip(given, expected):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_scale_with_the_loss(scale):
    """A convergence test with an absolute part would stop early where gradients are small."""
    t = redraw(affine_autoregressive(6, [16, 16]), 4.0).float()
    y = torch.randn(5, 6).float().requires_grad_()
    targets = [y, *t.parameters()]
    expected = torch.autograd.grad(t.inv(y.clone()).square().sum(), targets)
    given = torch.autograd.grad(scale * t.inv(y.clone()).square().sum(), targets)
    for a, b in zip(given, expected):
        assert (a / scale - b).abs().max() <= 1e-5 * b.abs().max()


def test_gradients_reach_parameters_that_nobody_sees():
    hidden = torch.tensor([0.3, 0.2], requires_grad=True)

    def meta(x):
        return AffineTransform(hidden[0] * nn.functional.pad(x[..., :-1], (1, 0)), hidden[1].exp())

    t = AutoregressiveTransform(meta)
    y = torch.randn(4, 3)
    (given,) = torch.autograd.grad(t.inv(y).sum(), hidden)
    (expected,) = torch.autograd.grad(unrolled(t, y).sum(), hidden)
    assert torch.allclose(given, expected)


def test_gradient_only_where_one_is_needed():
    t = redraw(affine_autoregressive(3))
    for p in t.parameters():
        p.requires_grad_(False)
    assert not t.inv(torch.randn(3)).requires_grad
    assert t.inv(torch.randn(3, requires_grad=True)).requires_grad


def test_second_derivative_raises_clearly():
    t = redraw(affine_autoregressive(3))
    y = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*torch\.func\.hessian"):
        torch.autograd.grad(t.inv(y).square().sum(), y, create_graph=True)


def test_second_derivative_under_torch_func():
    t = redraw(affine_autoregressive(3), 2.0)
    y = torch.randn(3)
    given = hessian(lambda v: t.inv(v).square().sum())(y)
    expected = torch.autograd.functional.hessian(lambda v: unrolled(t, v).square().sum(), y)
    assert torch.allclose(given, expected)


@pytest.mark.parametrize("build", [affine_autoregressive, spline_autoregressive, iaf])
def test_torch_func(build):
    t = redraw(build(4))
    y = torch.randn(5, 4)
    x = t.inv(y)
    assert torch.allclose(vmap(t.inv)(y), x)
    rows = vmap(jacrev(t.inv))(y)
    forward = torch.stack([torch.autograd.functional.jacobian(t, row) for row in x])
    assert torch.allclose(rows @ forward, torch.eye(4).expand(5, 4, 4), atol=1e-8)


@pytest.mark.parametrize("build", [affine_autoregressive, spline_autoregressive])
def test_tracing(build):
    t = redraw(build(4))
    for p in t.parameters():
        p.requires_grad_(False)
    y = torch.randn(5, 4)
    with torch.no_grad():
        traced = torch.jit.trace(lambda v: t.inv.call_and_ladj(v), (y,))
        other = torch.randn(7, 4)
        for given, expected in zip(traced(other), t.inv.call_and_ladj(other)):
            assert torch.allclose(given, expected)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2, 1]])
def test_infinity_and_nan_stay_in_their_row_and_after_their_coordinate(order):
    t = redraw(affine_autoregressive(4, order=order), 2.0)
    y = torch.randn(3, 4)
    expected = t.inv(y)[:, order]
    y = y.clone()
    y[0, order[2]], y[1, order[1]] = torch.inf, torch.nan
    x, ladj = t.inv.call_and_ladj(y)
    x = x[:, order]
    assert x[1, 1:].isnan().all()
    assert ladj.isnan().tolist() == [False, True, False]
    assert torch.equal(x[2], expected[2])
    assert torch.allclose(x[0, :2], expected[0, :2])
    assert torch.allclose(x[1, :1], expected[1, :1])


def test_nan_has_no_finite_consequences():
    """Not by passes over a meta from elsewhere, nor under torch.func; independent coordinates stay."""
    y = torch.tensor([[0.3, torch.nan, -0.2], [0.1, 0.2, 0.3]])
    for t in (
        AutoregressiveTransform(
            lambda x: AffineTransform(nn.functional.pad(x[..., :-1], (1, 0)), 2.0)
        ),
        redraw(affine_autoregressive(3)),
    ):
        for x, ladj in (t.inv.call_and_ladj(y), torch.vmap(t.inv.call_and_ladj)(y)):
            assert x[0, 1:].isnan().all()
            assert x[1].isfinite().all()
            assert ladj[1].isfinite()
    x = redraw(hinged_marginals(3)).inv(y)
    assert x.isnan().tolist() == [[False, True, False], [False] * 3]


def test_early_passes_may_overflow():
    # each coordinate multiplies the one before by 1e3: garbage of early passes overflows float32
    def meta(x):
        return AffineTransform(1e3 * nn.functional.pad(x[..., :-1], (1, 0)) ** 2, 1.0)

    t = AutoregressiveTransform(meta)
    x = torch.full((1, 8), 1e-3).float()
    y = t(x)
    assert torch.allclose(t.inv(y.clone()), x, atol=1e-5)


def test_overwritten_parameters_leave_the_inverse_exact():
    t = affine_autoregressive(5)
    for p in t.parameters():
        p.data.normal_()
    x = torch.randn(7, 5)
    assert torch.allclose(t.inv(t(x).detach()), x, atol=1e-8)


@pytest.mark.parametrize("build", [affine_autoregressive, spline_autoregressive, iaf, maf])
def test_gradient_at_a_known_pair_needs_no_inverse(build, monkeypatch):
    t = redraw(build(5), 2.0)
    x = torch.randn(7, 5)
    y = t(x).detach().requires_grad_()
    weight = torch.randn(7, 5)
    targets = [y, *t.parameters()]

    def gradients(back, ladj):
        return torch.autograd.grad((weight * back).sum() + ladj.square().sum(), targets)

    expected = gradients(*t.inverse_and_ladj(y))
    ladj_there = t.call_and_ladj(x)[1]

    def fail(*_):
        raise RuntimeError("inverted")

    monkeypatch.setattr("pyro_artransform.transforms.autoregressive.invert", fail)
    for a, b in zip(gradients(*t.inverse_at(x, y)), expected):
        assert torch.allclose(a, b, atol=1e-9)
    with torch.no_grad():
        back, ladj = t.inverse_at(x, y)
        assert torch.allclose(back, x, atol=1e-12)
        assert torch.allclose(ladj, -ladj_there, atol=1e-12)


def test_known_pair_where_no_value_can_be_read():
    t = redraw(affine_autoregressive(3))
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="use inverse_and_ladj there"):
        vmap(lambda v: t.inverse_at(v, v))(x)
