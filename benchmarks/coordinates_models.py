# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Hierarchies whose scales are latent, centred, as users write them; data are simulated with fixed seeds."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from prior_as_data import prior_as_data
from pyro import distributions as dist
from torch import Tensor

Subject = tuple[Callable[..., Any], tuple[Any, ...]]

#: Rubin (1981): effects of coaching in eight schools, and their standard errors
EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


class Simulator:
    """Random numbers of a seed in order."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)

    def poisson(self, rate: Tensor) -> Tensor:
        return torch.poisson(rate, generator=self.generator)


def schools_model(error: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=y)


def schools() -> Subject:
    return schools_model, (torch.tensor(ERRORS), torch.tensor(EFFECTS))


@prior_as_data
def funnel_model(num_latents: int) -> None:
    """Neal's funnel (2003, section 8): no data, so that its evidence is 1."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("latents", num_latents):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def slopes_model(group: Tensor, x: Tensor, y: Tensor) -> None:
    """An intercept and a slope of each group, correlated."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    factor = pyro.sample("L", dist.LKJCholesky(2, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    scale_tril = tau[..., None] * factor
    with pyro.plate("groups", int(group.max()) + 1):
        ab = pyro.sample("ab", dist.MultivariateNormal(mu, scale_tril=scale_tril))
    with pyro.plate("rows", len(y)):
        mean = ab[..., group, 0] + ab[..., group, 1] * x
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def slopes(num_groups: int = 200) -> Subject:
    """Groups of 2 to 7 rows."""
    simulator = Simulator(0)
    sizes = simulator.integers(2, 8, num_groups)
    group = torch.arange(num_groups).repeat_interleave(sizes)
    x = (simulator.uniform(len(group)) < 0.4).double()
    factor = torch.tensor([[0.35, 0.0], [-0.06, 0.1]])
    ab = torch.tensor([1.4, -0.65]) + simulator.normal(num_groups, 2) @ factor.T
    y = ab[group, 0] + ab[group, 1] * x + 0.75 * simulator.normal(len(group))
    return slopes_model, (group, x, y)


def means_model(sd: Tensor | float, y: Tensor) -> None:
    """Means of groups, whose rows have a known sd."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", y.shape[-1]):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("rows", y.shape[-2]):
            pyro.sample("y", dist.Normal(theta, sd), obs=y)


def strong(num_groups: int = 20, num_rows: int = 1_000) -> Subject:
    simulator = Simulator(1)
    theta = 2 + 0.5 * simulator.normal(num_groups)
    return means_model, (1.0, theta + simulator.normal(num_rows, num_groups))


def mixed(num_groups: int = 40) -> Subject:
    """A row in each group, known well in every other one and hardly in the rest."""
    simulator = Simulator(2)
    sd = torch.tensor([5.0, 0.05]).repeat(num_groups // 2)
    theta = 1 + 0.5 * simulator.normal(num_groups)
    return means_model, (sd, (theta + sd * simulator.normal(num_groups))[None])


def horseshoe_model(x: Tensor, y: Tensor) -> None:
    """A regression whose coefficients are zero, most of them (Carvalho, Polson and Scott, 2010)."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("columns", x.shape[1]):
        scale = pyro.sample("lambda", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, tau * scale))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(beta @ x.T, sigma), obs=y)


def horseshoe(num_rows: int = 100, num_columns: int = 20) -> Subject:
    simulator = Simulator(3)
    x, beta = simulator.normal(num_rows, num_columns), torch.zeros(num_columns)
    beta[:3] = torch.tensor([2.0, -1.0, 0.5])
    return horseshoe_model, (x, x @ beta + simulator.normal(num_rows))


def counts_model(group: Tensor, x: Tensor, exposure: Tensor, y: Tensor) -> None:
    """Counts with an exposure; each group has an intercept and a slope."""
    mu_a = pyro.sample("mu_a", dist.Normal(0.0, 2.0))
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 1.0))
    sd_a = pyro.sample("sd_a", dist.HalfNormal(1.0))
    sd_b = pyro.sample("sd_b", dist.HalfNormal(1.0))
    with pyro.plate("groups", int(group.max()) + 1):
        a = pyro.sample("a", dist.Normal(mu_a, sd_a))
        b = pyro.sample("b", dist.Normal(mu_b, sd_b))
    with pyro.plate("rows", len(y)):
        log_rate = a[..., group] + b[..., group] * x + exposure.log()
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def counts(num_groups: int = 30, num_rows: int = 240) -> Subject:
    simulator = Simulator(4)
    group, x = simulator.integers(0, num_groups, num_rows), simulator.normal(num_rows)
    exposure = 0.5 + 4 * simulator.uniform(num_rows)
    a = -0.5 + 0.6 * simulator.normal(num_groups)
    b = 0.3 + 0.2 * simulator.normal(num_groups)
    rate = exposure * (a[group] + b[group] * x).exp()
    return counts_model, (group, x, exposure, simulator.poisson(rate))


def walk_model(y: Tensor) -> None:
    """A random walk by a loop, seen with noise."""
    q = pyro.sample("q", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
    for t in range(len(y)):
        if t > 0:
            z = pyro.sample(f"z_{t}", dist.Normal(z, q))
        pyro.sample(f"y_{t}", dist.Normal(z, noise), obs=y[t])


def walk(num_steps: int = 60) -> Subject:
    simulator = Simulator(5)
    z = (0.2 * simulator.normal(num_steps)).cumsum(0)
    return walk_model, (z + 0.5 * simulator.normal(num_steps),)


def nested_model(district: Tensor, school: Tensor, y: Tensor) -> None:
    """Pupils in schools, these in districts."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    sd_districts = pyro.sample("sd_districts", dist.HalfNormal(2.0))
    sd_schools = pyro.sample("sd_schools", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("districts", int(district.max()) + 1):
        of_district = pyro.sample("of_district", dist.Normal(mu, sd_districts))
    with pyro.plate("schools", len(district)):
        of_school = pyro.sample("of_school", dist.Normal(of_district[..., district], sd_schools))
    with pyro.plate("pupils", len(y)):
        pyro.sample("y", dist.Normal(of_school[..., school], sigma), obs=y)


def nested(num_districts: int = 10, num_schools: int = 50, num_pupils: int = 300) -> Subject:
    simulator = Simulator(6)
    district = torch.arange(num_districts).repeat_interleave(num_schools // num_districts)
    school = simulator.integers(0, num_schools, num_pupils)
    of_school = 0.3 * simulator.normal(num_districts)[district] + 0.5 * simulator.normal(
        num_schools
    )
    return nested_model, (district, school, of_school[school] + simulator.normal(num_pupils))
