# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The initial guide of elements of mini-batches: near the posterior of all data from one of them."""

import math
from dataclasses import replace
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyro_artransform import AutoAmortized
from pyro_artransform.inference.initialization.initial_guide import (
    UNCHANGED,
    SharedPrior,
    find_initial_minibatch_guide,
)
from pyro_artransform.inference.loader import Batch
from pyro_artransform.inference.optimization.objective import PyroObjective
from pyro_artransform.joint import LogJoint
from tests.inference.conftest import QUICK

SIZE, BATCH = 400, 40
CONFIG = replace(QUICK.initialization, max_newton_steps=40)


def hierarchy(y, unit=1.0, total=SIZE):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 1e3 * unit))
    with pyro.plate("groups", total, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(mean, unit))
        pyro.sample("y", dist.Normal(z, 0.5 * unit), obs=y)


def drawing(y, size=BATCH):
    """The same, with a mini-batch that the plate draws."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1e3))
    with pyro.plate("groups", len(y), subsample_size=size):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=pyro.subsample(y, event_dim=0))


def autoencoder(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


class Encoder(nn.Module):
    def forward(self, y):
        return pyro.subsample(y, event_dim=0)[:, None]


def started(model, y, guide=None):
    guide = guide or AutoAmortized(model, Encoder())
    guide(y)
    batch, log_joint = Batch((y,), {}), LogJoint(model, (y,))
    elbo_draws = PyroObjective(model, guide, batch, log_joint).elbo_draws
    start = find_initial_minibatch_guide(log_joint, model, guide, batch, elbo_draws, CONFIG)
    return guide, start


def values(guide):
    return {name: p.detach().clone() for name, p in guide.named_parameters()}


@pytest.mark.parametrize("unit", [1.0, 1e4])
def test_globals_are_near_the_posterior_of_all_data(unit):
    y = unit * (70.0 + torch.randn(BATCH) * 1.25**0.5)
    guide, start = started(partial(hierarchy, unit=unit), y)
    assert start.name != UNCHANGED
    draws = guide.sample_posterior(2000, y)
    scale = unit * (1.25 / SIZE) ** 0.5
    # a mini-batch knows as much as this
    assert (draws["mean"].mean() - y.mean()).abs() < 0.2 * scale
    assert (draws["mean"].std() / scale - 1).abs() < 0.1
    assert (guide.transform.locals[0].affine.log_scale.exp() / (unit * 0.2**0.5) - 1).abs() < 0.1
    # 1 / 5 is what the prior's mean weighs, beside an element's data
    slope = (guide.transform.locals[0].affine.linear.weight[0, -1] / math.sqrt(SIZE)).item()
    assert abs(slope / (0.2 * scale) - 1) < 0.1
    if unit == 1.0:
        steps_follow_the_noise_of_mini_batches(guide)


def steps_follow_the_noise_of_mini_batches(guide):
    ratio = SIZE / BATCH
    units = {id(parameter): unit for parameter, unit in guide.step_scales().items()}
    *flow, affine = guide.transform.globals.transform.transforms
    scale = affine.log_scale.detach().exp()
    assert torch.allclose(units.pop(id(affine.loc)), 2 * math.sqrt(ratio) * scale)
    bent = [parameter for part in flow for parameter in part.parameters()]
    assert units.keys() == {id(parameter) for parameter in bent}
    assert all(unit == ratio**-0.5 for unit in units.values())


def test_a_guide_that_is_better_already_stays():
    y = torch.randn(BATCH)
    guide = AutoAmortized(hierarchy, Encoder(), flow=None, local_flow=None)
    _, first = started(hierarchy, y, guide)
    with torch.no_grad():
        guide.transform.locals[0].affine.loc.zero_()
        guide.transform.locals[0].affine.linear.weight[0, 0] = 0.8
    before = values(guide)
    _, start = started(hierarchy, y, guide)
    assert start.name == UNCHANGED
    assert start.elbo > first.elbo
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())


def test_of_a_plate_that_draws_its_mini_batch():
    y = 70.0 + torch.randn(10 * 20) * 1.25**0.5
    guide, start = started(partial(drawing, size=20), y)
    assert start.name != UNCHANGED
    mean = guide.sample_posterior(1000, y)["mean"]
    assert (mean.mean() - y.mean()).abs() < 5 * (1.25 / 20) ** 0.5
    assert (mean.std() / (1.25 / len(y)) ** 0.5 - 1).abs() < 0.1


def test_shared_prior():
    """The density of the mini-batch's own elements, with its share of that of the globals."""
    y = torch.randn(BATCH)
    log_joint = LogJoint(hierarchy, (y,))
    z = torch.randn(7, 1 + BATCH)
    prior = dist.Normal(0.0, 1e3).log_prob(z[:, 0]) * BATCH / SIZE
    local = dist.Normal(z[:, :1], 1.0).log_prob(z[:, 1:]).sum(-1)
    data = dist.Normal(z[:, 1:], 0.5).log_prob(y).sum(-1)
    assert torch.allclose(SharedPrior(log_joint, BATCH / SIZE, ["z"])(z), prior + local + data)


def test_shared_prior_of_elements_that_are_positive():
    """Their Jacobian counts once, as their density does."""

    def model():
        with pyro.plate("groups", SIZE, subsample_size=BATCH):
            pyro.sample("rate", dist.LogNormal(0.0, 1.0))

    u = torch.randn(5, BATCH)
    density = SharedPrior(LogJoint(model), BATCH / SIZE, ["rate"])
    assert torch.allclose(density(u), dist.Normal(0.0, 1.0).log_prob(u).sum(-1))


def test_a_start_without_a_covariance_is_no_error(monkeypatch):
    def fail(*_):
        raise torch.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(AutoAmortized, "start_near", fail)
    _, start = started(partial(hierarchy, total=40), torch.randn(10))
    assert start.name == UNCHANGED


def test_shared_prior_of_a_plate_that_draws_is_a_function():
    log_joint = LogJoint(drawing, (torch.randn(SIZE),))
    density, z = SharedPrior(log_joint, BATCH / SIZE, ["z"]), torch.randn(3, 1 + BATCH)
    state = torch.get_rng_state()
    assert torch.equal(density(z), density(z))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(log_joint(z), log_joint(z))


def test_without_globals_nothing_moves():
    y = torch.randn(BATCH)
    guide = AutoAmortized(autoencoder, Encoder())
    guide(y)
    before = values(guide)
    _, start = started(autoencoder, y, guide)
    assert start.name == UNCHANGED
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())
