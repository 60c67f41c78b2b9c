# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models of known evidence that are hard for a verdict: modes, rings, spikes, tails, funnels, edges.

Each is a constructor in ``TARGETS``. Most have a normalised posterior density (the likelihood is that
density over the prior's), so that the log evidence is 0; others have it in closed form, or by
quadrature on the unconstrained space (``known_evidences.py``).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.priors import neals_funnel, prior_as_data

Model = Callable[[], object]


@dataclass(frozen=True)
class Target:
    """A model, and what is known of its posterior.

    :param exact: a guide that is the posterior.
    :param part: a guide that is the posterior restricted to its largest mode.
    :param mode_of: the number of the mode of each draw, from draws by site.
    :param masses: the mass of each mode.
    :param summed_out: discrete sites, which Pyro's guides must not see.
    """

    model: Model
    log_evidence: float = 0.0
    exact: Model | None = None
    part: Model | None = None
    mode_of: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    masses: Tensor | None = None
    summed_out: tuple[str, ...] = ()

    def lost_mass(self, draws: Mapping[str, Tensor]) -> float:
        """The mass of the modes that have less than a tenth of their share of draws."""
        if self.mode_of is None or self.masses is None:
            return math.nan
        modes = self.mode_of(draws)
        shares = torch.bincount(modes, minlength=len(self.masses)) / len(modes)
        return self.masses[shares < 0.1 * self.masses].sum().item()


def prior_only(model: Model) -> Target:
    """A model without data: its prior is its posterior."""
    return Target(prior_as_data(model), exact=model)


def of_density(log_density: Callable[[Tensor], Tensor], dim: int, prior_scale: float) -> Model:
    """A model with a normal prior, whose posterior has a given normalised log density."""

    def model() -> None:
        prior = dist.Normal(torch.zeros(dim), prior_scale).to_event(1)
        z = pyro.sample("z", prior)
        pyro.factor("likelihood", log_density(z) - prior.log_prob(z))

    return model


def mixture(
    locs: Tensor,
    scales: float | Tensor = 1.0,
    weights: list[float] | None = None,
    prior_scale: float | None = None,
) -> Target:
    """Gaussians of equal weights unless they are given, the first one the largest.

    :param locs: shape ``(K, D)``.
    :param scales: standard deviations, of a shape that ``(K, D)`` expands.
    :param prior_scale: by default the largest of the coordinates, 3 at least.
    """
    masses = torch.tensor(weights or [1 / len(locs)] * len(locs))
    scales = torch.as_tensor(scales).expand(locs.shape)
    parts = dist.Normal(locs, scales).to_event(1)
    distribution = dist.MixtureSameFamily(dist.Categorical(masses), parts)
    prior_scale = prior_scale or max(locs.abs().max().item(), 3.0)
    model = of_density(distribution.log_prob, locs.shape[-1], prior_scale)

    def exact() -> None:
        pyro.sample("z", distribution)

    def part() -> None:
        pyro.sample("z", dist.Normal(locs[0], scales[0]).to_event(1))

    def mode_of(draws: Mapping[str, Tensor]) -> Tensor:
        return (parts.log_prob(draws["z"].unsqueeze(-2)) + masses.log()).argmax(-1)

    return Target(model, 0.0, exact, part, mode_of, masses)


def two(
    apart: float,
    dim: int,
    weight: float = 0.5,
    *,
    scales: tuple[float, float] = (1.0, 1.0),
    along: int | None = 1,
    center: float = 0.35,
) -> Target:
    """Two modes at a distance in each of the first coordinates (all of them for ``None``).

    :param center: where the origin is between the modes, from 0 (at the first) to 1.
    """
    locs = torch.zeros(2, dim)
    locs[1, :along] = apart
    locs[:, :along] -= center * apart
    return mixture(locs, torch.tensor(scales)[:, None], [weight, 1 - weight])


def around_a_main_mode(count: int, radius: float, weight: float, dim: int = 2) -> Target:
    """Modes of some weight each on a circle around a larger one."""
    angles = torch.arange(count) * (2 * math.pi / count)
    locs = torch.zeros(count + 1, dim)
    locs[1:, 0], locs[1:, 1] = radius * angles.cos(), radius * angles.sin()
    return mixture(locs, 1.0, [1 - count * weight] + [weight] * count)


def corners(dim: int, apart: float) -> Target:
    """A mode of equal weight in each corner of a cube."""
    corner = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * dim)
    return mixture(apart * corner.reshape(-1, dim))


