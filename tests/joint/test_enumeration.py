# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pyro_artransform.joint import LogJoint
from tests.joint.models import data

WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)


def locations():
    return pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).to_event(1))


def elements(locs):
    kind = pyro.sample("kind", dist.Categorical(WEIGHTS))
    pyro.sample("y", dist.Normal(Vindex(locs)[..., kind], 1.0), obs=data())


def plain():
    locs = locations()
    with pyro.plate("data", 5):
        elements(locs)


def minibatch():
    locs = locations()
    with pyro.plate("data", 50, subsample_size=5):
        elements(locs)


def scaled():
    locs = locations()
    pyro.sample("x", dist.Normal(locs[..., 0], 1.0), obs=torch.tensor(0.4))
    with poutine.scale(scale=0.1), pyro.plate("data", 5):
        elements(locs)


def masked():
    locs = locations()
    with pyro.plate("data", 5), poutine.mask(mask=data() > 0):
        elements(locs)


def all_scaled():
    with poutine.scale(scale=2.5):
        plain()


MODELS = {f.__name__: f for f in (plain, minibatch, scaled, masked, all_scaled)}


def by_hand(name, locs):
    """The sums over states written out."""
    prior = dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).log_prob(locs).sum()
    terms = WEIGHTS.log() + dist.Normal(locs, 1.0).log_prob(data()[:, None])
    sums = terms.logsumexp(-1)
    other = dist.Normal(locs[0], 1.0).log_prob(torch.tensor(0.4))
    return {
        "plain": prior + sums.sum(),
        "minibatch": prior + 10 * sums.sum(),
        "scaled": prior + other + 0.1 * sums.sum(),
        "masked": prior + sums[data() > 0].sum(),
        "all_scaled": 2.5 * (prior + sums.sum()),
    }[name]


@pytest.mark.parametrize("name", MODELS)
def test_scales_are_outside_and_masks_inside_of_the_sums(name):
    log_joint = LogJoint(config_enumerate(MODELS[name]))
    assert log_joint.strategy == "plate"
    draws = torch.randn(7, 2)
    found = log_joint(draws)
    expected = torch.stack([by_hand(name, locs) for locs in draws])
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(torch.stack([log_joint(row[None])[0] for row in draws]), expected)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    for locs, value in zip(draws, found):
        point = lambda locs=locs: pyro.sample("locs", dist.Delta(locs, event_dim=1))  # noqa: E731
        assert abs(elbo.loss(config_enumerate(MODELS[name]), point) + value) < 1e-9


def test_two_scales_of_one_sum():
    def model():
        locs = locations()
        kind = pyro.sample("kind", dist.Categorical(WEIGHTS))
        with pyro.plate("data", 50, subsample_size=5):
            pyro.sample("y", dist.Normal(Vindex(locs)[..., kind], 1.0), obs=data())

    with pytest.raises(ValueError, match=r"expected one scale .* got \[1.0, 10.0\]"):
        LogJoint(config_enumerate(model))


def test_a_scale_for_each_element():
    def model():
        locs = locations()
        with pyro.plate("data", 5), poutine.scale(scale=torch.rand(5)):
            elements(locs)

    with pytest.raises(ValueError, match=r"expected one scale .* got \[nan\]"):
        LogJoint(config_enumerate(model))


@pytest.mark.parametrize(
    ("options", "got"), [({"default": "sequential"}, "'sequential'"), ({"num_samples": 3}, "=3")]
)
def test_what_is_drawn_and_not_summed(options, got):
    with pytest.raises(ValueError, match=f"expected enumeration in parallel over all .*{got}"):
        LogJoint(config_enumerate(plain, **options))
