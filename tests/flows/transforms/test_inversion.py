# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The inverse and its gradients are those of as many passes as there are coordinates."""

import copy
import statistics

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform
from torch.func import hessian, jacrev, vmap

from pyro_artransform import (
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_spline_autoregressive,
    hinged_marginals,
    maf,
    spline_autoregressive,
)
from pyro_artransform.flows.conditioners import MaskedMLP
from pyro_artransform.flows.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
    ConditionedUnivariate,
    chain,
)
from pyro_artransform.flows.transforms.flow_module import call_and_ladj
from pyro_artransform.flows.univariate import Affine
from pyro_artransform.testing import redraw
from tests.flows.conditioners.test_masks import random_dag
from tests.flows.transforms.metas import CONDITIONERS, FAMILIES, make_meta


def unrolled(flow, y):
    """D full passes for each layer, differentiated by autograd: the inverse and its log-determinant."""
    total = 0.0
    for part in reversed(list(getattr(flow, "parts", [flow]))):
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1] - 1):
            x = call_and_ladj(part.meta(x).inv, y)[0]
        y, ladj = call_and_ladj(part.meta(x).inv, y)
        total = total + ladj.sum(-1)
    return y, total


def disagreement(flow, y, extra=()):
    """The worst difference from unrolled autograd, of values and gradients, relative to 1 + their size.

    Of the gradient of a parameter the size is that of its largest entry: sums over the batch carry its
    round-off to every entry.
    """
    y = y.detach().clone().requires_grad_()
    targets = [y, *extra, *flow.parameters()]
    weight, scale = torch.randn_like(y), torch.randn(y.shape[:-1])
    found = []
    for x, ladj in (flow.inverse_and_ladj(y), unrolled(flow, y)):
        loss = (weight * x).sum() + (scale * ladj).sum()
        gradients = torch.autograd.grad(loss, targets, allow_unused=True)
        found.append((x, ladj, *gradients))
    worst = 0.0
    for given, expected in zip(*found):
        if expected is None:
            assert given is None or not given.any()
            continue
        assert given.isfinite().all()
        worst = max(worst, ((given - expected).abs().max() / (1 + expected.abs().max())).item())
    return worst


@pytest.mark.parametrize(
    ("family", "conditioner", "gain"),
    [
        *((family, "mlp", 3.0) for family in FAMILIES),
        *(("affine", conditioner, 3.0) for conditioner in CONDITIONERS if conditioner != "mlp"),
        ("spline", "graph", 1.0),
        ("hinged", "narrow", 1.0),
        ("shift", "masked input", 1.0),
    ],
)
def test_values_and_gradients_are_those_of_unrolled_autograd(family, conditioner, gain):
    t = redraw(AutoregressiveTransform(make_meta(family, conditioner, 6)), gain)
    assert disagreement(t, torch.randn(5, 6)) <= 1e-9


@pytest.mark.parametrize(
    ("family", "conditioner", "context_shape"),
    [
        ("affine", "mlp", (2,)),
        ("spline", "mlp", (5, 2)),
        ("affine", "narrow", (1, 2)),
        ("spline", "graph", (1, 2)),
        ("affine", "masked input", (5, 2)),
        ("affine", "unconditional", (2,)),
        ("spline", "foreign", (5, 2)),
    ],
)
def test_and_with_a_context(family, conditioner, context_shape):
    t = redraw(ConditionalAutoregressiveTransform(make_meta(family, conditioner, 4, 2)), 2.0)
    context = torch.randn(context_shape).requires_grad_()
    assert disagreement(t.condition(context), torch.randn(5, 4), [context]) <= 1e-9


@pytest.mark.parametrize(("dim", "density"), [(12, 0.6), (40, 0.2)])
def test_and_with_a_sparse_graph(dim, density):
    adjacency = random_dag(dim, density)
    meta = ConditionedUnivariate(MaskedMLP(dim, 2, adjacency=adjacency), Affine())
    assert disagreement(redraw(AutoregressiveTransform(meta), 2.0), torch.randn(70, dim)) <= 1e-9


