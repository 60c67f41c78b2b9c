# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models as Pyro's examples and tutorials write them, small, each with simulated data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.transforms import OrderedTransform
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_artransform import AutoIAF, AutoStructuredFlow


class Example(NamedTuple):
    """A model, its arguments, the data, and how many rows to predict anew (0: each row has a latent)."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    data: torch.Tensor
    rows: int = 0

    def with_data(self):
        return (*self.args, self.data)

    def new_args(self):
        """The first rows of each argument that has rows."""
        return tuple(arg[: self.rows] if torch.is_tensor(arg) else arg for arg in self.args)


def baseball(at_bats, hits=None):
    """Hits of players whose log-odds have a common distribution (Pyro's example baseball.py)."""
    loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("num_players", at_bats.shape[0]):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        return pyro.sample("obs", dist.Binomial(at_bats, logits=alpha), obs=hits)


def correlation(y):
    """A covariance matrix by its correlations and scales (Pyro's example lkj.py)."""
    d = y.shape[1]
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(d)).to_event(1))
    concentration = torch.ones(())
    factor = pyro.sample("L_omega", dist.LKJCholesky(d, concentration))
    scale_tril = torch.mm(torch.diag(theta.sqrt()), factor)
    with pyro.plate("observations", len(y)):
        pyro.sample("obs", dist.MultivariateNormal(torch.zeros(d), scale_tril=scale_tril), obs=y)


def radon(county, floor, log_radon=None):
    """Measurements in houses, with an intercept for each county."""
    mu_a = pyro.sample("mu_a", dist.Normal(0.0, 1.0))
    sigma_a = pyro.sample("sigma_a", dist.HalfCauchy(1.0))
    with pyro.plate("counties", int(county.max()) + 1):
        a = pyro.sample("a", dist.Normal(mu_a, sigma_a))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("houses", len(county)):
        return pyro.sample("log_radon", dist.Normal(a[county] + b * floor, sigma), obs=log_radon)


def process(x, y=None):
    """A latent Gaussian process behind counts, by a Cholesky factor of its covariance."""
    length = pyro.sample("length", dist.InverseGamma(5.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    distances = (x.unsqueeze(-1) - x) / length
    covariance = scale**2 * torch.exp(-0.5 * distances**2) + 1e-6 * torch.eye(len(x))
    with pyro.plate("points", len(x)):
        white = pyro.sample("white", dist.Normal(0.0, 1.0))
    f = torch.linalg.cholesky(covariance) @ white
    with pyro.plate("counts", len(x)):
        return pyro.sample("y", dist.Poisson(f.exp()), obs=y)


def items(person, item, answer=None):
    """Answers to items: two parameters of each item, and an ability of each person."""
    with pyro.plate("persons", int(person.max()) + 1):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("items", int(item.max()) + 1):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    logits = slope[item] * (ability[person] - difficulty[item])
    with pyro.plate("answers", len(person)):
        return pyro.sample("answer", dist.Bernoulli(logits=logits), obs=answer)


class Network(PyroModule):
    """A regression by a network whose weights are latent (Pyro's tutorial on Bayesian regression)."""

    def __init__(self, num_hidden=3):
        super().__init__()
        self.hidden = PyroModule[nn.Linear](1, num_hidden)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([num_hidden, 1]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(0.0, 1.0).expand([num_hidden]).to_event(1))
        self.out = PyroModule[nn.Linear](num_hidden, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, num_hidden]).to_event(2))
        self.out.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def ordinal(group, x, num_categories, y=None):
    """Ordered categories with latent cutpoints, a slope, and an effect of each group."""
    steps = dist.Normal(0.0, 2.0).expand([num_categories - 1]).to_event(1)
    cutpoints = pyro.sample("cutpoints", dist.TransformedDistribution(steps, OrderedTransform()))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("groups", int(group.max()) + 1):
        effect = pyro.sample("effect", dist.Normal(0.0, sd))
    with pyro.plate("rows", len(x)):
        predictor = slope * x + effect[group]
        return pyro.sample("y", dist.OrderedLogistic(predictor, cutpoints), obs=y)


def draw(*shape):
    """Random numbers, the same for each shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def integers(high, count):
    """Random integers below a bound."""
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(1))


def examples():
    """All examples, by name."""
    hits = torch.tensor([18.0, 17.0, 15.0, 12.0, 11.0, 7.0])
    times, inputs = torch.linspace(0.0, 1.0, 10), torch.linspace(-1.0, 1.0, 20)[:, None]
    group, x = torch.arange(5).repeat(6), draw(30)
    log_radon = draw(5)[group] - 0.7 * (x > 0) + 0.7 * x.flip(0)
    person, item = torch.arange(6).repeat(4), torch.arange(4).repeat_interleave(6)
    return {
        "baseball": Example(baseball, (torch.full((6,), 45.0),), hits),
        "correlation": Example(correlation, (), draw(20, 3) @ torch.eye(3).add(0.4).tril()),
        "process": Example(process, (times,), integers(6, 10).double()),
        "network": Example(Network(), (inputs,), inputs[:, 0].sin() + 0.1 * draw(20), rows=7),
        "radon": Example(radon, (group, (x > 0).double()), log_radon, rows=7),
        "items": Example(items, (person, item), integers(2, 24).double(), rows=19),
        "ordinal": Example(ordinal, (group, x, 4), integers(4, 30), rows=7),
    }


GUIDES = {
    "AutoIAF": lambda model: AutoIAF(model, num_transforms=2, hidden_dims=8),
    "AutoStructuredFlow": lambda model: AutoStructuredFlow(model, hidden_dim=4),
}
