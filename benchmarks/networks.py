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
from fit_posteriors import cancer_data
from torch import Tensor, nn

from pyro_artransform import AutoIAF, fit
from pyro_artransform.conditioners import TiltedSiLU
from pyro_artransform.diagnostics import importance

Model = Callable[[], None]


def classify(x: Tensor, y: Tensor, prior: float) -> Model:
    """A logistic regression."""

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), prior).to_event(1))
        logits = (x @ beta[..., None])[..., 0]
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return model


def cancer() -> Model:
    """31 coefficients for scikit-learn's breast cancer data, columns centred and scaled."""
    return classify(*map(torch.as_tensor, cancer_data()), prior=10.0)


def simulated(num_rows: int, dim: int) -> Model:
    x, beta = normal(1, num_rows, dim), 0.5 * normal(2, dim)
    return classify(x, (uniform(3, num_rows) < torch.sigmoid(x @ beta)).double(), prior=2.0)


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
    y = torch.poisson((root @ normal(1, 80)).exp(), generator=torch.Generator().manual_seed(2))

    def model() -> None:
        height = pyro.sample("height", dist.HalfNormal(2.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(80), 1.0).to_event(1))
        rate = (height[..., None] * (z @ root.T)).exp()
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)

    return model


def funnel() -> Model:
    """Neal's funnel in 100 dimensions, whose evidence is 0."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("below", 99):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    return model


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


POSTERIORS: dict[str, tuple[int, Callable[[], Model]]] = {
    "cancer": (31, cancer),
    "regression 60": (60, lambda: simulated(150, 60)),
    "regression 100": (100, lambda: simulated(250, 100)),
    "hierarchy": (83, hierarchy),
    "process": (81, process),
    "funnel": (100, funnel),
}
NETWORKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "preset": lambda d: {},
    "SiLU": lambda d: {"nonlinearity": nn.SiLU()},
    "wide SiLU": lambda d: {
        "nonlinearity": nn.SiLU(),
        "hidden_dims": max(128, min(8 * d, 256), 4 * d),
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
    width = guide.transform.transforms[0].transforms[1].parts[0].meta.conditioner.hidden_dims[0]
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
