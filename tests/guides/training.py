# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A few steps of SVI, and whether they moved what they should."""

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from tests.guides import models


def train(guide, steps=4, model=models.regression, elbo=None):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo or Trace_ELBO())
    return [svi.step(models.data()) for _ in range(steps)]


def parameters(guide):
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


def unmoved(guide, before):
    now = dict(guide.named_parameters())
    assert now.keys() == before.keys()
    return [name for name, value in before.items() if torch.equal(value, now[name])]


def trains(guide, others=()):
    """Every parameter moves, and those of the others do not."""
    guide(models.data())
    before, theirs = parameters(guide), [parameters(other) for other in others]
    train(guide)
    assert before
    assert not unmoved(guide, before)
    for other, old in zip(others, theirs, strict=True):
        assert len(unmoved(other, old)) == len(old)


def redraw(guide, part="transforms.0"):
    """The guide, which is not a Gaussian any more, or depends on all that it can depend on."""
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if part in name:
                parameter.add_(0.3 * torch.randn_like(parameter) / max(parameter.shape) ** 0.5)
    return guide


def redraw_after_call(guide):
    guide(models.data())
    return redraw(guide)


def particles_agree(model, guide, *args):
    """F26: particles at once and one by one have losses of one mean, within five standard errors."""
    means, variances = [], []
    for vectorized in (True, False):
        elbo = Trace_ELBO(20, vectorize_particles=vectorized, max_plate_nesting=2)
        with torch.no_grad():
            losses = torch.tensor([elbo.loss(model, guide, *args) for _ in range(8)])
        means.append(losses.mean())
        variances.append(losses.var() / 8)
    assert abs(means[0] - means[1]) < 5 * sum(variances) ** 0.5
