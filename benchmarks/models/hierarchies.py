# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Hierarchies whose scales are latent, centred, as users write them; data are simulated with fixed seeds."""

from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from models.library import Library, Model, Simulator, Subject, tensors

#: Rubin (1981): effects of coaching in eight schools, and their standard errors
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(lib: Library, centred: bool) -> Model:
    effects, errors = lib.array(EFFECTS), lib.array(ERRORS)

    def model() -> Any:
        mu = lib.sample("mu", lib.dist.Normal(0.0, 5.0))
        tau = lib.sample("tau", lib.dist.HalfCauchy(5.0))
        with lib.plate("schools", len(EFFECTS)):
            if centred:
                theta = lib.sample("theta", lib.dist.Normal(mu, tau))
            else:
                theta = mu + tau * lib.sample("z", lib.dist.Normal(0.0, 1.0))
            lib.sample("y", lib.dist.Normal(theta, errors), obs=effects)
        return theta

    return model


class SchoolsTruth(NamedTuple):
    """What is known of the eight schools; of log tau the mean, the sd and the 1 % quantile."""

    evidence: float
    mean: Tensor
    sd: Tensor
    lowest: float


def schools_truth() -> SchoolsTruth:
    """By quadrature over log tau: given tau, the effects and their mean are integrated out."""
    error, y = torch.tensor(ERRORS), torch.tensor(EFFECTS)
    log_tau = torch.linspace(-40.0, 20.0, 60_001, dtype=torch.float64)
    tau = log_tau.exp()
    variance = error.square() + tau[:, None].square()
    shared = torch.full((len(tau), len(y), 1), 5.0, dtype=torch.float64)
    likelihood = dist.LowRankMultivariateNormal(torch.zeros_like(y), shared, variance).log_prob(y)
    log_density = likelihood + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    evidence = log_density.logsumexp(0) + (log_tau[1] - log_tau[0]).log()
    weights = log_density.softmax(0)
    mean = weights @ log_tau
    sd = (weights @ (log_tau - mean).square()).sqrt()
    lowest = log_tau[(weights.cumsum(0) < 0.01).sum()]
    return SchoolsTruth(evidence.item(), mean, sd, lowest.item())


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


def normal_hierarchy(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def hierarchy(num_groups: int = 1_000) -> Subject:
    """Groups with errors from 0.3 to 3."""
    rng = np.random.default_rng(1)
    theta, sigma = 1 + 0.7 * rng.normal(size=num_groups), 0.3 * 10 ** rng.random(num_groups)
    return normal_hierarchy, tensors(theta + sigma * rng.normal(size=num_groups), sigma)


def irt_2pl(y: Tensor) -> None:
    """Two-parameter logistic item responses of persons, which are rows, to items."""
    sigma_a = pyro.sample("sigma_a", dist.HalfNormal(1.0))
    sigma_b = pyro.sample("sigma_b", dist.HalfNormal(2.0))
    persons = pyro.plate("persons", y.shape[0], dim=-2)
    items = pyro.plate("items", y.shape[1], dim=-1)
    with persons:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with items:
        log_a = pyro.sample("log_a", dist.Normal(0.0, sigma_a))
        b = pyro.sample("b", dist.Normal(0.0, sigma_b))
    with persons, items:
        pyro.sample("y", dist.Bernoulli(logits=log_a.exp() * (theta - b)), obs=y)


def items(num_persons: int = 200, num_items: int = 50) -> Subject:
    rng = np.random.default_rng(3)
    theta, b = rng.normal(size=(num_persons, 1)), 1.2 * rng.normal(size=num_items)
    logits = np.exp(0.45 * rng.normal(size=num_items)) * (theta - b)
    return irt_2pl, tensors(rng.random(logits.shape) < 1 / (1 + np.exp(-logits)))


def groups(lib: Library, num_groups: int = 20, size: int = 1_000) -> Model:
    """Varying intercepts and slopes of large groups."""
    rng = np.random.default_rng(5)
    index, x_data = np.repeat(np.arange(num_groups), size), rng.normal(size=num_groups * size)
    effects = np.array([1.0, -0.5]) + np.array([0.8, 0.4]) * rng.normal(size=(num_groups, 2))
    mean_data = effects[index, 0] + effects[index, 1] * x_data
    y = lib.array(mean_data + 1.5 * rng.normal(size=len(index)))
    group, x = map(lib.array, (index, x_data))
    normal, half_normal = lib.dist.Normal, lib.dist.HalfNormal

    def model() -> None:
        a_mean, b_mean = (lib.sample(name, normal(0.0, 5.0)) for name in ("a_mean", "b_mean"))
        a_sd, b_sd = (lib.sample(name, half_normal(1.0)) for name in ("a_sd", "b_sd"))
        sigma = lib.sample("sigma", half_normal(2.0))
        with lib.plate("groups", num_groups):
            a = lib.sample("a", normal(a_mean, a_sd))
            b = lib.sample("b", normal(b_mean, b_sd))
        with lib.plate("rows", len(y)):
            lib.sample("y", normal(a[..., group] + b[..., group] * x, sigma), obs=y)

    return model
