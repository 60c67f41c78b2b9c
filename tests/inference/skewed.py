# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A correlated and skewed density whose logarithm is known, and a model that has it as its posterior."""

import pyro
import torch
from pyro import distributions as dist

DIM = 3
_SKEWNESS, _TAIL = 0.7, 0.9


def _tril():
    return torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [-1.0, 0.5, 0.3]])


def sample(n):
    """Draws of sinh-arcsinh noise (Jones, Pewsey 2009), mixed and shifted; shape ``(n, 3)``."""
    z = torch.randn(n, DIM)
    return 5 + torch.sinh((torch.asinh(z) + _SKEWNESS) / _TAIL) @ _tril().T


def log_prob(y):
    """The log-density at values of shape ``(n, 3)``."""
    x = torch.linalg.solve_triangular(_tril(), (y - 5).T, upper=False).T
    u = _TAIL * torch.asinh(x) - _SKEWNESS
    slope = torch.log(_TAIL * torch.cosh(u)) - 0.5 * torch.log1p(x * x)
    normal = dist.Normal(0.0, 1.0).log_prob(torch.sinh(u))
    return (normal + slope).sum(-1) - _tril().diagonal().log().sum()


def model():
    """A posterior of a vector and of a positive scalar: the density above, the last one exponentiated."""
    pair = pyro.sample("pair", dist.ImproperUniform(dist.constraints.real, (), (2,)))
    size = pyro.sample("size", dist.ImproperUniform(dist.constraints.positive, (), ()))
    log_size = size.log()
    y = torch.cat([pair, log_size[..., None]], -1)
    pyro.factor("density", log_prob(y.reshape(-1, DIM)).reshape(log_size.shape) - log_size)


def sites(y):
    """Rows as values of the sites of :func:`model`."""
    return {"pair": y[..., :2], "size": y[..., 2].exp()}
