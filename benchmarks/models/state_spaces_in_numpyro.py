# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of state_spaces.py for NumPyro, in the form in which paths are white noise for NUTS.

Each has all latents of the original, deterministic ones where they are not those that NUTS moves in.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import distributions as dist

from models.state_spaces import PERIOD, WIDTH

Model = Callable[..., None]


def log_normal(name: str, loc: float, scale: float = 1.0) -> Any:
    return numpyro.sample(name, dist.LogNormal(loc, scale))


def white(name: str, num: int) -> Any:
    return numpyro.sample(f"white_{name}", dist.Normal(jnp.zeros(num), 1.0).to_event(1))


def named(name: str, path: Any) -> Any:
    """Each state of a path as a site of its own."""
    for t, state in enumerate(path):
        numpyro.deterministic(f"{name}_{t}", state)
    return path


def walk(name: str, num: int, step: Any, first: float = 5.0) -> Any:
    noise = white(name, num)
    return (noise * step).at[0].set(first * noise[0]).cumsum()


def trend(num: int, level_sd: Any, slope_sd: Any) -> tuple[Any, Any]:
    """Levels and slopes."""
    slopes = walk("slope", num, slope_sd, 1.0)
    return walk("level", num, level_sd).at[1:].add(slopes[:-1].cumsum()), slopes


def scanned(step: Callable[..., Any], state: Any, inputs: Any) -> Any:
    """What a recursion shows at each step."""
    return jax.lax.scan(step, state, inputs, unroll=8)[1]


def observe(mean: Any, scale: Any, y: Any) -> None:
    numpyro.sample("y", dist.Normal(mean, scale).to_event(1), obs=y)


def local_level(y: Any) -> None:
    step, noise = log_normal("step", -1.0), log_normal("noise", -1.0)
    observe(named("level", walk("level", len(y), step)), noise, y)


def local_level_at_once(y: Any) -> None:
    step, noise = log_normal("step", -1.0), log_normal("noise", -1.0)
    observe(numpyro.deterministic("level", walk("level", len(y), step)), noise, y)


def local_linear_trend(y: Any) -> None:
    level_sd, slope_sd = log_normal("level_sd", -1.0), log_normal("slope_sd", -2.0)
    noise = log_normal("noise", -1.0)
    levels, slopes = trend(len(y), level_sd, slope_sd)
    named("slope", slopes)
    observe(named("level", levels), noise, y)


def local_linear_trend_at_once(y: Any) -> None:
    level_sd, slope_sd = log_normal("level_sd", -1.0), log_normal("slope_sd", -2.0)
    noise = log_normal("noise", -1.0)
    levels, slopes = trend(len(y), level_sd, slope_sd)
    numpyro.deterministic("slope", slopes)
    observe(numpyro.deterministic("level", levels), noise, y)


def seasonal(y: Any) -> None:
    level_sd, season_sd = log_normal("level_sd", -1.0), log_normal("season_sd", -2.0)
    noise = log_normal("noise", -1.0)
    levels = named("level", walk("level", len(y), level_sd))
    steps = white("season", len(y))

    def step(latest: Any, value: Any) -> tuple[Any, Any]:
        season = season_sd * value - latest.sum()
        return jnp.append(latest[1:], season), season

    first = 2.0 * steps[: PERIOD - 1]
    seasons = jnp.concatenate([first, scanned(step, first, steps[PERIOD - 1 :])])
    observe(levels + named("season", seasons), noise, y)


def ar2(y: Any) -> None:
    first, second = (numpyro.sample(f"partial_{k}", dist.Uniform(-1.0, 1.0)) for k in (1, 2))
    scale, noise = log_normal("step", -1.0), log_normal("noise", -1.0)
    steps = white("x", len(y))

    def step(latest: Any, value: Any) -> tuple[Any, Any]:
        state = first * (1 - second) * latest[1] + second * latest[0] + scale * value
        return jnp.stack([latest[1], state]), state

    states = scanned(step, 2.0 * steps[:2], steps[2:])
    observe(numpyro.deterministic("x", jnp.concatenate([2.0 * steps[:2], states])), noise, y)


