# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Random models that are linear and normal given a scale, with exact moments of their posteriors."""

from functools import partial

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from models import moments as quadrature
from models.moments import LinearGaussian, Moments
from models.random_numbers import (
    ByName,
    Data,
    Family,
    between,
    correlated,
    scale_prior,
    scales,
    size,
)


def hierarchy_model(
    prior: dist.TorchDistribution, spread: Tensor, error: Tensor, y: Data = None
) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, spread))
    tau = pyro.sample("tau", prior)
    with pyro.plate("groups", len(error)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, error), obs=y)


def hierarchy() -> Family:
    """Means of groups, seen once each with a known error."""
    count, prior = size(3, 58), scale_prior()
    spread, error = torch.tensor(between(1.0, 10.0)), scales(count, 0.3, 3.0)
    design = torch.cat([torch.zeros(count, 1), torch.eye(count)], 1)
    shared, own = torch.ones(count + 1, count + 1), torch.eye(count + 1)
    own[0, 0] = 0.0

    def given(tau: Tensor) -> LinearGaussian:
        covariance = spread**2 * shared + tau[:, None, None] ** 2 * own
        return LinearGaussian(covariance, design, error**2)

    def exact(y: Tensor) -> ByName:
        tau, (mean, sd) = quadrature.given_scale(prior, given, y)
        theta = Moments(mean[1:], sd[1:])
        return {"mu": Moments(mean[0], sd[0]), "tau": tau, "theta": theta}

    return Family(partial(hierarchy_model, prior), (spread, error), exact)


def funnel_model(spread: Tensor, error: Tensor, y: Data = None) -> None:
    v = pyro.sample("v", dist.Normal(0.0, spread))
    with pyro.plate("latents", len(error)):
        x = pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))
        pyro.sample("y", dist.Normal(x, error), obs=y)


def funnel() -> Family:
    """Neal's funnel, seen with noise."""
    count = size(3, 30)
    spread, error = torch.tensor(between(0.5, 3.0)), scales(count, 0.3, 10.0)
    prior = dist.LogNormal(0.0, spread / 2)

    def given(scale: Tensor) -> LinearGaussian:
        covariance = scale[:, None, None] ** 2 * torch.eye(count)
        return LinearGaussian(covariance, torch.eye(count), error**2)

    def exact(y: Tensor) -> ByName:
        half, x = quadrature.given_scale(prior, given, y)
        return {"v": Moments(2 * half.mean, 2 * half.sd), "x": x}

    return Family(funnel_model, (spread, error), exact)


def walk_model(prior: dist.TorchDistribution, length: int, noise: Tensor, y: Data = None) -> None:
    q = pyro.sample("q", prior)
    z, mean = torch.zeros(()), []
    for t in range(length):
        z = pyro.sample(f"z_{t}", dist.Normal(z, q if t else 1.0))
        mean.append(z)
    pyro.sample("y", dist.Normal(torch.stack(mean, -1), noise).to_event(1), obs=y)


def walk() -> Family:
    """A random walk by a loop, seen with a known noise."""
    length, prior = size(3, 20), scale_prior()
    noise, times = torch.tensor(between(0.3, 2.0)), torch.arange(length)
    num_steps = torch.minimum(times[:, None], times)

    def given(q: Tensor) -> LinearGaussian:
        covariance = 1 + q[:, None, None] ** 2 * num_steps
        return LinearGaussian(covariance, torch.eye(length), noise.square().expand(length))

    def exact(y: Tensor) -> ByName:
        q, (mean, sd) = quadrature.given_scale(prior, given, y)
        return {"q": q, **{f"z_{t}": Moments(mean[t], sd[t]) for t in range(length)}}

    return Family(partial(walk_model, prior, length), (noise,), exact)


def regression_model(
    prior: dist.TorchDistribution | None, noise: Tensor, spread: Tensor, x: Tensor, y: Data = None
) -> None:
    sigma = noise if prior is None else pyro.sample("sigma", prior)
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), spread).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((beta * x).sum(-1), sigma), obs=y)


def regression(is_known: bool) -> Family:
    """Correlated columns; the noise is known, or has a prior."""
    dim = size(1, 60) if is_known else size(1, 40)
    # with more coefficients than rows a noise of zero explains the data
    num_rows = size(1, 80) if is_known else dim + size(3, 60)
    prior = None if is_known else scale_prior()
    noise, spread = torch.tensor(between(0.2, 3.0)), torch.tensor(between(0.5, 5.0))
    x = torch.randn(num_rows, dim) @ correlated(dim).T
    covariance = spread**2 * torch.eye(dim)

    def given(sigma: Tensor) -> LinearGaussian:
        variance = sigma.square()[..., None].expand(*sigma.shape, num_rows)
        return LinearGaussian(covariance, x, variance)

    def exact(y: Tensor) -> ByName:
        if prior is None:
            return {"beta": given(noise).moments(y)}
        sigma, beta = quadrature.given_scale(prior, given, y, low=-9.0)
        return {"sigma": sigma, "beta": beta}

    return Family(partial(regression_model, prior), (noise, spread, x), exact)


def process_model(scale_tril: Tensor, noise: Tensor, y: Data = None) -> None:
    zeros = scale_tril.new_zeros(len(scale_tril))
    z = pyro.sample("z", dist.MultivariateNormal(zeros, scale_tril=scale_tril))
    pyro.sample("y", dist.Normal(z, noise).to_event(1), obs=y)


def process() -> Family:
    """A multivariate normal of random correlations, seen with noise."""
    dim = size(2, 60)
    scale_tril, noise = correlated(dim), scales(dim, 0.1, 10.0)
    posterior = LinearGaussian(scale_tril @ scale_tril.T, torch.eye(dim), noise**2)
    return Family(process_model, (scale_tril, noise), lambda y: {"z": posterior.moments(y)})


def conjugate_model(shape: Tensor, rate: Tensor, ratio: Tensor, x: Tensor, y: Data = None) -> None:
    precision = pyro.sample("precision", dist.Gamma(shape, rate))
    sigma = precision.rsqrt()
    zeros = x.new_zeros(x.shape[1])
    beta = pyro.sample("beta", dist.Normal(zeros, (ratio * sigma)[..., None]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((beta * x).sum(-1), sigma), obs=y)


def conjugate(degrees: tuple[float, float] = (2.5, 12.0)) -> Family:
    """A regression whose coefficients are Student's t given the data: of so many degrees of freedom."""
    df, dim = between(*degrees), size(1, 10)
    num_rows = size(1, 3) if df > 4 else 1
    shape, rate = torch.tensor((df - num_rows) / 2), torch.tensor(between(0.3, 3.0))
    ratio, x = torch.tensor(between(0.5, 3.0)), torch.randn(num_rows, dim)

    def exact(y: Tensor) -> ByName:
        precision = x.T @ x + torch.eye(dim) / ratio**2
        mean = torch.linalg.solve(precision, x.T @ y)
        new_rate = rate + (y @ y - mean @ precision @ mean) / 2
        scale = (2 * new_rate / df * precision.inverse().diagonal()).sqrt()
        of_precision = quadrature.log_gamma_moments(torch.tensor(df / 2), new_rate)
        beta = Moments(mean, quadrature.student_sd(df, scale))
        return {"precision": of_precision, "beta": beta}

    return Family(conjugate_model, (shape, rate, ratio, x), exact, df)
