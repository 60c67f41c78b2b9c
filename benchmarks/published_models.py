# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The targets of published.md: models for Pyro and NumPyro, their data, and the moments that are known."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import distributions

#: for each site the mean and the variance of its square
Truth = Mapping[str, tuple[np.ndarray, np.ndarray]]
Model = Callable[..., None]


@dataclass(frozen=True)
class Library:
    """What a model needs of Pyro and PyTorch, or of NumPyro and JAX."""

    sample: Callable[..., Any]
    factor: Callable[..., Any]
    dist: Any
    arrays: Any

    def free(self, name: str, num: int) -> Any:
        """Latents without a density of their own, which factors are to have."""
        normal = self.dist.Normal(self.arrays.zeros(num), 1.0)
        return self.sample(name, normal.mask(False).to_event(1))

    def path(self, name: str, num: int, first: Any, mean: Any, slope: Any, sd: Any) -> Any:
        """An autoregression around its mean, whose first value has an sd of its own."""
        z = self.free(name, num)
        self.factor("first", self.dist.Normal(mean, first).log_prob(z[..., 0]))
        before = mean[..., None] + slope[..., None] * (z[..., :-1] - mean[..., None])
        steps = self.dist.Normal(before, sd[..., None]).log_prob(z[..., 1:])
        self.factor("steps", steps.sum(-1))
        return z


PYRO = Library(pyro.sample, pyro.factor, distributions, torch)


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
    locs = lib.path("locs", 30, sd, 0 * sd, 0 * sd + 1, sd)
    lib.sample("y", lib.dist.Normal(locs[..., seen], noise[..., None]).to_event(1), obs=y)


def volatility(lib: Library, y: Any) -> None:
    slope = 2 * lib.sample("half", lib.dist.Beta(20.0, 1.5)) - 1
    mean = lib.sample("mean_log_volatility", lib.dist.Cauchy(0.0, 5.0))
    sd = lib.sample("white_noise_shock_scale", lib.dist.HalfCauchy(2.0))
    path = lib.path("log_volatility", len(y), sd / (1 - slope**2) ** 0.5, mean, slope, sd)
    lib.sample("y", lib.dist.Normal(0.0, lib.arrays.exp(path / 2)).to_event(1), obs=y)


def item_responses(lib: Library, students: Any, questions: Any, y: Any) -> None:
    mean = lib.sample("mean_student_ability", lib.dist.Normal(0.75, 1.0))
    normal = lib.dist.Normal
    ability = lib.sample(
        "centered_student_ability", normal(lib.arrays.zeros(400), 1.0).to_event(1)
    )
    difficulty = lib.sample("question_difficulty", normal(lib.arrays.zeros(100), 1.0).to_event(1))
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


def ill_conditioned() -> np.ndarray:
    """The covariance of `inference_gym`'s Gaussian: eigenvalues inverse to gamma variates, rotated."""
    rng = np.random.RandomState(10)
    eigenvalues = 1 / np.sort(rng.gamma(0.5, 1.0, 100))
    q, r = np.linalg.qr(rng.randn(100, 100))
    q *= np.sign(np.diag(r))
    return (q * eigenvalues) @ q.T


def target(name: str) -> tuple[Model, tuple[np.ndarray, ...], Truth]:
    """A model, its arguments beside the library, and its moments."""
    if name.startswith("Gaussian"):
        diagonal = np.diag(np.geomspace(0.1, 10, 100))
        cov = ill_conditioned() if "rotated" in name else diagonal
        truth = {"x": (np.diag(cov), 2 * np.diag(cov) ** 2)}
        return gaussian, (np.linalg.inv(cov),), truth
    if name == "banana":
        return banana, (), {"x": (np.array([100.0, 19.0]), np.array([2e4, 4610.0]))}
    if name == "Rosenbrock":
        return rosenbrock, (), {"x": (np.array(2.0), np.array(6.0)), "y": (np.array(10.1), np.array(668.02))}
    if name == "Brownian motion":
        key = "brownian_motion_missing_middle_observations"
        y = of_gym(f"internal/datasets/{key}").OBSERVED_LOC.astype(float)
        seen = np.flatnonzero(~np.isnan(y))
        truth = truth_of_gym("brownian_motion_unknown_scales_missing_middle_observations")
        return brownian, (seen, y[seen]), truth
    if name.startswith("volatility"):
        returns = np.diff(of_gym("internal/datasets/sp500_closing_prices").CLOSING_PRICES)
        is_small = "small" in name
        returns = returns[-100:] if is_small else returns
        truth = truth_of_gym(f"stochastic_volatility_sp500{'_small' * is_small}")
        return volatility, (returns - returns.mean(),), truth
    data = of_gym("internal/datasets/synthetic_item_response_theory")
    args = data.STUDENT_IDS, data.QUESTION_IDS, data.CORRECT.astype(float)
    return item_responses, args, truth_of_gym("synthetic_item_response_theory")
