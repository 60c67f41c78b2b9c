# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The posteriors of benchmarks/fit.py, each written once for Pyro and NumPyro, with its log evidence.

Data of "autoregression" and "survey" are simulated, after arK and nes1996 of posteriordb; those of
"cancer" are scikit-learn's, all columns centred and divided by their standard deviations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
#: by importance sampling with 400,000 draws of an AutoIAF with 512 hidden units, of which 73 % were effective
CANCER_EVIDENCE = -71.470
#: the chain: its persistence, the sds of its steps and of the noise of its data
PERSISTENCE, STEP, NOISE, LENGTH = 0.95, 0.3, 0.5, 200

Model = Callable[[], Any]


@dataclass(frozen=True)
class Library:
    """What the models call: Pyro's names, which are NumPyro's too, and how it makes an array."""

    sample: Callable[..., Any]
    plate: Callable[..., Any]
    factor: Callable[..., Any]
    dist: Any
    array: Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Posterior:
    """A model for either library, its number of latents, and its log evidence if it is known."""

    bind: Callable[[Library], Model]
    dim: int
    evidence: Callable[[], float] = lambda: math.nan


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


def chain(lib: Library) -> Model:
    y, zeros = lib.array(chain_data()), lib.array(np.zeros(LENGTH))

    def model() -> None:
        # drawn anywhere: the density of the path is the two factors
        x = lib.sample("x", lib.dist.Normal(zeros, 1.0).mask(False).to_event(1))
        first = lib.dist.Normal(0.0, stationary_sd()).log_prob(x[..., 0])
        steps = lib.dist.Normal(PERSISTENCE * x[..., :-1], STEP).log_prob(x[..., 1:])
        lib.factor("path", first + steps.sum(-1))
        lib.sample("y", lib.dist.Normal(x, NOISE).to_event(1), obs=y)

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


def stationary_sd() -> float:
    return STEP / math.sqrt(1 - PERSISTENCE**2)


def chain_data() -> np.ndarray:
    rng = np.random.default_rng(2)
    path = [stationary_sd() * rng.normal()]
    while len(path) < LENGTH:
        path.append(PERSISTENCE * path[-1] + STEP * rng.normal())
    return np.array(path) + NOISE * rng.normal(size=LENGTH)


def gaussian(y: np.ndarray, covariance: np.ndarray) -> float:
    """The log density of a Normal with mean zero."""
    chol = np.linalg.cholesky(covariance)
    white = np.linalg.solve(chol, y)
    log_det = 2 * np.log(np.diag(chol)).sum()
    return -0.5 * float(white @ white + log_det + len(y) * math.log(2 * math.pi))


def integral(points: np.ndarray, log_values: np.ndarray) -> float:
    """The log of an integral by the trapezoidal rule, whose ends are negligible."""
    top = log_values.max()
    return float(top + np.log(np.trapezoid(np.exp(log_values - top), points)))


def half_cauchy(scale: float, log_x: np.ndarray) -> np.ndarray:
    """The log density of the logarithm of a half-Cauchy."""
    return math.log(2 / (math.pi * scale)) - np.log1p((np.exp(log_x) / scale) ** 2) + log_x


def schools_evidence() -> float:
    """The effects and their mean are integrated out in closed form, their sd by quadrature."""
    points = np.linspace(-25, 12, 4000)
    values = []
    for tau in np.exp(points):
        values.append(gaussian(EFFECTS, np.diag(ERRORS**2 + tau**2) + 25.0))
    return integral(points, np.array(values) + half_cauchy(5.0, points))


def regression_evidence(data: Callable[[], tuple[np.ndarray, np.ndarray]]) -> float:
    """The coefficients are integrated out in closed form, the noise by quadrature."""
    x, y = data()
    middle = math.log(np.std(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]))
    points = np.linspace(middle - 1, middle + 1, 201)
    variances, axes = np.linalg.eigh(100 * x @ x.T)
    totals = variances.clip(0) + np.exp(2 * points)[:, None]
    terms = (y @ axes) ** 2 / totals + np.log(2 * math.pi * totals)
    return integral(points, -0.5 * terms.sum(-1) + half_cauchy(2.5, points))


def chain_evidence() -> float:
    """That of a Gaussian of all data, which a Kalman filter would find as well."""
    times = np.arange(LENGTH)
    covariance = stationary_sd() ** 2 * PERSISTENCE ** abs(times[:, None] - times)
    return gaussian(chain_data(), covariance + NOISE**2 * np.eye(LENGTH))


def linear(data: Callable[[], tuple[np.ndarray, np.ndarray]], dim: int) -> Posterior:
    return Posterior(partial(regression, data=data), dim, partial(regression_evidence, data))


POSTERIORS = {
    "schools, centred": Posterior(partial(schools, centred=True), 10, schools_evidence),
    "schools, non-centred": Posterior(partial(schools, centred=False), 10, schools_evidence),
    "autoregression": linear(autoregression_data, 7),
    "survey": linear(survey_data, 10),
    "cancer": Posterior(logistic, 31, lambda: CANCER_EVIDENCE),
    "chain": Posterior(chain, LENGTH, chain_evidence),
}
