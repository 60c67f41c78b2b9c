# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Hierarchies as users write them, with the exact quantiles of each of their scales; see tails.md.

Latents are integrated out in closed form, given the scales, and scales on a grid of their unconstrained
space: the log axis. Data are simulated. What has no closed form, a dose response, is in `dose.py`.
The import makes float64 the default of PyTorch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from scipy.interpolate import CubicSpline
from torch import Tensor
from torch.distributions import biject_to

from models import dose

LEVELS = (0.01, 0.03, 0.5, 0.97, 0.99)
#: of what is on the grid the log density is less than this below the largest, within these bounds
DEPTH, BOUNDS = 16.0, (-16.0, 12.0)
Quantiles = Mapping[str, Mapping[float, float]]

torch.set_default_dtype(torch.float64)


@dataclass(frozen=True)
class Target:
    """A model with its arguments.

    :param priors: of what is on the grid, by name; "rho" is no scale.
    :param log_evidence: of data, given the values of these, ``(K,)`` each, latents integrated out.
    """

    model: Callable[..., None]
    args: tuple[Any, ...]
    priors: Mapping[str, dist.TorchDistribution]
    log_evidence: Callable[..., Tensor]

    @property
    def scales(self) -> list[str]:
        return [name for name in self.priors if name != "rho"]

    def values(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draws by site, ``(..., *site)``, to those of each scale ``(...)``; "s[0]" is of the site "s"."""
        found = {}
        for name in self.scales:
            site, _, index = name.rstrip("]").partition("[")
            found[name] = draws[site][..., int(index)] if index else draws[site]
        return found

    def log_density(self, u: Tensor) -> Tensor:
        """Of unconstrained values ``(K, S)``, up to a constant: shape ``(K,)``."""
        values, total = [], torch.zeros(len(u))
        for prior, column in zip(self.priors.values(), u.unbind(-1)):
            to = biject_to(prior.support)
            values.append(to(column))
            total += prior.log_prob(values[-1]) + to.log_abs_det_jacobian(column, values[-1])
        return (total + self.log_evidence(*values)).nan_to_num(-torch.inf)

    @cached_property
    def quantiles(self) -> Quantiles:
        """Of each scale, and of rho, by level."""
        return self.by_grid(193 if len(self.priors) < 3 else 65)

    def by_grid(self, num_points: int) -> Quantiles:
        """Quantiles by the trapezoidal rule with so many points along each axis."""
        low, high = (torch.full((len(self.priors),), bound) for bound in BOUNDS)
        for count in (49, 49, num_points):
            axes = [torch.linspace(a, b, count) for a, b in zip(low.tolist(), high.tolist())]
            points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
            values = torch.cat([self.log_density(block) for block in points.split(20_000)])
            inside = points[values > values.max() - DEPTH]
            step = (high - low) / (count - 1)
            low = (inside.amin(0) - step).clamp_min(BOUNDS[0])
            high = (inside.amax(0) + step).clamp_max(BOUNDS[1])
        density = (values - values.max()).exp().reshape([count] * len(axes))
        found = {}
        for number, (name, prior) in enumerate(self.priors.items()):
            others = [k for k in range(len(axes)) if k != number]
            marginal = density.sum(others) if others else density
            cdf = CubicSpline(axes[number], marginal).antiderivative()
            fine = np.linspace(*cdf.x[[0, -1]], 20_001)
            u = np.interp(LEVELS, cdf(fine) / cdf(fine[-1]), fine)
            found[name] = dict(zip(LEVELS, biject_to(prior.support)(torch.tensor(u)).tolist()))
        return found


def log_normal(rows: Tensor, covariance: Tensor, count: int) -> Tensor:
    """Of rows ``(G, N)`` of rank ``count``, up to a constant; not a number where there is no factor."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    squares = torch.linalg.solve_triangular(factor, rows.T, upper=False).square().sum((-2, -1))
    found = -squares / 2 - count * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return found.masked_fill(failed > 0, math.nan)


def log_evidence(y: Tensor, covariance: Tensor, shared: Tensor | float = 0.0) -> Tensor:
    """Of rows y_g = m + e_g, shape ``(G, N)``, m ~ Normal(0, shared), e_g ~ Normal(0, covariance).

    By an orthogonal map of the groups: their mean, and G - 1 contrasts without m. Matrices are
    ``(K, N, N)``, of K scales; the result is ``(K,)``, up to a constant.
    """
    mean, count = y.mean(0, keepdim=True), len(y)
    of_mean = log_normal(math.sqrt(count) * mean, covariance + count * shared, 1)
    return of_mean + log_normal(y - mean, covariance, count - 1)


def times(coefficient: Tensor, matrix: Tensor) -> Tensor:
    """Coefficients ``(K,)`` times a matrix ``(N, N)``: shape ``(K, N, N)``."""
    return coefficient[:, None, None] * matrix


# Varying intercepts and slopes: a vector of scales

SLOPE_TIMES, SLOPE_NOISE = torch.arange(5.0), 0.8


def slopes(t: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0).expand([2]).to_event(1))
    with pyro.plate("groups", len(y)):
        b0 = pyro.sample("b0", dist.Normal(mu[0], s[0]))
        b1 = pyro.sample("b1", dist.Normal(mu[1], s[1]))
        mean = b0[..., None] + b1[..., None] * t
        pyro.sample("y", dist.Normal(mean, SLOPE_NOISE).to_event(1), obs=y)


