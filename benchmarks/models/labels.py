# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures, classes and topics, whose components have no names of their own.

Each is a constructor. Data are simulated.
"""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.nn.functional import one_hot

from models.symmetry import Numbers, Symmetric, data, permutation, slot


def mixture() -> Symmetric:
    """A mixture of three Gaussians."""
    by = Numbers(0)
    parts = by.normal(50) * 0.7 - 3, by.normal(40), by.normal(30) * 0.8 + 3

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("k", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("n", len(y)):
            mixture = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, s))
            pyro.sample("y", mixture, obs=y)

    names = permutation(3, slot("w", -1), slot("mu", -1), slot("s", -1))
    return Symmetric(model, data(torch.cat(parts)), frozenset({names}))


def annotators(K: int = 4, J: int = 5, I: int = 45) -> Symmetric:  # noqa: E741
    """Annotators with errors of their own (Dawid and Skene, 1979); their answers have names."""
    by = Numbers(1)
    truth = by.integers(K, I)
    is_right = by.uniform(I, J) < 0.7
    answers = torch.where(is_right, truth[:, None], by.integers(K, I, J))

    def model(y: Tensor) -> None:
        pi = pyro.sample("pi", dist.Dirichlet(torch.ones(K)))
        with pyro.plate("j", J, dim=-2), pyro.plate("c", K, dim=-1):
            beta = pyro.sample("beta", dist.Dirichlet(torch.ones(K)))
        of_answers = [beta[..., j, :, :].log()[..., y[:, j]].transpose(-1, -2) for j in range(J)]
        of_classes = pi.log()[..., None, :] + sum(of_answers)
        pyro.factor("answers", of_classes.logsumexp(-1).sum(-1))

    names = permutation(K, slot("pi", -1), slot("beta", -2))
    return Symmetric(model, data(answers), frozenset({names}))


def topics(K: int = 3, V: int = 12, D: int = 20, length: int = 40) -> Symmetric:
    """Topics of documents, by the counts of their words."""
    by = Numbers(2)
    phi = by.dirichlet(torch.full((K, V), 0.3))
    theta = by.dirichlet(torch.full((D, K), 0.4))
    counts = one_hot(by.categorical(theta @ phi, length), V).sum(-2).double()

    def model(c: Tensor) -> None:
        with pyro.plate("t", K):
            phi = pyro.sample("phi", dist.Dirichlet(torch.full((V,), 0.5)))
        with pyro.plate("d", D):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((K,), 0.5)))
        pyro.factor("words", ((theta @ phi).log() * c).sum((-1, -2)))

    names = permutation(K, slot("phi", -2), slot("theta", -1))
    return Symmetric(model, data(counts), frozenset({names}))


def mixture_enumerated() -> Symmetric:
    """A mixture of three as in a tutorial of Pyro, whose assignments are enumerated."""
    rng = np.random.default_rng(2)
    parts = [rng.normal(loc, 0.7, count) for loc, count in ((-3, 40), (0, 30), (4, 50))]

    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(2 * torch.ones(3)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(locs[k], scale), obs=y)

    names = permutation(3, slot("weights", -1), slot("locs", -1))
    return Symmetric(model, data(torch.as_tensor(np.concatenate(parts))), frozenset({names}))


def hmm_chain(locs: list[float], A: list[list[float]], noise: float, count: int) -> Tensor:
    rng, state = np.random.default_rng(4), [0]
    for _ in range(count - 1):
        state.append(rng.choice(len(locs), p=A[state[-1]]))
    return torch.as_tensor(np.array(locs)[state] + noise * rng.normal(size=count))


STICKY = [[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]


def hmm_enumerated() -> Symmetric:
    """A hidden Markov model by a loop; the prior of its locations names its states."""

    def model(y: Tensor) -> None:
        prior = torch.ones(3, 3) + 3 * torch.eye(3)
        A = pyro.sample("A", dist.Dirichlet(prior).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        x: Any = 0
        for t in pyro.markov(range(len(y))):
            probs = A[x] if t else torch.ones(3) / 3
            x = pyro.sample(f"x_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(mu[x], sigma), obs=y[t])

    return Symmetric(model, data(hmm_chain([-2.0, 0.0, 2.5], STICKY, 0.5, 60)), frozenset())


def hidden_markov() -> Symmetric:
    """One in which no prior names the states: rows and columns of a matrix are permuted together."""

    def model(y: Tensor) -> None:
        A = pyro.sample("A", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        emission = dist.Normal(mu.unsqueeze(-2), sigma[..., None, None])
        initial = torch.zeros(3)
        pyro.sample("y", dist.DiscreteHMM(initial, A.log().unsqueeze(-3), emission, len(y)), obs=y)

    names = permutation(3, slot("A", -2, -1), slot("mu", -1))
    y = hmm_chain([-2.0, 0.0, 2.5], STICKY, 0.5, 60)
    return Symmetric(model, data(y), frozenset({names}))


def experts(K: int = 3) -> Symmetric:
    """A mixture of experts, each with a gate of its own, so that no expert is the reference."""
    by = Numbers(5)
    x = torch.stack([torch.ones(90), 4 * by.uniform(90) - 2], -1)
    slopes = torch.tensor([[-2.0, -2.0], [0.0, 2.0], [3.0, -1.0]]).double()
    which = (x[:, 1] > -0.7).long() + (x[:, 1] > 0.7).long()
    y = (x * slopes[which]).sum(-1) + 0.3 * by.normal(90)

    def model(x: Tensor, y: Tensor) -> None:
        gates = pyro.sample("gates", dist.Normal(0.0, 3.0).expand([2, K]).to_event(2))
        coefs = pyro.sample("coefs", dist.Normal(0.0, 3.0).expand([K, 2]).to_event(2))
        noise = pyro.sample("noise", dist.HalfNormal(1.0).expand([K]).to_event(1))
        choice = dist.Categorical(logits=x @ gates)
        parts = dist.Normal(x @ coefs.transpose(-1, -2), noise.unsqueeze(-2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(choice, parts), obs=y)

    names = permutation(K, slot("gates", -1), slot("coefs", -2), slot("noise", -1))
    return Symmetric(model, data(x, y), frozenset({names}))


def blocks(K: int = 3, N: int = 15) -> Symmetric:
    """A stochastic block model of directed edges with mixed membership: a matrix of blocks."""
    by = Numbers(6)
    member = torch.arange(N) % K
    rates = torch.tensor([[0.8, 0.1, 0.3], [0.05, 0.7, 0.1], [0.1, 0.5, 0.9]]).double()
    edges = (by.uniform(N, N) < rates[member][:, member]).double()

    def model(edges: Tensor) -> None:
        with pyro.plate("nodes", N):
            member = pyro.sample("member", dist.Dirichlet(torch.full((K,), 0.5)))
        with pyro.plate("to", K, dim=-1), pyro.plate("from", K, dim=-2):
            rates = pyro.sample("rates", dist.Beta(1.0, 1.0))
        probs = member @ rates @ member.transpose(-1, -2)
        pyro.sample("edges", dist.Bernoulli(probs).to_event(2), obs=edges)

    names = permutation(K, slot("member", -1), slot("rates", -2, -1))
    return Symmetric(model, data(edges), frozenset({names}))


def documents(K: int = 3, V: int = 8, D: int = 10, length: int = 25) -> Symmetric:
    """Latent Dirichlet allocation as in an example of Pyro: topics of words are enumerated."""
    by = Numbers(7)
    phi, theta = (
        by.dirichlet(torch.full(shape, concentration))
        for shape, concentration in (((K, V), 0.3), ((D, K), 0.5))
    )
    words = by.categorical(theta @ phi, length).T

    @config_enumerate
    def model(words: Tensor) -> None:
        with pyro.plate("topics", K):
            topic_weights = pyro.sample("topic_weights", dist.Gamma(2.0, 2.0))
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(V)))
        with pyro.plate("documents", D):
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
            with pyro.plate("words", length):
                topic = pyro.sample("topic", dist.Categorical(doc_topics))
                pyro.sample("word", dist.Categorical(topic_words[topic]), obs=words)

    names = permutation(
        K, slot("topic_weights", -1), slot("topic_words", -2), slot("doc_topics", -1)
    )
    return Symmetric(model, (words,), frozenset({names}))


def latent_classes(K: int = 3, J: int = 6, N: int = 90) -> Symmetric:
    """Latent class analysis of binary answers."""
    by = Numbers(8)
    probs = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.8, 0.9]]).double().repeat(3, 1)
    y = (by.uniform(N, J) < probs.T[torch.arange(N) % K]).double()

    @config_enumerate
    def model(y: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(K)))
        with pyro.plate("classes", K, dim=-2), pyro.plate("items", J, dim=-1):
            probs = pyro.sample("probs", dist.Beta(1.0, 1.0))
        with pyro.plate("persons", N):
            kind = pyro.sample("kind", dist.Categorical(shares))
            pyro.sample("y", dist.Bernoulli(probs[kind]).to_event(1), obs=y)

    names = permutation(K, slot("shares", -1), slot("probs", -2))
    return Symmetric(model, data(y), frozenset({names}))


def full_covariances(K: int = 2, D: int = 2) -> Symmetric:
    """Gaussians with covariances of their own, as many as there are coordinates."""
    by = Numbers(9)
    turns = torch.tensor([[[1.0, 0.0], [0.8, 0.5]], [[0.7, 0.0], [-0.5, 0.6]]]).double()
    kind = torch.arange(80) % 3 // 2
    y = (turns[kind] @ by.normal(80, 2, 1)).squeeze(-1) + 4 * kind[:, None]

    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(K)))
        with pyro.plate("components", K):
            loc = pyro.sample("loc", dist.Normal(torch.zeros(D), 5.0).to_event(1))
            scale = pyro.sample("scale", dist.HalfNormal(torch.full((D,), 2.0)).to_event(1))
            corr = pyro.sample("corr", dist.LKJCholesky(D, 2.0))
        parts = dist.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * corr)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=y)

    names = permutation(
        K, slot("weights", -1), slot("loc", -2), slot("scale", -2), slot("corr", -3)
    )
    return Symmetric(model, data(y), frozenset({names}))


def poisson_mixture(K: int = 3) -> Symmetric:
    """Counts of three rates, by a lookup that allows for batches."""
    rates = torch.tensor([1.0, 6.0, 20.0])[torch.arange(90) % K]

    @config_enumerate
    def model(y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(K)))
        rate = pyro.sample("rate", dist.Gamma(1.0, 0.1).expand([K]).to_event(1))
        with pyro.plate("rows", len(y)):
            kind = pyro.sample("kind", dist.Categorical(weights.unsqueeze(-2)))
            pyro.sample("y", dist.Poisson(Vindex(rate.unsqueeze(-2))[..., kind]), obs=y)

    names = permutation(K, slot("weights", -1), slot("rate", -1))
    return Symmetric(model, data(Numbers(10).poisson(rates)), frozenset({names}))


def zero_inflated_regressions(K: int = 2) -> Symmetric:
    """A mixture of Poisson regressions, and zeros of neither."""
    by = Numbers(11)
    x = torch.stack([torch.ones(120), by.normal(120)], -1)
    slopes = torch.tensor([[0.5, 1.0], [2.5, -0.3]]).double()
    y = by.poisson((x * slopes[torch.arange(120) % 2]).sum(-1).exp()) * (by.uniform(120) > 0.2)

    def model(x: Tensor, y: Tensor) -> None:
        gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(K)))
        with pyro.plate("regressions", K):
            slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        rates = (x @ slopes.transpose(-1, -2)).exp()
        parts = weights.log().unsqueeze(-2) + dist.Poisson(rates).log_prob(y.unsqueeze(-1))
        counts = (1 - gate).log().unsqueeze(-1) + parts.logsumexp(-1)
        zeros = torch.where(y == 0, gate.log().unsqueeze(-1), -torch.inf)
        pyro.factor("y", torch.logaddexp(counts, zeros).sum(-1))

    names = permutation(K, slot("weights", -1), slot("slopes", -2))
    return Symmetric(model, data(x, y), frozenset({names}))
