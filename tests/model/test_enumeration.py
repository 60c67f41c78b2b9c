# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Sums over the states of discrete latents, many draws at once, against single draws and Pyro's sums."""

from functools import partial
from itertools import pairwise

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_artransform.model import LogJoint
from pyro_artransform.model.enumeration import _elimination
from tests.model import enumerated_models


@config_enumerate
def changepoint():
    """Rates of counts before and after an unknown year, all at once in the one site of data."""
    early, late = (
        pyro.sample("early", dist.Exponential(1.0)),
        pyro.sample("late", dist.Exponential(1.0)),
    )
    year = pyro.sample("year", dist.Categorical(torch.ones(8)))
    with pyro.plate("years", 8) as t:
        rates = torch.stack([early, late])
        is_late = (t >= year).long()
        pyro.sample("y", dist.Poisson(rates[is_late]), obs=torch.tensor([4.0, 5, 4, 1, 0, 1, 2, 0]))


def value_and_gradient(log_joint, strategy, z):
    log_joint = log_joint.evaluated(strategy=strategy)
    z = z.clone().requires_grad_()
    values = log_joint(z)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), gradient


@pytest.mark.parametrize("name", ["changepoint", *enumerated_models.EXAMPLES])
def test_many_draws_at_once_and_the_sums_of_pyro(name):
    model, args = changepoint, ()
    if name != "changepoint":
        model, args = enumerated_models.subject(name)
    model = partial(model, *args)
    log_joint = LogJoint(model)
    assert log_joint.strategy == ("plate" if name.startswith("cjs") else "vmap")
    z = torch.randn(3, log_joint.latents.latent_dim)
    values, gradient = value_and_gradient(log_joint, "loop", z)
    assert values.isfinite().all()
    for strategy in {log_joint.strategy, "vmap"}:
        found = value_and_gradient(log_joint, strategy, z)
        assert torch.allclose(found[0], values, rtol=1e-12)
        assert torch.allclose(found[1], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max())
    first = z[0].requires_grad_()
    constrained, ladj = log_joint.latents.constrain_with_ladj(first)
    elbo = TraceEnum_ELBO(max_plate_nesting=log_joint.num_plates)
    given = poutine.condition(model, constrained)
    expected = ladj - elbo.differentiable_loss(given, lambda: None)
    assert torch.allclose(values[0], expected, rtol=1e-12)
    (wanted,) = torch.autograd.grad(expected, first)
    assert torch.allclose(gradient[0], wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max())


@config_enumerate
def impossible():
    """No state is possible for a datum that is further than one from both locations."""
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", 2):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        off = torch.tensor([0.0, 3.0]) - locs[kind.long()]
        pyro.factor("bounded", torch.where(off.abs() < 1, -((off / scale) ** 2), -torch.inf))


def test_a_sum_of_zeros_has_no_logarithm_and_a_gradient_all_the_same():
    log_joint = LogJoint(impossible)
    assert log_joint.strategy == "vmap"
    z = torch.tensor([[0.1, 2.9, 0.0], [0.2, 0.1, 0.0], [7.0, 7.0, 0.0]])
    for strategy in ("vmap", "loop"):
        values, gradient = value_and_gradient(log_joint, strategy, z)
        assert values.isfinite().tolist() == [True, False, False]
        assert values[1:].isneginf().all()
        assert gradient.isfinite().all()


def test_far_states_do_not_vanish():
    """The terms of a sum are 1e4 nats apart, as are those of its factors."""

    @config_enumerate
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        rows = torch.tensor([[0.0, -1e4], [-1e4, 0.0]]) * z
        one = pyro.sample("one", dist.Bernoulli(0.5)).long()
        other = pyro.sample("other", dist.Bernoulli(0.5)).long()
        pyro.factor("both", rows[one, other])
        pyro.factor("first", torch.tensor([0.0, -2e4])[one] * z)
        pyro.factor("second", torch.tensor([-2e4, 0.0])[other] * z)

    z = torch.ones(2, 1)
    values, gradient = value_and_gradient(LogJoint(model), "vmap", z)
    # states (0, 1) are the likeliest, by 1e4 nats
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + 2 * torch.tensor(0.5).log() - 1e4
    assert torch.allclose(values, expected)
    assert torch.allclose(gradient, torch.full((2, 1), -1e4 - 1.0))


def test_a_chain_is_summed_from_its_end():
    """No product has more dimensions than the two of a transition, in chains of any length."""
    names = [chr(200 + t) for t in range(500)]
    factors = [(name, torch.Size([3])) for name in names]
    factors += [(b + a, torch.Size([3, 3])) for a, b in pairwise(names)]
    steps = _elimination(tuple(factors), frozenset(names))
    assert len(steps) == 501
    dims = [set(name) for name, _ in factors]
    for name, members in steps:
        dims.append(set().union(*(dims[i] for i in members)))
        assert len(dims[-1]) <= 2
        dims[-1].discard(name)
    assert dims[-1] == set()
