# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What symmetries.py compares with: moments of components by long runs of NumPyro's NUTS, in a file.

    python benchmarks/symmetries_reference.py [MODEL ...]

Moments are those of all latents as the model has them. Each draw is relabelled to the image that is nearest
to a common centre, in units of sds. Both are written, so that other draws can be relabelled in the same way.
`switched` is the share of draws whose labels are not those of most of the chain. Where it is 0, any other way
to tell components apart gives the same moments; elsewhere they depend on it.

The hidden Markov model has modes that are no images, between which NUTS hardly moves: four chains of 150,000
draws agree, R-hat 1.006, without one of them. Its moments are by importance sampling, from a mixture around
draws of the posterior with the likelihood to the power of 0.7.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import torch
from jax.scipy.special import logsumexp
from measuring.nuts import long_run
from measuring.references import Row, stored, write
from models.symmetric import SYMMETRIC
from models.symmetry import Center, Symmetry
from numpyro import distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from pyro.distributions import Chi2
from torch import Tensor
from torch.linalg import cholesky

from pyro_artransform.model import LogJoint

Draws = dict[str, Tensor]
REFERENCE = Path(__file__).parent / "symmetries_reference.json"
SIZES = {"num_chains": 4, "num_warmup": 2000, "num_samples": 10_000}
NUM_ROUNDS = 6  # of the centre and the images nearest to it
#: of the mixture: kernels and their degrees of freedom, draws that a covariance is of, and draws
NUM_KERNELS, DEGREES, NUM_NEAREST, NUM_WEIGHTED = 1000, 6.0, 1000, 400_000


def mixture(y: Any) -> None:
    w = numpyro.sample("w", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("k", 3):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        s = numpyro.sample("s", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("n", len(y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, s))
        numpyro.sample("y", mixture, obs=y)


def annotators(y: Any) -> None:
    size, num_annotators = 4, y.shape[1]
    pi = numpyro.sample("pi", dist.Dirichlet(jnp.ones(size)))
    with numpyro.plate("j", num_annotators, dim=-2), numpyro.plate("c", size, dim=-1):
        beta = numpyro.sample("beta", dist.Dirichlet(jnp.ones(size)))
    of_answers = jnp.log(beta)[jnp.arange(num_annotators), :, y]
    numpyro.factor("answers", logsumexp(jnp.log(pi) + of_answers.sum(1), -1).sum())


def topics(c: Any) -> None:
    with numpyro.plate("t", 3):
        phi = numpyro.sample("phi", dist.Dirichlet(jnp.full(c.shape[1], 0.5)))
    with numpyro.plate("d", len(c)):
        theta = numpyro.sample("theta", dist.Dirichlet(jnp.full(3, 0.5)))
    numpyro.factor("words", (jnp.log(theta @ phi) * c).sum())


def mixture_enumerated(y: Any) -> None:
    weights = numpyro.sample("weights", dist.Dirichlet(2 * jnp.ones(3)))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("components", 3):
        locs = numpyro.sample("locs", dist.Normal(0.0, 5.0))
    with numpyro.plate("data", len(y)):
        parts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, scale))
        numpyro.sample("y", parts, obs=y)


