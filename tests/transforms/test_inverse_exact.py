# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The inverse and its gradients are those of as many passes as there are coordinates."""

import copy
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.func import jacrev, vmap
from torch.profiler import ProfilerActivity, profile

from pyro_artransform import (
    AutoIAF,
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_iaf,
    conditional_spline_autoregressive,
    iaf,
    maf,
    spline_autoregressive,
)
from pyro_artransform.conditioners import MaskedMLP
from pyro_artransform.conditioners.blocks import MLPBlocks
from pyro_artransform.testing import redraw
from pyro_artransform.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
    ConditionedUnivariate,
)
from pyro_artransform.transforms.evaluate import inverse_and_ladj
from pyro_artransform.univariate import Affine

from ..conditioners.test_masks import random_dag
from .metas import CONDITIONERS, FAMILIES


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


def chain_of_200(count):
    x = [torch.randn(count)]
    for _ in range(199):
        x.append(0.95 * x[-1] + 0.1 * torch.randn(count))
    return torch.stack(x, -1)


def scales(count):
    base = torch.randn(count, 9)
    return (base + 0.5 * base.roll(1, -1)) * torch.logspace(-4, 4, 9)


TARGETS = {
    "funnel": (funnel, lambda: iaf(9, num_transforms=2)),
    "funnel, splines": (funnel, lambda: spline_autoregressive(9, [32, 32])),
    "chain of 200": (chain_of_200, lambda: affine_autoregressive(200, [200, 200])),
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


def worst_residual(t, y):
    """Of ``T(T^-1(y)) - y``, relative to ``1 + |y| + |x|`` of the same coordinate."""
    with torch.no_grad():
        x = t.inverse_and_ladj(y)[0]
        again = t.call_and_ladj(x)[0]
    return ((again - y).abs() / (1 + y.abs() + x.abs())).max().item()


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("gain", [1, 2, 4])
@pytest.mark.parametrize("dim", [8, 64, 512])
@pytest.mark.parametrize("family", BUILDERS)
def test_residual(family, dim, gain, dtype):
    t = redraw(BUILDERS[family](dim), gain).to(dtype)
    for batch in (1, 64):
        assert worst_residual(t, torch.randn(batch, dim, dtype=dtype)) <= UNITS[dtype]


@pytest.mark.parametrize("gain", [1, 2])
@pytest.mark.parametrize("family", BUILDERS)
def test_error_is_that_of_as_many_passes_as_coordinates(family, gain):
    ratios = []
    for seed in range(50):
        t = redraw(BUILDERS[family](24, [48, 48]), gain, seed=seed)
        y = torch.randn(16, 24)
        single = copy.deepcopy(t).float()
        with torch.no_grad():
            exact = unrolled(t, y.float().double())[0]
            exact_single = unrolled(copy.deepcopy(single).double(), y.float().double())[0]
            given = single.inverse_and_ladj(y.float())[0]
            passes = unrolled(single, y.float())[0]
        errors = [((x - exact_single).abs() / (1 + exact.abs())).max().item() for x in (given, passes)]
        ratios.append(errors[0] / errors[1])
    assert statistics.median(ratios) <= 1.5
    assert max(ratios) <= 20