def funnel(count):
    width = 3 * torch.randn(count, 1)
    return torch.cat([width, (width / 2).exp() * torch.randn(count, 8)], -1)


def test_and_of_trained_weights():
    flow = chain([affine_autoregressive(9, 32), spline_autoregressive(9, 32, count_bins=4)])
    losses = []
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(100):
        noise, ladj = flow.call_and_ladj(funnel(64))
        loss = (noise.square().sum(-1) / 2 - ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    assert statistics.median(losses[-20:]) < statistics.median(losses[:20]) - 1
    x = funnel(16)
    with torch.no_grad():
        y, _ = flow.call_and_ladj(x)
        back = flow.inverse_and_ladj(y)[0]
        again = flow.call_and_ladj(back)[0]
    assert ((again - y).abs() <= 1e-11 * (1 + y.abs() + back.abs())).all()
    assert disagreement(flow, y[:4]) <= 1e-9


@pytest.mark.parametrize(
    ("build", "dim", "gain"),
    [
        (affine_autoregressive, 64, 2),
        (spline_autoregressive, 64, 1),
        (affine_autoregressive, 512, 2),
        pytest.param(spline_autoregressive, 512, 4, marks=pytest.mark.slow),
    ],
)
def test_residual_of_noise_in_many_dimensions(build, dim, gain):
    """Relative to ``1 + |y| + |x|`` of the same coordinate."""
    t = redraw(build(dim), gain)
    for dtype, unit in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        t, noise = t.to(dtype), torch.randn(16, dim, dtype=dtype)
        with torch.no_grad():
            for y in (noise, t(noise)):
                x = t.inverse_and_ladj(y)[0]
                error = (t.call_and_ladj(x)[0] - y).abs()
                assert (error <= unit * (1 + y.abs() + x.abs())).all()


@pytest.mark.slow
def test_compiled():
    flow = redraw(maf(4, num_transforms=1), 2.0)
    direct = copy.deepcopy(flow)

    def both(given, value):
        y, ladj = given.call_and_ladj(value)
        x, inverse_ladj = given.inverse_and_ladj(value)
        return y, ladj, x, inverse_ladj

    value = torch.randn(5, 4)
    compiled = torch.compile(lambda v: both(flow, v), backend="aot_eager")(value)
    expected = both(direct, value)
    torch.testing.assert_close(compiled, expected, atol=1e-12, rtol=1e-5)
    weights = [torch.randn_like(part) for part in expected]
    for outputs in (compiled, expected):
        sum((w * out).sum() for w, out in zip(weights, outputs)).backward()
    for a, b in zip(flow.parameters(), direct.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-10)


def test_vmap_and_jacrev_with_a_context():
    t = redraw(conditional_spline_autoregressive(4, 2), 2.0)
    context, y = torch.randn(5, 2), torch.randn(5, 4)

    def inverse(c, v):
        return t.condition(c).inv.call_and_ladj(v)

    x, ladj = inverse(context, y)
    for given, expected in zip(vmap(inverse)(context, y), (x, ladj)):
        assert torch.allclose(given, expected, atol=1e-12)
    shared = vmap(inverse, in_dims=(None, 0))(context[0], y)
    assert torch.allclose(shared[0], inverse(context[0], y)[0], atol=1e-12)
    by_context, by_value = vmap(jacrev(lambda c, v: inverse(c, v)[0], argnums=(0, 1)))(context, y)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(
            lambda c, v: unrolled(t.condition(c), v)[0], (context[row], y[row])
        )
        assert torch.allclose(by_context[row], jacobian[0], atol=1e-9)
        assert torch.allclose(by_value[row], jacobian[1], atol=1e-9)
    assert torch.allclose(torch.linalg.slogdet(by_value)[1], ladj, atol=1e-9)


@pytest.mark.parametrize(
    ("context_shape", "value_shape"),
    [((2,), (3, 2, 4)), ((3, 1, 2), (3, 2, 4)), ((2, 2), (3, 1, 4)), ((3, 2, 2), (4,))],
)
def test_batch_shapes_broadcast(context_shape, value_shape):
    t = redraw(conditional_affine_autoregressive(4, 2), 2.0)
    context = torch.randn(context_shape).requires_grad_()
    y = torch.randn(value_shape).requires_grad_()
    x, ladj = t.condition(context).inverse_and_ladj(y)
    assert x.shape == (3, 2, 4)
    assert ladj.shape == (3, 2)
    rows = t.condition(context.expand(3, 2, 2).reshape(6, 2))
    x_rows, ladj_rows = rows.inverse_and_ladj(y.expand(3, 2, 4).reshape(6, 4))
    weight = torch.randn(3, 2, 4)
    found = []
    for value, log in ((x, ladj), (x_rows.view(3, 2, 4), ladj_rows.view(3, 2))):
        loss = (weight * value).sum() + log.square().sum()
        found.append([value, log, *torch.autograd.grad(loss, [context, y, *t.parameters()])])
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-10)


