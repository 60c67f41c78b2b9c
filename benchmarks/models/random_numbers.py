# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What a random model is, and the random numbers that it is made of."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from torch import Tensor

from models.moments import Moments

Data = Tensor | None
ByName = Mapping[str, Moments]

#: fewer finite moments than this, of some latent, are heavy tails
HEAVY = 6.0


class Family(NamedTuple):
    """A model of some size, before it has data.

    :param exact: the moments of each site, given the data (an empty tensor where there are none).
    :param num_moments: absolute moments of an order below this are finite, of all latents.
    """

    model: Callable[..., None]
    args: tuple[Any, ...]
    exact: Callable[[Tensor], ByName]
    num_moments: float = math.inf


class Subject(NamedTuple):
    """A model with its data."""

    model: Callable[..., None]
    args: tuple[Any, ...]
    moments: ByName
    num_moments: float
    has_data: bool

    @property
    def is_heavy(self) -> bool:
        return self.num_moments < HEAVY


def between(low: float, high: float) -> float:
    """Log-uniform."""
    return low * (high / low) ** torch.rand(()).item()


def size(low: int, high: int) -> int:
    return round(between(low, high))


def scales(count: int, low: float, high: float) -> Tensor:
    return low * (high / low) ** torch.rand(count)


def scale_prior() -> dist.TorchDistribution:
    """One of some priors of a scale, as people choose them."""
    typical = between(0.3, 3.0)
    priors = (
        dist.HalfNormal(typical),
        dist.HalfCauchy(typical),
        dist.LogNormal(math.log(typical), 1.0),
        dist.Exponential(1 / typical),
        dist.Gamma(2.0, 2 / typical),
    )
    return priors[int(torch.randint(len(priors), ()))]


def correlated(dim: int) -> Tensor:
    """The Cholesky factor of a random covariance."""
    root = torch.randn(dim, dim + 2) * scales(dim, 0.2, 5.0)[:, None]
    return torch.linalg.cholesky(root @ root.T / (dim + 2))
