# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors whose mass is known, draws of guides that have a part of it, and what a search finds."""

import math

import pyro
import torch
from pyro import distributions as dist

from pyro_artransform.inference.config import FitConfig
from pyro_artransform.inference.evaluation.missed_modes import find_missed_modes
from pyro_artransform.joint import LogJoint

DEFAULTS = FitConfig()


def missed(model, draws, log_evidence=0.0, config=DEFAULTS, **found):
    return find_missed_modes(LogJoint(model), config, draws, log_evidence, **found)


class Mixture:
    """Independent normals under a flat prior, as a model; of log evidence 0."""

    def __init__(self, locs, weights, scales=1.0):
        self.locs, self.logits = torch.as_tensor(locs), torch.as_tensor(weights).log()
        self.scales = torch.as_tensor(scales).expand(len(self.locs))[:, None]

    def __call__(self):
        space = dist.ImproperUniform(dist.constraints.real_vector, (), self.locs.shape[1:])
        z = pyro.sample("z", space)
        parts = dist.Normal(self.locs, self.scales).to_event(1).log_prob(z.unsqueeze(-2))
        pyro.factor("target", (parts + self.logits).logsumexp(-1))

    def draws(self, n=2000, of=(0,)):
        """Draws of some of the normals, and the log of their share."""
        logits = self.logits[list(of)]
        k = torch.tensor(of)[dist.Categorical(logits=logits).sample((n,))]
        noise = torch.randn(n, self.locs.shape[1])
        return self.locs[k] + self.scales[k] * noise, logits.logsumexp(0).item()

    def missed(self, n=2000, of=(0,), **options):
        return missed(self, *self.draws(n, of), **options)


def along(places, weights, dim=1, scales=1.0):
    """Normals in places along the first axis."""
    locs = torch.zeros(len(places), dim)
    locs[:, 0] = torch.tensor(places)
    return Mixture(locs, weights, scales)


def ring(radius, width):
    """A distance from the origin of a plane, in all directions: a ridge, where no climb ends at a maximum."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        distance = z.square().sum(-1).sqrt()
        density = dist.Normal(radius, width).log_prob(distance)
        pyro.factor("ring", density - math.log(2 * math.pi) - distance.log())

    return model


def ring_draws(radius, width, angle, n=5000):
    """Draws of the ring in the directions up to an angle to each side."""
    angle = angle * (2 * torch.rand(n) - 1)
    distance = radius + width * torch.randn(n, 1)
    return distance * torch.stack([angle.cos(), angle.sin()], -1)
