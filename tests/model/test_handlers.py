# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Masks of data, which have no part in the density and in its gradient, and of latents; sums over states."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pyro_artransform.model import LogJoint
from pyro_artransform.posterior import log_likelihood
from tests.model.models import data


@pytest.mark.parametrize(
    ("distribution", "hidden"),
    [
        (lambda z: dist.Normal(z, 1.0), torch.nan),
        (lambda z: dist.LogNormal(z, 1.0), 0.0),
        (lambda z: dist.Beta(z.exp(), 2.0), torch.inf),
        (lambda z: dist.Normal(z[..., None], torch.ones(2)).to_event(1), torch.inf),
        (lambda z: dist.Dirichlet(z.exp()[..., None] * torch.ones(2)), 0.0),
    ],
)
def test_what_a_mask_hides_is_not_in_the_gradient(distribution, hidden):
    event = distribution(torch.zeros(())).event_shape
    y = torch.tensor([0.3, 0.7, 0.4])
    y = torch.stack([y, 1 - y], -1) if event else y
    mask = torch.tensor([False, True, True])

    def model(y, mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", distribution(z), obs=y)

    z = torch.randn(5, 1, requires_grad=True)
    expected = LogJoint(model, (y[1:], True))(z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    spoilt = y.clone()
    spoilt[0] = hidden
    for draws in (z, z[:1]):
        given = LogJoint(model, (spoilt, mask))(draws)
        assert torch.allclose(given, expected[: len(draws)])
        (found,) = torch.autograd.grad(given.sum(), z)
        assert torch.allclose(found[: len(draws)], slope[: len(draws)])


@pytest.mark.parametrize("mask", [torch.zeros(3).bool(), torch.tensor(False)], ids=["each", "all"])
@pytest.mark.parametrize("strategy", ["plate", "vmap", "loop"])
def test_data_that_are_hidden_as_a_whole(mask, strategy):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            pyro.sample("y", dist.LogNormal(z, 1.0), obs=torch.full((3,), torch.nan))

    z = torch.randn(5, 1, requires_grad=True)
    found = LogJoint(model).evaluated(strategy=strategy)(z)
    assert torch.allclose(found, dist.Normal(0.0, 1.0).log_prob(z[:, 0]))
    (slope,) = torch.autograd.grad(found.sum(), z)
    assert torch.allclose(slope, -z)
    terms = log_likelihood(model, {"z": torch.randn(4)})["y"]
    assert torch.equal(terms, torch.zeros(4, 3))


@pytest.mark.parametrize("mask", [torch.tensor([True, False]), False], ids=str)
def test_masked_latents_have_their_prior_unless_the_mask_is_false(mask):
    y = torch.tensor([1.0, 2.0])

    def model():
        with pyro.plate("data", 2):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("other", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    log_joint, z = LogJoint(model), torch.randn(4, 8)
    expected = dist.Normal(z[:, :2], 1.0).log_prob(y).sum(-1)
    if mask is not False:
        expected = expected + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert log_joint.strategy == "plate"
    assert torch.allclose(log_joint(z), expected)
    assert torch.allclose(log_joint.with_arguments(())(z), expected)


# Sums over the states of discrete latents

WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)


def locations():
    return pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).to_event(1))


def elements(locs):
    kind = pyro.sample("kind", dist.Categorical(WEIGHTS))
    pyro.sample("y", dist.Normal(Vindex(locs)[..., kind], 1.0), obs=data())


def plain(size=5):
    locs = locations()
    with pyro.plate("data", size, subsample_size=5):
        elements(locs)


def minibatch():
    plain(50)


def scaled():
    locs = locations()
    pyro.sample("x", dist.Normal(locs[..., 0], 1.0), obs=torch.tensor(0.4))
    with poutine.scale(scale=0.1), pyro.plate("data", 5):
        elements(locs)


def masked():
    locs = locations()
    with pyro.plate("data", 5), poutine.mask(mask=data() > 0):
        elements(locs)


@pytest.mark.parametrize("model", [plain, minibatch, scaled, masked])
def test_scales_are_outside_and_masks_inside_of_the_sums(model):
    log_joint = LogJoint(config_enumerate(model))
    assert log_joint.strategy == "plate"
    draws, elbo = torch.randn(5, 2), TraceEnum_ELBO(max_plate_nesting=1)
    found = log_joint(draws)
    assert torch.allclose(torch.cat([log_joint(row[None]) for row in draws]), found)
    for locs, value in zip(draws, found):
        point = lambda locs=locs: pyro.sample("locs", dist.Delta(locs, event_dim=1))  # noqa: E731
        assert abs(elbo.loss(config_enumerate(model), point) + value) < 1e-9
        if model in (minibatch, masked):  # the sums over states written out
            terms = WEIGHTS.log() + dist.Normal(locs, 1.0).log_prob(data()[:, None])
            terms = terms.logsumexp(-1) * (10 if model is minibatch else data() > 0)
            prior = dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).log_prob(locs)
            assert torch.isclose(value, prior.sum() + terms.sum())


def two_scales():
    locs, kind = locations(), pyro.sample("kind", dist.Categorical(WEIGHTS))
    with pyro.plate("data", 50, subsample_size=5):
        pyro.sample("y", dist.Normal(Vindex(locs)[..., kind], 1.0), obs=data())


def scale_of_each_element():
    locs = locations()
    with pyro.plate("data", 5), poutine.scale(scale=torch.rand(5)):
        elements(locs)


@pytest.mark.parametrize(
    ("model", "got"), [(two_scales, r"\[1.0, 10.0\]"), (scale_of_each_element, r"\[nan\]")]
)
def test_two_scales_of_one_sum(model, got):
    with pytest.raises(ValueError, match=f"expected the same scale .* got {got}"):
        LogJoint(config_enumerate(model))(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("options", "got"), [({"default": "sequential"}, "'sequential'"), ({"num_samples": 3}, "=3")]
)
def test_what_is_drawn_and_not_summed(options, got):
    with pytest.raises(ValueError, match=f"expected parallel enumeration over all .*{got}"):
        LogJoint(config_enumerate(plain, **options))


@pytest.mark.parametrize(
    "counts",
    [
        lambda size: dist.NegativeBinomial(size, logits=(5.0 / size).log()),
        lambda size: dist.GammaPoisson(size, size / 5.0),
    ],
)
def test_a_probability_above_one_is_round_off(counts):
    """Of 65 million failures log-gammas cancel: in float32 log-probabilities are 128, in float64 -2."""

    def model(y):
        log_size = pyro.sample("log_size", dist.Normal(y.new_zeros(()), 10.0))
        with pyro.plate("data", 3):
            pyro.sample("y", counts(log_size.exp()), obs=y)

    y, z = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([[1.0], [18.0]])
    assert (counts(z[1].float().exp()).log_prob(y.float()) > 100).any()
    assert LogJoint(model, (y.float(),))(z.float()).isfinite().tolist() == [True, False]
    found = LogJoint(model, (y.double(),))(z.double())[1]
    prior = dist.Normal(0.0, 10.0).log_prob(torch.tensor(18.0))
    assert float(found - prior) == pytest.approx(-1.9634 - 1.7403 - 2.2591, abs=1e-3)