def grid(count: int, apart: float) -> Target:
    """Modes of equal weight on a square grid."""
    line = apart * (torch.arange(count) - (count - 1) / 2)
    return mixture(torch.cartesian_prod(line, line))


def shell(radius: float, width: float, dim: int) -> Target:
    """A normal distance from the origin, in all directions: a ring in two dimensions."""
    distribution = dist.Normal(radius, width)
    area = math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(dim / 2)

    def log_density(z: Tensor) -> Tensor:
        distance = z.square().sum(-1).clamp_min(1e-12).sqrt()
        return distribution.log_prob(distance) - area - (dim - 1) * distance.log()

    return Target(of_density(log_density, dim, radius))


def spike(width: float, weight: float, dim: int, away: float = 0.0) -> Target:
    """A narrow mode inside a wide one."""
    locs = torch.zeros(2, dim)
    locs[1, 0] = away
    return mixture(locs, torch.tensor([1.0, width])[:, None], [1 - weight, weight])


def student(degrees: float, dim: int) -> Target:
    return prior_only(
        lambda: pyro.sample("z", dist.StudentT(degrees, torch.zeros(dim), 1.0).to_event(1))
    )


def joint_student(degrees: float, dim: int) -> Target:
    distribution = dist.MultivariateStudentT(
        torch.tensor(degrees), torch.zeros(dim), torch.eye(dim)
    )
    return prior_only(lambda: pyro.sample("z", distribution))


def funnel(dim: int) -> Target:
    return prior_only(partial(neals_funnel, dim - 1))


def horseshoe(dim: int) -> Target:
    def model() -> None:
        with pyro.plate("coefficients", dim):
            local = pyro.sample("local", dist.HalfCauchy(1.0))
            pyro.sample("x", dist.Normal(0.0, local))

    return prior_only(model)


def banana(bend: float, num_pairs: int = 1) -> Target:
    def model() -> None:
        with pyro.plate("pairs", num_pairs):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(bend * (x**2 - 1), 0.3))

    return prior_only(model)