def hidden_markov(y: Any, power: float = 1.0) -> None:
    A = numpyro.sample("A", dist.Dirichlet(jnp.ones((3, 3)) + 3 * jnp.eye(3)).to_event(1))
    mu = numpyro.sample("mu", dist.Normal(jnp.array([-2.0, 0.0, 2.0]), 1.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    of_states = dist.Normal(mu, sigma).log_prob(y[:, None])

    def step(forward: Any, of_state: Any) -> tuple[Any, None]:
        return logsumexp(forward[:, None] + jnp.log(A), 0) + of_state, None

    forward, _ = jax.lax.scan(step, of_states[0] - jnp.log(3), of_states[1:])
    numpyro.factor("y", power * logsumexp(forward))


#: by the names of symmetric models
MODELS: dict[str, Callable[..., None]] = {
    "mixture": mixture,
    "annotators": annotators,
    "topics": topics,
    "mixture, enumerated": mixture_enumerated,
    "hidden Markov, enumerated": hidden_markov,
}
WEIGHTED = ("hidden Markov, enumerated",)


def centered(draws: Draws, symmetry: Symmetry) -> Center:
    """A centre of the images of draws ``(n,) + site shape`` that are nearest to it, from the last draw on."""
    center = Center({site: z[-1] for site, z in draws.items()}, Center.of(draws).sd)
    for _ in range(NUM_ROUNDS):
        center = Center.of(center.nearest(draws, symmetry)[0])
    return center


def moments(z: np.ndarray) -> Row:
    """Means and sds of chains ``(C, n, D)`` with their Monte Carlo standard errors."""
    mean, sd = z.mean((0, 1)), z.std((0, 1))
    squares = (z - mean) ** 2
    error = squares.std((0, 1)) / np.sqrt(effective_sample_size(squares)) / (2 * sd)
    return {
        "mean": mean,
        "sd": sd,
        "mean_se": sd / np.sqrt(effective_sample_size(z)),
        "sd_se": error,
    }


def reference(name: str) -> Row:
    """Moments of relabelled components, by site, and how well chains agree."""
    subject = SYMMETRIC[name]()
    args = tuple(value.numpy() for value in subject.args)
    found, num_divergent = long_run(MODELS[name], args, 1, SIZES)
    draws = {site: torch.tensor(z).flatten(0, 1) for site, z in found.items()}
    row: Row = {"divergent": num_divergent, "switched": 0.0}
    center = Center.of(draws)
    for symmetry in subject.symmetries:
        center = centered(draws, symmetry)
        draws, number = center.nearest(draws, symmetry)
        by_chain = number.unflatten(0, (SIZES["num_chains"], -1))
        row["switched"] = float((by_chain != by_chain.mode(1, True).values).double().mean())
    shape = SIZES["num_chains"], SIZES["num_samples"], -1
    by_site = {site: z.reshape(shape).numpy() for site, z in draws.items()}
    z = np.concatenate([*by_site.values()], 2)
    row["rhat"] = round(float(split_gelman_rubin(z).max()), 5)
    row["ess"] = round(float(effective_sample_size(z).min()))
    row["sites"] = {site: moments(value) for site, value in by_site.items()}
    for site, columns in row["sites"].items():
        columns["center"] = center.mean[site].flatten()
        columns["center_sd"] = center.sd[site].flatten()
    return row


class Kernels:
    """A mixture of Student's t around some of the draws ``(n, D)``, as wide as the draws near each."""

    def __init__(self, z: Tensor) -> None:
        self.at = z[torch.randperm(len(z))[:NUM_KERNELS]]
        nearest = torch.cdist(self.at / z.std(0), z / z.std(0)).topk(NUM_NEAREST, largest=False)
        self.factors = torch.stack([cholesky(z[rows].T.cov()) for rows in nearest.indices])
        self.inverses = torch.linalg.inv(self.factors)

    def sample(self, count: int) -> Tensor:
        rows = torch.randint(len(self.at), (count,))
        white = Chi2(DEGREES).sample((count, 1)).div(DEGREES).rsqrt() * torch.randn(
            count, self.at.shape[1]
        )
        return self.at[rows] + torch.einsum("nij,nj->ni", self.factors[rows], white)

    def log_prob(self, z: Tensor) -> Tensor:
        """Up to a constant."""
        white = torch.einsum("kij,nkj->nki", self.inverses, z[:, None] - self.at)
        power = -(DEGREES + z.shape[1]) / 2
        parts = power * (white.square().sum(-1) / DEGREES).log1p()
        return (parts + self.inverses.diagonal(dim1=1, dim2=2).log().sum(1)).logsumexp(1)


def weighted(name: str) -> Row:
    """Moments by importance sampling."""
    torch.manual_seed(0)
    subject = SYMMETRIC[name]()
    args = *(value.numpy() for value in subject.args), 0.7
    draws, num_divergent = long_run(MODELS[name], args, 1, SIZES)
    log_joint = LogJoint(subject.model, subject.args).with_coordinates(None)
    sites = {site: torch.tensor(draws[site]).flatten(0, 1) for site in log_joint.latents.sites}
    proposal = Kernels(log_joint.latents.unconstrain(sites))
    z = proposal.sample(NUM_WEIGHTED)
    with torch.no_grad():
        parts = [log_joint(part) - proposal.log_prob(part) for part in z.split(2000)]
    weights = torch.cat(parts).softmax(0)
    row: Row = {"by": "importance sampling", "divergent": num_divergent, "sites": {}}
    row["ess"] = round(float(1 / weights.square().sum()))
    for site, values in log_joint.latents.constrain(z).items():
        row["sites"][site] = weighted_moments(weights, values.reshape(len(values), -1))
    return row


def weighted_moments(weights: Tensor, z: Tensor) -> Row:
    """Moments of values ``(n, D)`` with weights, whose sum is 1, and their standard errors."""
    mean = weights @ z
    squares = (z - mean).square()
    sd = (weights @ squares).sqrt()
    errors = (weights.square() @ squares).sqrt(), weights.square() @ (squares - sd**2).square()
    found = {"mean": mean, "sd": sd, "mean_se": errors[0], "sd_se": errors[1].sqrt() / (2 * sd)}
    return found | {"center": mean, "center_sd": sd}


def store(name: str, row: Row) -> None:
    """Adds a model to the file, with all numbers rounded."""
    rows = stored(REFERENCE) | {name: row}
    for of_model in rows.values():
        for site, columns in of_model["sites"].items():
            rounded = {k: [float(f"{x:.5g}") for x in v] for k, v in columns.items()}
            of_model["sites"][site] = rounded
    write(REFERENCE, rows, MODELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], default=[])
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for name in options.models or MODELS:
        began = time.process_time()
        store(name, (weighted if name in WEIGHTED else reference)(name))
        row = {key: value for key, value in stored(REFERENCE)[name].items() if key != "sites"}
        print(name, row, round(time.process_time() - began), "s", flush=True)


if __name__ == "__main__":
    main()
