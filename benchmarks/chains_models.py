# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The large posteriors of benchmarks/chains.md in Pyro, centred, as users write them; data are simulated.

The same posteriors for NumPyro are in chains_peers.py, by the names of the functions.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from coordinates_models import funnel_model
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


LARGE: dict[str, Callable[[], Subject]] = {
    "state space": states,
    "hierarchy": hierarchy,
    "volatility": volatility,
    "item responses": items,
    "counts on a grid": field,
}
