# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors whose draws by chains must not be believed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

from tests.inference.models import tilted


class Doubtful(NamedTuple):
    """A model, and words of which the verdict has some.

    :param is_slow: whether chains go on until the time is over.
    """

    model: Callable[..., object]
    words: tuple[str, ...]
    is_slow: bool = False


@config_enumerate
def labels():
    """Two locations of data around -5 and 4, with other weights: their exchange gives another mode.

    Since there are as many data around each, it has the same mass.
    """
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    data = torch.cat([torch.linspace(-6, -4, 20), torch.linspace(3, 5, 20)])
    with pyro.plate("data", len(data)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("y", dist.Normal(Vindex(locs)[..., kind], 1.0), obs=data)


def funnel(dim=9):
    """With a neck and a mouth that trajectories in the coordinates of the model hardly enter."""
    v = tilted("v", dist.Normal(0.0, 5.0), dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(dim), (v[..., None] / 2).exp()).to_event(1))


def improper():
    """Two latents of which the data know the sum."""
    a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
    b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))


def cauchy(dim=10):
    """Of independent latents, in whose tails trajectories hardly get anywhere."""
    prior = dist.Normal(torch.zeros(dim), 5.0).to_event(1)
    tilted("z", prior, dist.Cauchy(torch.zeros(dim), 1.0).to_event(1))


def angle():
    """An angle that any whole turn leaves as it is."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.factor("around", dist.VonMises(0.0, 0.5).log_prob(z))


def direction(y):
    """An angle with a prior for angles, and directions around it."""
    phi = pyro.sample("phi", dist.VonMises(0.0, 1.0))
    with pyro.plate("directions", len(y)):
        pyro.sample("y", dist.VonMises(phi, 4.0), obs=y)


def wall():
    """Two islands of equal mass, between which there is no density."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    inside = z[..., 0].abs() > 6
    pyro.factor("wall", torch.where(inside, 0.0, -torch.inf))


def two_scales():
    """A scale that is near 0.01 or near 1, each with half of the mass, of five effects."""
    prior = dist.Normal(-2.0, 3.0)
    log_scale = pyro.sample("log_scale", prior)
    places = torch.tensor([math.log(0.01), 0.0])
    parts = dist.Normal(places, 0.3).log_prob(log_scale.unsqueeze(-1))
    pyro.factor("both", parts.logsumexp(-1) - prior.log_prob(log_scale))
    scale = log_scale[..., None].exp()
    pyro.sample("effects", dist.Normal(torch.zeros(5), scale).to_event(1))


MODES, APART, FEW = "chains found 2 modes", "have not mixed", "effective draws in the tails"

DOUBTFUL = {
    "improper": Doubtful(improper, (APART,), is_slow=True),
    "Cauchy": Doubtful(cauchy, (APART, FEW), is_slow=True),
    "angle": Doubtful(angle, (APART,), is_slow=True),
    "wall": Doubtful(wall, (MODES, APART), is_slow=True),
}