def correlated(dim: int, condition: float) -> Target:
    """A Gaussian of this condition number, turned so that no coordinate is an axis of it."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    root = turn * torch.logspace(0, -0.5 * math.log10(condition), dim)
    lower = torch.linalg.qr(root.mT).R.mT
    lower = lower * lower.diagonal().sign()
    distribution = dist.MultivariateNormal(torch.ones(dim), scale_tril=lower)
    return prior_only(lambda: pyro.sample("z", distribution))


def site(distribution: dist.Distribution, size: int | None = None) -> Target:
    """One site of this distribution."""
    if size is not None:
        distribution = distribution.expand([size]).to_event(1)
    return prior_only(lambda: pyro.sample("z", distribution))


def dirichlet(concentration: float, size: int) -> Target:
    return site(dist.Dirichlet(torch.full((size,), concentration)))


def flat(size: int) -> Target:
    return prior_only(lambda: pyro.sample("z", dist.Uniform(torch.zeros(size), 1.0).to_event(1)))


def sawtooth() -> Target:
    """Seven narrow modes in a row, the outer ones small."""
    locs = 6.0 * torch.tensor([0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0])[:, None]
    return mixture(locs, 0.5, [0.28, 0.18, 0.18, 0.1, 0.1, 0.08, 0.08])


def skewed(dim: int) -> Target:
    distribution = dist.LogNormal(torch.zeros(dim), 2.0).to_event(1)
    return site(distribution)


TARGETS: dict[str, Callable[[], Target]] = {
    # what is right, and has to be trusted
    "normal, D=1": partial(site, dist.Normal(0.0, 1.0)),
    "correlated 0.9, D=20": partial(correlated, 20, 1e2),
    "log-normal 2, D=3": partial(skewed, 3),
    "gamma 2": partial(site, dist.Gamma(torch.tensor(2.0), 1.0)),
    # two modes
    **{
        f"two {apart:g} sd, {weight:g}, D={dim}": partial(two, apart, dim, weight)
        for apart, weight, dim in [
            (4.0, 0.5, 1),
            (8.0, 0.7, 1),
            (60.0, 0.5, 1),
            (4.0, 0.5, 2),
            (8.0, 0.7, 2),
            (20.0, 0.9, 2),
            (60.0, 0.5, 2),
            (6.0, 0.5, 10),
            (20.0, 0.8, 10),
            (60.0, 0.7, 10),
            (8.0, 0.5, 50),
            (20.0, 0.7, 50),
            (6.0, 0.5, 150),
            (20.0, 0.7, 150),
            (5.0, 0.5, 250),
            (8.0, 0.7, 250),
            (60.0, 0.5, 300),
        ]
    },
    "two 4 sd in each, D=10": partial(two, 4.0, 10, along=None),
    "two 2 sd in each, D=250": partial(two, 2.0, 250, along=None),
    "two, one at the origin, 30 sd, D=5": partial(two, 30.0, 5, 0.6, center=0.0),
    "two, sd 1 and 0.2, D=5": partial(two, 10.0, 5, scales=(1.0, 0.2)),
    "two, sd 1 and 5, D=5": partial(two, 40.0, 5, scales=(1.0, 5.0)),
    "two, sd 1 and 0.5, D=50": partial(two, 10.0, 50, 0.6, scales=(1.0, 0.5)),
    # many modes
    "25 of 2 %, D=2": partial(around_a_main_mode, 25, 30.0, 0.02),
    "12 of 1 %, D=10": partial(around_a_main_mode, 12, 20.0, 0.01, 10),
    "3 x 3, 8 sd": partial(grid, 3, 8.0),
    "7 in a row": sawtooth,
    "32 corners, 6 sd, D=5": partial(corners, 5, 6.0),
    "256 corners, 8 sd, D=8": partial(corners, 8, 8.0),
    # shapes
    "ring 5 ± 0.3": partial(shell, 5.0, 0.3, 2),
    "ring 20 ± 0.2": partial(shell, 20.0, 0.2, 2),
    "shell 5 ± 0.3, D=5": partial(shell, 5.0, 0.3, 5),
    "spike 0.01, D=1": partial(spike, 0.01, 0.3, 1),
    "spike 0.05, D=2": partial(spike, 0.05, 0.3, 2, 1.0),
    "spike 0.1, D=5": partial(spike, 0.1, 0.3, 5, 1.0),
    "spike 0.15, D=6": partial(spike, 0.15, 0.5, 6),
    "banana": partial(banana, 1.0),
    "bananas, D=10": partial(banana, 1.0, 5),
    "funnel, D=2": partial(funnel, 2),
    "funnel, D=10": partial(funnel, 10),
    "funnel, D=30": partial(funnel, 30),
    "horseshoe, D=6": partial(horseshoe, 3),
    # tails
    "Cauchy, D=1": partial(student, 1.0, 1),
    "Cauchy, D=3": partial(student, 1.0, 3),
    "Student 3, D=10": partial(student, 3.0, 10),
    "joint Student 2, D=5": partial(joint_student, 2.0, 5),
    "Laplace, D=5": partial(site, dist.Laplace(0.0, 1.0), 5),
    # condition numbers
    "condition 1e10, D=2": partial(correlated, 2, 1e10),
    "condition 1e10, D=20": partial(correlated, 20, 1e10),
    # edges
    "beta 0.3": partial(site, dist.Beta(torch.tensor(0.3), 0.3)),
    "beta 0.5, D=5": partial(site, dist.Beta(torch.tensor(0.5), 0.5), 5),
    "half-Cauchy": partial(site, dist.HalfCauchy(1.0)),
    "Dirichlet 0.2, K=3": partial(dirichlet, 0.2, 3),
    "Dirichlet 0.2, K=10": partial(dirichlet, 0.2, 10),
    "uniform, D=10": partial(flat, 10),
}
