# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The path gradient of an amortized guide."""

import math
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_artransform import AutoAmortized, conditional_spline_autoregressive
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import data, redraw


def gradient(guide, y, path, particles=1):
    guide.path = path
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    elbo.max_plate_nesting = 1 + (particles > 1)
    loss = elbo.differentiable_loss(hierarchies.groups, guide, y)
    found = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_path_gradient_at_the_posterior_is_zero_in_each_draw():
    y = data()
    guide = AutoAmortized(hierarchies.groups, flow=None, local_flow=None)
    guide(y)
    # y given the mean is Normal(mean, 1.25), and z given both Normal((mean + 4 y) / 5, 1 / 5)
    precision = 1 / 9 + 12 / 1.25
    mean, scale, shrink = y.sum() / 1.25 / precision, precision**-0.5, 1 / 5
    with torch.no_grad():
        local, globals_ = guide.transform.locals[0], guide.transform.globals
        globals_.transform.parts[-1].set_(mean.reshape(1), torch.tensor([[scale]]))
        local.affine.log_scale.fill_(-0.5 * math.log(5.0))
        local.affine.loc.fill_(shrink * mean)
        # the context is in units of what a single element knows of the mean
        local.affine.linear.weight[0, -1] = shrink * scale * math.sqrt(12)
        local.table[:, -2] = (1 - shrink) * y
    assert gradient(guide, y, True).abs().max() < 1e-10
    assert gradient(guide, y, True, 5).abs().max() < 1e-10
    assert gradient(guide, y, False).abs().max() > 0.1


def test_path_gradient_is_a_context_of_the_guide():
    guide = AutoAmortized(hierarchies.groups)
    for before in (False, True):
        guide.path = before
        with pytest.raises(KeyError), guide.path_gradient():
            assert guide.path
            raise KeyError
        assert guide.path is before


def test_path_gradient_has_the_same_mean(monkeypatch):
    """But for what the mean force on the draws does to scale and flow, which is taken away."""
    monkeypatch.setattr(
        "pyro_artransform.guides.distributions._moved_by", lambda location, value: value
    )
    y = data()
    guide = AutoAmortized(
        hierarchies.groups, local_flow=lambda d, c: conditional_spline_autoregressive(d, c, 8)
    )
    guide(y)
    redraw(guide)
    directions = torch.randn(len(gradient(guide, y, False)), 20)
    by_path, plain = (
        torch.stack([gradient(guide, y, path, 100) @ directions for _ in range(30)])
        for path in (True, False)
    )
    error = ((by_path.var(0) + plain.var(0)) / 30).sqrt()
    # 20 t statistics of 58 degrees of freedom: beyond 5 in one of 10,000 runs
    assert ((by_path - plain).mean(0).abs() < 5 * error).all()
    # and there is something to be seen
    assert (plain.mean(0).abs() > 5 * error).any()


def test_single_draw_keeps_its_whole_gradient():
    """With one draw there is no mean to tell apart: flow and scale learn from all of it."""
    y = data()
    guide = AutoAmortized(hierarchies.groups, flow=None, local_flow=None)
    guide(y)
    guide.path = True
    loss = Trace_ELBO().differentiable_loss(hierarchies.groups, guide, y)
    scale = guide.transform.globals.affine.log_scale
    assert torch.autograd.grad(loss, scale)[0].abs() > 1e-3


def test_noise_that_all_draws_share_moves_the_location_alone():
    """A force that is the same for all draws, as that of a mini-batch, must not reach scale and flow."""
    y, found = data(), []
    guide = AutoAmortized(hierarchies.groups)
    guide(y)
    redraw(guide)
    guide.path = True

    globals_ = guide.transform.globals
    for force in (0.0, 100.0):
        model = partial(hierarchies.groups, force=force)
        pyro.set_rng_seed(1)
        elbo = Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1)
        loss = elbo.differentiable_loss(model, guide, y)
        found.append(torch.autograd.grad(loss, list(globals_.parameters())))
    for parameter, without, with_force in zip(globals_.parameters(), *found):
        difference = (with_force - without).abs().max()
        assert difference > 50 if parameter is globals_.affine.loc else difference < 1e-9
