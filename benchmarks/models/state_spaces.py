# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of docs/state_spaces.md, which shows them from here, and data for each; see state_spaces.py."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

Model = Callable[..., None]
#: quarters of a year
PERIOD = 4
#: half the width of the interval of the Gaussian process, whose inputs are within -1 and 1
WIDTH = 1.5


def local_level(y: Tensor) -> None:
    step = pyro.sample("step", dist.LogNormal(-1.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    levels = [pyro.sample("level_0", dist.Normal(0.0, 5.0))]
    for t in range(1, len(y)):
        levels.append(pyro.sample(f"level_{t}", dist.Normal(levels[-1], step)))
    path = torch.stack(levels, -1)
    pyro.sample("y", dist.Normal(path, noise[..., None]).to_event(1), obs=y)


def free(name: str, num: int) -> Tensor:
    """A path without a density of its own, which factors are to have."""
    return pyro.sample(name, dist.Normal(torch.zeros(num), 1.0).mask(False).to_event(1))


def local_level_at_once(y: Tensor) -> None:
    step = pyro.sample("step", dist.LogNormal(-1.0, 1.0))[..., None]
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))[..., None]
    level = free("level", len(y))
    pyro.factor("first", dist.Normal(0.0, 5.0).log_prob(level[..., 0]))
    pyro.factor("steps", dist.Normal(level[..., :-1], step).log_prob(level[..., 1:]).sum(-1))
    pyro.sample("y", dist.Normal(level, noise).to_event(1), obs=y)


def local_linear_trend(y: Tensor) -> None:
    level_sd = pyro.sample("level_sd", dist.LogNormal(-1.0, 1.0))
    slope_sd = pyro.sample("slope_sd", dist.LogNormal(-2.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    level = pyro.sample("level_0", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope_0", dist.Normal(0.0, 1.0))
    levels = [level]
    for t in range(1, len(y)):
        level = pyro.sample(f"level_{t}", dist.Normal(level + slope, level_sd))
        slope = pyro.sample(f"slope_{t}", dist.Normal(slope, slope_sd))
        levels.append(level)
    path = torch.stack(levels, -1)
    pyro.sample("y", dist.Normal(path, noise[..., None]).to_event(1), obs=y)


def local_linear_trend_at_once(y: Tensor) -> None:
    level_sd = pyro.sample("level_sd", dist.LogNormal(-1.0, 1.0))[..., None]
    slope_sd = pyro.sample("slope_sd", dist.LogNormal(-2.0, 1.0))[..., None]
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))[..., None]
    level, slope = free("level", len(y)), free("slope", len(y))
    pyro.factor("first_level", dist.Normal(0.0, 5.0).log_prob(level[..., 0]))
    pyro.factor("first_slope", dist.Normal(0.0, 1.0).log_prob(slope[..., 0]))
    mean = level[..., :-1] + slope[..., :-1]
    pyro.factor("levels", dist.Normal(mean, level_sd).log_prob(level[..., 1:]).sum(-1))
    pyro.factor("slopes", dist.Normal(slope[..., :-1], slope_sd).log_prob(slope[..., 1:]).sum(-1))
    pyro.sample("y", dist.Normal(level, noise).to_event(1), obs=y)


def seasonal(y: Tensor) -> None:
    """Effects of four quarters that sum to about zero, and change slowly."""
    level_sd = pyro.sample("level_sd", dist.LogNormal(-1.0, 1.0))
    season_sd = pyro.sample("season_sd", dist.LogNormal(-2.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    levels = [pyro.sample("level_0", dist.Normal(0.0, 5.0))]
    seasons = [pyro.sample(f"season_{t}", dist.Normal(0.0, 2.0)) for t in range(PERIOD - 1)]
    for t in range(1, len(y)):
        levels.append(pyro.sample(f"level_{t}", dist.Normal(levels[-1], level_sd)))
    for t in range(PERIOD - 1, len(y)):
        mean = -sum(seasons[1 - PERIOD :])
        seasons.append(pyro.sample(f"season_{t}", dist.Normal(mean, season_sd)))
    path = torch.stack(levels, -1) + torch.stack(seasons, -1)
    pyro.sample("y", dist.Normal(path, noise[..., None]).to_event(1), obs=y)


def ar2(y: Tensor) -> None:
    """Partial autocorrelations within -1 and 1 are those of stationary paths."""
    first, second = (
        pyro.sample(f"partial_{k}", dist.Uniform(-1.0, 1.0))[..., None] for k in (1, 2)
    )
    step = pyro.sample("step", dist.LogNormal(-1.0, 1.0))[..., None]
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))[..., None]
    x = free("x", len(y))
    pyro.factor("first", dist.Normal(0.0, 2.0).log_prob(x[..., :2]).sum(-1))
    mean = first * (1 - second) * x[..., 1:-1] + second * x[..., :-2]
    pyro.factor("steps", dist.Normal(mean, step).log_prob(x[..., 2:]).sum(-1))
    pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def stochastic_volatility(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))[..., None]
    phi = pyro.sample("phi", dist.Beta(20.0, 1.5))[..., None]
    step = pyro.sample("step", dist.LogNormal(-1.5, 0.7))[..., None]
    h = free("h", len(y))
    first = dist.Normal(mean, step / (1 - phi**2).sqrt())
    pyro.factor("first", first.log_prob(h[..., :1]).sum(-1))
    next_mean = mean + phi * (h[..., :-1] - mean)
    pyro.factor("steps", dist.Normal(next_mean, step).log_prob(h[..., 1:]).sum(-1))
    pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)


