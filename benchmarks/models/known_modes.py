# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors of several modes, none of which is an image of another one, with exact shares and evidence.

Each is a constructor in ``TARGETS``. Modes are far apart: next to no mass is beyond the edges of its own.
"""

from collections.abc import Callable, Mapping
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.known_densities import Model, Target, mixture, of_density
from models.known_evidences import quadrature
from pyro_artransform.model import LogJoint


def shares(model: Model, edges: tuple[float, ...], low: float, high: float) -> Tensor:
    """The mass between edges of the only latent, a real one, by quadrature from low to high."""
    grid = torch.linspace(low, high, 100_001)
    with torch.no_grad():
        density = torch.cat([LogJoint(model)(part[:, None]) for part in grid.split(20_000)])
    density = density.double().softmax(0)
    return density.new_zeros(len(edges) + 1).index_add(0, number_of(grid, edges), density)


def number_of(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    return torch.bucketize(values.contiguous(), values.new_tensor(edges))


def of_one_latent(model: Model, edges: tuple[float, ...], low: float, high: float) -> Target:
    """Modes of a real latent ``z`` between edges."""
    return Target(
        model,
        quadrature(model, (low, high), count=20_001),
        mode_of=lambda draws: number_of(draws["z"], edges),
        masses=shares(model, edges, low, high),
    )


def square(loc: float) -> Target:
    """A square is seen, and the prior knows a little of the sign."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z**2, 0.3), obs=torch.tensor(2.0))

    return of_one_latent(model, (0.0,), -6.0, 6.0)


def camps() -> Target:
    """A location with heavy tails, of which half of the data are nearer to each other."""
    y = torch.tensor([-10.3, -9.7, -9.9, -10.1, 10.1, 9.8, 10.0, 10.05])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.StudentT(2.0, z, 0.5), obs=y)

    return of_one_latent(model, (0.0,), -30.0, 30.0)


def cubic() -> Target:
    """A cubic that has the value that is seen three times, with different slopes there."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.5, 2.0))
        pyro.sample("y", dist.Normal(z * (z - 2) * (z + 3), 0.5), obs=torch.tensor(-1.0))

    return of_one_latent(model, (-1.7, 1.0), -8.0, 8.0)


def islands(dim: int, ratio: float, widths: tuple[float, float] = (1.0, 1.0)) -> Target:
    """Two Gaussians of so many sds apart that none of their draws is between them."""
    locs = torch.zeros(2, dim)
    locs[0, 0], locs[1, 0] = -6.0, 6.0
    weights = [ratio / (1 + ratio), 1 / (1 + ratio)]
    return mixture(locs, torch.tensor(widths)[:, None], weights)


def curved(dim: int, ratio: float, bend: float = 0.3) -> Target:
    """Two bananas that bend towards each other, of which the second one is half as wide.

    Each is a Gaussian whose second coordinate is moved by the square of its first.
    """
    loc = torch.zeros(2, dim)
    loc[0, 1], loc[1, 1] = -8.0, 8.0
    bends, scales = torch.tensor([bend, -bend]), torch.tensor([1.0, 0.5])
    masses = torch.tensor([ratio / (1 + ratio), 1 / (1 + ratio)])
    parts = dist.Normal(torch.zeros(2, dim), scales[:, None]).to_event(1)

    def by_mode(z: Tensor) -> Tensor:
        white = z.unsqueeze(-2) - loc
        moved = white[..., 1] - bends * (white[..., 0].square() - scales.square())
        white = torch.cat([white[..., :1], moved.unsqueeze(-1), white[..., 2:]], -1)
        return parts.log_prob(white) + masses.log()

    def mode_of(draws: Mapping[str, Tensor]) -> Tensor:
        return by_mode(draws["z"]).argmax(-1)

    model = of_density(lambda z: by_mode(z).logsumexp(-1), dim, 8.0)
    return Target(model, 0.0, mode_of=mode_of, masses=masses)


TARGETS: dict[str, Callable[[], Target]] = {
    "square": partial(square, 0.3),
    "cubic": cubic,
    "camps": camps,
    "islands 3:1, D=2": partial(islands, 2, 3.0),
    "islands 30:1, D=10": partial(islands, 10, 30.0),
    "islands 300:1, D=50": partial(islands, 50, 300.0),
    "widths 3:1, D=10": partial(islands, 10, 3.0, (1.0, 0.2)),
    "curved 3:1, D=2": partial(curved, 2, 3.0),
    "curved 30:1, D=10": partial(curved, 10, 30.0),
    "curved 300:1, D=50": partial(curved, 50, 300.0),
}
