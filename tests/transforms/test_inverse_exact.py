# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The inverse and its gradients are those of as many passes as there are coordinates."""

import copy
import statistics

import pytest
import torch
from torch.func import jacrev, vmap

from pyro_artransform import (
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_spline_autoregressive,
    iaf,
    maf,
    spline_autoregressive,
)
from pyro_artransform.conditioners import MaskedMLP
from pyro_artransform.testing import redraw
from pyro_artransform.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
    ConditionedUnivariate,
    chain,
)
from pyro_artransform.transforms.flow_module import inverse_and_ladj
from pyro_artransform.univariate import Affine
from tests.conditioners.test_masks import random_dag
from tests.transforms.metas import CONDITIONERS, FAMILIES


def unrolled(flow, y):
    """D full passes for each layer, differentiated by autograd: the inverse and its log-determinant."""
    total = 0.0
    for part in reversed(list(getattr(flow, "parts", [flow]))):
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1] - 1):
            x = inverse_and_ladj(part.meta(x), y)[0]
        y, ladj = inverse_and_ladj(part.meta(x), y)
        total = total + ladj.sum(-1)
    return y, total


def make_meta(family, conditioner, dim, context_dim=0):
    univariate = FAMILIES[family]()
    network = CONDITIONERS[conditioner](dim, univariate.num_params, context_dim)
    return ConditionedUnivariate(network, univariate)


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


