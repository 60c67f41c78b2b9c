# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Likelihoods of hidden Markov chains with latent scales."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LinearHMMReparam, StudentTReparam

from pyro_artransform import AutoIAF
from pyro_artransform.joint import LogJoint
from tests.inference.conftest import quick_fit
from tests.joint.by_trace import by_trace

DURATION = 8


def data():
    return (0.8 * torch.arange(DURATION)).sin().unsqueeze(-1)


def scales():
    """Those of the steps and of the noise, each a latent."""
    return [pyro.sample(name, dist.LogNormal(-1.0, 0.5)) for name in ("step", "noise")]


def gaussian():
    step, noise = scales()
    distribution = dist.GaussianHMM(
        dist.Normal(0.0, 1.0).expand([1]).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), step.unsqueeze(-1)).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), noise.unsqueeze(-1)).to_event(1),
        duration=DURATION,
    )
    pyro.sample("y", distribution, obs=data())


def linear(first, distribution, reparam):
    step, noise = scales()
    hmm = dist.LinearHMM(
        first.expand([1]).to_event(1),
        torch.eye(1),
        distribution(torch.zeros(1), step.unsqueeze(-1)).to_event(1),
        torch.eye(1),
        distribution(torch.zeros(1), noise.unsqueeze(-1)).to_event(1),
        duration=DURATION,
    )
    with poutine.reparam(config={"y": reparam}):
        pyro.sample("y", hmm, obs=data())


def linear_gaussian():
    linear(dist.Normal(0.0, 1.0), dist.Normal, LinearHMMReparam())


def linear_student():
    linear(
        dist.StudentT(4.0, 0.0, 1.0),
        lambda loc, scale: dist.StudentT(4.0, loc, scale),
        LinearHMMReparam(StudentTReparam(), StudentTReparam(), StudentTReparam()),
    )


def by_covariance(step, noise):
    """The density of the Gaussian chain as that of a vector of all data."""
    start = torch.ones(DURATION, DURATION)
    times = torch.arange(1.0, DURATION + 1)
    walk = torch.minimum(times[:, None], times)
    covariance = start + step**2 * walk + noise**2 * torch.eye(DURATION)
    return dist.MultivariateNormal(torch.zeros(DURATION), covariance).log_prob(data()[:, 0])


@pytest.mark.parametrize("model", [gaussian, linear_gaussian, linear_student])
def test_many_draws_at_once(model):
    log_joint = LogJoint(model)
    assert log_joint.strategy == "vmap", log_joint.reason
    z = log_joint.start + 0.5 * torch.randn(3, log_joint.latents.latent_dim)
    expected = torch.stack([by_trace(model, row) for row in z])
    assert torch.allclose(log_joint(z), expected, rtol=1e-8)


@pytest.mark.parametrize("model", [gaussian, linear_gaussian])
def test_density(model):
    z = torch.tensor([[-1.0, 0.3], [0.2, -0.7]])
    prior = dist.Normal(-1.0, 0.5).log_prob(z).sum(-1)
    expected = prior + torch.stack([by_covariance(*row.exp()) for row in z])
    assert torch.allclose(LogJoint(model)(z), expected, rtol=1e-8)


@pytest.mark.parametrize("kind", [AutoIAF, AutoNormal])
@pytest.mark.parametrize("model", [gaussian, linear_gaussian, linear_student])
def test_steps(model, kind):
    svi = SVI(model, kind(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))


def test_fit():
    result = quick_fit(gaussian, AutoIAF(gaussian, hidden_dims=8), num_steps=30, progress=False)
    assert not result.one_at_a_time
    assert result.elbo > result.log_evidence - 0.1