def test_gradients_scale_with_the_loss():
    """A convergence test with an absolute part would stop early where gradients are small."""
    scale = 1e-12
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
    (expected,) = torch.autograd.grad(unrolled(t, y)[0].sum(), hidden)
    assert torch.allclose(given, expected)


def test_second_derivative_raises_clearly_and_is_right_under_torch_func():
    t = redraw(affine_autoregressive(3), 2.0)
    y = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*torch\.func\.hessian"):
        torch.autograd.grad(t.inv(y).square().sum(), y, create_graph=True)
    given = hessian(lambda v: t.inv(v).square().sum())(y)
    expected = torch.autograd.functional.hessian(lambda v: unrolled(t, v)[0].square().sum(), y)
    assert torch.allclose(given, expected)


def test_tracing():
    t = redraw(chain([affine_autoregressive(4), spline_autoregressive(4)]))
    for p in t.parameters():
        p.requires_grad_(False)
    y = torch.randn(5, 4)
    with torch.no_grad():
        traced = torch.jit.trace(lambda v: t.inv.call_and_ladj(v), (y,))
        other = torch.randn(7, 4)
        for given, expected in zip(traced(other), t.inv.call_and_ladj(other)):
            assert torch.allclose(given, expected)


def test_gradient_at_a_known_pair_needs_no_inverse(monkeypatch):
    t = redraw(maf(5), 2.0)
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

    monkeypatch.setattr("pyro_artransform.flows.transforms.autoregressive.invert", fail)
    for a, b in zip(gradients(*t.inverse_at(x, y)), expected):
        assert torch.allclose(a, b, atol=1e-9)
    with torch.no_grad():
        back, ladj = t.inverse_at(x, y)
        assert torch.allclose(back, x, atol=1e-12)
        assert torch.allclose(ladj, -ladj_there, atol=1e-12)
    with pytest.raises(RuntimeError, match="use inverse_and_ladj there"):
        vmap(lambda v: t.inv.inverse_at(v, v))(x)


# Numbers that are not finite


def test_early_passes_may_overflow():
    # each coordinate multiplies the one before by 1e3: garbage of early passes overflows float32
    def meta(x):
        return AffineTransform(1e3 * nn.functional.pad(x[..., :-1], (1, 0)) ** 2, 1.0)

    t = AutoregressiveTransform(meta)
    x = torch.full((1, 8), 1e-3).float()
    y = t(x)
    assert torch.allclose(t.inv(y.clone()), x, atol=1e-5)


def test_infinity_and_nan_stay_in_their_row_and_after_their_coordinate():
    order = [3, 0, 2, 1]
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


def test_infinity_stays_one_where_passes_invert():
    t = AutoregressiveTransform(
        lambda x: AffineTransform(nn.functional.pad(x[:, :-1], (1, 0)), 2.0)
    )
    x = t.inv(torch.tensor([[0.3, torch.inf, 0.1], [0.1, -torch.inf, 0.2]]))
    assert x[:, :2].tolist() == [[0.15, torch.inf], [0.05, -torch.inf]]


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
