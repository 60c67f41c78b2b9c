# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors that are hard for chains, each in regions of known shares.

Shares are known by symmetry, in closed form, or by quadrature; each is a constructor in ``TARGETS``.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations
from operator import itemgetter
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.nn.functional import softplus

from models import known_densities as known
from models.priors import funnel_by_factor, prior_as_data

#: of regions in the tails, between which are the other draws
TAILS = (0.1, 0.8, 0.1)
Draws = Mapping[str, Tensor]


class Target(NamedTuple):
    """A model, the number of the region of each draw, and the exact share of each region.

    :param region: from draws of each site, ``(num_chains, n) + site shape``, to integers ``(num_chains, n)``.
    :param exact: empty where there is no posterior, so that no draws are right.
    """

    model: Callable[[], object]
    region: Callable[[Draws], Tensor]
    exact: tuple[float, ...]

    def shares(self, draws: Draws) -> tuple[float, ...]:
        regions = self.region(draws).flatten()
        return tuple((regions == k).double().mean().item() for k in range(len(self.exact)))

    def is_wrong(self, shares: tuple[float, ...], num_draws: int, errors: float = 4.0) -> bool:
        """Whether a share is off by more than some standard errors of independent draws."""
        allowed = [errors * math.sqrt(p * (1 - p) / num_draws) for p in self.exact]
        off = [abs(share - p) for share, p in zip(shares, self.exact, strict=True)]
        return not off or any(a > b for a, b in zip(off, allowed, strict=True))


def cut(values: Callable[[Draws], Tensor], *edges: float) -> Callable[[Draws], Tensor]:
    """Regions of a scalar between edges."""

    def region(draws: Draws) -> Tensor:
        found = values(draws).contiguous()
        return torch.bucketize(found, found.new_tensor(edges))

    return region


def first(draws: Draws) -> Tensor:
    return draws["z"][..., 0]


def quantiles(log_density: Callable[[Tensor], Tensor], low: float, high: float) -> list[float]:
    """The quantiles that leave ``TAILS`` outside, by quadrature of a log density."""
    grid = torch.linspace(low, high, 1_000_001, dtype=torch.float64)
    cdf = log_density(grid).softmax(0).cumsum(0)
    return [grid[(cdf >= p).nonzero()[0, 0]].item() for p in (TAILS[0], 1 - TAILS[2])]


def labels(site: str, truth: Tensor) -> Callable[[Draws], Tensor]:
    """Which names the components of a site have, as numbers of permutations.

    :param truth: the components, of shape ``(K, D)``.
    """
    orders = torch.tensor([*permutations(range(len(truth)))])

    def region(draws: Draws) -> Tensor:
        products = draws[site].reshape(*draws[site].shape[:2], *truth.shape) @ truth.mT
        return products[..., torch.arange(len(truth)), orders].sum(-1).argmax(-1)

    return region


def mixture(of: Callable[[], known.Target]) -> Target:
    """Modes whose shares are their masses, up to 0.002 that is nearer to another one."""
    target = of()
    return Target(target.model, target.mode_of, tuple(target.masses.tolist()))


def narrow(loc: float, scale: float) -> known.Target:
    """A narrow mode of mass 0.3, inside of a wide one or far from the bulk of the prior."""
    scales = torch.tensor([[1.0], [scale]])
    return known.mixture(torch.tensor([[0.0], [loc]]), scales, [0.7, 0.3], prior_scale=10.0)


def beside(dim: int) -> known.Target:
    """A mode where the model starts, and one of mass 0.3 at a distance of 20 sds, two of the prior."""
    locs = torch.stack([torch.zeros(dim), torch.full((dim,), 20 / math.sqrt(dim))])
    return known.mixture(locs, torch.ones(2, dim), [0.7, 0.3], prior_scale=10.0)


