# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Paths and fields: states, volatilities, walks, counts on a grid; data are simulated."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
from pyro import distributions as dist
from torch import Tensor

from models.library import PYRO, Library, Model, Simulator, Subject, tensors

#: how strongly a node of the field is drawn to its neighbours
ALPHA = 0.95
#: of chains the persistence, the sds of steps and of the noise of data, and the length of the short one
PERSISTENCE, STEP, NOISE, LENGTH = 0.95, 0.3, 0.5, 200


def stationary_sd() -> float:
    return STEP / math.sqrt(1 - PERSISTENCE**2)


def chain_data() -> np.ndarray:
    rng = np.random.default_rng(2)
    path = [stationary_sd() * rng.normal()]
    while len(path) < LENGTH:
        path.append(PERSISTENCE * path[-1] + STEP * rng.normal())
    return np.array(path) + NOISE * rng.normal(size=LENGTH)


def chain(
    lib: Library, length: int = LENGTH, make: Callable[[], np.ndarray] | None = None
) -> Model:
    """States with Gaussian data, all parameters known: the posterior is Gaussian."""
    y = lib.array((make or chain_data)())

    def model() -> None:
        x = lib.path("x", length, 0.0, PERSISTENCE, STEP)
        lib.sample("y", lib.dist.Normal(x, NOISE).to_event(1), obs=y)

    return model


def states(lib: Library, length: int = 1_000) -> Model:
    """The same with more of them."""
    rng = np.random.default_rng(0)
    z = simulated_path(rng, PERSISTENCE, STEP, length)
    return chain(lib, length, lambda: z + NOISE * rng.normal(size=length))


def simulated_path(rng: np.random.Generator, phi: float, scale: float, length: int) -> np.ndarray:
    steps = scale * rng.normal(size=length)
    states = [steps[0] / math.sqrt(1 - phi**2)]
    for step in steps[1:]:
        states.append(phi * states[-1] + step)
    return np.array(states)


def stochastic_volatility(y: Tensor, lowest: float = -1.0) -> None:
    """Returns y_t ~ N(0, exp(h_t / 2)), where h is an AR(1) path with unknown parameters.

    :param lowest: the bound of its persistence.
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    phi_star = pyro.sample("phi_star", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    h = PYRO.path("h", len(y), mu, lowest + (1 - lowest) * phi_star, sigma)
    pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)


def volatility(num_days: int = 1_000) -> Subject:
    rng = np.random.default_rng(2)
    h = simulated_path(rng, 0.95, 0.25, num_days) - 0.2
    return stochastic_volatility, tensors(np.exp(h / 2) * rng.normal(size=num_days))


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


def field(lib: Library, rows: int = 32, columns: int = 32) -> Model:
    """Counts on a grid, whose log rates are a conditional autoregression about an intercept."""
    rng, matrix = np.random.default_rng(4), precision(rows, columns)
    states = np.linalg.solve(np.linalg.cholesky(matrix).T, rng.normal(size=rows * columns))
    y = lib.array(rng.poisson(np.exp(0.8 + states)).astype(float))
    degree = lib.array(matrix.diagonal().reshape(rows, columns))
    log_det = np.linalg.slogdet(matrix)[1] - rows * columns * math.log(2 * math.pi)

    def model() -> None:
        kappa = lib.sample("kappa", lib.dist.Gamma(2.0, 1.0))
        intercept = lib.sample("intercept", lib.dist.Normal(0.0, 2.0))
        z = lib.free("z", rows * columns)
        form = quadratic_form(z.reshape((*z.shape[:-1], rows, columns)), degree)
        log_kappa = rows * columns * lib.arrays.log(kappa)
        lib.factor("field", 0.5 * (log_det + log_kappa - kappa * form))
        rate = lib.arrays.exp(intercept[..., None] + z)
        lib.sample("y", lib.dist.Poisson(rate).to_event(1), obs=y)

    return model


def white_walk(lib: Library, length: int = 2_000) -> Model:
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
