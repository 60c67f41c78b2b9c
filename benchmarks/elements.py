# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""100,000 rows in 2,000 groups by mini-batches: each group's fit and verdict against exact answers.

    python benchmarks/elements.py [--broken GROUP] [--steps N]

Intercepts and slopes of the groups are conjugate given the five numbers that all groups share, which are
integrated over by importance sampling. Prints CPU seconds, the verdict, and the errors of the groups' means.
"""

import argparse
import math
import time
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import AutoAmortized, fit

GROUPS, ROWS, BATCH, FACTOR = 2000, 50, 100, 30.0  # the factor is that of data of a broken group
MU, TAU, SIGMA = (1.0, -0.5), (0.8, 0.4), 1.5
NUM_EXACT, NUM_DRAWS, NUM_STEPS = 2000, 5000, 30


def simulate(broken: int | None) -> tuple[Tensor, Tensor]:
    """The covariates ``(groups, rows, 2)``, the first of them 1, and the data ``(groups, rows)``."""
    noise = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    z = torch.tensor(MU) + torch.tensor(TAU) * noise(GROUPS, 2)
    x = torch.stack([torch.ones(GROUPS, ROWS), noise(GROUPS, ROWS)], -1)
    y = (x @ z[..., None])[..., 0] + SIGMA * noise(GROUPS, ROWS)
    if broken is not None:
        y[broken] *= FACTOR
    return x, y


def model(x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(2.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("groups", GROUPS, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(mu, tau).to_event(1))
        mean = z[..., :1] * x[..., 0] + z[..., 1:] * x[..., 1]
        pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def encoder(x: Tensor, y: Tensor) -> Tensor:
    """The sufficient statistics of each group, as means over its rows."""
    xx, xy = (x[..., :, None] * x[..., None, :]).mean(-3), (x * y[..., None]).mean(-2)
    return torch.cat([xx[..., 0, 1:], xx[..., 1, 1:], xy, y.square().mean(-1, keepdim=True)], -1)


def given_shared(x: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``(groups, 2)`` and variances given mu, log tau and log sigma; the log joint density of these."""
    mu, tau, sigma = u[:2], u[2:4].exp(), u[4].exp()
    precision = x.mT @ x / sigma**2 + torch.diag(tau**-2)
    right = (x.mT @ y[..., None])[..., 0] / sigma**2 + mu / tau**2
    covariance = torch.linalg.inv(precision)
    mean = (covariance @ right[..., None])[..., 0]
    log_likelihood = 0.5 * (
        ((right * mean).sum(-1) - y.square().sum(-1) / sigma**2 - (mu**2 / tau**2).sum())
        - torch.logdet(precision)
        - 2 * tau.log().sum()
        - ROWS * torch.log(2 * torch.pi * sigma**2)
    )
    log_prior = dist.Normal(0.0, 5.0).log_prob(mu).sum() + u[2:].sum()
    for scale, width in ((tau, 2.0), (sigma, 5.0)):
        log_prior = log_prior + (dist.Normal(0.0, width).log_prob(scale) + math.log(2)).sum()
    return mean, covariance.diagonal(dim1=-1, dim2=-2), log_prior + log_likelihood.sum()


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """The means and sds of the groups ``(groups, 2)``, and the log evidence."""
    given = partial(given_shared, x.double(), y.double())
    u = torch.tensor([*MU, *map(math.log, TAU), math.log(SIGMA)], dtype=torch.float64)
    gradient = torch.func.grad(lambda v: -given(v)[2])
    for _ in range(NUM_STEPS):
        hessian = torch.func.jacfwd(gradient)(u)
        u = u - torch.linalg.solve(hessian, gradient(u)).clamp(-0.1, 0.1)
    proposal = dist.MultivariateNormal(u, precision_matrix=hessian)
    draws = proposal.sample((NUM_EXACT,))
    means, variances, densities = torch.func.vmap(given, chunk_size=100)(draws)
    log_weights = densities - proposal.log_prob(draws)
    mean, second = (
        torch.tensordot(log_weights.softmax(0), v, 1) for v in (means, variances + means**2)
    )
    return mean, (second - mean**2).sqrt(), float(log_weights.logsumexp(0)) - math.log(NUM_EXACT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--broken", type=int)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = simulate(args.broken)
    mean, sd, evidence = exact(x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    guide, began = AutoAmortized(model, encoder), time.process_time()
    result = fit(model, guide, loader=loader, num_steps=args.steps, seed=0, progress=False)
    print(f"{time.process_time() - began:.0f} CPU s, exact log evidence {evidence:.2f}\n{result}")
    z = torch.cat([guide.sample_posterior(NUM_DRAWS // 10, x, y)["z"] for _ in range(10)])
    errors, ratios = (z.mean(0) - mean).abs() / sd, z.std(0) / sd
    if args.broken is not None:
        errors[args.broken], ratios[args.broken] = 0.0, 1.0
    print(
        f"means: rms {errors.square().mean().sqrt():.3f} sd, largest {errors.max():.3f}, "
        f"{int((errors > 0.15).any(-1).sum())} groups beyond 0.15; "
        f"sds {ratios.min():.3f} to {ratios.max():.3f} of the exact ones\n{result.elements}"
    )


if __name__ == "__main__":
    main()
