# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The density of a guide's own draw: from the evaluation that made it, and never of another one."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoContinuous
from torch.distributions import ExpTransform

from pyro_artransform import FlowDistribution, conditional_iaf, iaf, maf
from pyro_artransform.flows.transforms import chain
from pyro_artransform.flows.transforms.composition import ComposedTransform
from pyro_artransform.guides import AutoAutoregressive, AutoIAF
from pyro_artransform.guides import distributions as drawn
from pyro_artransform.testing import redraw
from tests.guides import models
from tests.guides.named import GUIDES, pairs
from tests.guides.training import redraw_after_call, train


def trace_of(guide):
    return poutine.trace(guide).get_trace(models.data())


def latent_density(trace):
    trace.compute_log_prob()
    return latent_site_of(trace)["log_prob"]


def latent_site_of(trace):
    (site,) = (s for s in trace.nodes.values() if s.get("infer", {}).get("is_auxiliary"))
    return site


@pytest.mark.parametrize(
    ("name", "elbo"),
    [("iaf", JitTrace_ELBO), ("structured", TraceGraph_ELBO), *((n, Trace_ELBO) for n in GUIDES)],
)
def test_a_step_inverts_nothing(name, elbo, monkeypatch):
    guide = redraw_after_call(GUIDES[name](models.regression))
    invert = ComposedTransform.inverse_and_ladj

    def refuse(self, y):
        # a part that is an inverse may invert: that is its forward direction
        assert self is not guide._modules["transform"], "the whole transform was inverted"
        return invert(self, y)

    monkeypatch.setattr(ComposedTransform, "inverse_and_ladj", refuse)
    options = {"ignore_jit_warnings": True} if elbo is JitTrace_ELBO else {}
    train(guide, 2, elbo=elbo(**options))


@pairs
def test_loss_and_gradients_are_as_pyro_has_them(new, model, monkeypatch):
    guide = redraw_after_call(new(model))
    elbo = Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=2)
    results = []
    for sample_latent in (AutoAutoregressive.sample_latent, AutoContinuous.sample_latent):
        monkeypatch.setattr(AutoAutoregressive, "sample_latent", sample_latent)
        pyro.set_rng_seed(3)
        guide.zero_grad()
        loss = elbo.loss_and_grads(model, guide, models.data())
        gradients = [p.grad.clone() for p in guide.parameters() if p.grad is not None]
        results.append([torch.tensor(loss), *gradients])
    assert len(results[0]) > 2
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["iaf", "maf"])
def test_another_value_has_its_own_density(name):
    guide = redraw_after_call(GUIDES[name](models.regression))
    posterior = guide.get_posterior()
    other = trace_of(guide)
    replayed = latent_site_of(poutine.trace(poutine.replay(guide, other)).get_trace(models.data()))
    assert replayed["value"] is latent_site_of(other)["value"]
    assert torch.allclose(replayed["fn"].log_prob(replayed["value"]), latent_density(other))
    site = latent_site_of(trace_of(guide))
    for value in (torch.zeros(2), site["value"].detach().clone(), site["value"] + 1):
        assert torch.allclose(site["fn"].log_prob(value), posterior.log_prob(value))
    data = {site["name"]: torch.ones(2)}
    conditioned = latent_site_of(trace_of(poutine.condition(guide, data=data)))
    assert torch.allclose(
        conditioned["fn"].log_prob(data[site["name"]]), posterior.log_prob(torch.ones(2))
    )


def test_draws_that_were_edited_have_the_density_of_their_values():
    guide = redraw_after_call(AutoIAF(models.regression, hidden_dims=8))
    site = latent_site_of(trace_of(guide))
    z, log_q = site["value"], site["fn"].log_prob(site["value"])
    assert torch.allclose(log_q, guide.log_density(z.clone()))
    with torch.no_grad():
        z += 1
        assert torch.allclose(site["fn"].log_prob(z), guide.log_density(z))


