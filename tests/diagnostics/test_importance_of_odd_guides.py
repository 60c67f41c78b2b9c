# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Importance weights where draws share a mini-batch, are discrete, or have auxiliary sites."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics import importance


@pytest.mark.parametrize("guide", ["flow", "by hand"])
def test_each_draw_sees_a_mini_batch_of_its_own(guide):
    """The standard error knows of the noise of mini-batches, 14 nats; with one for all it was 0.1."""
    data = torch.randn(100)
    precision = 1.0 + len(data)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), subsample_size=20) as indices:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=data[indices])

    def posterior():
        pyro.sample("mean", dist.Normal(data.sum() / precision, precision**-0.5))

    if guide == "flow":
        posterior = AutoIAF(model)
        posterior.set_up()
        posterior.start_at(data.sum()[None] / precision, torch.tensor([[precision**-0.5]]))
    result = importance(model, posterior, 400)
    covariance = torch.eye(100) + 1.0
    exact = dist.MultivariateNormal(torch.zeros(100), covariance).log_prob(data)
    assert abs(result.elbo - exact) < 4 * result.elbo_se
    assert 0.3 < result.elbo_se < 2.0


def _marked(auxiliary):
    return {"is_auxiliary": True} if auxiliary else {}


@pytest.mark.parametrize(
    "distribution", [dist.Uniform(0.0, 10.0), dist.Bernoulli(0.5)], ids=["u", "mixture"]
)
@pytest.mark.parametrize("is_marked", [False, True])
def test_guides_whose_density_of_the_latents_is_not_known(distribution, is_marked):
    """The density of the auxiliary site came into the ELBO, 2.3 nats above the evidence."""

    def guide():
        u = pyro.sample("u", distribution, infer=_marked(is_marked))
        pyro.sample("z", dist.Normal(0.1 * u, 1.0))

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"others that determine them by a Delta.*got \['u'\]"):
        importance(model, guide, 10)


@pytest.mark.parametrize(
    "distribution",
    [dist.Bernoulli(0.9), dist.Poisson(0.1), dist.OneHotCategorical(torch.tensor([0.9, 0.1]))],
)
def test_discrete_sites_of_few_values_are_no_points(distribution):
    """Three draws that are the same, of type float, were taken for AutoDelta: an ELBO of -inf."""

    def model():
        k = pyro.sample("k", distribution)
        pyro.sample("z", dist.Normal(3 * k.sum(), 1.0))

    result = importance(model, model, 100)
    assert (result.elbo, result.log_evidence) == (0.0, 0.0)


def test_the_only_entry_of_a_simplex_is_no_point():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(1)))
        pyro.sample("z", dist.Normal(0.0, 0.1))

    assert abs(importance(model, AutoNormal(model, init_scale=0.1), 100).elbo) < 1e-6


def test_a_guide_that_broadcasts_in_a_plate():
    def model():
        with pyro.plate("pair", 2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        with pyro.plate("pair", 2):
            pyro.sample("z", dist.Normal(torch.zeros(2, 1), 1.0))

    with pytest.raises(ValueError, match=r'site "z", invalid log_prob shape'):
        importance(model, guide, 10)
