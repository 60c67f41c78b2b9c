# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Factors, networks and small models whose signs, directions or level the data do not know.

Each is a constructor. Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from models.symmetry import (
    Numbers,
    Symmetric,
    Symmetry,
    data,
    permutation,
    rotation,
    sign,
    signed_permutation,
    slot,
)


def factors(K: int = 2, P: int = 8, N: int = 60) -> Symmetric:
    """Factors with scales of different priors: they have names, but no signs."""
    by = Numbers(3)
    loadings = by.normal(K, P) * torch.tensor([[2.0], [1.0]])
    y = by.normal(N, K) @ loadings + 0.5 * by.normal(N, P)

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Gamma(torch.tensor([4.0, 2.0]), 2.0).to_event(1))
        scale = a[..., :, None].expand(*a.shape, P)
        W = pyro.sample("W", dist.Normal(0.0, scale).to_event(2))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(N, K), 1.0).to_event(2))
        pyro.sample("y", dist.Normal(z @ W, s[..., None, None]).to_event(2), obs=y)

    return Symmetric(model, data(y), frozenset({sign(K, slot("W", -2), slot("z", -1))}))


def network(H: int = 5) -> Symmetric:
    """A hidden layer of tanh units."""
    by = Numbers(4)
    x = by.normal(80, 2)
    y = torch.sin(1.5 * x[:, 0]) * x[:, 1] + 0.1 * by.normal(80)

    def model(x: Tensor, y: Tensor) -> None:
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(2, H), 1.0).to_event(2))
        b1 = pyro.sample("b1", dist.Normal(torch.zeros(H), 1.0).to_event(1))
        w2 = pyro.sample("w2", dist.Normal(torch.zeros(H), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(0.5))
        units = torch.tanh(x @ w1 + b1[..., None, :])
        mean = (units * w2[..., None, :]).sum(-1)
        pyro.sample("y", dist.Normal(mean, s[..., None]).to_event(1), obs=y)

    slots = slot("w1", -1), slot("b1", -1), slot("w2", -1)
    return Symmetric(model, data(x, y), frozenset({signed_permutation(H, *slots)}))


def bimodal() -> Symmetric:
    """A square is seen, so that the sign is not."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(a**2, 0.3), obs=torch.tensor(2.0))

    return Symmetric(model, (), frozenset({sign(1, slot("a"))}))


class TwoLayers(PyroModule):  # type: ignore[misc]
    """A network of two hidden layers of the same size."""

    def __init__(self, H: int) -> None:
        super().__init__()
        shapes = {"w1": (2, H), "b1": (H,), "w2": (H, H), "b2": (H,), "w3": (H, 1)}
        for name, shape in shapes.items():
            prior = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
            setattr(self, name, PyroSample(prior))

    def forward(self, x: Tensor, y: Tensor) -> None:
        first = torch.tanh(x @ self.w1 + self.b1.unsqueeze(-2))
        second = torch.tanh(first @ self.w2 + self.b2.unsqueeze(-2))
        mean = (second @ self.w3).squeeze(-1)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


def two_layers(H: int = 3) -> Symmetric:
    """The units of either layer are permuted and change signs, those of the other as they are."""
    by = Numbers(12)
    x = by.normal(60, 2)
    y = torch.sin(1.5 * x[:, 0]) * x[:, 1] + 0.3 * by.normal(60)
    first, second = (
        (slot("w1", -1), slot("b1", -1), slot("w2", -2)),
        (slot("w2", -1), slot("b2", -1), slot("w3", -2)),
    )
    found = {signed_permutation(H, *slots) for slots in (first, second)}
    return Symmetric(TwoLayers(H), data(x, y), frozenset(found))


def sparse_factors(K: int = 2, P: int = 6, N: int = 40) -> Symmetric:
    """Laplace loadings single out the axes: names and signs are free, directions are not."""
    by = Numbers(13)
    loadings = torch.tensor([[2.0, 1.5, -1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, -2.0, 1.5]])
    y = by.normal(N, K) @ loadings.double() + 0.5 * by.normal(N, P)

    def model(y: Tensor) -> None:
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("factors", K, dim=-2):
            with pyro.plate("items", P, dim=-1):
                loadings = pyro.sample("loadings", dist.Laplace(0.0, 1.0))
            with pyro.plate("persons", N, dim=-1):
                scores = pyro.sample("scores", dist.Normal(0.0, 1.0))
        mean = scores.transpose(-1, -2) @ loadings
        with pyro.plate("rows", N, dim=-2), pyro.plate("columns", P, dim=-1):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    slots = slot("loadings", -2), slot("scores", -2)
    return Symmetric(model, data(y), frozenset({signed_permutation(K, *slots)}))


def isotropic_factors(K: int = 2, P: int = 6, N: int = 30) -> Symmetric:
    """Normal loadings and scores: factors may be turned."""
    by = Numbers(14)
    y = by.normal(N, K) @ by.normal(K, P) + 0.5 * by.normal(N, P)

    def model(y: Tensor) -> None:
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("items", P):
            loadings = pyro.sample("loadings", dist.Normal(torch.zeros(K), 1.0).to_event(1))
        with pyro.plate("rows", N):
            scores = pyro.sample("scores", dist.Normal(torch.zeros(K), 1.0).to_event(1))
            mean = scores @ loadings.transpose(-1, -2)
            pyro.sample("y", dist.Normal(mean, noise[..., None, None]).to_event(1), obs=y)

    turned = rotation(K, slot("loadings", -1), slot("scores", -1))
    return Symmetric(model, data(y), frozenset({turned}))


def product() -> Symmetric:
    """Only a product is seen. The two may be exchanged, too, which changes no mode."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * b, 0.3), obs=torch.tensor(2.0))

    return Symmetric(model, (), frozenset({sign(1, slot("a"), slot("b"))}))


def exchangeable_pair() -> Symmetric:
    """A sum is seen: there is one mode, which contains both images of a draw."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(a.sum(-1), 1.0), obs=torch.tensor(1.5))

    return Symmetric(model, (), frozenset({permutation(2, slot("a", -1))}))


def games(num_players: int = 6, count: int = 60) -> tuple[Tensor, ...]:
    """Winners and losers."""
    by = Numbers(15)
    skills = torch.linspace(-1.5, 1.5, num_players).double()
    first = by.integers(num_players, count)
    second = (first + 1 + by.integers(num_players - 1, count)) % num_players
    wins = by.uniform(count) < torch.sigmoid(skills[first] - skills[second])
    return torch.where(wins, first, second), torch.where(wins, second, first)


def bradley_terry(prior: dist.Distribution, symmetries: frozenset[Symmetry]) -> Symmetric:
    def model(winner: Tensor, loser: Tensor) -> None:
        skill = pyro.sample("skill", prior)
        logits = skill[..., winner] - skill[..., loser]
        with pyro.plate("games", len(winner)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=torch.ones(len(winner)))

    return Symmetric(model, games(), symmetries)


def bradley_terry_flat() -> Symmetric:
    """Skills in games without a prior: the data know differences only. Shifts are not looked for."""
    flat = dist.ImproperUniform(dist.constraints.real_vector, (), (6,))
    return bradley_terry(flat, frozenset())


def bradley_terry_normal() -> Symmetric:
    return bradley_terry(dist.Normal(torch.zeros(6), 1.0).to_event(1), frozenset())