def volatility_of_returns(y: Tensor) -> None:
    """The log volatility is a random walk about a level, and returns have heavy tails."""
    step = pyro.sample("step", dist.Exponential(50.0))[..., None]
    df = pyro.sample("df", dist.Exponential(0.1))[..., None]
    level = pyro.sample("level", dist.Normal(-4.0, 2.0))[..., None]
    h = free("h", len(y))
    pyro.factor("first", dist.Normal(0.0, 1.0).log_prob(h[..., 0]))
    pyro.factor("steps", dist.Normal(h[..., :-1], step).log_prob(h[..., 1:]).sum(-1))
    pyro.sample("y", dist.StudentT(df, 0.0, (level + h).exp()).to_event(1), obs=y)


def gaussian_process(x: Tensor, y: Tensor | None = None, num: int = 20) -> None:
    """Squared exponential: sines on (-WIDTH, WIDTH), whose weights have its spectral density."""
    amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 1.0))[..., None]
    length = pyro.sample("length", dist.LogNormal(-1.0, 0.5))[..., None]
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))[..., None]
    frequency = math.pi / (2 * WIDTH) * torch.arange(1, num + 1)
    sines = (frequency * (x[:, None] + WIDTH)).sin() / math.sqrt(WIDTH)
    density = math.sqrt(2 * math.pi) * length * (-0.5 * (length * frequency) ** 2).exp()
    weights = pyro.sample("weights", dist.Normal(torch.zeros(num), 1.0).to_event(1))
    f = (sines @ (amplitude * density.sqrt() * weights)[..., None])[..., 0]
    pyro.sample("y", dist.Normal(f, noise).to_event(1), obs=y)


def lattice(y: Tensor) -> None:
    """Counts on a grid: an intrinsic autoregression of log rates, whose level has a flat prior."""
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0).mask(False).to_event(2))
    down, right = z[..., 1:, :] - z[..., :-1, :], z[..., :, 1:] - z[..., :, :-1]
    squares = (down**2).sum((-2, -1)) + (right**2).sum((-2, -1))
    # of rank one less than there are cells
    pyro.factor("field", -0.5 * squares / scale**2 - (y.numel() - 1) * scale.log())
    pyro.sample("y", dist.Poisson(z.exp()).to_event(2), obs=y)


def horseshoe(x: Tensor, y: Tensor | None = None) -> None:
    """The regularized one; about five coefficients are expected not to be small."""
    num_rows, num_columns = x.shape
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))[..., None]
    expected = 5 / max(num_columns - 5, 1) / math.sqrt(num_rows)
    tau = sigma * pyro.sample("tau", dist.HalfCauchy(expected))[..., None]
    slab = pyro.sample("slab", dist.InverseGamma(2.0, 8.0))[..., None]
    local = pyro.sample("local", dist.HalfCauchy(torch.ones(num_columns)).to_event(1))
    z = pyro.sample("z", dist.Normal(torch.zeros(num_columns), 1.0).to_event(1))
    beta = z * tau * local * (slab / (slab + (tau * local) ** 2)).sqrt()
    mean = (x @ beta[..., None])[..., 0]
    pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y)


def spline(x: Tensor, y: Tensor | None = None, num: int = 20) -> None:
    """Cubic B-splines at equal distances on (0, 1), whose coefficients are a random walk."""
    away = (x[:, None] * (num - 3) + 1 - torch.arange(num)).abs()
    basis = ((2 - away).clamp(min=0) ** 3 - 4 * (1 - away).clamp(min=0) ** 3) / 6
    step = pyro.sample("step", dist.LogNormal(-1.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))[..., None]
    walk = [pyro.sample("c_0", dist.Normal(0.0, 5.0))]
    for k in range(1, num):
        walk.append(pyro.sample(f"c_{k}", dist.Normal(walk[-1], step)))
    mean = (basis @ torch.stack(walk, -1)[..., None])[..., 0]
    pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)