def slope_data(seed: int, spread: tuple[float, float]) -> Tensor:
    random = np.random.default_rng(seed)
    b0, b1 = (
        torch.tensor(loc + s * random.normal(size=(12, 1))) for loc, s in zip((1.0, 0.5), spread)
    )
    return b0 + b1 * SLOPE_TIMES + SLOPE_NOISE * torch.tensor(random.normal(size=(12, 5)))


def slope_evidence(y: Tensor, s0: Tensor, s1: Tensor, rho: Tensor | float = 0.0) -> Tensor:
    one, t = torch.ones(5), SLOPE_TIMES
    ones, both, squares = one.outer(one), one.outer(t) + t.outer(one), t.outer(t)
    found = times(s0**2, ones) + times(rho * s0 * s1, both) + times(s1**2, squares)
    return log_evidence(y, found + SLOPE_NOISE**2 * torch.eye(5), 9 * (ones + squares))


def make_slopes() -> Target:
    y = slope_data(1, (0.3, 0.3))
    priors = {"s[0]": dist.HalfNormal(1.0), "s[1]": dist.HalfNormal(1.0)}
    return Target(slopes, (SLOPE_TIMES, y), priors, partial(slope_evidence, y))


# The same with correlated effects


def correlated(t: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(1.0).expand([2]).to_event(1))
    corr = pyro.sample("L", dist.LKJCholesky(2, 1.0))
    with pyro.plate("groups", len(y)):
        b = pyro.sample("b", dist.MultivariateNormal(mu, scale_tril=torch.diag_embed(s) @ corr))
        mean = b[..., :1] + b[..., 1:] * t
        pyro.sample("y", dist.Normal(mean, SLOPE_NOISE).to_event(1), obs=y)


def make_correlated() -> Target:
    y = slope_data(6, (0.6, 0.15))
    priors = {
        "s[0]": dist.HalfNormal(1.0),
        "s[1]": dist.HalfNormal(1.0),
        "rho": dist.Uniform(-1.0, 1.0),
    }
    return Target(correlated, (SLOPE_TIMES, y), priors, partial(slope_evidence, y))


# Rows and columns


def crossed(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    s_row = pyro.sample("s_row", dist.HalfNormal(1.0))
    s_column = pyro.sample("s_column", dist.HalfCauchy(1.0))
    rows, columns = pyro.plate("rows", 8, dim=-2), pyro.plate("columns", 5, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, s_row))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, s_column))
    with rows, columns:
        pyro.sample("y", dist.Normal(mu + a + b, 1.0), obs=y)


def make_crossed() -> Target:
    random = np.random.default_rng(7)
    effects = 0.8 * random.normal(size=(8, 1)) + 0.2 * random.normal(size=5)
    y, eye, ones = (
        torch.tensor(1.0 + effects + random.normal(size=(8, 5))),
        torch.eye(5),
        torch.ones(5, 5),
    )

    def evidence(s_row: Tensor, s_column: Tensor) -> Tensor:
        return log_evidence(y, times(s_row**2, ones) + eye, times(s_column**2, eye) + 9 * ones)

    priors = {"s_row": dist.HalfNormal(1.0), "s_column": dist.HalfCauchy(1.0)}
    return Target(crossed, (y,), priors, evidence)


# Pupils of schools of districts


