# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The posteriors of benchmarks/chains.md, as users write them; data are simulated.

Some are written once for Pyro and NumPyro; the others are in Pyro here, hierarchies and paths centred,
and for NumPyro in chains_peers.py, by the names of the functions.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from coordinates_models import funnel_model
from fit_posteriors import POSTERIORS, Library, Model, Posterior, linear
from pyro import distributions as dist
from torch import Tensor

#: how strongly a node of the field is drawn to its neighbours
ALPHA = 0.95
#: persistence of the states, the sds of their steps and of the noise of their data
PERSISTENCE, STEP, NOISE = 0.95, 0.3, 0.5
Subject = tuple[Callable[..., Any], tuple[Any, ...]]


def path(name: str, loc: Tensor | float, phi: Any, scale: Any, length: int) -> Tensor:
    """A stationary AR(1) path."""
    # drawn anywhere: the density of the path is the two factors
    z = pyro.sample(name, dist.Normal(torch.zeros(length), 1.0).mask(False).to_event(1))
    loc, phi, scale = (torch.as_tensor(value)[..., None] for value in (loc, phi, scale))
    first = dist.Normal(loc, scale / (1 - phi**2).sqrt()).log_prob(z[..., :1])
    steps = dist.Normal(loc + phi * (z[..., :-1] - loc), scale).log_prob(z[..., 1:])
    pyro.factor(f"{name}_path", first.sum(-1) + steps.sum(-1))
    return z


def precision(rows: int, columns: int) -> np.ndarray:
    """That of a conditional autoregression on a grid, where kappa is 1: D - alpha W, W the adjacency."""
    index = np.arange(rows * columns).reshape(rows, columns)
    adjacency = np.zeros((rows * columns,) * 2)
    for one, other in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        adjacency[one.ravel(), other.ravel()] = adjacency[other.ravel(), one.ravel()] = 1
    return np.diag(adjacency.sum(0)) - ALPHA * adjacency


def quadratic_form(field: Any, degree: Any) -> Any:
    """z' (D - alpha W) z of fields z of shape ``(..., rows, columns)``, in either library."""
    down = (field[..., 1:, :] * field[..., :-1, :]).sum((-2, -1))
    right = (field[..., :, 1:] * field[..., :, :-1]).sum((-2, -1))
    return (degree * field**2).sum((-2, -1)) - 2 * ALPHA * (down + right)


def lgssm(y: Tensor) -> None:
    """States with Gaussian data, all parameters known: the posterior is Gaussian."""
    z = path("z", 0.0, PERSISTENCE, STEP, len(y))
    pyro.sample("y", dist.Normal(z, NOISE).to_event(1), obs=y)


