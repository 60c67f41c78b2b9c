# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Evaluations of networks, and memory."""

import pyro.distributions as dist
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pyro_artransform import (
    FlowDistribution,
    affine_autoregressive,
    conditional_iaf,
    iaf,
    maf,
    spline_autoregressive,
)
from pyro_artransform.flows.conditioners import MaskedMLP
from pyro_artransform.flows.conditioners.blocks import MLPBlocks
from pyro_artransform.testing import redraw


@pytest.fixture
def evaluations(monkeypatch):
    """A function that counts, in a call, evaluations of networks and of blocks of levels."""
    counts = {"networks": 0, "blocks": 0}

    def counting(owner, name, key):
        inner = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[key] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    counting(MaskedMLP, "forward", "networks")
    counting(MLPBlocks, "params", "blocks")

    def count(function):
        counts.update(networks=0, blocks=0)
        function()
        return dict(counts)

    return count


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("build", [spline_autoregressive, iaf])
def test_evaluations_of_an_inverse(build, grad, evaluations):
    t = redraw(build(7))
    layers = len(getattr(t, "parts", [t]))
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    with torch.set_grad_enabled(grad):
        assert evaluations(lambda: t.call_and_ladj(x)) == {"networks": layers, "blocks": 0}
        assert evaluations(lambda: t.inv.inverse_and_ladj(x))["networks"] == layers
        alone = evaluations(lambda: t.inv._call(y))
        assert alone["networks"] == (layers if grad else 0)
        assert evaluations(lambda: t.inv.call_and_ladj(y)) == alone
        assert evaluations(lambda: t.inverse_and_ladj(y)) == alone


def test_evaluations_of_distributions(evaluations):
    base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    q, y = FlowDistribution(base, [redraw(maf(4, num_transforms=2))]), torch.randn(5, 4)
    assert evaluations(lambda: q.log_prob(y)) == {"networks": 2, "blocks": 0}
    draw = evaluations(lambda: q.rsample((5,)))
    assert evaluations(lambda: q.log_prob(q.rsample((5,)))) == draw
    flow, context = redraw(conditional_iaf(4, 2, num_transforms=2)), torch.randn(5, 2)

    def draw_and_score():
        q = FlowDistribution(base, [flow.condition(context)])
        q.log_prob(q.rsample((5,))).sum().backward()

    assert evaluations(draw_and_score) == {"networks": 2, "blocks": 0}


def peak_memory(function):
    """The largest number of bytes held at once during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory_ratio(build, dim, batch):
    """Of the gradient through the inverse, and that of forward and backward."""
    t = redraw(build(dim)).float()
    y = torch.randn(batch, dim, dtype=torch.float32, requires_grad=True)
    targets = [y, *t.parameters()]

    def run(direction):
        value, ladj = direction(y)
        torch.autograd.grad(value.square().sum() + ladj.sum(), targets)

    return peak_memory(lambda: run(t.inverse_and_ladj)) / peak_memory(lambda: run(t.call_and_ladj))


@pytest.mark.parametrize("build", [affine_autoregressive, spline_autoregressive])
def test_gradient_of_an_inverse_holds_no_more_than_twice_what_its_own_does(build):
    memory_ratio(build, 8, 2)  # what the first call of a process sets up
    assert memory_ratio(build, 128, 64) <= 2.0
