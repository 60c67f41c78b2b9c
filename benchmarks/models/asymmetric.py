# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models whose components look as if they had no names, but that have no symmetry.

Each is a constructor. Data are those of the symmetric models, or simulated, or the eight schools.
"""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from pyro.infer import config_enumerate
from torch import Tensor

from models import factor_models, labels
from models.hierarchies import EFFECTS, ERRORS
from models.library import tensors
from models.symmetry import Numbers, Symmetric, data

Model = Callable[..., None]


def without(model: Model, *args: Tensor) -> Symmetric:
    """A model that has no symmetry."""
    return Symmetric(model, args, frozenset())


def ordered_mixture() -> Symmetric:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
        mu = pyro.sample("mu", dist.TransformedDistribution(base, [OrderedTransform()]))
        s = pyro.sample("s", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
        parts = dist.Normal(mu.unsqueeze(-2), s.unsqueeze(-2))
        with pyro.plate("n", len(y)):
            mixture = dist.MixtureSameFamily(dist.Categorical(w.unsqueeze(-2)), parts)
            pyro.sample("y", mixture, obs=y)

    return without(model, *labels.mixture().args)


def unequal_priors() -> Symmetric:
    """A mixture of which each mean has a prior of its own."""

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("k", 3):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 0.0, 2.0]), 2.0))
            s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("n", len(y)):
            mixture = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, s))
            pyro.sample("y", mixture, obs=y)

    return without(model, *labels.mixture().args)


def unequal_weights() -> Symmetric:
    """A mixture of known shares, enumerated."""

    @config_enumerate
    def model(y: Tensor) -> None:
        with pyro.plate("k", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("n", len(y)):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.4, 0.35, 0.25])))
            pyro.sample("y", dist.Normal(mu[kind], s[kind]), obs=y)

    return without(model, *labels.mixture().args)


def weak_covariate() -> Symmetric:
    """Two components, of which a covariate makes the second one a little likelier."""
    by = Numbers(20)
    x, y = by.normal(100), by.normal(100) + 4 * (torch.arange(100) % 2)

    def model(x: Tensor, y: Tensor) -> None:
        logit = pyro.sample("logit", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("k", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        slopes = torch.tensor([0.0, 0.05])
        kind = dist.Categorical(logits=logit.unsqueeze(-2) + slopes * x.unsqueeze(-1))
        parts = dist.Normal(mu.unsqueeze(-2), 1.0)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(kind, parts), obs=y)

    return without(model, *data(x, y))


def triangular_factors(P: int = 6, N: int = 30) -> Symmetric:
    """Loadings below a positive diagonal: neither names nor signs nor directions are free."""

    def model(y: Tensor) -> None:
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        diagonal = pyro.sample("diagonal", dist.HalfNormal(torch.ones(2)).to_event(1))
        below = pyro.sample("below", dist.Normal(torch.zeros(2 * P - 3), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.zeros(N, 2), 1.0).to_event(2))
        first = torch.cat([diagonal[..., :1], below[..., : P - 1]], -1)
        second = [torch.zeros_like(first[..., :1]), diagonal[..., 1:], below[..., P - 1 :]]
        loadings = torch.stack([first, torch.cat(second, -1)], -2)
        pyro.sample("y", dist.Normal(z @ loadings, noise[..., None, None]).to_event(2), obs=y)

    return without(model, *factor_models.isotropic_factors(P=P, N=N).args)


def informed_rows() -> Symmetric:
    """A hidden Markov model whose transitions have different priors by state."""

    def model(y: Tensor) -> None:
        prior = torch.tensor([[8.0, 1.0, 1.0], [1.0, 4.0, 4.0], [2.0, 2.0, 2.0]])
        A = pyro.sample("A", dist.Dirichlet(prior).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        emission = dist.Normal(mu.unsqueeze(-2), sigma[..., None, None])
        steps = A.log().unsqueeze(-3)
        pyro.sample("y", dist.DiscreteHMM(torch.zeros(3), steps, emission, len(y)), obs=y)

    return without(model, *labels.hidden_markov().args)


def groups() -> Symmetric:
    """The eight schools: groups with data of their own."""

    def model(y: Tensor, error: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, error), obs=y)

    return without(model, *tensors(EFFECTS, ERRORS))


def seeded_topics(K: int = 3, V: int = 12, D: int = 20) -> Symmetric:
    """Topics, each with a word that its prior expects."""

    def model(c: Tensor) -> None:
        with pyro.plate("t", K):
            phi = pyro.sample("phi", dist.Dirichlet(0.5 + torch.eye(K, V)))
        with pyro.plate("d", D):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((K,), 0.5)))
        pyro.factor("words", ((theta @ phi).log() * c).sum((-1, -2)))

    return without(model, *labels.topics(K, V, D).args)


def exchangeable_slopes() -> Symmetric:
    """Slopes with a common prior, of columns that are similar."""
    by = Numbers(21)
    x = by.normal(40, 1) + 0.5 * by.normal(40, 4)
    y = x.sum(-1) + by.normal(40)

    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("columns", 4):
            slopes = pyro.sample("slopes", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(slopes @ x.T, 1.0).to_event(1), obs=y)

    return without(model, *data(x, y))


def informed_annotators(K: int = 4, J: int = 5, I: int = 45) -> Symmetric:  # noqa: E741
    """Annotators who are expected to be right."""

    def model(y: Tensor) -> None:
        pi = pyro.sample("pi", dist.Dirichlet(torch.ones(K)))
        with pyro.plate("j", J, dim=-2), pyro.plate("c", K, dim=-1):
            beta = pyro.sample("beta", dist.Dirichlet(1 + torch.eye(K)))
        of_answers = [beta[..., j, :, :].log()[..., y[:, j]].transpose(-1, -2) for j in range(J)]
        of_classes = pi.log()[..., None, :] + sum(of_answers)
        pyro.factor("answers", of_classes.logsumexp(-1).sum(-1))

    return without(model, *labels.annotators(K, J, I).args)


def reference_class(K: int = 4) -> Symmetric:
    """A softmax regression, whose last class is the reference."""
    by = Numbers(22)
    x = by.normal(60, 3)
    y = by.categorical((x @ by.normal(3, K)).softmax(-1), 1).squeeze(-1)

    def model(x: Tensor, y: Tensor) -> None:
        prior = dist.Normal(torch.zeros(3, K - 1), 1.0).to_event(2)
        logits = x @ pyro.sample("slopes", prior)
        logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], -1)
        pyro.sample("y", dist.Categorical(logits=logits).to_event(1), obs=y)

    return without(model, *data(x, y))


def fixed_outputs(H: int = 4) -> Symmetric:
    """A hidden layer with known and distinct output weights."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, H), 1.0).to_event(2))
        b = pyro.sample("b", dist.Normal(torch.zeros(H), 1.0).to_event(1))
        mean = torch.tanh(x @ w + b.unsqueeze(-2)) @ torch.linspace(0.5, 1.5, H)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    return without(model, *factor_models.network().args)
