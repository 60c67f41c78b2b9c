# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The path gradient of an amortised guide."""

import math

import torch
from pyro.infer import Trace_ELBO

from pyro_artransform import AutoAmortized, conditional_spline_autoregressive

from . import hierarchies
from .hierarchies import data, redraw


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
        local.affine.linear.weight[0, -1] = shrink * scale
        local.table[:, -2] = (1 - shrink) * y
    assert gradient(guide, y, True).abs().max() < 1e-10
    assert gradient(guide, y, True, 5).abs().max() < 1e-10
    assert gradient(guide, y, False).abs().max() > 0.1


def test_path_gradient_has_the_same_mean():
    y = data()
    guide = AutoAmortized(
        hierarchies.groups, local_flow=lambda d, c: conditional_spline_autoregressive(d, c, 8)
    )
    guide(y)
    redraw(guide)
    directions = torch.randn(len(gradient(guide, y, False)), 20)
    means = [gradient(guide, y, path, 5_000) @ directions for path in (True, False)]
    one = torch.stack([gradient(guide, y, False) @ directions for _ in range(100)])
    # the standard error of the difference is about 0.02 of a standard deviation
    assert ((means[0] - means[1]).abs() < 0.1 * one.std(0)).all()