def normal_hierarchy(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def stochastic_volatility(y: Tensor) -> None:
    """Returns y_t ~ N(0, exp(h_t / 2)), where h is an AR(1) path with unknown parameters."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    phi_star = pyro.sample("phi_star", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    h = path("h", mu, 2 * phi_star - 1, sigma, len(y))
    pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)


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


class PoissonField:
    """Counts on a grid, whose log rates are a conditional autoregression about an intercept."""

    def __init__(self, rows: int, columns: int) -> None:
        matrix = torch.as_tensor(precision(rows, columns), dtype=torch.get_default_dtype())
        self.degree, self.log_det = matrix.diagonal().reshape(rows, columns), matrix.logdet()
        self.__name__ = "poisson_gmrf"

    def __call__(self, y: Tensor) -> None:
        kappa = pyro.sample("kappa", dist.Gamma(2.0, 1.0))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
        zeros = torch.zeros(y.numel())
        z = pyro.sample("z", dist.Normal(zeros, 1.0).mask(False).to_event(1))
        form = quadratic_form(z.reshape(z.shape[:-1] + y.shape), self.degree)
        log_det = self.log_det + y.numel() * (kappa.log() - math.log(2 * math.pi))
        pyro.factor("field", 0.5 * (log_det - kappa * form))
        rate = (intercept[..., None] + z).exp()
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y.reshape(-1))


def simulated_path(rng: np.random.Generator, phi: float, scale: float, length: int) -> np.ndarray:
    steps = scale * rng.normal(size=length)
    states = [steps[0] / math.sqrt(1 - phi**2)]
    for step in steps[1:]:
        states.append(phi * states[-1] + step)
    return np.array(states)


def tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(array, dtype=torch.get_default_dtype()) for array in arrays)


def states(length: int = 1_000) -> Subject:
    rng = np.random.default_rng(0)
    z = simulated_path(rng, PERSISTENCE, STEP, length)
    return lgssm, tensors(z + NOISE * rng.normal(size=length))


def hierarchy(num_groups: int = 1_000) -> Subject:
    """Groups with errors from 0.3 to 3."""
    rng = np.random.default_rng(1)
    theta, sigma = 1 + 0.7 * rng.normal(size=num_groups), 0.3 * 10 ** rng.random(num_groups)
    return normal_hierarchy, tensors(theta + sigma * rng.normal(size=num_groups), sigma)


def volatility(num_days: int = 1_000) -> Subject:
    rng = np.random.default_rng(2)
    h = simulated_path(rng, 0.95, 0.25, num_days) - 0.2
    return stochastic_volatility, tensors(np.exp(h / 2) * rng.normal(size=num_days))


def items(num_persons: int = 200, num_items: int = 50) -> Subject:
    rng = np.random.default_rng(3)
    theta, b = rng.normal(size=(num_persons, 1)), 1.2 * rng.normal(size=num_items)
    logits = np.exp(0.45 * rng.normal(size=num_items)) * (theta - b)
    return irt_2pl, tensors(rng.random(logits.shape) < 1 / (1 + np.exp(-logits)))


def field(rows: int = 32, columns: int = 32) -> Subject:
    rng = np.random.default_rng(4)
    factor = np.linalg.cholesky(precision(rows, columns))
    z = np.linalg.solve(factor.T, rng.normal(size=rows * columns))
    return PoissonField(rows, columns), tensors(rng.poisson(np.exp(0.8 + z)).reshape(rows, columns))


def funnel() -> Subject:
    return funnel_model, (100,)


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


def rows_data(num_rows: int = 5_000, num_columns: int = 26) -> tuple[np.ndarray, np.ndarray]:
    """A constant and columns that are correlated."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(num_rows, num_columns)) + 0.7 * rng.normal(size=(num_rows, 1))
    x[:, 0] = 1.0
    return x, x @ rng.normal(size=num_columns) + 2.0 * rng.normal(size=num_rows)


def logistic_horseshoe(lib: Library, num_rows: int = 200, num_columns: int = 100) -> Model:
    """Five of the coefficients are not zero."""
    rng = np.random.default_rng(7)
    x_data = rng.normal(size=(num_rows, num_columns))
    logits = 0.5 + x_data[:, :5] @ np.array([3.0, -2.5, 2.0, -1.5, 1.0])
    x, y = lib.array(x_data), lib.array((rng.random(num_rows) < 1 / (1 + np.exp(-logits))) * 1.0)
    zeros, ones = (lib.array(np.full(num_columns, value)) for value in (0.0, 1.0))

    def model() -> None:
        intercept = lib.sample("intercept", lib.dist.Normal(0.0, 2.0))
        tau = lib.sample("tau", lib.dist.HalfCauchy(1.0))
        scales = lib.sample("lambda", lib.dist.HalfCauchy(ones).to_event(1))
        beta = lib.sample("z", lib.dist.Normal(zeros, 1.0).to_event(1)) * scales * tau[..., None]
        logits = intercept[..., None] + (x @ beta[..., None])[..., 0]
        lib.sample("y", lib.dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return model


def walk(lib: Library, length: int = 2_000) -> Model:
    """A random walk as sums of white noise, observed with noise."""
    rng = np.random.default_rng(8)
    y = lib.array(np.cumsum(0.1 * rng.normal(size=length)) + NOISE * rng.normal(size=length))
    zeros = lib.array(np.zeros(length))

    def model() -> None:
        step = lib.sample("step", lib.dist.HalfNormal(1.0))
        noise = lib.sample("noise", lib.dist.HalfNormal(1.0))
        level = lib.sample("level", lib.dist.Normal(0.0, 5.0))
        white = lib.sample("white", lib.dist.Normal(zeros, 1.0).to_event(1))
        path = level[..., None] + step[..., None] * white.cumsum(-1)
        lib.sample("y", lib.dist.Normal(path, noise[..., None]).to_event(1), obs=y)

    return model


#: models for Pyro
LARGE: dict[str, Callable[[], Subject]] = {
    "state space": states,
    "hierarchy": hierarchy,
    "volatility": volatility,
    "item responses": items,
    "counts on a grid": field,
    "funnel": funnel,
}
#: models for either library
BOUND = POSTERIORS | {
    "groups": Posterior(groups, 45),
    "regression": linear(rows_data, 27),
    "logistic_horseshoe": Posterior(logistic_horseshoe, 202),
    "walk": Posterior(walk, 2_003),
}
NAMES = (*LARGE, *BOUND)
