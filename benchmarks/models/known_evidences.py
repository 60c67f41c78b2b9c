# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors with data, whose evidence is known in closed form or by quadrature."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.hierarchies import schools, schools_truth
from models.known_densities import Model, Target
from models.library import PYRO
from pyro_artransform.model import LogJoint


def quadrature(model: Model, *ranges: tuple[float, float], count: int = 400) -> float:
    """The log evidence by the trapezoidal rule on the unconstrained space.

    :param ranges: the interval of each coordinate, with all but a millionth of the mass.
    :raises ValueError: if the density at the edge is above a millionth of its maximum.
    """
    lines = [torch.linspace(*interval, count) for interval in ranges]
    points = torch.cartesian_prod(*lines).reshape(-1, len(lines))
    with torch.no_grad():
        values = torch.cat(list(map(LogJoint(model), points.split(20_000))))
    shape = values.reshape([count] * len(lines))
    edge = max(
        shape.select(axis, end).max().item() for axis in range(shape.dim()) for end in (0, -1)
    )
    if edge > values.max().item() - math.log(1e6):
        raise ValueError(f"{ranges}: expected all of the mass inside, got {edge} at the edge")
    cell = sum(math.log((high - low) / (count - 1)) for low, high in ranges)
    return values.logsumexp(0).item() + cell


def conjugate() -> Target:
    y = torch.tensor([1.3, 0.2, 2.9, -0.4, 1.7, 0.8])

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    distribution = dist.MultivariateNormal(torch.zeros(len(y)), torch.eye(len(y)) + 9.0)
    return Target(model, distribution.log_prob(y).item())


def beta_binomial() -> Target:
    def model() -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Binomial(20, p), obs=torch.tensor(1.0))

    return Target(model, -math.log(21))


def linear_regression(dim: int) -> Target:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, dim, generator=generator)
    y = x.sum(-1) + torch.randn(40, generator=generator)

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(dim), 2.0).to_event(1))
        mean = (x * beta.unsqueeze(-2)).sum(-1)
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    distribution = dist.MultivariateNormal(torch.zeros(40), torch.eye(40) + 4 * x @ x.T)
    return Target(model, distribution.log_prob(y).item())


def random_walk(length: int) -> Target:
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(length, generator=generator).cumsum(0) + torch.randn(
        length, generator=generator
    )

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(length), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.cumsum(-1), 1.0).to_event(1), obs=y)

    sums = torch.ones(length, length).tril()
    distribution = dist.MultivariateNormal(torch.zeros(length), torch.eye(length) + sums @ sums.T)
    return Target(model, distribution.log_prob(y).item())


def scale_regression() -> Target:
    generator = torch.Generator().manual_seed(3)
    x = torch.linspace(-1, 1, 12)
    y = 1 + 2 * x + 0.5 * torch.randn(12, generator=generator)

    def model() -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        with pyro.plate("data", 12):
            pyro.sample("y", dist.Normal(1 + slope * x, sigma), obs=y)

    return Target(model, quadrature(model, (-2.0, 6.0), (-3.0, 3.0)))


def logistic() -> Target:
    x = torch.linspace(-2, 2, 20)
    y = (x + 0.4 * torch.sin(9 * x) > 0).double()

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        b = pyro.sample("b", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)

    return Target(model, quadrature(model, (-15.0, 15.0), (-10.0, 25.0)))


def eight_schools(centred: bool) -> Target:
    return Target(schools(PYRO, centred), schools_truth().evidence)


def two_camps() -> Target:
    """Data of two locations under a likelihood with heavy tails."""
    y = torch.tensor([-10.2, -9.9, -10.0, -10.1, 10.1, 9.8, 10.0, 10.05])

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.StudentT(2.0, loc, 0.3), obs=y)

    return Target(model, quadrature(model, (-30.0, 30.0), count=200_000))


