# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models as in Pyro's tutorials and examples, whose discrete latents are summed out.

All but ``capture_recapture`` index by these from the left, so that draws do not fit into a plate.
"""

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

STATES, TONES = 3, 2
SERIES = torch.arange(36).reshape(3, 6, TONES) % 5 > 2
LENGTHS = torch.tensor([6, 4, 5])
YEARS = torch.arange(35).reshape(7, 5) % 3 == 0


def mixture():
    """The tutorial on Gaussian mixtures."""
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", 5):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample(
            "y", dist.Normal(locs[k], scale), obs=torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
        )


def gaussian_chain(length=60):
    """A hidden Markov model with normal emissions."""
    y = torch.linspace(-2.0, 2.0, length)
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(STATES, STATES)).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    x = 0
    for t in pyro.markov(range(length)):
        x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]))
        pyro.sample(f"y_{t}", dist.Normal(locs[x], scale), obs=y[t])


def tones_of(*shape):
    """The rows of a chain, and the probability of each tone in each state."""
    rows = dist.Dirichlet(0.9 * torch.eye(STATES) + 0.1).to_event(1)
    probs = dist.Beta(1.0, 3.0).expand((*shape, TONES)).to_event(len(shape) + 1)
    return pyro.sample("probs_x", rows), pyro.sample("probs_y", probs)


def hmm_0():
    """Each series by itself, in a sequential plate."""
    rows, probs = tones_of(STATES)
    tones = pyro.plate("tones", TONES, dim=-1)
    for i in pyro.plate("series", len(SERIES)):
        x = 0
        for t in pyro.markov(range(LENGTHS[i])):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(rows[x]))
            with tones:
                distribution = dist.Bernoulli(probs[x.squeeze(-1)])
                pyro.sample(f"y_{i}_{t}", distribution, obs=1.0 * SERIES[i, t])


def in_series(step):
    """All series at once, those that have ended masked."""
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("series", len(SERIES), dim=-2):
        state = ()
        for t in pyro.markov(range(int(LENGTHS.max()))):
            with poutine.mask(mask=(t < LENGTHS).unsqueeze(-1)):
                state = step(t, tones, 1.0 * SERIES[:, t], *state)


def hmm_1():
    rows, probs = tones_of(STATES)

    def step(t, tones, data, x=0):
        x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]))
        with tones:
            pyro.sample(f"y_{t}", dist.Bernoulli(probs[x.squeeze(-1)]), obs=data)
        return (x,)

    in_series(step)


def hmm_2():
    """The data depend on the data before."""
    rows, probs = tones_of(STATES, 2)

    def step(t, tones, data, x=0, y=0):
        x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]))
        with tones as tone:
            y = pyro.sample(f"y_{t}", dist.Bernoulli(probs[x, y, tone]), obs=data).long()
        return x, y

    in_series(step)


def hmm_3():
    """Two chains behind each series."""
    rows, probs = tones_of(STATES, STATES)
    others = pyro.sample("probs_w", dist.Dirichlet(torch.ones(STATES, STATES)).to_event(1))

    def step(t, tones, data, w=0, x=0):
        w = pyro.sample(f"w_{t}", dist.Categorical(others[w]))
        x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]))
        with tones as tone:
            pyro.sample(f"y_{t}", dist.Bernoulli(probs[w, x, tone]), obs=data)
        return w, x

    in_series(step)


def hmm_4():
    """Two chains of which one depends on the other."""
    rows, probs = tones_of(STATES, STATES)
    cube = dist.Dirichlet(torch.ones(STATES, STATES, STATES)).to_event(2)
    others = pyro.sample("probs_w", cube)

    def step(t, tones, data, w=0, x=0):
        x = pyro.sample(f"x_{t}", dist.Categorical(rows[x]))
        w = pyro.sample(f"w_{t}", dist.Categorical(Vindex(others)[x, w]))
        with tones as tone:
            pyro.sample(f"y_{t}", dist.Bernoulli(probs[w, x, tone]), obs=data)
        return w, x

    in_series(step)


def capture_recapture():
    """Animals that survive from year to year, and are seen with some probability: Cormack-Jolly-Seber."""
    seen = 1.0 * YEARS
    sex = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    loc = pyro.sample("loc", dist.Normal(0.0, 1.5))
    by_sex = pyro.sample("by_sex", dist.Normal(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    animals = pyro.plate("animals", 7, dim=-1)
    z, was_seen = torch.ones(7), torch.zeros(7)
    for t in pyro.markov(range(5)):
        year = pyro.sample(f"year_{t}", dist.Normal(0.0, 1.0)) if t else 0.0
        with animals, poutine.mask(mask=was_seen.bool()):
            phi = torch.sigmoid(loc + by_sex * sex + year)
            z = pyro.sample(f"z_{t}", dist.Bernoulli(was_seen * phi * z + (1 - was_seen)))
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=seen[:, t])
        was_seen = torch.maximum(was_seen, seen[:, t])


def dawid_skene():
    """Items of unknown classes, labelled by annotators with confusion matrices of their own."""
    labels = (torch.arange(24) * 7 % 5 % STATES).reshape(4, 6)
    share = pyro.sample("share", dist.Dirichlet(torch.ones(STATES)))
    with pyro.plate("annotators", 4):
        matrix = torch.ones(STATES, STATES) + 4 * torch.eye(STATES)
        confusion = pyro.sample("confusion", dist.Dirichlet(matrix).to_event(1))
    with pyro.plate("items", 6, dim=-1):
        kind = pyro.sample("kind", dist.Categorical(share))
        with pyro.plate("labels", 4, dim=-2) as annotator:
            distribution = dist.Categorical(confusion[annotator[:, None], kind])
            pyro.sample("label", distribution, obs=labels)


def two_levels():
    """A class of each group, and one of each element that depends on it."""
    table = pyro.sample("table", dist.Dirichlet(torch.ones(2, STATES)).to_event(1))
    rate = pyro.sample("rate", dist.Gamma(torch.tensor([1.0, 4.0, 9.0]), 1.0).to_event(1))
    with pyro.plate("groups", 3, dim=-1):
        group = pyro.sample("group", dist.Bernoulli(0.4)).long()
        with pyro.plate("elements", 4, dim=-2):
            kind = pyro.sample("kind", dist.Categorical(table[group]))
            pyro.sample("y", dist.Poisson(rate[kind]), obs=torch.arange(12.0).reshape(4, 3))


def changepoint():
    """Rates of counts before and after an unknown year, all at once in the one site of data."""
    early, late = (
        pyro.sample("early", dist.Exponential(1.0)),
        pyro.sample("late", dist.Exponential(1.0)),
    )
    year = pyro.sample("year", dist.Categorical(torch.ones(8)))
    with pyro.plate("years", 8) as t:
        rates = torch.stack([early, late])
        is_late = (t >= year).long()
        pyro.sample("y", dist.Poisson(rates[is_late]), obs=torch.tensor([4.0, 5, 4, 1, 0, 1, 2, 0]))


_ALL = (
    *(mixture, gaussian_chain, hmm_0, hmm_1, hmm_2, hmm_3, hmm_4),
    *(capture_recapture, dawid_skene, two_levels, changepoint),
)
MODELS = [*map(config_enumerate, _ALL)]
