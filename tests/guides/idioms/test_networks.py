# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Bayesian neural networks by `PyroModule` and `PyroSample`; their forward pass is in test_examples.py."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

from pyro_artransform import AutoIAF
from pyro_artransform.joint import LogJoint
from tests.inference.conftest import quick_fit


class LastLayerLatent(PyroModule):
    """The first layer is trained, the last one is latent."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(1, 4)
        self.out = PyroModule[nn.Linear](4, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
        self.out.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.out(self.hidden(x).tanh()).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)
        return mean


def data():
    x = torch.linspace(-1.0, 1.0, 30)[:, None]
    return x, (2 * x[:, 0]).sin()


@pytest.mark.parametrize(
    "kind", [lambda model: AutoIAF(model, num_transforms=2, hidden_dims=8), AutoNormal]
)
def test_last_layer_latent(kind):
    """The layer that is no latent is trained along, and the predictions come near the data."""
    torch.manual_seed(1)
    model, (x, y) = LastLayerLatent(), data()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    guide = kind(model)
    guide(x, y)
    is_pyros = isinstance(guide, AutoNormal)
    options = {"num_particles": 4} if is_pyros else {}
    if is_pyros:
        with pytest.warns(UserWarning, match="one draw after the other"):
            quick_fit(model, guide, x, y, num_steps=20, progress=False, **options)
    else:
        result = quick_fit(model, guide, x, y, num_steps=150, progress=False)
        assert not result.one_at_a_time
        predictive = Predictive(model, guide=guide, num_samples=50, return_sites=["_RETURN"])
        mean = predictive(x)["_RETURN"].reshape(50, -1).mean(0)
        assert (mean - y).square().mean() < 0.02  # of a variance of 0.5
    assert set(before) == {"hidden.weight", "hidden.bias"}
    for name, value in model.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_every_weight_latent():
    """As Pyro's tutorials make a network of PyTorch Bayesian: a prior for each parameter."""
    network = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    to_pyro_module_(network)
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
            setattr(module, name, PyroSample(prior))

    def model(x, y=None):
        mean = network(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.3), obs=y)

    log_joint = LogJoint(model, data())
    assert log_joint.latents.latent_dim == 10
    assert log_joint.strategy == "vmap"
    guide = AutoIAF(model, num_transforms=2, hidden_dims=8)
    result = quick_fit(model, guide, *data(), num_steps=20, progress=False)
    assert not result.one_at_a_time
    predictive = Predictive(model, guide=guide, num_samples=5)
    assert predictive(torch.zeros(7, 1))["obs"].shape == (5, 7)
