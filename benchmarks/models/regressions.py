# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Regressions, with data that are simulated, or those of scikit-learn."""

from collections.abc import Callable

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from models.library import Library, Model, Simulator, Subject


def regression(lib: Library, data: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Model:
    x, y = map(lib.array, data())
    zeros = lib.array(np.zeros(x.shape[1]))

    def model() -> None:
        beta = lib.sample("beta", lib.dist.Normal(zeros, 10.0).to_event(1))
        sigma = lib.sample("sigma", lib.dist.HalfCauchy(2.5))
        mean = (x @ beta[..., None])[..., 0]
        lib.sample("y", lib.dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)

    return model


def logistic(lib: Library) -> Model:
    x, y = map(lib.array, cancer_data())
    zeros = lib.array(np.zeros(x.shape[1]))

    def model() -> None:
        beta = lib.sample("beta", lib.dist.Normal(zeros, 10.0).to_event(1))
        logits = (x @ beta[..., None])[..., 0]
        lib.sample("y", lib.dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return model


def autoregression_data() -> tuple[np.ndarray, np.ndarray]:
    """Five lags and a constant, of 200 simulated points: the size of arK."""
    rng, lags = np.random.default_rng(0), 5
    y = list(rng.normal(size=lags))
    while len(y) < 200:
        y.append(0.7 * y[-1] + 0.4 * y[-2] - 0.2 * y[-3] - 0.1 * y[-4] + 0.15 * rng.normal())
    path = np.array(y)
    columns = [path[lags - k : len(y) - k] for k in range(1, lags + 1)]
    return np.stack([np.ones(len(y) - lags), *columns], -1), path[lags:]


def survey_data() -> tuple[np.ndarray, np.ndarray]:
    """A party on a scale of seven by nine columns, raw codes of answers: the size of nes1996."""
    rng, n = np.random.default_rng(1), 850
    ideology, education = rng.integers(1, 8, n), rng.integers(1, 5, n)
    income, age = rng.integers(1, 6, n), rng.integers(1, 5, n)
    race, gender = rng.random(n) < 0.15, rng.integers(1, 3, n)
    ages = [age == k for k in (2, 3, 4)]
    x = np.stack([np.ones(n), ideology, race, *ages, education, gender, income], -1).astype(float)
    effects = np.array([-1.3, 0.75, -1.1, -0.2, -0.2, -0.4, 0.3, 0.0, 0.15])
    return x, (x @ effects + 1.9 * rng.normal(size=n)).round().clip(1, 7)


def cancer_data() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    scaled = (x - x.mean(0)) / x.std(0)
    return np.concatenate([np.ones((len(x), 1)), scaled], 1), y.astype(float)


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
