# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The initial guide of elements of mini-batches: near the posterior of all data from one of them."""

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyro_artransform import AutoAmortized
from pyro_artransform.inference.config import InitializationConfig
from pyro_artransform.inference.initialization.initial_guide import (
    SharedPrior,
    find_initial_minibatch_guide,
)
from pyro_artransform.inference.loader import Batch
from pyro_artransform.inference.optimization.objective import PyroObjective
from pyro_artransform.joint import LogJoint

SIZE, BATCH = 400, 40


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


def find(*args):
    return find_initial_minibatch_guide(*args, InitializationConfig())


def started(model, y, **options):
    guide = AutoAmortized(model, Encoder(), **options)
    guide(y)
    log_joint = LogJoint(model, (y,))
    objective = PyroObjective(model, guide, Batch((y,), {}), log_joint)
    return guide, find(log_joint, model, guide, ((y,), {}), objective.elbo_draws)


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e4])
def test_globals_are_near_the_posterior_of_all_data(unit):
    y = unit * (70.0 + torch.randn(BATCH) * 1.25**0.5)
    model = partial(hierarchy, unit=unit)
    guide, start = started(model, y)
    assert start.name != "initial guide"
    draws = guide.sample_posterior(4000, y)
    scale = unit * (1.25 / SIZE) ** 0.5
    # a mini-batch knows as much as this
    assert (draws["mean"].mean() - y.mean()).abs() < 0.2 * scale
    assert (draws["mean"].std() / scale - 1).abs() < 0.1
    assert (guide.transform.locals[0].affine.log_scale.exp() / (unit * 0.2**0.5) - 1).abs() < 0.1
    # 1 / 5 is what the prior's mean weighs, beside an element's data
    slope = (guide.transform.locals[0].affine.linear.weight[0, -1] / math.sqrt(SIZE)).item()
    assert abs(slope / (0.2 * scale) - 1) < 0.1


def test_of_a_plate_that_draws_its_mini_batch():
    y = 70.0 + torch.randn(SIZE) * 1.25**0.5
    guide, start = started(drawing, y)
    assert start.name != "initial guide"
    mean = guide.sample_posterior(4000, y)["mean"]
    assert (mean.mean() - y.mean()).abs() < 5 * (1.25 / BATCH) ** 0.5
    assert (mean.std() / (1.25 / SIZE) ** 0.5 - 1).abs() < 0.1


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
    _, start = started(hierarchy, torch.randn(BATCH))
    assert start.name == "initial guide"


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
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    log_joint = LogJoint(autoencoder, (y,))
    objective = PyroObjective(autoencoder, guide, Batch((y,), {}), log_joint)
    start = find(log_joint, autoencoder, guide, ((y,), {}), objective.elbo_draws)
    assert start.name == "initial guide"
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())


def test_a_guide_that_is_better_already_stays():
    y = torch.randn(BATCH)
    guide, first = started(hierarchy, y, flow=None, local_flow=None)
    with torch.no_grad():
        guide.transform.locals[0].affine.loc.zero_()
        guide.transform.locals[0].affine.linear.weight[0, 0] = 0.8
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    log_joint = LogJoint(hierarchy, (y,))
    objective = PyroObjective(hierarchy, guide, Batch((y,), {}), log_joint)
    start = find(log_joint, hierarchy, guide, ((y,), {}), objective.elbo_draws)
    assert start.name == "initial guide"
    assert start.elbo > first.elbo
    assert all(torch.equal(p, before[name]) for name, p in guide.named_parameters())


def test_step_scales_of_globals_follow_the_noise_of_mini_batches():
    y = torch.randn(BATCH)
    guide, _ = started(hierarchy, y)
    ratio = SIZE / BATCH
    units = {id(parameter): unit for parameter, unit in guide.step_scales().items()}
    *flow, affine = guide.transform.globals.transform.transforms
    scale = affine.log_scale.detach().exp()
    assert torch.allclose(units.pop(id(affine.loc)), 2 * math.sqrt(ratio) * scale)
    bent = [parameter for part in flow for parameter in part.parameters()]
    assert units.keys() == {id(parameter) for parameter in bent}
    assert all(unit == ratio**-0.5 for unit in units.values())


def test_step_scales_of_globals_that_see_all_data():
    y = torch.randn(SIZE)
    guide, _ = started(hierarchy, y)
    (parameter,) = guide.step_scales()
    assert parameter is guide.transform.globals.affine.loc
