# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models of `pyro.contrib.gp` with priors on kernel parameters.

Not among them: ``VariationalGP`` and ``VariationalSparseGP``, whose data depend on the parameters of
their own guides, and not on the latent that their models draw.
"""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.contrib import gp
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroSample

from pyro_artransform import AutoIAF
from pyro_artransform.joint import LogJoint
from tests.inference.conftest import quick_fit
from tests.joint.by_trace import by_trace


def x():
    return torch.linspace(0.0, 1.0, 12)


def regression(*latents):
    """A regression with priors on some of its parameters."""
    y = torch.sin(6 * x()) + 0.1 * torch.cos(50 * x())
    kernel = gp.kernels.RBF(1, lengthscale=torch.tensor(0.3))
    model = gp.models.GPRegression(x(), y, kernel, noise=torch.tensor(0.05))
    if "noise" in latents:
        model.noise = PyroSample(dist.LogNormal(-2.0, 1.0))
    for name in {"lengthscale", "variance"} & set(latents):
        setattr(kernel, name, PyroSample(dist.LogNormal(-1.0, 1.0)))
    return model


def sparse():
    y, kernel = torch.sin(6 * x()), gp.kernels.Matern32(1)
    kernel.lengthscale = PyroSample(dist.LogNormal(-1.0, 1.0))
    return gp.models.SparseGPRegression(x(), y, kernel, Xu=x()[::3].clone())


PROCESSES = {
    "noise": lambda: regression("noise"),
    "kernel": lambda: regression("lengthscale", "variance"),
    "all": lambda: regression("noise", "lengthscale", "variance"),
    "sparse": sparse,
}


@pytest.mark.parametrize("name", PROCESSES)
def test_many_draws_at_once(name):
    model = PROCESSES[name]().model
    log_joint = LogJoint(model)
    assert log_joint.strategy == ("copies" if name == "noise" else "vmap"), log_joint.reason
    z = log_joint.start + 0.5 * torch.randn(3, log_joint.latents.latent_dim)
    expected = torch.stack([by_trace(model, row) for row in z])
    assert torch.allclose(log_joint(z), expected, rtol=1e-8)


@pytest.mark.parametrize("kind", [AutoIAF, AutoNormal])
@pytest.mark.parametrize("name", PROCESSES)
def test_steps(name, kind):
    model = PROCESSES[name]().model
    svi = SVI(model, kind(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))


def test_posterior():
    """By quadrature over the one latent; the parameters of the kernel are trained along, so after the fit.

    The tolerance is four standard errors and 0.005, what a bent posterior leaves after few steps.
    """
    process = regression("noise")
    before = process.kernel.lengthscale.item()
    result = quick_fit(process.model, num_steps=20, progress=False)
    assert not result.one_at_a_time
    assert process.kernel.lengthscale.item() != before
    points = torch.linspace(-8.0, 2.0, 2001)[:, None]
    with torch.no_grad():
        density = LogJoint(process.model)(points)
    expected = torch.trapezoid((density - density.max()).exp(), points[:, 0]).log() + density.max()
    assert abs(result.log_evidence - expected) < 4 * result.log_evidence_se + 0.005
    assert expected - 0.05 < result.elbo < expected + 3 * result.elbo_se
