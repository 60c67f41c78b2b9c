# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models as users write them, of the sizes that they have in practice.

Most are those of tests/guides/idioms/models.py. Data are simulated, except the batting averages.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from models.library import Subject
from models.paths import simulate, stochastic_volatility

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.guides.idioms import models as idioms

#: hits of 18 players in their first 45 at bats of the season of 1970 (Efron and Morris, 1975)
HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)


def uniform(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def poisson(seed: int, rate: Tensor) -> Tensor:
    return torch.poisson(rate, generator=torch.Generator().manual_seed(seed))


def baseball() -> Subject:
    return idioms.baseball, (torch.full((18,), 45.0), torch.tensor(HITS, dtype=torch.float64))


def correlation() -> Subject:
    factor = torch.eye(5) + 0.4 * torch.ones(5, 5).tril(-1)
    return idioms.correlation, (normal(0, 200, 5) @ factor.T,)


def radon() -> Subject:
    """919 houses in 85 counties of unequal sizes, each with one house at least."""
    more = (85 * uniform(0, 919 - 85) ** 2).long()
    county, floor = torch.cat([torch.arange(85), more]), (uniform(1, 919) < 0.17).double()
    intercept = 1.4 + 0.35 * normal(2, 85)
    return idioms.radon, (county, floor, intercept[county] - 0.7 * floor + 0.75 * normal(3, 919))


def poisson_regression(group: Tensor, x: Tensor, exposure: Tensor, y: Tensor) -> None:
    """Counts with an exposure, and an effect of each group."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("groups", int(group.max()) + 1):
        effect = pyro.sample("effect", dist.Normal(0.0, sd))
    with pyro.plate("rows", len(x)):
        log_rate = intercept + slope * x + effect[group] + exposure.log()
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def counts() -> Subject:
    group, x, exposure = torch.arange(40).repeat(10), normal(0, 400), 1 + 9 * uniform(1, 400)
    log_rate = -0.5 + 0.3 * x + 0.6 * normal(2, 40)[group]
    return poisson_regression, (group, x, exposure, poisson(3, exposure * log_rate.exp()))


def process() -> Subject:
    x = torch.linspace(0.0, 1.0, 100)
    return idioms.process, (
        x,
        poisson(0, torch.exp(1 + torch.sin(7 * x) + 0.5 * torch.cos(15 * x))),
    )


def items() -> Subject:
    person, item = torch.arange(100).repeat_interleave(20), torch.arange(20).repeat(100)
    slope = (0.4 * normal(0, 20)).exp()
    logits = slope[item] * (normal(1, 100)[person] - normal(2, 20)[item])
    return idioms.items, (person, item, (uniform(3, 2000) < logits.sigmoid()).double())


def network() -> Subject:
    """13 hidden units: 40 weights, and the noise."""
    x = 4 * uniform(0, 80)[:, None] - 2
    return idioms.Network(13), (x, torch.sin(2 * x[:, 0]) + 0.1 * normal(1, 80))


def ordinal() -> Subject:
    group, x = torch.arange(40).repeat(10), normal(0, 400)
    latent = 0.8 * x + 0.7 * normal(1, 40)[group] + torch.logit(uniform(2, 400))
    return idioms.ordinal, (group, x, 6, (latent[:, None] > torch.linspace(-2, 2, 5)).sum(-1))


def volatility() -> Subject:
    return stochastic_volatility, (simulate(200), 0.0)


#: in words, and the model with its arguments
MODELS: dict[str, tuple[str, Callable[[], Subject]]] = {
    "baseball": ("binomial, partially pooled, 18 players", baseball),
    "correlation": ("covariance by LKJ, 5 columns, 200 rows", correlation),
    "ordinal": ("ordinal mixed, 6 categories, 40 groups, 400 rows", ordinal),
    "counts": ("Poisson mixed with exposure, 40 groups, 400 rows", counts),
    "radon": ("varying intercepts, 85 counties, 919 houses", radon),
    "network": ("network of 40 weights, 80 rows", network),
    "volatility": ("stochastic volatility, 200 days", volatility),
    "items": ("item responses, 100 persons, 20 items", items),
    "process": ("Gaussian process of 100 points behind counts", process),
}
