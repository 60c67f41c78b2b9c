# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""100,000 rows in 2,000 groups by mini-batches: each group's fit and verdict against exact answers.

    python benchmarks/elements.py [--seeds 1] [--broken GROUP] [--steps N]

Intercepts and slopes of the groups are conjugate given the five numbers that all groups share. These are
integrated over by importance sampling of their own posterior. Prints CPU seconds, how far each group's means
are from the exact ones in standard deviations, and the verdict.
"""

import argparse
import time

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import AutoAmortized, fit

GROUPS, ROWS, BATCH = 2000, 50, 100
FACTOR = 30.0  # of the data of a broken group
MU, TAU, SIGMA = (1.0, -0.5), (0.8, 0.4), 1.5
NUM_EXACT, NUM_DRAWS, CHUNK = 2000, 5000, 500


def simulate(broken: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The covariates ``(groups, rows, 2)``, the first of them 1, and the data ``(groups, rows)``."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.tensor(MU) + torch.tensor(TAU) * torch.randn(GROUPS, 2, generator=generator)
    x = torch.stack([torch.ones(GROUPS, ROWS), torch.randn(GROUPS, ROWS, generator=generator)], -1)
    y = (x @ z[..., None])[..., 0] + SIGMA * torch.randn(GROUPS, ROWS, generator=generator)
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
    tril = torch.linalg.cholesky(precision)
    mean = torch.cholesky_solve(right[..., None], tril)[..., 0]
    log_likelihood = (
        0.5 * ((right * mean).sum(-1) - y.square().sum(-1) / sigma**2 - (mu**2 / tau**2).sum())
        - tril.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        - tau.log().sum()
        - 0.5 * ROWS * torch.log(2 * torch.pi * sigma**2)
    )
    log_prior = dist.Normal(0.0, 5.0).log_prob(mu).sum() + u[2:].sum()
    log_prior = log_prior + dist.HalfNormal(2.0).log_prob(tau).sum()
    log_prior = log_prior + dist.HalfNormal(5.0).log_prob(sigma)
    variance = torch.cholesky_inverse(tril).diagonal(dim1=-1, dim2=-2)
    return mean, variance, log_prior + log_likelihood.sum()


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """The means and sds of the groups ``(groups, 2)``, and the log evidence."""
    x, y = x.double(), y.double()
    u = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([u], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -given_shared(x, y, u)[2]
        value.backward()
        return value

    optimizer.step(loss)
    hessian = torch.autograd.functional.hessian(lambda v: -given_shared(x, y, v)[2], u.detach())
    proposal = dist.MultivariateNormal(u.detach(), precision_matrix=hessian)
    torch.manual_seed(1)
    draws = proposal.sample((NUM_EXACT,))
    found = [given_shared(x, y, draw) for draw in draws]
    log_weights = torch.stack([density for _, _, density in found]) - proposal.log_prob(draws)
    weights = log_weights.softmax(0)
    mean, second = torch.zeros(2, GROUPS, 2, dtype=torch.float64)
    for weight, (of_draw, variance, _) in zip(weights, found):
        mean += weight * of_draw
        second += weight * (variance + of_draw**2)
    return (
        mean,
        (second - mean**2).sqrt(),
        (log_weights.logsumexp(0) - torch.tensor(NUM_EXACT).log()).item(),
    )


def moments(guide: AutoAmortized, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The means and sds of the groups by many draws of a guide."""
    mean, second = torch.zeros(2, GROUPS, 2, dtype=torch.float64)
    for _ in range(NUM_DRAWS // CHUNK):
        z = guide.sample_posterior(CHUNK, x, y)["z"].double()
        mean += z.sum(0) / NUM_DRAWS
        second += z.square().sum(0) / NUM_DRAWS
    return mean, (second - mean**2).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--broken", type=int)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = simulate(args.broken)
    mean, sd, evidence = exact(x, y)
    is_whole = torch.arange(GROUPS) != (-1 if args.broken is None else args.broken)
    for seed in range(args.seeds):
        pyro.clear_param_store()
        loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
        guide, began = AutoAmortized(model, encoder), time.process_time()
        result = fit(model, guide, loader=loader, num_steps=args.steps, seed=seed, progress=False)
        seconds = time.process_time() - began
        print(f"seed {seed}: {seconds:.0f} CPU s, exact log evidence {evidence:.2f}")
        print(result, flush=True)
        found, width = moments(guide, x, y)
        errors, ratios = ((found - mean) / sd).abs()[is_whole], (width / sd)[is_whole]
        print(
            f"means: rms {errors.square().mean().sqrt():.3f} sd, largest {errors.max():.3f}, "
            f"{int((errors > 0.15).any(-1).sum())} groups beyond 0.15; "
            f"sds {ratios.min():.3f} to {ratios.max():.3f} of the exact ones",
            flush=True,
        )


if __name__ == "__main__":
    main()