def stochastic_volatility(y: Any) -> None:
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
    scale = log_normal("step", -1.5, 0.7)
    noises = white("h", len(y)).at[0].divide(jnp.sqrt(1 - phi**2))

    def step(state: Any, value: Any) -> tuple[Any, Any]:
        state = phi * state + value
        return state, state

    h = numpyro.deterministic("h", mean + scale * scanned(step, 0.0, noises))
    observe(0.0, jnp.exp(h / 2), y)


def volatility_of_returns(y: Any) -> None:
    step = numpyro.sample("step", dist.Exponential(50.0))
    df = numpyro.sample("df", dist.Exponential(0.1))
    level = numpyro.sample("level", dist.Normal(-4.0, 2.0))
    h = numpyro.deterministic("h", walk("h", len(y), step, 1.0))
    numpyro.sample("y", dist.StudentT(df, 0.0, jnp.exp(level + h)).to_event(1), obs=y)


def gaussian_process(x: Any, y: Any, num: int = 20) -> None:
    amplitude, length = log_normal("amplitude", 0.0), log_normal("length", -1.0, 0.5)
    noise = log_normal("noise", -1.0)
    frequency = math.pi / (2 * WIDTH) * jnp.arange(1, num + 1)
    sines = jnp.sin(frequency * (x[:, None] + WIDTH)) / math.sqrt(WIDTH)
    density = math.sqrt(2 * math.pi) * length * jnp.exp(-0.5 * (length * frequency) ** 2)
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(num), 1.0).to_event(1))
    observe(sines @ (amplitude * jnp.sqrt(density) * weights), noise, y)


def lattice(y: Any) -> None:
    scale = log_normal("scale", -1.0)
    free = dist.Normal(jnp.zeros(y.size), 1.0).mask(False).to_event(1)
    z = numpyro.sample("z", free).reshape(y.shape)
    squares = sum((jnp.diff(z, axis=axis) ** 2).sum() for axis in (0, 1))
    numpyro.factor("field", -0.5 * squares / scale**2 - (y.size - 1) * jnp.log(scale))
    numpyro.sample("y", dist.Poisson(jnp.exp(z)).to_event(2), obs=y)


def horseshoe(x: Any, y: Any) -> None:
    num_rows, num_columns = x.shape
    sigma = log_normal("sigma", 0.0)
    expected = 5 / (num_columns - 5) / math.sqrt(num_rows)
    tau = sigma * numpyro.sample("tau", dist.HalfCauchy(expected))
    slab = numpyro.sample("slab", dist.InverseGamma(2.0, 8.0))
    local = numpyro.sample("local", dist.HalfCauchy(jnp.ones(num_columns)).to_event(1))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(num_columns), 1.0).to_event(1))
    observe(x @ (z * tau * local * jnp.sqrt(slab / (slab + (tau * local) ** 2))), sigma, y)


def spline(x: Any, y: Any, num: int = 20) -> None:
    away = jnp.abs(x[:, None] * (num - 3) + 1 - jnp.arange(num))
    basis = (jnp.maximum(2 - away, 0) ** 3 - 4 * jnp.maximum(1 - away, 0) ** 3) / 6
    step, noise = log_normal("step", -1.0), log_normal("noise", -1.0)
    observe(basis @ named("c", walk("c", num, step)), noise, y)


def garch(y: Any) -> None:
    variance = log_normal("variance", 0.0)
    persistence = numpyro.sample("persistence", dist.Beta(8.0, 2.0))
    share = numpyro.sample("share", dist.Beta(2.0, 4.0))

    def step(before: Any, square: Any) -> tuple[Any, Any]:
        latest = share * square + (1 - share) * before
        state = (1 - persistence) * variance + persistence * latest
        return state, state

    variances = scanned(step, variance, jnp.asarray(y[:-1]) ** 2)
    observe(0.0, jnp.sqrt(jnp.concatenate([variance[None], variances])), y)


MODELS = (
    *(local_level, local_level_at_once, local_linear_trend, local_linear_trend_at_once),
    *(seasonal, ar2, stochastic_volatility, volatility_of_returns, gaussian_process, lattice),
    *(horseshoe, spline, garch),
)
PEERS: dict[str, Model] = {model.__name__: model for model in MODELS}
