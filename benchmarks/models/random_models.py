# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Random models with exact posterior means and sds of every latent on the unconstrained space.

A name such as ``hierarchy_2`` is the seed of all that is random in a model: its size, its constants, its
latents, drawn from the prior, and its data given these.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from models import moments as quadrature
from models.moments import Moments
from models.random_numbers import ByName, Data, Family, Subject, between, correlated, scales, size
from models.random_regressions import conjugate, funnel, hierarchy, process, regression, walk

# Conjugate posteriors


def shares_model(total: int, concentration: Tensor, y: Data = None) -> None:
    p = pyro.sample("p", dist.Dirichlet(concentration))
    pyro.sample("y", dist.Multinomial(total, p), obs=y)


def shares() -> Family:
    concentration, total = scales(size(2, 61), 0.5, 5.0), size(1, 300)

    def exact(y: Tensor) -> ByName:
        return {"p": quadrature.simplex_moments(concentration + y)}

    return Family(partial(shares_model, total), (concentration,), exact)


def rates_model(a: Tensor, b: Tensor, total: Tensor, y: Data = None) -> None:
    with pyro.plate("items", len(total)):
        p = pyro.sample("p", dist.Beta(a, b))
        pyro.sample("y", dist.Binomial(total, p), obs=y)


def rates() -> Family:
    count = size(1, 60)
    a, b = scales(count, 0.5, 5.0), scales(count, 0.5, 5.0)
    total = scales(count, 1.0, 50.0).round()

    def exact(y: Tensor) -> ByName:
        return {"p": quadrature.logit_beta_moments(a + y, b + total - y)}

    return Family(rates_model, (a, b, total), exact)


def intensities_model(shape: Tensor, rate: Tensor, exposure: Tensor, y: Data = None) -> None:
    with pyro.plate("items", len(exposure)):
        intensity = pyro.sample("intensity", dist.Gamma(shape, rate))
        pyro.sample("y", dist.Poisson(intensity * exposure), obs=y)


def intensities() -> Family:
    count = size(1, 60)
    shape, rate = scales(count, 0.5, 5.0), scales(count, 0.5, 5.0)
    exposure = scales(count, 0.1, 5.0)

    def exact(y: Tensor) -> ByName:
        return {"intensity": quadrature.log_gamma_moments(shape + y, rate + exposure)}

    return Family(intensities_model, (shape, rate, exposure), exact)


# Independent latents, by quadrature of one at a time


def separate_model(
    prior: dist.TorchDistribution,
    likelihood: Callable[[Tensor], dist.TorchDistribution],
    num_rows: int,
    y: Data = None,
) -> None:
    with pyro.plate("latents", prior.batch_shape[0]):
        z = pyro.sample("z", prior)
        with pyro.plate("rows", num_rows):
            pyro.sample("y", likelihood(z), obs=y)


def separate(
    prior: dist.TorchDistribution,
    likelihood: Callable[[Tensor], dist.TorchDistribution],
    num_rows: int,
) -> Family:
    constrain = biject_to(prior.support)

    def exact(y: Tensor) -> ByName:
        def log_density(u: Tensor) -> Tensor:
            z = constrain(u)
            found = prior.log_prob(z) + constrain.log_abs_det_jacobian(u, z)
            found = found + sum(likelihood(z).log_prob(row) for row in y)
            return found.nan_to_num(-torch.inf)  # of infinite rates

        with pyro.validation_enabled(False):  # points far away are at the edges of a support
            return {"z": quadrature.one_by_one(log_density)}

    return Family(partial(separate_model, prior, likelihood, num_rows), (), exact)


def robust() -> Family:
    """A normal prior, and data with heavy tails: light tails of the posterior, and skewed."""
    count, num_rows = size(1, 20), size(2, 20)
    df, scale = torch.tensor(between(2.5, 5.0)), scales(count, 0.3, 3.0)
    prior = dist.Normal(torch.zeros(count), scales(count, 1.0, 5.0))
    return separate(prior, lambda z: dist.StudentT(df, z, scale), num_rows)


def surprised() -> Family:
    """A prior with heavy tails, and normal data: light tails of the posterior, and skewed."""
    count, df = size(1, 30), torch.tensor(between(2.5, 5.0))
    noise = scales(count, 0.5, 5.0)
    prior = dist.StudentT(df, torch.zeros(count), scales(count, 0.5, 3.0))
    return separate(prior, lambda z: dist.Normal(z, noise), 1)


def waiting() -> Family:
    """The log of the rate of exponential times."""
    count = size(1, 60)
    prior = dist.Normal(torch.zeros(count), scales(count, 0.5, 4.0))
    return separate(prior, lambda z: dist.Exponential(z.exp()), size(1, 5))


def truncated() -> Family:
    """Exponential priors and normal data: the log of a normal that is cut at zero."""
    count, noise = size(1, 60), between(0.3, 3.0)
    prior = dist.Exponential(scales(count, 0.3, 3.0))
    return separate(prior, lambda z: dist.Normal(z, noise), 1)


def extremes() -> Family:
    count, noise = size(1, 60), scales(1, 0.5, 10.0)
    prior = dist.Gumbel(torch.zeros(count), scales(count, 0.3, 3.0))
    return separate(prior, lambda z: dist.Normal(z, noise), 1)


# Generalized linear models of one or two coefficients, by quadrature


