# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The targets of published.md: models for Pyro and NumPyro, their data, and the moments that are known."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.library import Library

#: for each site the mean and the variance of its square
Truth = Mapping[str, tuple[np.ndarray, np.ndarray]]
#: a model, its arguments after the library, and its moments
Target = tuple[Callable[..., None], tuple[np.ndarray, ...], Truth]


def gaussian(lib: Library, precision: Any) -> None:
    x = lib.free("x", len(precision))
    lib.factor("density", -0.5 * ((x @ precision) * x).sum(-1))


def banana(lib: Library) -> None:
    x = lib.free("x", 2)
    bend = x[..., 1] - 0.03 * (x[..., 0] ** 2 - 100)
    lib.factor("density", -0.5 * ((x[..., 0] / 10) ** 2 + bend**2))


def rosenbrock(lib: Library) -> None:
    x, y = lib.free("x", 18), lib.free("y", 18)
    lib.factor("density", -0.5 * ((x - 1) ** 2 + 10 * (x**2 - y) ** 2).sum(-1))


def brownian(lib: Library, seen: Any, y: Any) -> None:
    sd = lib.sample("innovation_noise_scale", lib.dist.LogNormal(0.0, 2.0))
    noise = lib.sample("observation_noise_scale", lib.dist.LogNormal(0.0, 2.0))
    locs = lib.path("locs", 30, 0.0, 1.0, sd, first=sd)
    lib.sample("y", lib.dist.Normal(locs[..., seen], noise[..., None]).to_event(1), obs=y)


def volatility(lib: Library, y: Any) -> None:
    slope = 2 * lib.sample("half", lib.dist.Beta(20.0, 1.5)) - 1
    mean = lib.sample("mean_log_volatility", lib.dist.Cauchy(0.0, 5.0))
    sd = lib.sample("white_noise_shock_scale", lib.dist.HalfCauchy(2.0))
    path = lib.path("log_volatility", len(y), mean, slope, sd)
    lib.sample("y", lib.dist.Normal(0.0, lib.arrays.exp(path / 2)).to_event(1), obs=y)


def item_responses(lib: Library, students: Any, questions: Any, y: Any) -> None:
    mean = lib.sample("mean_student_ability", lib.dist.Normal(0.75, 1.0))
    of_students, of_questions = (lib.dist.Normal(lib.arrays.zeros(n), 1.0) for n in (400, 100))
    ability = lib.sample("centered_student_ability", of_students.to_event(1))
    difficulty = lib.sample("question_difficulty", of_questions.to_event(1))
    logits = mean[..., None] + ability[..., students] - difficulty[..., questions]
    lib.sample("y", lib.dist.Bernoulli(logits=logits).to_event(1), obs=y)


def of_gym(module: str) -> Any:
    """A module of arrays of `inference_gym`, whose own import needs TensorFlow."""
    found = importlib.util.find_spec("inference_gym")
    if found is None or found.origin is None:
        raise ImportError("expected the package inference_gym: pip install inference_gym")
    path = Path(found.origin).parent / f"{module}.py"
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    arrays = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arrays)
    return arrays


def truth_of_gym(name: str) -> Truth:
    """Moments from means and sds, as if latents were normal, which only scales the error."""
    arrays = of_gym(f"targets/ground_truth/{name}")
    start, end = "IDENTITY_", "_STANDARD_DEVIATION"
    truth = {}
    for key in vars(arrays):
        if key.startswith(start) and key.endswith(end):
            site = key.removeprefix(start).removesuffix(end)
            mean, sd = (getattr(arrays, f"{start}{site}{what}") for what in ("_MEAN", end))
            truth[site.lower()] = mean**2 + sd**2, 2 * sd**4 + 4 * mean**2 * sd**2
    return truth


def truth_of_brownian(seen: np.ndarray, y: np.ndarray) -> Truth:
    """Moments by quadrature over both scales, given which the path is Gaussian."""
    logs = np.linspace(-5.0, 1.5, 150)
    sd, noise = (np.exp(x).reshape(-1, 1, 1) for x in np.meshgrid(logs, logs))
    prior = sd**2 * np.minimum.outer(np.arange(1, 31), np.arange(1, 31))
    cov = prior[:, seen][:, :, seen] + noise**2 * np.eye(len(seen))
    gain = np.linalg.solve(cov, prior[:, seen]).mT
    log_weights = -0.5 * (y @ np.linalg.solve(cov, y[:, None])[..., 0].T)
    log_weights -= 0.5 * np.linalg.slogdet(cov)[1]
    log_weights -= (np.log(sd) ** 2 + np.log(noise) ** 2)[:, 0, 0] / 8
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    mean, variance = gain @ y, np.diagonal(prior - gain @ prior[:, seen], axis1=1, axis2=2)
    second, fourth = mean**2 + variance, mean**4 + 6 * mean**2 * variance + 3 * variance**2
    moments = {"locs": (weights @ second, weights @ fourth)}
    for name, x in (("innovation", sd), ("observation", noise)):
        moments[f"{name}_noise_scale"] = weights @ x[:, 0, 0] ** 2, weights @ x[:, 0, 0] ** 4
    return {site: (second, fourth - second**2) for site, (second, fourth) in moments.items()}


def ill_conditioned() -> np.ndarray:
    """The covariance of `inference_gym`'s Gaussian: eigenvalues inverse to gamma variates, rotated."""
    rng = np.random.RandomState(10)
    eigenvalues = 1 / np.sort(rng.gamma(0.5, 1.0, 100))
    q, r = np.linalg.qr(rng.randn(100, 100))
    q *= np.sign(np.diag(r))
    return (q * eigenvalues) @ q.T


def gaussian_target(covariance: np.ndarray) -> Target:
    variance = np.diag(covariance)
    return gaussian, (np.linalg.inv(covariance),), {"x": (variance, 2 * variance**2)}


def brownian_target() -> Target:
    """Its moments in the package are not those of its data, so that they are computed here."""
    y = of_gym("internal/datasets/brownian_motion_missing_middle_observations").OBSERVED_LOC
    seen = np.flatnonzero(~np.isnan(y))
    y = y[seen].astype(float)
    return brownian, (seen, y), truth_of_brownian(seen, y)


def volatility_target(ending: str, num: int) -> Target:
    prices = of_gym("internal/datasets/sp500_closing_prices").CLOSING_PRICES
    y = np.diff(prices)[-num:]
    return volatility, (y - y.mean(),), truth_of_gym(f"stochastic_volatility_sp500{ending}")


def item_target() -> Target:
    data = of_gym("internal/datasets/synthetic_item_response_theory")
    args = data.STUDENT_IDS, data.QUESTION_IDS, data.CORRECT.astype(float)
    return item_responses, args, truth_of_gym("synthetic_item_response_theory")


BANANA = {"x": (np.array([100.0, 19.0]), np.array([2e4, 4610.0]))}
ROSENBROCK = {"x": (np.array(2.0), np.array(6.0)), "y": (np.array(10.1), np.array(668.02))}
TARGETS: Mapping[str, Callable[[], Target]] = {
    "Gaussian, diagonal": lambda: gaussian_target(np.diag(np.geomspace(0.1, 10.0, 100))),
    "Gaussian, rotated": lambda: gaussian_target(ill_conditioned()),
    "banana": lambda: (banana, (), BANANA),
    "Rosenbrock": lambda: (rosenbrock, (), ROSENBROCK),
    "Brownian motion": brownian_target,
    "volatility, small": lambda: volatility_target("_small", 100),
    "item responses": item_target,
    "volatility": lambda: volatility_target("", 2516),
}