def garch(y: Tensor) -> None:
    """A share of the last square and of the last variance makes the next variance."""
    variance = pyro.sample("variance", dist.LogNormal(0.0, 1.0))
    persistence = pyro.sample("persistence", dist.Beta(8.0, 2.0))
    share = pyro.sample("share", dist.Beta(2.0, 4.0))
    variances = [variance]
    for t in range(1, len(y)):
        latest = share * y[t - 1] ** 2 + (1 - share) * variances[-1]
        variances.append((1 - persistence) * variance + persistence * latest)
    sd = torch.stack(variances, -1).sqrt()
    pyro.sample("y", dist.Normal(0.0, sd).to_event(1), obs=y)


def walk_data(rng: np.random.Generator, num: int) -> tuple[np.ndarray, ...]:
    return (0.3 * rng.normal(size=num).cumsum() + 0.5 * rng.normal(size=num),)


def trend_data(rng: np.random.Generator, num: int) -> tuple[np.ndarray, ...]:
    slopes = 0.2 + 0.1 * rng.normal(size=num).cumsum()
    return ((slopes + 0.3 * rng.normal(size=num)).cumsum() + 0.5 * rng.normal(size=num),)


def seasonal_data(rng: np.random.Generator, num: int) -> tuple[np.ndarray, ...]:
    return (walk_data(rng, num)[0] + np.resize([1.5, -0.5, -1.5, 0.5], num),)


def ar2_data(rng: np.random.Generator, num: int) -> tuple[np.ndarray, ...]:
    x = [0.0, 0.0]
    for step in 0.5 * rng.normal(size=num - 2):
        x.append(1.4 * x[-1] - 0.7 * x[-2] + step)
    return (np.array(x) + 0.3 * rng.normal(size=num),)


def volatility_data(rng: np.random.Generator, num: int) -> tuple[np.ndarray, ...]:
    h = [0.0]
    for step in 0.3 * rng.normal(size=num - 1):
        h.append(0.95 * h[-1] + step)
    return (np.exp(np.array(h) / 2) * rng.normal(size=num),)


def return_data(rng: np.random.Generator, num: int) -> tuple[np.ndarray, ...]:
    h = 0.04 * rng.normal(size=num).cumsum()
    return (np.exp(h - 4.5) * rng.standard_t(6, size=num),)


def curve_data(rng: np.random.Generator, num: int, low: float) -> tuple[np.ndarray, ...]:
    x = np.sort(rng.uniform(low, 1.0, num))
    return x, np.sin(6 * x) + 0.5 * x + 0.3 * rng.normal(size=num)


def lattice_data(rng: np.random.Generator, side: int) -> tuple[np.ndarray, ...]:
    rows, columns = np.indices((side, side)) / side
    log_rates = 1 + np.sin(4 * rows) + np.cos(5 * columns) + 0.2 * rng.normal(size=(side, side))
    return (rng.poisson(np.exp(log_rates)).astype(float),)


def sparse_data(rng: np.random.Generator, num: int) -> tuple[np.ndarray, ...]:
    """Half as many columns as rows, five of which count."""
    x = rng.normal(size=(num, num // 2))
    return x, x[:, :5] @ np.array([3.0, -2.0, 2.0, 1.5, -1.0]) + rng.normal(size=num)


def garch_data(rng: np.random.Generator, num: int) -> tuple[np.ndarray, ...]:
    y, variance = [0.0], 1.0
    for noise in rng.normal(size=num - 1):
        variance = 0.1 + 0.3 * y[-1] ** 2 + 0.6 * variance
        y.append(math.sqrt(variance) * noise)
    return (np.array(y),)


#: the model, its data, and the number that these take: of times, rows, or cells along a side
SUBJECTS: dict[str, tuple[Model, Callable[..., tuple[np.ndarray, ...]], tuple[Any, ...]]] = {
    "local level": (local_level, walk_data, (100,)),
    "local level, at once": (local_level_at_once, walk_data, (100,)),
    "local linear trend": (local_linear_trend, trend_data, (100,)),
    "local linear trend, at once": (local_linear_trend_at_once, trend_data, (100,)),
    "seasonal": (seasonal, seasonal_data, (80,)),
    "AR(2) with noise": (ar2, ar2_data, (100,)),
    "stochastic volatility": (stochastic_volatility, volatility_data, (200,)),
    "volatility of ten years": (volatility_of_returns, return_data, (2_429,)),
    "Gaussian process": (gaussian_process, curve_data, (100, -1.0)),
    "counts on a lattice": (lattice, lattice_data, (10,)),
    "regularized horseshoe": (horseshoe, sparse_data, (100,)),
    "spline": (spline, curve_data, (100, 0.0)),
    "changing variance": (garch, garch_data, (200,)),
}


def subject(name: str, num: int | None = None) -> tuple[Model, tuple[Tensor, ...]]:
    """A model and its data; another number makes smaller ones."""
    model, data, (default, *rest) = SUBJECTS[name]
    arrays = data(np.random.default_rng(0), num or default, *rest)
    return model, tuple(torch.as_tensor(z, dtype=torch.get_default_dtype()) for z in arrays)
