# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Small posteriors of several kinds, on which flows are compared."""

import pyro
import torch
from pyro import distributions as dist

from models.hierarchies import schools
from models.library import PYRO


def regression() -> None:
    """Ten observations: the posterior of the slopes has the tails of a Student's t."""
    x = torch.linspace(-1, 1, 10)
    y = 100 + 30 * x + 5 * torch.sin(7 * x)
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1000.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(beta[..., :1] + beta[..., 1:] * x, sigma), obs=y)


def process() -> None:
    """The length, the height and the noise of a Gaussian process with eight observations."""
    x = torch.linspace(0, 10, 8)
    y = torch.sin(x) + 0.3 * torch.cos(5 * x)
    length = pyro.sample("length", dist.Gamma(5.0, 2.0))
    height = pyro.sample("height", dist.HalfNormal(2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    away = (x[:, None] - x) / length[..., None, None]
    cov = height[..., None, None] ** 2 * torch.exp(-0.5 * away**2)
    cov = cov + (noise[..., None, None] ** 2 + 1e-6) * torch.eye(len(x))
    chol = torch.linalg.cholesky(cov)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=chol), obs=y)


def logistic() -> None:
    """Twelve coefficients and forty observations that are nearly separated: a skewed posterior."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator)
    x[:, 0] = 1.0
    noise = torch.rand(40, generator=generator)
    y = (noise < torch.sigmoid(2 * x[:, 1] - 2 * x[:, 2] + x[:, 3])).double()
    beta = pyro.sample("beta", dist.Normal(torch.zeros(12), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        logits = beta @ x.T
        logits = logits.squeeze(-2) if logits.dim() > 1 else logits
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


POSTERIORS = {
    "centred": schools(PYRO, centred=True),
    "noncentred": schools(PYRO, centred=False),
    **{model.__name__: model for model in (regression, process, logistic)},
}
