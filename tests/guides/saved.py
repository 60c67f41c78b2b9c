# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Guides by name, as a process that reads their files makes them; run with the folder of the files."""

import sys
from pathlib import Path

import pyro
import torch
from pyro import distributions as dist

from pyro_artransform import AutoAmortized
from tests.guides.named import GUIDES

Y = torch.tensor([0.3, -1.2, 2.2, 0.9], dtype=torch.float64)


def hierarchy(y, weight=1.0):
    """Coordinates of the prior, all kinds of supports, and a dependency that the weight switches on."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta + weight * probs[0], 0.5), obs=y)


def kinds():
    return {
        **{name: GUIDES[name](hierarchy) for name in ("iaf", "maf", "structured", "mixture")},
        "amortized": AutoAmortized(hierarchy, lambda y, weight=1.0: torch.stack([y, y**2], -1)),
        "embeddings": AutoAmortized(hierarchy),
    }


def main(folder):
    """Writes the densities, at the points in the folder, of guides made anew and loaded."""
    pyro.set_rng_seed(99)
    found = {}
    for name, guide in kinds().items():
        # units of features and graphs are those of the file, not of these data
        guide.set_up(Y + 1.0, 0.0)
        guide.load(folder / f"{name}.pt")
        found[name] = guide.log_prob(torch.load(folder / f"{name}.draws"), Y)
    torch.save(found, folder / "found")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