@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize("conditioner", CONDITIONERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_unrolled_autograd(family, conditioner, gain):
    t = redraw(AutoregressiveTransform(make_meta(family, conditioner, 6)), gain)
    assert disagreement(t, torch.randn(5, 6)) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_and_of_a_chain(family):
    t = redraw(iaf(5, univariate=FAMILIES[family]), 2.0)
    assert disagreement(t, torch.randn(5, 5)) <= 1e-9


@pytest.mark.parametrize("context_shape", [(2,), (1, 2), (5, 2)])
@pytest.mark.parametrize("conditioner", CONDITIONERS)
@pytest.mark.parametrize("family", ["affine", "spline"])
def test_and_with_a_context(family, conditioner, context_shape):
    t = redraw(ConditionalAutoregressiveTransform(make_meta(family, conditioner, 4, 2)), 2.0)
    context = torch.randn(context_shape).requires_grad_()
    assert disagreement(t.condition(context), torch.randn(5, 4), [context]) <= 1e-9


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("dim", [12, 40])
def test_and_with_a_sparse_graph(dim, density):
    adjacency = random_dag(dim, density)
    meta = ConditionedUnivariate(MaskedMLP(dim, 2, adjacency=adjacency), Affine())
    assert disagreement(redraw(AutoregressiveTransform(meta), 2.0), torch.randn(70, dim)) <= 1e-9


def funnel(count):
    width = 3 * torch.randn(count, 1)
    return torch.cat([width, (width / 2).exp() * torch.randn(count, 8)], -1)


def walks_of_200(count):
    x = [torch.randn(count)]
    for _ in range(199):
        x.append(0.95 * x[-1] + 0.1 * torch.randn(count))
    return torch.stack(x, -1)


def scales(count):
    base = torch.randn(count, 9)
    return (base + 0.5 * base.roll(1, -1)) * torch.logspace(-4, 4, 9)


TARGETS = {
    "funnel": (funnel, lambda: iaf(9, num_transforms=2)),
    "funnel, splines": (
        funnel,
        lambda: chain([affine_autoregressive(9), spline_autoregressive(9, [32, 32])]),
    ),
    "chain of 200": (walks_of_200, lambda: affine_autoregressive(200, [200, 200])),
    "scales from 1e-4 to 1e4": (scales, lambda: iaf(9, num_transforms=3)),
}


@pytest.fixture(scope="module")
def trained():
    """Flows from data to noise, fitted by maximum likelihood, each when it is first asked for."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = fitted(*TARGETS[name])
        return done[name]

    return get


def fitted(sample, build):
    flow = build()
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    losses = []
    for _ in range(300):
        noise, ladj = flow.call_and_ladj(sample(64))
        loss = (noise.square().sum(-1) / 2 - ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    return flow, sample, losses


@pytest.mark.parametrize("name", TARGETS)
def test_and_of_trained_weights(trained, name):
    flow, sample, losses = trained(name)
    assert statistics.median(losses[-20:]) < statistics.median(losses[:20]) - 1
    x = sample(16)
    with torch.no_grad():
        y, _ = flow.call_and_ladj(x)
        back = flow.inverse_and_ladj(y)[0]
        again = flow.call_and_ladj(back)[0]
    assert ((again - y).abs() <= 1e-11 * (1 + y.abs() + back.abs())).all()
    assert disagreement(flow, y[:4]) <= 1e-9


BUILDERS = {"affine": affine_autoregressive, "spline": spline_autoregressive}
UNITS = {torch.float64: 1e-11, torch.float32: 1e-5}


def residual(t, y):
    """The worst of ``T(T^-1(y)) - y`` relative to ``1 + |y| + |x|`` of the same coordinate."""
    x = t.inverse_and_ladj(y)[0]
    return relative(t.call_and_ladj(x)[0] - y, x, y), x


def relative(error, x, y):
    return (error.abs() / (1 + y.abs() + x.abs())).max().item()


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("gain", [1, 2, 4])
@pytest.mark.parametrize("dim", [8, 64, 512])
@pytest.mark.parametrize("family", BUILDERS)
def test_residual(family, dim, gain, dtype):
    """Where noise is inverted with large weights, x is 1e3 times as large as y, and in float32 T itself is
    evaluated no better than to 2e-5; then a few times its own error is allowed."""
    t = redraw(BUILDERS[family](dim), gain).to(dtype)
    for batch in (1, 64 if family == "affine" else 16):
        noise = torch.randn(batch, dim, dtype=dtype)
        with torch.no_grad():
            assert residual(t, t.call_and_ladj(noise)[0])[0] <= UNITS[dtype]
            found, x = residual(t, noise)
            allowed = UNITS[dtype]
            if gain == 4 and dtype == torch.float32:
                exact = copy.deepcopy(t).double().call_and_ladj(x.double())[0]
                round_off = relative(t.call_and_ladj(x)[0] - exact, x, noise)
                allowed = max(allowed, 4 * round_off)
        assert found <= allowed


@pytest.mark.parametrize("gain", [1, 4])
@pytest.mark.parametrize("family", BUILDERS)
def test_error_is_that_of_as_many_passes_as_coordinates(family, gain):
    ratios = []
    for seed in range(50):
        t = redraw(BUILDERS[family](24, [48, 48]), gain, seed=seed).float()
        y = torch.randn(16, 24, dtype=torch.float32)
        with torch.no_grad():
            exact = unrolled(copy.deepcopy(t).double(), y.double())[0]
            found = t.inverse_and_ladj(y)[0], unrolled(t, y)[0]
        given, passes = (((x - exact).abs() / (1 + exact.abs())).max().item() for x in found)
        ratios.append(given / passes)
    assert statistics.median(ratios) <= 1.5
    assert max(ratios) <= 20


@pytest.mark.parametrize("build", [affine_autoregressive, maf])
def test_compiled(build):
    flow = redraw(build(4) if build is affine_autoregressive else build(4, num_transforms=1), 2.0)
    direct = copy.deepcopy(flow)

    def both(given, value):
        y, ladj = given.call_and_ladj(value)
        x, inverse_ladj = given.inverse_and_ladj(value)
        return y, ladj, x, inverse_ladj

    value = torch.randn(5, 4)
    compiled = torch.compile(lambda v: both(flow, v), backend="aot_eager")(value)
    expected = both(direct, value)
    for a, b in zip(compiled, expected):
        assert torch.allclose(a, b, atol=1e-12)
    weights = [torch.randn_like(part) for part in expected]
    for outputs in (compiled, expected):
        sum((w * out).sum() for w, out in zip(weights, outputs)).backward()
    for a, b in zip(flow.parameters(), direct.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-10)


@pytest.mark.parametrize(
    "build", [conditional_affine_autoregressive, conditional_spline_autoregressive]
)
def test_vmap_and_jacrev_with_a_context(build):
    t = redraw(build(4, 2), 2.0)
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


def test_vectorised_particles_agree_with_one_after_the_other():
    t = redraw(iaf(4), 2.0)
    y = torch.randn(6, 3, 4)
    x, ladj = t.inverse_and_ladj(y)
    for k in range(6):
        one, one_ladj = t.inverse_and_ladj(y[k])
        assert torch.allclose(x[k], one, atol=1e-12)
        assert torch.allclose(ladj[k], one_ladj, atol=1e-12)