def test_expanded_and_masked():
    guide = redraw_after_call(AutoIAF(models.regression, hidden_dims=8))
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
        site = latent_site_of(trace_of(guide))
    fn, value = site["fn"], site["value"]
    assert fn.batch_shape == (4, 3)
    expected = guide.get_posterior().log_prob(value.detach())
    assert expected.shape == (4, 3)
    assert torch.allclose(fn.log_prob(value), expected)
    assert fn.expand((5, 4, 3))().shape == (5, 4, 3, 2)
    masked = fn.mask(torch.tensor([True, False, True]))
    draw = masked()
    expected = guide.get_posterior().log_prob(draw.detach()) * torch.tensor([1.0, 0.0, 1.0])
    assert torch.allclose(masked.log_prob(draw), expected)
    with poutine.mask(mask=False):
        assert not latent_density(trace_of(guide)).any()


@pytest.mark.parametrize("count", [3, 5])
def test_mean_gradient_of_draws_goes_to_the_location_and_the_rest_to_the_scale(count):
    x, forces = torch.randn(count, 1, 3), torch.randn(count, 1, 3)
    loc, scale = (torch.ones(3, requires_grad=True) for _ in range(2))
    value = drawn._moved_by(loc, loc + scale * x)
    found = torch.autograd.grad((forces * value).sum(), (loc, scale))
    assert torch.allclose(value, loc + scale * x)
    assert torch.allclose(found[0], forces.sum((0, 1)))
    covariance = ((forces - forces.mean(0)) * (x - x.mean(0))).sum((0, 1)) * count / (count - 1)
    assert torch.allclose(found[1], covariance)


@pytest.mark.parametrize("count", [2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_gradient_of_scale_and_skew_is_unbiased(count):
    """However few draws, in pairs or not: what is even in them counts as what is odd."""
    loc, scale, skew = (torch.zeros(1, requires_grad=True) for _ in range(3))
    found = []
    for _ in range(2000):
        x = drawn._in_pairs(torch.randn(count, 1))
        value = drawn._moved_by(loc, loc + (1 + scale) * x + skew * (x**2 - 1))
        found.append(
            torch.stack(torch.autograd.grad((value**3 / 3 + value**2 / 2).mean(), (scale, skew)))
        )
    found = torch.stack(found)[..., 0]
    error = found.std(0) / len(found) ** 0.5
    # the covariances of the force, x + x^2, with x and with x^2 - 1
    assert ((found.mean(0) - torch.tensor([1.0, 2.0])).abs() < 5 * error + 1e-12).all()


# The distribution by itself

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
    flow = make()
    q, plain = pair(flow)
    draw = q.rsample((5,))
    assert draw.shape == plain.rsample((5,)).shape
    other = draw.detach().clone()
    for value in (draw, other):
        assert torch.allclose(q.log_prob(value), plain.log_prob(other), atol=1e-9)
    assert q.log_prob(draw) is q.log_prob(draw)
    assert q.log_prob(other) is not q.log_prob(other)
    densities = (q.log_prob(other), plain.log_prob(other))
    found = (torch.autograd.grad(density.sum(), list(flow.parameters())) for density in densities)
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_draw_that_was_edited_in_place(mode):
    """In inference mode tensors do not count their versions."""
    q, plain = pair(iaf(4))
    with mode():
        draw = q.rsample((5,))
        draw.add_(0.5)
        assert torch.allclose(q.log_prob(draw), plain.log_prob(draw.clone()), atol=1e-9)


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


def test_a_base_with_more_event_dimensions():
    redraw(flow := iaf(4))
    wide = dist.Normal(torch.zeros(3, 4), 1.0).to_event(2)
    q, plain = (kind(wide, [flow]) for kind in (FlowDistribution, dist.TransformedDistribution))
    draw = q.rsample((5,))
    assert q.log_prob(draw).shape == (5,)
    for value in (draw, draw.detach().clone()):
        assert torch.allclose(q.log_prob(value), plain.log_prob(draw.detach()), atol=1e-9)


def test_what_it_takes():
    with pytest.raises(TypeError, match="expected one transform, got 2: ComposedTransform"):
        FlowDistribution(base(), [iaf(4), iaf(4)])
    with pytest.raises(ValueError, match="to be within the support"):
        FlowDistribution(base(), chain([iaf(4), ExpTransform()])).log_prob(-torch.ones(4))
