# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Mini-batches and new data: sizes of plates, features and embeddings of their elements."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Predictive, Trace_ELBO
from torch import nn

from pyro_artransform import AutoAmortized, conditional_iaf
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import (
    Encoder,
    SubsamplingEncoder,
    data,
    redraw,
    traces,
    train,
)

# Batches of other sizes


def test_last_short_batch_and_another_total():
    guide = AutoAmortized(hierarchies.batched, Encoder())
    for size, total in ((4, 12), (3, 12), (4, 12), (1, 12), (5, 500)):
        y = data(size)
        guide_trace, model_trace = traces(hierarchies.batched, guide, y, total)
        assert guide_trace.nodes["z"]["value"].shape == (size,)
        assert guide_trace.nodes["z"]["scale"] == total / size
        assert torch.equal(*(t.nodes["groups"]["value"] for t in (guide_trace, model_trace)))
        assert guide.sample_posterior(3, y, total)["z"].shape == (3, size)


def test_the_model_is_run_for_new_shapes_only():
    runs = []

    def model(y, total=12, scale=1.0):
        runs.append(len(y))
        hierarchies.batched(y, total)

    guide = AutoAmortized(model, lambda y, *_, **__: y[:, None])
    guide(data(4))
    runs.clear()
    for y in (data(4), data(3), data(4), data(3) + 1, data(1)):
        guide(y)
    assert runs == [3, 1]
    guide(data(4), 20)
    assert runs == [3, 1, 4]


def test_autoencoder():
    """No globals; each conditional layer has the encoder's features, and decoder and encoder train."""
    decoder, encoder = nn.Linear(3, 5), Encoder(5, 4)
    x = (torch.rand(8, 5) > 0.5).double()

    def model(x):
        return hierarchies.autoencoder(x, decoder)

    guide = AutoAmortized(model, encoder, local_flow=lambda d, c: conditional_iaf(d, c, 2, 8))
    train(model, guide, x)
    assert sum("context_layer" in name for name, _ in guide.named_parameters()) == 2
    stored = {id(p) for _, p in pyro.get_param_store().named_parameters()}
    networks = [*decoder.parameters(), *encoder.parameters()]
    assert {id(parameter) for parameter in networks} <= stored
    first = [parameter.detach().clone() for parameter in networks]
    train(model, guide, x)
    assert not any(map(torch.equal, first, networks))
    new, missing = x[:3], torch.full((3, 5), torch.nan)
    for parallel in (False, True):
        predictive = Predictive(model, guide=guide, num_samples=7, parallel=parallel)
        assert predictive(new)["z"].shape == (7, 3, 3)
    draws = guide.sample_posterior(7, new)
    assert draws["z"].shape == (7, 3, 3)
    assert Predictive(model, draws, parallel=True)(missing)["x"].shape == (7, 3, 5)


def test_what_is_predicted_may_be_discrete():
    """Without data the observations are latent, and no concern of the guide."""

    def model(x, obs=None):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("obs", dist.Bernoulli(logits=z), obs=obs)

    guide = AutoAmortized(model, lambda x, obs=None: x[:, None])
    guide(torch.zeros(4), torch.zeros(4))
    found = Predictive(model, guide=guide, num_samples=3)(torch.zeros(2))
    assert found["obs"].shape == (3, 2)
    assert set(guide(torch.zeros(6))) == {"z"}


def test_encoder_that_registers_itself():
    net = Encoder()
    guide = AutoAmortized(hierarchies.groups, lambda y: pyro.module("mine", net)(y))
    guide(data())
    before = [p.detach().clone() for p in net.parameters()]
    train(hierarchies.groups, guide, data())
    assert not any(map(torch.equal, before, net.parameters()))


def test_rows_of_all_elements_are_indexed_as_the_mini_batch_is():
    """An encoder of the mini-batch, and one of all data, give the same."""
    y, encoder = data(), SubsamplingEncoder()
    draws = []
    for function in (encoder, lambda y: encoder.net(y[:, None]).detach()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoAmortized(hierarchies.minibatch, function)
        guide.set_up(y)
        redraw(guide.transform.locals)
        pyro.set_rng_seed(1)
        draws.append(guide(y)["z"])
    assert torch.allclose(*draws)


def test_features_of_some_plates_and_embeddings_of_others():
    def model(y):
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("beta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoAmortized(model, lambda y: {"rows": y[:, None]})
    guide(data(5))
    assert guide(data(4))["z"].shape == (4,)
    assert guide.needs_indices
    tables = [factor.table for factor in guide.transform.locals]
    assert tables[0].shape == (3, 10)
    assert tables[1] is None


def test_plate_sizes_that_follow_from_values():
    """Batches of one shape have 6 groups or 4, as the encoder's features or the user's plates say."""

    def model(group, y):
        with pyro.plate("groups", 12, subsample_size=int(group.max()) + 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z[..., group], 1.0), obs=y)

    def encoder(group, y):
        return y.new_zeros(int(group.max()) + 1, 2).index_add(0, group, y[:, None].expand(-1, 2))

    def subsampling_encoder(group, y):
        return encoder(group, y) + 0 * pyro.subsample(y.new_zeros(12), event_dim=0).sum()

    def create_plates(group, y):
        return pyro.plate("groups", 12, int(group.max()) + 1)

    y = torch.randn(6)
    six, four = torch.arange(6), torch.tensor([0, 1, 2, 3, 3, 3])
    for options in (
        {"encoder": encoder},
        {"encoder": subsampling_encoder, "create_plates": create_plates},
        {"create_plates": create_plates},
    ):
        guide = AutoAmortized(model, **options)
        for group in (six, four, six, four):
            loss = Trace_ELBO().differentiable_loss(model, guide, group, y)
            assert loss.isfinite()
            assert guide(group, y)["z"].shape == (int(group.max()) + 1,)
        pyro.clear_param_store()
    wrong = AutoAmortized(model, lambda group, y: y.new_zeros(int(group[-1]) + 1, 2))
    wrong(six, y)
    with pytest.raises(
        ValueError, match=r"encoder: expected features of shape \(6, 2\).*got \(4, 2\)"
    ):
        wrong(torch.tensor([5, 0, 1, 2, 3, 3]), y)
