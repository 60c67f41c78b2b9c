# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Gaussian processes of `pyro.contrib.gp` and hidden Markov chains, with latent scales.

``VariationalGP`` and ``VariationalSparseGP`` do not suit: their data depend on their own guides' parameters.
"""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.contrib import gp
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LinearHMMReparam, StudentTReparam
from pyro.nn import PyroSample

from pyro_artransform import AutoIAF
from pyro_artransform.model import LogJoint
from tests.inference.conftest import quick_fit
from tests.model.models import by_trace

DURATION = 8


def x():
    return torch.linspace(0.0, 1.0, 12)


def regression(prior_of_kernel=False):
    """A regression with a prior on its noise."""
    y = torch.sin(6 * x()) + 0.1 * torch.cos(50 * x())
    kernel = gp.kernels.RBF(1, lengthscale=torch.tensor(0.3))
    model = gp.models.GPRegression(x(), y, kernel, noise=torch.tensor(0.05))
    model.noise = PyroSample(dist.LogNormal(-2.0, 1.0))
    if prior_of_kernel:
        kernel.lengthscale = PyroSample(dist.LogNormal(-1.0, 1.0))
        kernel.variance = PyroSample(dist.LogNormal(-1.0, 1.0))
    return model


def sparse():
    y, kernel = torch.sin(6 * x()), gp.kernels.Matern32(1)
    kernel.lengthscale = PyroSample(dist.LogNormal(-1.0, 1.0))
    return gp.models.SparseGPRegression(x(), y, kernel, Xu=x()[::3].clone())


def data():
    return (0.8 * torch.arange(DURATION)).sin().unsqueeze(-1)


def chain(kind, first, distribution):
    """A hidden Markov chain whose scales of steps and of noise are latents."""
    step, noise = [pyro.sample(name, dist.LogNormal(-1.0, 0.5)) for name in ("step", "noise")]
    return kind(
        first.expand([1]).to_event(1),
        torch.eye(1),
        distribution(torch.zeros(1), step.unsqueeze(-1)).to_event(1),
        torch.eye(1),
        distribution(torch.zeros(1), noise.unsqueeze(-1)).to_event(1),
        duration=DURATION,
    )


def gaussian():
    pyro.sample("y", chain(dist.GaussianHMM, dist.Normal(0.0, 1.0), dist.Normal), obs=data())


@poutine.reparam(config={"y": LinearHMMReparam()})
def linear_gaussian():
    pyro.sample("y", chain(dist.LinearHMM, dist.Normal(0.0, 1.0), dist.Normal), obs=data())


@poutine.reparam(config={"y": LinearHMMReparam(*[StudentTReparam() for _ in range(3)])})
def linear_student():
    def student(loc, scale):
        return dist.StudentT(4.0, loc, scale)

    pyro.sample("y", chain(dist.LinearHMM, student(0.0, 1.0), student), obs=data())


MODELS = {
    "noise": lambda: regression().model,
    "all": lambda: regression(prior_of_kernel=True).model,
    "sparse": lambda: sparse().model,
    "gaussian": lambda: gaussian,
    "linear gaussian": lambda: linear_gaussian,
    "linear student": lambda: linear_student,
}


@pytest.mark.parametrize("name", MODELS)
def test_many_draws_at_once_and_steps(name):
    model = MODELS[name]()
    log_joint = LogJoint(model)
    assert log_joint.strategy == ("loop" if name == "noise" else "vmap"), log_joint.reason
    z = log_joint.start + 0.5 * torch.randn(3, log_joint.latents.latent_dim)
    expected = torch.stack([by_trace(model, row) for row in z])
    assert torch.allclose(log_joint(z), expected, rtol=1e-8)
    svi = SVI(model, AutoIAF(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))


@pytest.mark.parametrize("model", [gaussian, linear_gaussian])
def test_density_of_a_chain(model):
    """As that of a vector of all data."""
    z = torch.tensor([[-1.0, 0.3], [0.2, -0.7]])
    times = torch.arange(1.0, DURATION + 1)
    expected = dist.Normal(-1.0, 0.5).log_prob(z).sum(-1)
    for i, (step, noise) in enumerate(z.exp()):
        covariance = 1 + step**2 * torch.minimum(times[:, None], times)
        covariance = covariance + noise**2 * torch.eye(DURATION)
        vector = dist.MultivariateNormal(torch.zeros(DURATION), covariance)
        expected[i] += vector.log_prob(data()[:, 0])
    assert torch.allclose(LogJoint(model)(z), expected, rtol=1e-8)


@pytest.mark.filterwarnings("ignore:the model cannot be evaluated at many draws at once")
def test_posterior_of_a_process():
    """By quadrature over the one latent; the parameters of the kernel are trained along, so after the fit.

    The tolerance is four standard errors and 0.005, what a bent posterior leaves after few steps.
    """
    process = regression()
    before = process.kernel.lengthscale.item()
    result = quick_fit(process.model, num_steps=10, progress=False)
    assert result.one_at_a_time
    assert process.kernel.lengthscale.item() != before
    points = torch.linspace(-8.0, 2.0, 401)[:, None]
    with torch.no_grad():
        density = LogJoint(process.model)(points)
    expected = torch.trapezoid((density - density.max()).exp(), points[:, 0]).log() + density.max()
    assert abs(result.log_evidence - expected) < 4 * result.log_evidence_se + 0.005
    assert expected - 0.05 < result.elbo < expected + 3 * result.elbo_se