def sites(names: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The number of a mode by the signs of these sites."""

    def mode_of(draws: Mapping[str, Tensor]) -> Tensor:
        number = torch.zeros(len(draws[names[0]]), dtype=torch.long)
        for name in names:
            number = 2 * number + (draws[name] > 0).long()
        return number

    return mode_of


def product() -> Target:
    """Only the product of two latents is seen: two bent modes."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * b, 0.2), obs=torch.tensor(2.0))

    evidence = quadrature(model, (-7.0, 7.0), (-7.0, 7.0), count=1500)
    return Target(model, evidence, mode_of=sites("a"), masses=torch.tensor([0.5, 0.5]))


def squares(dim: int, noise: float) -> Target:
    """Only squares are seen: modes of all signs."""

    def one() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x**2, noise), obs=torch.tensor(1.5))

    def model() -> None:
        for name in "abcdefgh"[:dim]:
            x = pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{name}", dist.Normal(x**2, noise), obs=torch.tensor(1.5))

    evidence = dim * quadrature(one, (-5.0, 5.0), count=20_000)
    masses = torch.full((2**dim,), 2.0**-dim)
    return Target(model, evidence, mode_of=sites("abcdefgh"[:dim]), masses=masses)


def labels(apart: float) -> Target:
    """Two locations without an order; which of them a datum belongs to is summed out."""
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(12, generator=generator) + apart * (torch.arange(12) % 2 - 0.5)

    def model() -> None:
        first = pyro.sample("first", dist.Normal(0.0, 5.0))
        second = pyro.sample("second", dist.Normal(0.0, 5.0))
        with pyro.plate("data", 12):
            which = pyro.sample("which", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(torch.where(which > 0, second, first), 1.0), obs=y)

    evidence = quadrature(model, (-20.0, 20.0), (-20.0, 20.0))
    return Target(
        model,
        evidence,
        mode_of=lambda draws: (draws["first"] < draws["second"]).long(),
        masses=torch.tensor([0.5, 0.5]),
        summed_out=("which",),
    )


def jump() -> Target:
    """A discrete latent that is summed out leaves two modes of a continuous one."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 5.0))
        k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x + 8 * k, 0.5), obs=torch.tensor(4.0))

    distribution = dist.Normal(torch.tensor([0.0, 8.0]), math.sqrt(25 + 0.25))
    parts = distribution.log_prob(torch.tensor(4.0)) + torch.tensor([0.6, 0.4]).log()
    return Target(
        model,
        parts.logsumexp(0).item(),
        mode_of=lambda draws: (draws["x"] < 0).long(),
        masses=parts.softmax(0),
        summed_out=("k",),
    )


def ridge() -> Target:
    """Data of a sum only: a direction that has the width of the prior, and one a ten-thousandth."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1e-3), obs=torch.tensor(1.0))

    distribution = dist.Normal(0.0, math.sqrt(300 + 1e-6))
    return Target(model, distribution.log_prob(torch.tensor(1.0)).item())


def constant() -> Target:
    """Three latents that no datum sees, and one that has one."""

    def model() -> None:
        pyro.sample("unseen", dist.Uniform(torch.zeros(3), 5.0).to_event(1))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.7))

    return Target(model, dist.Normal(0.0, math.sqrt(2)).log_prob(torch.tensor(0.7)).item())


def at_the_edge() -> Target:
    """A rate of which zero events were seen, and a share of which all were."""

    def model() -> None:
        rate = pyro.sample("rate", dist.Exponential(1.0))
        share = pyro.sample("share", dist.Uniform(0.0, 1.0))
        pyro.sample("none", dist.Poisson(10 * rate), obs=torch.tensor(0.0))
        pyro.sample("all", dist.Binomial(50, share), obs=torch.tensor(50.0))

    return Target(model, -math.log(11) - math.log(51))


POSTERIORS: dict[str, Callable[[], Target]] = {
    "conjugate": conjugate,
    "beta-binomial": beta_binomial,
    "linear regression, D=5": partial(linear_regression, 5),
    "random walk, D=30": partial(random_walk, 30),
    "slope and scale": scale_regression,
    "logistic": logistic,
    **{
        f"eight schools, {form}": partial(eight_schools, form == "centred")
        for form in ("centred", "non-centred")
    },
    "two camps": two_camps,
    "product": product,
    "square": partial(squares, 1, 0.3),
    "squares, D=6": partial(squares, 6, 0.3),
    "labels 2 sd": partial(labels, 2.0),
    "labels 6 sd": partial(labels, 6.0),
    "jump": jump,
    "ridge": ridge,
    "unseen latents": constant,
    "at the edge": at_the_edge,
}