def logistic_model(spread: Tensor, x: Tensor, y: Data = None) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), spread).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(beta * x).sum(-1)), obs=y)


def counts_model(spread: Tensor, x: Tensor, y: Data = None) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), spread).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Poisson((beta * x).sum(-1).exp()), obs=y)


def generalized(
    model: Callable[..., None], log_norm: Callable[[Tensor], Tensor], largest: float
) -> Family:
    """Rows with log likelihood ``y eta - log_norm(eta)``, up to a constant."""
    dim, spread = int(torch.randint(1, 3, ())), torch.tensor(between(0.5, largest))
    x = torch.randn(size(2, 30), dim)
    x[:, 0] = 1.0

    def exact(y: Tensor) -> ByName:
        def log_density(beta: Tensor) -> Tensor:
            eta = beta @ x.T
            return (y * eta - log_norm(eta)).sum(-1) - (beta / spread).square().sum(-1) / 2

        return {"beta": quadrature.in_box(log_density, dim)}

    return Family(model, (spread, x), exact)


# Priors only, whose moments are known


def students_model(df: Tensor, loc: Tensor, scale: Tensor) -> None:
    with pyro.plate("latents", len(loc)):
        pyro.sample("z", dist.StudentT(df, loc, scale))


def students(degrees: tuple[float, float] = (2.5, 5.0)) -> Family:
    count = size(1, 10)
    df, loc, scale = scales(count, *degrees), torch.randn(count), scales(count, 0.2, 5.0)
    moments = Moments(loc, quadrature.student_sd(df, scale))
    return Family(students_model, (df, loc, scale), lambda _: {"z": moments}, df.min().item())


def cauchy() -> Family:
    """Neither its mean nor its sd exists."""
    loc, scale = torch.randn(1), scales(1, 0.2, 5.0)
    moments = Moments(torch.full_like(loc, math.nan), torch.full_like(loc, math.inf))
    return Family(students_model, (torch.ones(1), loc, scale), lambda _: {"z": moments}, 1.0)


def joint_student_model(df: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
    pyro.sample("z", dist.MultivariateStudentT(df, loc, scale_tril))


def joint_student(degrees: tuple[float, float] = (2.5, 5.0)) -> Family:
    df, scale_tril = torch.tensor(between(*degrees)), correlated(size(2, 8))
    loc = torch.randn(len(scale_tril))
    moments = Moments(loc, quadrature.student_sd(df, scale_tril.norm(dim=1)))
    args = (df, loc, scale_tril)
    return Family(joint_student_model, args, lambda _: {"z": moments}, df.item())


def pairs_model(df: Tensor, scale: Tensor) -> None:
    with pyro.plate("pairs", len(scale)):
        precision = pyro.sample("precision", dist.Gamma(df / 2, df / 2 * scale**2))
        pyro.sample("z", dist.Normal(0.0, precision.rsqrt()))


def pairs(degrees: tuple[float, float] = (2.5, 12.0)) -> Family:
    """A normal latent of latent precision, whose own distribution is Student's t."""
    scale = scales(size(1, 15), 0.2, 5.0)
    df = scales(len(scale), *degrees)
    moments = {
        "precision": quadrature.log_gamma_moments(df / 2, df / 2 * scale**2),
        "z": Moments(torch.zeros_like(scale), quadrature.student_sd(df, scale)),
    }
    return Family(pairs_model, (df, scale), lambda _: moments, df.min().item())


FAMILIES: dict[str, Callable[..., Family]] = {
    "hierarchy": hierarchy,
    "walk": walk,
    "known_noise": partial(regression, True),
    "unknown_noise": partial(regression, False),
    "process": process,
    "shares": shares,
    "rates": rates,
    "intensities": intensities,
    "conjugate": conjugate,
    "robust": robust,
    "surprised": surprised,
    "waiting": waiting,
    "truncated": truncated,
    "extremes": extremes,
    "logistic": partial(generalized, logistic_model, torch.nn.functional.softplus, 5.0),
    "counts": partial(generalized, counts_model, torch.exp, 2.0),
    "students": students,
    "cauchy": cauchy,
    "joint_student": joint_student,
    "pairs": pairs,
    "funnel": funnel,
}

#: how many of the benchmark's models are of each family: 60
COUNTS = {
    "hierarchy": 4,
    "walk": 2,
    "known_noise": 2,
    "unknown_noise": 4,
    "process": 2,
    "shares": 4,
    "rates": 2,
    "intensities": 3,
    "conjugate": 4,
    "robust": 3,
    "surprised": 2,
    "waiting": 3,
    "truncated": 3,
    "extremes": 2,
    "logistic": 4,
    "counts": 3,
    "students": 5,
    "cauchy": 1,
    "joint_student": 2,
    "pairs": 3,
    "funnel": 2,
}
#: the first of each family first
MODELS = [
    f"{family}_{i}"
    for i in range(max(COUNTS.values()))
    for family, count in COUNTS.items()
    if i < count
]


def family_of(name: str) -> str:
    return name.rpartition("_")[0]


def subject(name: str) -> Subject:
    """The model of this name: its data are drawn from the model itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        model, args, exact, num_moments = FAMILIES[family_of(name)]()
        nodes = poutine.trace(model).get_trace(*args).nodes
    if "y" not in nodes:
        return Subject(model, args, exact(torch.empty(0)), num_moments, False)
    data = nodes["y"]["value"]
    return Subject(model, (*args, data), exact(data), num_moments, True)
