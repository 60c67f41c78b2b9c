# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Which flow a preset should have: `fit` with several of them on small posteriors of several kinds.

    python benchmarks/flows.py [POSTERIOR ...] [--seeds 2]

Prints for each posterior and flow the distance of the ELBO from the best log evidence that any of
them has found (nats), k-hat, and seconds; medians over seeds, and the worst k-hat.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from prior_as_data import prior_as_data
from torch import nn

from pyro_artransform import (
    AutoAutoregressive,
    AutoIAF,
    fit,
    hinged_marginals,
    iaf,
    spline_autoregressive,
    spline_marginals,
)
from pyro_artransform.flows.transforms import chain

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def centred() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(EFFECTS)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS.double()), obs=EFFECTS.double())


def noncentred() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(EFFECTS)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, ERRORS.double()), obs=EFFECTS.double())


def regression() -> None:
    """Ten observations: the posterior of the slopes has the tails of a Student's t."""
    x = torch.linspace(-1, 1, 10)
    y = 100 + 30 * x + 5 * torch.sin(7 * x)
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1000.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(beta[..., :1] + beta[..., 1:] * x, sigma), obs=y)


def process() -> None:
    """The length, the height and the noise of a Gaussian process with eight observations."""
    x = torch.linspace(0, 10, 8)
    y = torch.sin(x) + 0.3 * torch.cos(5 * x)
    length = pyro.sample("length", dist.Gamma(5.0, 2.0))
    height = pyro.sample("height", dist.HalfNormal(2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    away = (x[:, None] - x) / length[..., None, None]
    cov = height[..., None, None] ** 2 * torch.exp(-0.5 * away**2)
    cov = cov + (noise[..., None, None] ** 2 + 1e-6) * torch.eye(len(x))
    chol = torch.linalg.cholesky(cov)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), scale_tril=chol), obs=y)


def logistic() -> None:
    """Twelve coefficients and forty observations that are nearly separated: a skewed posterior."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator)
    x[:, 0] = 1.0
    noise = torch.rand(40, generator=generator)
    y = (noise < torch.sigmoid(2 * x[:, 1] - 2 * x[:, 2] + x[:, 3])).double()
    beta = pyro.sample("beta", dist.Normal(torch.zeros(12), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        logits = beta @ x.T
        logits = logits.squeeze(-2) if logits.dim() > 1 else logits
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


@prior_as_data
def rate() -> None:
    """One latent: a rate whose logarithm has a long left tail."""
    pyro.sample("rate", dist.Gamma(0.5, 1.0))


def success() -> None:
    """One latent: next to a Gaussian."""
    p = pyro.sample("p", dist.Beta(10.0, 10.0))
    with pyro.plate("throws", 10):
        pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor([1.0] * 6 + [0.0] * 4))


@prior_as_data
def heavy() -> None:
    """One latent: the tails of a Student's t."""
    pyro.sample("x", dist.StudentT(3.0, 0.0, 1.0))


def spike() -> None:
    """One latent: half of the mass within a tenth of the width of the other half."""
    wide = dist.Normal(0.0, 1.0)
    x = pyro.sample("x", wide)
    both = torch.stack([wide.log_prob(x), dist.Normal(0.0, 0.1).log_prob(x)]) - math.log(2)
    pyro.factor("both", both.logsumexp(0) - wide.log_prob(x))


def wide(d: int, num_transforms: int = 3) -> nn.Module:
    """Layers with the networks that :class:`AutoIAF` has by default."""
    return iaf(d, num_transforms, **AutoIAF._network(d))


def splines(d: int) -> nn.Module:
    return chain([spline_autoregressive(d), spline_autoregressive(d, order=range(d - 1, -1, -1))])


def marginal(d: int, num_splines: int, count_bins: int = 8) -> nn.Module:
    layers = [spline_marginals(d, count_bins=count_bins) for _ in range(num_splines)]
    return chain([hinged_marginals(d), *layers])


def by_networks(d: int) -> nn.Module:
    """Splines whose parameters networks give, of no input in one dimension."""
    layers = [spline_autoregressive(d, 128, nonlinearity=nn.SiLU()) for _ in range(3)]
    return chain([hinged_marginals(d), *layers])


OF_ONE_LATENT = rate, success, heavy, spike
POSTERIORS = {
    f.__name__: f for f in (centred, noncentred, regression, process, logistic, *OF_ONE_LATENT)
}
FLOWS = {
    "3 affine": wide,
    "hinges, 3 affine, 2 x 64 ELU": lambda d: chain([hinged_marginals(d), iaf(d)]),
    "hinges, 2 affine": lambda d: chain([hinged_marginals(d), wide(d, 2)]),
    "2 splines, 2 x 64 ELU": splines,
}
FLOWS_OF_ONE = {
    "hinges, 3 splines, 128 SiLU": by_networks,
    "hinges, 2 splines of 16 bins": partial(marginal, num_splines=2, count_bins=16),
    "hinges, 1 spline of 16 bins": partial(marginal, num_splines=1, count_bins=16),
}


def guides(posterior: str) -> dict[str, Callable[..., nn.Module]]:
    """The preset and what it is compared with, by name."""
    is_one = POSTERIORS[posterior] in OF_ONE_LATENT
    preset = f"hinges, 3 {'splines' if is_one else 'affine'} (preset)"
    flows = FLOWS_OF_ONE if is_one else FLOWS
    others = {name: partial(AutoAutoregressive, flow=flow) for name, flow in flows.items()}
    return {preset: AutoIAF, **others}


def run(posterior: str, guide: str, seed: int):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = POSTERIORS[posterior]
    return fit(model, guides(posterior)[guide](model), progress=False)


def set_up(description: str, num_seeds: int) -> argparse.Namespace:
    """The posteriors and seeds of the command line; from here on, float64 and one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("posteriors", nargs="*", default=list(POSTERIORS))
    parser.add_argument("--seeds", type=int, default=num_seeds)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    return parser.parse_args()


def main() -> None:
    args = set_up(__doc__.splitlines()[0], num_seeds=2)
    print("| posterior | flow | gap (nats) | k-hat | worst k-hat | steps | seconds |")
    print("|---|---|---|---|---|---|---|")
    for posterior in args.posteriors:
        found = {
            name: [run(posterior, name, s) for s in range(args.seeds)] for name in guides(posterior)
        }
        evidence = max(r.log_evidence for rs in found.values() for r in rs)
        for name, results in found.items():
            gap, khat, steps, seconds = (
                statistics.median(values)
                for values in zip(
                    *((evidence - r.elbo, r.khat, r.num_steps, r.seconds) for r in results)
                )
            )
            worst = max(r.khat for r in results)
            print(
                f"| {posterior} | {name} | {gap:.4f} | {khat:.2f} | {worst:.2f} | {steps:.0f} "
                f"| {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
