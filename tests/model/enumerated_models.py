# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models with discrete latents that are summed out, and continuous ones, after examples of Pyro and NumPyro.

Each is written anew after the mathematics of the example that it names, in the form in which the example has
it: what it indexes from the left stays so. Data are simulated with fixed seeds, in few rows.
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor

Run = Callable[..., Any]


class Simulator:
    """Random numbers of one seed in order."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)


def mixture_model(y: Tensor) -> None:
    """Two normal components of one scale."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((2,), 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        component = pyro.sample("component", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[component], scale), obs=y)


# Hidden Markov models of polyphonic music

SERIES, STEPS, TONES, HIDDEN = 3, 6, 5, 4


def music() -> tuple[Any, ...]:
    """Which tones sound, ``(series, steps, tones)``, about four at a time, and the lengths."""
    simulator = Simulator()
    rates = torch.full((SERIES, STEPS, TONES), 4 / TONES)
    tones = torch.bernoulli(rates, generator=simulator.generator)
    return tones, simulator.integers(STEPS // 2, STEPS + 1, SERIES)


def sticky(size: int) -> Tensor:
    """The concentration of transitions that mostly stay where they are."""
    return 0.9 * torch.eye(size) + 0.1


def sounding(*shape: int) -> Tensor:
    """The probability of each tone, given states of these numbers."""
    rates = dist.Beta(0.1, 0.9).expand((*shape, TONES)).to_event(len(shape) + 1)
    return pyro.sample("probs_y", rates)


def hmm_0(tones: Tensor, lengths: Tensor) -> None:
    """Series after series, in a sequential plate."""
    probs_x = pyro.sample("probs_x", dist.Dirichlet(sticky(HIDDEN)).to_event(1))
    probs_y = sounding(HIDDEN)
    keys = pyro.plate("tones", TONES, dim=-1)
    for i in pyro.plate("series", len(tones)):
        x = 0
        for t in pyro.markov(range(lengths[i])):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]))
            with keys:
                played = dist.Bernoulli(probs_y[x.squeeze(-1)])
                pyro.sample(f"y_{i}_{t}", played, obs=tones[i, t])


def of_all_series(step: Run, tones: Tensor, lengths: Tensor) -> None:
    """All series at once; those that are over are masked."""
    keys = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("series", len(tones), dim=-2):
        state: tuple[Any, ...] = ()
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths)[:, None]):
                state = step(t, keys, tones[:, t], *state)


def hmm_4(tones: Tensor, lengths: Tensor) -> None:
    """Two chains, of which one depends on the other."""
    size = int(HIDDEN**0.5)
    probs_w = pyro.sample("probs_w", dist.Dirichlet(sticky(size)).to_event(1))
    cube = dist.Dirichlet(sticky(size)).expand_by([size]).to_event(2)
    probs_x = pyro.sample("probs_x", cube)
    probs_y = sounding(size, size)

    def step(t: int, keys: Any, heard: Tensor, w: Any = 0, x: Any = 0) -> tuple[Any, ...]:
        w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]))
        x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(probs_x)[w, x]))
        with keys as key:
            pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, key]), obs=heard)
        return w, x

    of_all_series(step, tones, lengths)


# Capture and recapture of animals: Cormack, Jolly, Seber

ANIMALS, YEARS = 20, 5


def dippers() -> tuple[Any, ...]:
    """Which animals were seen, ``(animals, years)``, and their sex."""
    simulator = Simulator()
    sex = 1.0 * simulator.integers(0, 2, ANIMALS)
    first = simulator.integers(0, YEARS, ANIMALS)
    is_alive, seen = torch.ones(ANIMALS), []
    for t in range(YEARS):
        survives = 1.0 * (simulator.uniform(ANIMALS) < 0.55 + 0.05 * sex)
        is_alive = torch.where(t > first, is_alive * survives, 1.0)
        is_seen = (simulator.uniform(ANIMALS) < 0.9) * is_alive
        seen.append(torch.where(t == first, 1.0, is_seen * (t > first)))
    return torch.stack(seen, -1), sex


def alive_and_seen(seen: Tensor, rho: Tensor, phi_of: Callable[[int], Any]) -> None:
    """Whether each animal is alive, year after year, from the year in which it was first seen."""
    animals = pyro.plate("animals", len(seen), dim=-1)
    z, was_seen = torch.ones(len(seen)), torch.zeros(len(seen)).bool()
    for t in pyro.markov(range(seen.shape[1])):
        phi = phi_of(t)
        with animals, poutine.mask(mask=was_seen):
            known = 1.0 * was_seen
            survival = known * phi * z + (1 - known)
            z = pyro.sample(f"z_{t}", dist.Bernoulli(survival))
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=seen[:, t])
        was_seen |= seen[:, t].bool()


def chance(name: str) -> Tensor:
    return pyro.sample(name, dist.Uniform(0.0, 1.0))