def nested(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    s_district = pyro.sample("s_district", dist.HalfNormal(1.0))
    s_school = pyro.sample("s_school", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("districts", 6, dim=-2):
        district = pyro.sample("district", dist.Normal(mu, s_district))
        with pyro.plate("schools", 3, dim=-1):
            school = pyro.sample("school", dist.Normal(district, s_school))
            pyro.sample("y", dist.Normal(school[..., None], sigma).to_event(1), obs=y)


def make_nested() -> Target:
    random = np.random.default_rng(8)
    school = 0.3 * random.normal(size=(6, 1, 1)) + 0.3 * random.normal(size=(6, 3, 1))
    y, eye, ones = (
        torch.tensor(school + random.normal(size=(6, 3, 2))),
        torch.eye(6),
        torch.ones(6, 6),
    )
    same_school = torch.block_diag(*[torch.ones(2, 2)] * 3)

    def evidence(s_district: Tensor, s_school: Tensor, sigma: Tensor) -> Tensor:
        covariance = times(s_school**2, same_school) + times(sigma**2, eye)
        return log_evidence(y.reshape(6, 6), times(s_district**2, ones) + covariance, 9 * ones)

    priors = {name: dist.HalfNormal(1.0) for name in ("s_district", "s_school", "sigma")}
    return Target(nested, (y,), priors, evidence)


# Counts of gamma rates, which make them negative binomial


def counts(y: Tensor) -> None:
    shape = pyro.sample("shape", dist.HalfNormal(5.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("items", len(y)):
        rate = pyro.sample("rate", dist.Gamma(shape, 1 / scale))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def make_counts() -> Target:
    random = np.random.default_rng(9)
    y = torch.tensor(1.0 * random.poisson(random.gamma(3.0, 0.7, size=15)))

    def evidence(shape: Tensor, scale: Tensor) -> Tensor:
        of_row = dist.NegativeBinomial(shape[:, None], logits=scale.log()[:, None])
        return of_row.log_prob(y).sum(-1)

    priors = {"shape": dist.HalfNormal(5.0), "scale": dist.HalfCauchy(1.0)}
    return Target(counts, (y,), priors, evidence)


# Groups of many rows and of one, in one plate

MIXED_ROWS = torch.tensor([100] * 4 + [1] * 8)


def mixed(group: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("groups", 12):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[group], 1.0), obs=y)


def make_mixed() -> Target:
    random, group = np.random.default_rng(2), torch.arange(12).repeat_interleave(MIXED_ROWS)
    theta = torch.tensor(0.5 + 0.1 * random.normal(size=12))
    y = theta[group] + torch.tensor(random.normal(size=len(group)))
    # the means of groups are sufficient
    means = torch.zeros(12).index_add(0, group, y) / MIXED_ROWS

    def evidence(tau: Tensor) -> Tensor:
        fixed = torch.diag(1.0 / MIXED_ROWS) + 9.0
        return log_evidence(means[None], times(tau**2, torch.eye(12)) + fixed)

    return Target(mixed, (group, y), {"tau": dist.HalfCauchy(1.0)}, evidence)


# A local level, as a loop


def walk(q: Tensor, r: Tensor, y: Tensor) -> None:
    x = torch.tensor(0.0)
    for t in range(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, q))
        pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def level(y: Tensor) -> None:
    q = pyro.sample("q", dist.HalfNormal(1.0))
    r = pyro.sample("r", dist.HalfNormal(1.0))
    walk(q, r, y)


def outlier(y: Tensor) -> None:
    q = pyro.sample("q", dist.HalfCauchy(25.0))
    r = pyro.sample("r", dist.HalfCauchy(25.0))
    walk(q, r, y)


def make_walk(model: Callable[..., None], prior: dist.TorchDistribution, y: Tensor) -> Target:
    t = torch.arange(1.0, len(y) + 1)
    shared, eye = torch.minimum(t, t[:, None]), torch.eye(len(y))

    def evidence(q: Tensor, r: Tensor) -> Tensor:
        return log_evidence(y[None], times(q**2, shared) + times(r**2, eye))

    return Target(model, (y,), {"q": prior, "r": prior}, evidence)


def make_level() -> Target:
    random = np.random.default_rng(3)
    y = 0.3 * random.normal(size=5).cumsum() + 0.7 * random.normal(size=5)
    return make_walk(level, dist.HalfNormal(1.0), torch.tensor(y))


def make_outlier() -> Target:
    random = np.random.default_rng(5)
    y = 0.5 * random.normal(size=12).cumsum() + random.normal(size=12)
    y[7] = 50.0
    return make_walk(outlier, dist.HalfCauchy(25.0), torch.tensor(y))


class DoseTarget(Target):
    """Its quantiles are those of chains."""

    @property
    def scales(self) -> list[str]:
        return list(dose.SCALES)

    @cached_property
    def quantiles(self) -> Quantiles:
        return dose.quantiles(LEVELS)


TARGETS: Mapping[str, Target] = {
    "dose": DoseTarget(
        dose.dose,
        (torch.tensor(dose.DOSES), torch.tensor(dose.data())),
        {},
        torch.zeros_like,
    ),
    "crossed": make_crossed(),
    "nested": make_nested(),
    "slopes": make_slopes(),
    "correlated": make_correlated(),
    "counts": make_counts(),
    "mixed": make_mixed(),
    "level": make_level(),
    "outlier": make_outlier(),
}