def swapped() -> Target:
    """Three Gaussians, whose names have six orders."""
    torch.manual_seed(2)
    truth = torch.tensor([-3.0, 0.0, 4.0])
    data = truth.repeat_interleave(torch.tensor([40, 30, 50])) + 0.7 * torch.randn(120)

    @config_enumerate
    def model() -> None:
        weights = pyro.sample("weights", dist.Dirichlet(2 * torch.ones(3)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        with pyro.plate("data", len(data)):
            kind = pyro.sample("kind", dist.Categorical(weights.unsqueeze(-2)))
            loc = Vindex(locs.unsqueeze(-2))[..., kind]
            pyro.sample("y", dist.Normal(loc, scale.unsqueeze(-1)), obs=data)

    return Target(model, labels("locs", truth[:, None]), (1 / 6,) * 6)


def topics(documents: int = 20, words: int = 25, length: int = 100) -> Target:
    """Topics of documents, summed out word by word: six orders of their names."""
    torch.manual_seed(0)
    truth = dist.Dirichlet(torch.full((3, words), 0.2)).sample()
    of_documents = dist.Dirichlet(torch.full((documents, 3), 0.5)).sample()
    counts = dist.Multinomial(length, of_documents @ truth).sample()

    def model() -> None:
        phi = pyro.sample("phi", dist.Dirichlet(torch.full((3, words), 0.2)).to_event(1))
        theta = pyro.sample("theta", dist.Dirichlet(torch.full((documents, 3), 0.5)).to_event(1))
        probs = dist.Multinomial(length, theta @ phi, validate_args=False)
        pyro.sample("counts", probs.to_event(1), obs=counts)

    return Target(model, labels("phi", truth), (1 / 6,) * 6)


def signs(rows: int = 30) -> Target:
    """One factor, whose loadings and scores may both change their sign."""
    torch.manual_seed(1)
    truth = torch.tensor([1.0, -1.5, 0.8, 1.2, -0.7])
    data = torch.randn(rows, 1) * truth + 0.5 * torch.randn(rows, 5)

    def model() -> None:
        loadings = pyro.sample("loadings", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        scores = pyro.sample("scores", dist.Normal(torch.zeros(rows), 1.0).to_event(1))
        loc = scores.unsqueeze(-1) * loadings.unsqueeze(-2)
        pyro.sample("y", dist.Normal(loc, 0.5).to_event(2), obs=data)

    return Target(model, cut(lambda draws: draws["loadings"] @ truth, 0.0), (0.5, 0.5))


def funnel() -> Target:
    edges = quantiles(dist.Normal(0.0, 3.0).log_prob, -30.0, 30.0)
    return Target(funnel_by_factor, cut(itemgetter("v"), *edges), TAILS)


def cauchy(dim: int = 10) -> Target:
    """Latents without variance, of which data tell nothing more; regions of the largest of them."""
    model = prior_as_data(lambda: pyro.sample("z", dist.Cauchy(torch.zeros(dim), 1.0).to_event(1)))
    edges = [math.tan(math.pi / 2 * p ** (1 / dim)) for p in (TAILS[0], 1 - TAILS[2])]
    return Target(model, cut(lambda draws: draws["z"].abs().amax(-1), *edges), TAILS)


def ring() -> Target:
    """A ring 200 times as wide as thin, by quarters."""

    def region(draws: Draws) -> Tensor:
        x, y = draws["z"].unbind(-1)
        return 2 * (x > 0).long() + (y > 0).long()

    return Target(known.shell(20.0, 0.1, 2).model, region, (0.25,) * 4)


def banana() -> Target:
    """A parabola of a width of 0.02."""

    def log_density(z: Tensor) -> Tensor:
        x, y = z.unbind(-1)
        return dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(5 * x**2, 0.02).log_prob(y)

    edges = quantiles(dist.Normal(0.0, 1.0).log_prob, -10.0, 10.0)
    return Target(known.of_density(log_density, 2, 10.0), cut(first, *edges), TAILS)


def change(num_times: int = 60) -> Target:
    """A change of level, smooth, whose two places are apart by a few data of the other level."""
    times = torch.arange(float(num_times))
    is_after = (times >= 20) & ((times < 30) | (times >= 39))
    data = 2.5 * is_after + 0.7 * (-1) ** times

    def after(place: Tensor) -> Tensor:
        return ((times - place.unsqueeze(-1)) / 0.5).sigmoid()

    def model() -> None:
        place = pyro.sample("place", dist.Uniform(0.0, float(num_times)))
        levels = pyro.sample("levels", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        before, step = levels[..., :1], levels[..., 1:]
        pyro.sample("y", dist.Normal(before + step * after(place), 1.0).to_event(1), obs=data)

    places = torch.linspace(0.0, num_times, 6001)
    effects = torch.stack([torch.ones(6001, num_times), after(places)], -1)
    # both levels are summed out
    of_data = dist.LowRankMultivariateNormal(
        torch.zeros(num_times), 3 * effects, torch.ones(num_times)
    )
    share = of_data.log_prob(data).softmax(0)[places < 29].sum().item()
    return Target(model, cut(itemgetter("place"), 29.0), (share, 1 - share))


def outlier(size: float) -> Target:
    """A local level, whose outlier is of the data or of the level."""
    data = torch.tensor([0.3, 1.2, -0.4, 0.9, 1.8, 0.5, size, 1.1, 2.3, 1.4, 0.2, 1.7])
    num_times = len(data)

    def model() -> None:
        q = pyro.sample("q", dist.HalfCauchy(25.0))
        r = pyro.sample("r", dist.HalfCauchy(25.0))
        level: float | Tensor = 0.0
        for t in range(num_times):
            level = pyro.sample(f"level_{t}", dist.Normal(level, q if t else 25.0))
            pyro.sample(f"y_{t}", dist.Normal(level, r), obs=data[t])

    # levels are summed out, on a grid of the logarithms of both scales
    grid = torch.linspace(-10.0, 20.0, 301, dtype=torch.float64)
    q, r = (x[..., None, None] for x in torch.meshgrid(grid, grid, indexing="ij"))
    steps = torch.arange(num_times, dtype=torch.float64)
    covariance = 625 + (2 * q).exp() * torch.minimum(steps[:, None], steps)
    covariance = covariance + (2 * r).exp() * torch.eye(num_times)
    prior = sum(dist.HalfCauchy(25.0).log_prob(x.exp()) + x for x in (q, r))[..., 0, 0]
    of_data = dist.MultivariateNormal(torch.zeros(num_times, dtype=torch.float64), covariance)
    density = (of_data.log_prob(data.double()) + prior).flatten().softmax(0)
    share = density[(q < r).flatten()].sum().item()
    return Target(model, cut(lambda draws: draws["q"] / draws["r"], 1.0), (share, 1 - share))


def boundary() -> Target:
    """A uniform latent, whose data are twenty sds beyond its bound."""

    def model() -> None:
        z = pyro.sample("z", dist.Uniform(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.01), obs=torch.tensor(1.2))

    edges = quantiles(lambda z: dist.Normal(1.2, 0.01).log_prob(z), 0.98, 1.0)
    return Target(model, cut(itemgetter("z"), *edges), TAILS)


def both_ends(power: float = 0.1) -> Target:
    """A uniform latent with a beta density by factor, most of which is next to both bounds."""

    def model() -> None:
        z = pyro.sample("z", dist.Uniform(0.0, 1.0))
        pyro.factor("ends", dist.Beta(power, power).log_prob(z))

    edges = (1e-4, 1 - 1e-4)
    x = torch.linspace(-300.0, 300.0, 1_000_001, dtype=torch.float64)  # the logit
    density = (-power * (softplus(x) + softplus(-x))).softmax(0)
    end = density[x < math.log(edges[0] / edges[1])].sum().item()
    return Target(model, cut(itemgetter("z"), *edges), (end, 1 - 2 * end, end))


def by_factor(log_factor: Callable[[Tensor], Tensor], dim: int, scale: float = 1.0) -> known.Model:
    """Independent normals, and a factor of them."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), scale).to_event(1))
        pyro.factor("data", log_factor(z))

    return model


def step(height: float = 5.0, edge: float = 2.0) -> Target:
    """Twenty normals, with so many nats more where the first is large, which no gradient shows."""
    below, above = (0.5 * math.erfc(x / math.sqrt(2)) for x in (-edge, edge))
    share = below / (below + above * math.exp(height))
    model = by_factor(lambda z: height * (z[..., 0] > edge), 20)
    return Target(model, cut(first, edge), (share, 1 - share))


def cliff(edge: float = 3.0, dim: int = 5) -> Target:
    """Normals whose sum is above a bound, outside of the bulk of the prior."""
    model = by_factor(lambda z: torch.where(z.sum(-1) > edge, 0.0, -torch.inf), dim)
    edges = quantiles(dist.Normal(0.0, math.sqrt(dim)).log_prob, edge, 30.0)
    return Target(model, cut(lambda draws: draws["z"].sum(-1), *edges), TAILS)


def islands() -> Target:
    """Two parts of a normal, between which there is no density."""
    model = by_factor(lambda z: torch.where(z[..., 0].abs() > 6, 0.0, -torch.inf), 2, 3.0)
    return Target(model, cut(first, 0.0), (0.5, 0.5))


def improper() -> Target:
    """Two latents of which the data know the sum: there is no posterior."""

    def model() -> None:
        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        a, b = pyro.sample("a", flat), pyro.sample("b", flat)
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))

    return Target(model, cut(itemgetter("a")), ())


TARGETS: dict[str, Callable[[], Target]] = {
    "two modes, 0.9": partial(mixture, partial(known.two, 8.0, 1, 0.9)),
    "two modes, 0.5": partial(mixture, partial(known.two, 8.0, 1, 0.5)),
    "two modes of 21 latents, 0.9": partial(mixture, partial(known.two, 8.0, 21, 0.9)),
    "two modes of 21 latents, 0.5": partial(mixture, partial(known.two, 8.0, 21, 0.5)),
    "a mode beside the start": partial(mixture, partial(beside, 2)),
    "a mode beside the start, 10 latents": partial(mixture, partial(beside, 10)),
    "a spike in a slab": partial(mixture, partial(narrow, 0.0, 1e-3)),
    "a narrow mode far away": partial(mixture, partial(narrow, 40.0, 0.01)),
    "swapped labels": swapped,
    "topics": topics,
    "signs of a factor": signs,
    "a funnel by factor": funnel,
    "Cauchy tails": cauchy,
    "a thin ring": ring,
    "a thin banana": banana,
    "a change at two places": change,
    "an outlier of 1e6": partial(outlier, 1e6),
    "an outlier of 1e3": partial(outlier, 1e3),
    "at a bound": boundary,
    "at both bounds": both_ends,
    "a step": step,
    "a cliff": cliff,
    "two islands": islands,
    "improper": improper,
}