def cjs_5(seen: Tensor, sex: Tensor) -> None:
    """Effects of sex and year on the logit of survival."""
    effect = sex * pyro.sample("phi_beta", dist.Normal(0.0, 10.0))
    rho = chance("rho")

    def phi_of(t: int) -> Tensor:
        gamma = pyro.sample(f"phi_gamma_{t}", dist.Normal(0.0, 10.0)) if t else 0.0
        return torch.sigmoid(effect + gamma)

    alive_and_seen(seen, rho, phi_of)


def experts_model(x: Tensor, y: Tensor, num_experts: int = 3) -> None:
    """Linear regressions, of which a softmax of the columns chooses one for each row."""
    shape = x.shape[-1], num_experts
    gate = pyro.sample("gate", dist.Normal(0.0, 1.0).expand(shape).to_event(2))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand(shape).to_event(2))
    scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([num_experts]).to_event(1))
    means = x @ slopes
    with pyro.plate("rows", len(x)) as row:
        expert = pyro.sample("expert", dist.Categorical(logits=x @ gate))
        pyro.sample("y", dist.Normal(means[row, expert], scales[expert]), obs=y)


def experts() -> tuple[Any, ...]:
    simulator = Simulator()
    x = torch.cat([torch.ones(200, 1), simulator.normal(200, 3)], -1)
    slopes = 2 * simulator.normal(4, 3)
    chosen = (x @ simulator.normal(4, 3)).argmax(-1, keepdim=True)
    return x, (x @ slopes).gather(-1, chosen)[:, 0] + 0.3 * simulator.normal(200)


# Labels of several annotators

CLASSES, ANNOTATORS, ITEMS = 4, 5, 8


def labels() -> tuple[Any, ...]:
    """The label of each item by each annotator, ``(annotators, items)``."""
    simulator = Simulator()
    truth = simulator.integers(0, CLASSES, ITEMS)
    guessed = simulator.integers(0, CLASSES, ANNOTATORS * ITEMS).reshape(ANNOTATORS, ITEMS)
    return (torch.where(simulator.uniform(ANNOTATORS, ITEMS) < 0.7, truth, guessed),)


def mace(labels: Tensor) -> None:
    """An annotator who does not know the class draws from a distribution of their own."""
    with pyro.plate("annotators", ANNOTATORS):
        guesses = pyro.sample("guesses", dist.Dirichlet(torch.full((CLASSES,), 10.0)))
        guessing = pyro.sample("guessing", dist.Beta(0.5, 0.5))
    with pyro.plate("items", ITEMS, dim=-1):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(CLASSES)))
        with pyro.plate("positions", ANNOTATORS, dim=-2) as annotator:
            is_guess = pyro.sample("is_guess", dist.Bernoulli(guessing[annotator][:, None]))
            known = torch.eye(CLASSES)[kind]
            probs = torch.where(is_guess[..., None] == 0, known, guesses[annotator][:, None])
            pyro.sample("labels", dist.Categorical(probs), obs=labels)


# Topics of documents

TOPICS, VOCABULARY, DOCUMENTS, WORDS = 3, 10, 4, 6


def documents() -> tuple[Any, ...]:
    """The words of each document, ``(words, documents)``."""
    simulator = Simulator()
    topics = (2 * simulator.normal(TOPICS, VOCABULARY)).softmax(-1)
    shares = (2 * simulator.normal(DOCUMENTS, TOPICS)).softmax(-1)
    words = torch.multinomial(shares @ topics, WORDS, True, generator=simulator.generator)
    return (words.T,)


def lda(words: Tensor) -> None:
    """Latent Dirichlet allocation, the topic of each word summed out."""
    with pyro.plate("topics", TOPICS):
        weights = pyro.sample("topic_weights", dist.Gamma(1 / TOPICS, 1.0))
        spread = torch.full((VOCABULARY,), 1 / VOCABULARY)
        topics = pyro.sample("topic_words", dist.Dirichlet(spread))
    with pyro.plate("documents", DOCUMENTS, dim=-1):
        shares = pyro.sample("doc_topics", dist.Dirichlet(weights))
        with pyro.plate("words", WORDS, dim=-2):
            topic = pyro.sample("word_topics", dist.Categorical(shares))
            pyro.sample("doc_words", dist.Categorical(topics[topic]), obs=words)


#: by name: the model, and what makes its arguments. After the tutorial gmm and examples/hmm.py,
#: examples/capture_recapture/cjs.py and examples/lda.py of Pyro, Jacobs et al. (1991), and
#: examples/annotation.py of NumPyro
EXAMPLES: dict[str, tuple[Run, Callable[[], tuple[Any, ...]]]] = {
    "gmm": (mixture_model, lambda: (torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]),)),
    **{model.__name__: (model, music) for model in (hmm_0, hmm_4)},
    "cjs_5": (cjs_5, dippers),
    "experts": (experts_model, experts),
    "mace": (mace, labels),
    "lda": (lda, documents),
}


def subject(name: str) -> tuple[Run, tuple[Any, ...]]:
    """The model of this name, its discrete latents enumerated, and its arguments."""
    model, make_arguments = EXAMPLES[name]
    return config_enumerate(model), make_arguments()
