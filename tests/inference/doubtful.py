# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors whose draws by chains must not be believed, with a guide that leads chains astray."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.ops.indexing import Vindex

from pyro_artransform import AutoIAF
from tests.inference.models import tilted, two_modes


class Doubtful(NamedTuple):
    """A model, a function that makes a guide of it, and words of which the verdict has some.

    :param is_slow: whether chains go on until the time is over.
    """

    model: Callable[..., object]
    guide: Callable[..., object]
    words: tuple[str, ...]
    is_slow: bool = False


def at(model, scale=1.0, **values):
    """Makes independent normals at values of the sites."""
    found = {name: torch.as_tensor(value) for name, value in values.items()}
    start = init_to_value(values=found)
    hidden = poutine.block(model, hide=["kind"])
    return partial(AutoNormal, hidden, init_scale=scale, init_loc_fn=start)


@config_enumerate
def labels():
    """Two locations that may change their names, of data around -4 and 4."""
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    data = torch.cat([torch.linspace(-5, -3, 20), torch.linspace(3, 5, 20)])
    with pyro.plate("data", len(data)):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.5, 0.5])))
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
    pyro.sample("z", dist.Cauchy(torch.zeros(dim), 1.0).to_event(1))


def angle():
    """An angle that any whole turn leaves as it is."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.factor("around", dist.VonMises(0.0, 0.5).log_prob(z))


def wall():
    """Two islands of equal mass, between which there is no density."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    inside = z[..., 0].abs() > 6
    pyro.factor("wall", torch.where(inside, 0.0, -torch.inf))


def two_scales():
    """A scale that is near 0.01 or near 1, each with half of the mass, of five effects."""
    log_scale = pyro.sample("log_scale", dist.ImproperUniform(dist.constraints.real, (), ()))
    places = torch.tensor([math.log(0.01), 0.0])
    parts = dist.Normal(places, 0.3).log_prob(log_scale.unsqueeze(-1))
    pyro.factor("both", parts.logsumexp(-1))
    scale = log_scale[..., None].exp()
    pyro.sample("effects", dist.Normal(torch.zeros(5), scale).to_event(1))


MODES, AGREE = "other mode", "do not agree"
distant = two_modes(1, 100.0, 0.5)
far = two_modes(5, 8.0, 0.5)

DOUBTFUL = {
    "two modes of 1": Doubtful(distant, at(distant, z=torch.zeros(1)), (MODES, AGREE)),
    "two modes of 5": Doubtful(far, at(far, z=torch.zeros(5)), (MODES, AGREE)),
    "labels": Doubtful(labels, at(labels, 0.2, locs=torch.tensor([-4.0, 4.0])), (MODES, AGREE)),
    "improper": Doubtful(improper, at(improper, a=0.0, b=1.0), (AGREE,), is_slow=True),
    "Cauchy": Doubtful(cauchy, at(cauchy, z=torch.zeros(10)), (AGREE,), is_slow=True),
    "angle": Doubtful(angle, at(angle, 6.0, z=0.0), (MODES, AGREE), is_slow=True),
    "wall": Doubtful(wall, at(wall, 0.3, z=torch.tensor([7.0, 0.0])), (MODES, AGREE), is_slow=True),
    "two scales": Doubtful(two_scales, partial(AutoIAF, two_scales), (MODES, AGREE)),
}
