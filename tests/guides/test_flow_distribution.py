# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The density of a draw comes from the evaluation that made it, and is never that of another one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import ExpTransform

from pyro_artransform import FlowDistribution, conditional_iaf, iaf, maf
from pyro_artransform.testing import redraw
from pyro_artransform.transforms import chain

FLOWS = {
    "iaf": lambda: iaf(4, num_transforms=2),
    "maf": lambda: maf(4, num_transforms=2),
    "other support": lambda: chain([iaf(4, num_transforms=2), ExpTransform()]),
    "conditional": lambda: redraw(conditional_iaf(4, 2)).condition(torch.randn(5, 2)),
}
every_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS.keys())


def base(dim=4):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def pair(flow):
    """The distribution and Pyro's own of the same flow."""
    redraw(flow)
    return FlowDistribution(base(), [flow]), dist.TransformedDistribution(base(), [flow])


@every_flow
def test_density_of_the_draw_and_of_other_values(make):
    q, plain = pair(make())
    draw = q.rsample((5,))
    assert draw.shape == plain.rsample((5,)).shape
    other = draw.detach().clone()
    for value in (draw, other):
        assert torch.allclose(q.log_prob(value), plain.log_prob(other), atol=1e-9)
    assert q.log_prob(draw) is q.log_prob(draw)
    assert q.log_prob(other) is not q.log_prob(other)


@every_flow
def test_gradients_are_those_of_pyros_own(make):
    flow = make()
    q, plain = pair(flow)
    value = q.rsample((5,)).detach().clone()
    parameters = list(flow.parameters())
    found = torch.autograd.grad(q.log_prob(value).sum(), parameters)
    for a, b in zip(found, torch.autograd.grad(plain.log_prob(value).sum(), parameters)):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("edit", [lambda v: v.add_(0.5), lambda v: v.mul_(2.0)])
def test_a_draw_that_was_edited_in_place(edit):
    q, plain = pair(iaf(4))
    with torch.no_grad():
        draw = q.rsample((5,))
        edit(draw)
        assert torch.allclose(q.log_prob(draw), plain.log_prob(draw.clone()), atol=1e-9)


def test_an_earlier_draw():
    q, plain = pair(iaf(4))
    first, second = q.rsample((5,)), q.rsample((5,))
    for draw in (first, second):
        assert torch.allclose(q.log_prob(draw), plain.log_prob(draw.detach()), atol=1e-9)


def test_gradients_wanted_now_but_not_then():
    q, _ = pair(iaf(4))
    with torch.no_grad():
        draw = q.rsample((5,))
        kept = q.log_prob(draw)
    assert not kept.requires_grad
    assert q.log_prob(draw).requires_grad
    assert torch.allclose(q.log_prob(draw), kept)
    draw = q.rsample((5,))
    with torch.no_grad():
        assert not q.log_prob(draw).requires_grad


def test_inference_mode():
    q, _ = pair(iaf(4))
    with torch.inference_mode():
        draw = q.rsample((5,))
        expected = q.log_prob(draw.clone())
        assert torch.allclose(q.log_prob(draw), expected)


def test_a_draw_that_was_edited_in_inference_mode():
    """Its tensors do not count their versions."""
    q, plain = pair(iaf(4))
    with torch.inference_mode():
        draw = q.rsample((5,))
        draw += 0.5
        assert torch.allclose(q.log_prob(draw), plain.log_prob(draw.clone()), atol=1e-9)


def test_scored_twice_in_one_loss():
    q, _ = pair(iaf(4))
    draw = q.rsample((5,))
    (q.log_prob(draw) + q.log_prob(draw)).sum().backward()


def test_expanded_by_plates():
    redraw(flow := iaf(4))

    def program():
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1):
            return pyro.sample("x", FlowDistribution(base(), [flow]))

    trace = pyro.poutine.trace(program).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert isinstance(site["fn"], FlowDistribution)
    assert site["log_prob"].shape == (3, 2)
    plain = dist.TransformedDistribution(base(), [flow])
    assert torch.allclose(site["log_prob"], plain.log_prob(site["value"].detach()), atol=1e-9)


def test_a_base_with_more_event_dimensions():
    redraw(flow := iaf(4))
    wide = dist.Normal(torch.zeros(3, 4), 1.0).to_event(2)
    q, plain = (kind(wide, [flow]) for kind in (FlowDistribution, dist.TransformedDistribution))
    draw = q.rsample((5,))
    assert q.log_prob(draw).shape == (5,)
    for value in (draw, draw.detach().clone()):
        assert torch.allclose(q.log_prob(value), plain.log_prob(draw.detach()), atol=1e-9)


def test_what_it_takes():
    for transforms in (
        [iaf(4), iaf(4)],
        [ExpTransform()],
        dist.transforms.affine_autoregressive(4),
    ):
        q = FlowDistribution(base(), transforms)
        with pytest.raises(TypeError, match="expected one transform of this package"):
            q.rsample()
        with pytest.raises(TypeError, match="expected one transform of this package"):
            q.log_prob(torch.ones(4))
    with pytest.raises(ValueError, match="to be within the support"):
        FlowDistribution(base(), chain([iaf(4), ExpTransform()])).log_prob(-torch.ones(4))
