# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""
One fit on many processes, started by PyTorch's torchrun::

    torchrun --nproc-per-node 2 tutorials/many_processes.py

The model is a hierarchy of many groups, fitted with mini-batches::

    mean ~ Normal(0, 3),  z_i ~ Normal(mean, 1),  y_i ~ Normal(z_i, 0.5)

Only the printing depends on processes: ``fit`` finds the others from the environment variables that
torchrun sets. Each process has its own batches, and the gradients are averaged, so that all processes end
with the same guide and result. Started with ``python``, the script is a fit in one process.

The posterior is known in closed form, so that the fit can be checked.
"""

import os

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_artransform import AutoAmortized, fit

smoke_test = "CI" in os.environ

NUM_GROUPS = 200 if smoke_test else 5_000
BATCH_SIZE = 25 if smoke_test else 100
EPOCHS = 10 if smoke_test else 20
IS_FIRST = os.environ.get("RANK", "0") == "0"


def model(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", NUM_GROUPS, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def data() -> Tensor:
    """Simulated data, the same in all processes."""
    generator = torch.Generator().manual_seed(0)
    return 1.0 + 1.25**0.5 * torch.randn(NUM_GROUPS, generator=generator)


def exact(y: Tensor) -> tuple[float, float, float]:
    """The posterior mean and sd of ``mean``, and the log evidence."""
    precision = 1 / 9 + len(y) / 1.25
    factor, diagonal = torch.full((len(y), 1), 3.0), torch.full((len(y),), 1.25)
    marginal = dist.LowRankMultivariateNormal(torch.zeros(len(y)), factor, diagonal)
    return (y.sum() / 1.25 / precision).item(), precision**-0.5, marginal.log_prob(y).item()


def main() -> None:
    torch.set_default_dtype(torch.float64)
    y = data()
    guide = AutoAmortized(model, encoder=lambda y: y[:, None], local_flow=None)
    result = fit(
        model,
        guide,
        loader=DataLoader(y, batch_size=BATCH_SIZE, shuffle=True),
        epochs=EPOCHS,
        num_particles=4,
        seed=0,
        progress=False,
    )
    draws = guide.sample_posterior(1000, y)["mean"]
    if IS_FIRST:
        mean, sd, log_evidence = exact(y)
        processes = os.environ.get("WORLD_SIZE", "1")
        print(f"processes     {processes}")
        print(f"steps         {result.num_steps} in {result.seconds:.1f} s")
        print(
            f"ELBO          {result.elbo:.2f} ± {result.elbo_se:.2f} (log evidence {log_evidence:.2f})"
        )
        print(f"mean of mean  {draws.mean():.4f} (exactly {mean:.4f})")
        print(f"sd of mean    {draws.std():.4f} (exactly {sd:.4f})")


if __name__ == "__main__":
    main()
