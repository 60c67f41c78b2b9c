# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The stochastic volatility model that several benchmarks have in common, and its simulated returns."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def stochastic_volatility(y: Tensor) -> None:
    """Returns y_t ~ N(0, exp(h_t / 2)), where h is an AR(1) path with unknown parameters."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    # drawn anywhere: the density of the path is the two factors
    h = pyro.sample("h", dist.Normal(torch.zeros_like(y), 1.0).mask(False).to_event(1))
    mu, phi, sigma = mu[..., None], phi[..., None], sigma[..., None]
    first = dist.Normal(mu, sigma / (1 - phi**2).sqrt()).log_prob(h[..., :1])
    steps = dist.Normal(mu + phi * (h[..., :-1] - mu), sigma).log_prob(h[..., 1:])
    pyro.factor("path", first.sum(-1) + steps.sum(-1))
    pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)


def simulate(num_days: int, seed: int = 0) -> Tensor:
    """Returns of so many days: a log-variance about 0, a persistence of 0.97, steps of 0.2."""
    generator = torch.Generator().manual_seed(seed)
    shocks, noise = torch.randn(2, num_days, generator=generator, dtype=torch.float64)
    path = [0.2 / (1 - 0.97**2) ** 0.5 * shocks[0]]
    for shock in shocks[1:]:
        path.append(0.97 * path[-1] + 0.2 * shock)
    return ((torch.stack(path) / 2).exp() * noise).to(torch.get_default_dtype())
