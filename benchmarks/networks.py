# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Which network `AutoIAF` should have beyond 64 latents: whole fits with several of them.

    OMP_NUM_THREADS=1 python benchmarks/networks.py [POSTERIOR ...] [--networks NETWORK ...] [--seed 0]

Prints the ELBO of 40,000 fresh draws with its standard error, k-hat, steps and CPU seconds. The page is
benchmarks/flows.md.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from models import normal, poisson, uniform
from torch import nn
from verdict_targets import funnel

from pyro_artransform import AutoIAF, fit
from pyro_artransform.diagnostics import importance
from pyro_artransform.flows.conditioners import MaskedMLP, TiltedSiLU

Model = Callable[[], None]


def regression() -> Model:
    """A logistic regression of 250 rows on 100 columns."""
    x, beta = normal(1, 250, 100), 0.5 * normal(2, 100)
    y = (uniform(3, 250) < torch.sigmoid(x @ beta)).double()

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(100), 2.0).to_event(1))
        logits = (x @ beta[..., None])[..., 0]
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return model


def hierarchy() -> Model:
    """80 groups of five, with the errors of a Student's t: 83 latents."""
    y = 1 + 0.5 * normal(1, 80)[:, None] + normal(2, 80, 5)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("groups", 80, dim=-2):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            with pyro.plate("rows", 5, dim=-1):
                pyro.sample("y", dist.StudentT(4.0, theta, sigma), obs=y)

    return model


def process() -> Model:
    """Counts that follow a Gaussian process at 80 points, and its height: 81 latents."""
    t = torch.linspace(0, 10, 80)
    cov = torch.exp(-0.5 * (t[:, None] - t) ** 2) + 1e-4 * torch.eye(80)
    root = torch.linalg.cholesky(cov)
    y = poisson(2, (root @ normal(1, 80)).exp())

    def model() -> None:
        height = pyro.sample("height", dist.HalfNormal(2.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(80), 1.0).to_event(1))
        rate = (height[..., None] * (z @ root.T)).exp()
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)

    return model


POSTERIORS: dict[str, tuple[int, Callable[[], Model]]] = {
    "regression": (100, regression),
    "hierarchy": (83, hierarchy),
    "process": (81, process),
    "funnel": (100, lambda: funnel(100).model),
}
NETWORKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "preset": lambda d: {},
    "SiLU": lambda d: {"nonlinearity": nn.SiLU()},
    "wide SiLU": lambda d: {
        "nonlinearity": nn.SiLU(),
        "hidden_dims": max(256, 4 * d),
    },
    "even, skip": lambda d: {"nonlinearity": TiltedSiLU(0.0), "skip_connections": True},
}


def row(posterior: str, network: str, seed: int) -> str:
    dim, make = POSTERIORS[posterior]
    model = make()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoIAF(model, **NETWORKS[network](dim))
    began = time.process_time()
    result = fit(model, guide, progress=False)
    seconds = time.process_time() - began
    found = importance(model, guide, 40_000)
    width = next(m for m in guide.modules() if isinstance(m, MaskedMLP)).hidden_dims[0]
    elbo = f"{found.elbo:.3f} ± {found.elbo_se:.3f}"
    cells = [posterior, dim, network, width, elbo, f"{found.khat:.2f}", result.num_steps]
    return f"| {' | '.join(map(str, cells))} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posteriors", nargs="*", default=list(POSTERIORS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print("| posterior | D | network | width | ELBO | k-hat | steps | CPU s |")
    print(f"|{'---|' * 8}")
    for posterior in args.posteriors:
        for network in args.networks:
            print(row(posterior, network, args.seed), flush=True)


if __name__ == "__main__":
    main()
