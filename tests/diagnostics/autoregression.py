# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A stationary Gaussian path of any length as a posterior, and guides of it that are wrong as wanted."""

from functools import partial

import pyro
import torch
from pyro import distributions as dist

from pyro_artransform.transforms import FlowModule

SLOPE = 0.95


def path(dim):
    """A model of a path of ``dim`` unit variances, without data."""
    z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
    noise = z[..., 1:] - SLOPE * z[..., :-1]
    steps = dist.Normal(0.0, (1 - SLOPE**2) ** 0.5).log_prob(noise).sum(-1)
    pyro.factor("path", dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + steps)


class PathGuide:
    """The posterior of :func:`path`, wider by a factor and shifted: a guide by protocol only.

    :param factor: a number, or shape ``(dim,)``.
    :param shift: in standard deviations of the posterior, a number or shape ``(dim,)``.
    :param distort: a function of standard normal draws that is applied before all else.
    """

    def __init__(self, dim, factor=1.0, shift=0.0, distort=lambda x: (x, torch.zeros(len(x)))):
        self.dim, self.distort = dim, distort
        self.factor, self.shift = torch.as_tensor(factor).expand(dim), torch.as_tensor(shift)

    def call_and_ladj(self, x):
        x, ladj = self.distort(x)
        z = torch.cat([x[:, :1], (1 - SLOPE**2) ** 0.5 * x[:, 1:]], 1)
        # sums of all earlier noise by doubling: exact up to a length of 2048
        for power in range(11):
            lag = 2**power
            z = z + SLOPE**lag * torch.nn.functional.pad(z, (lag, 0))[:, : self.dim]
        ladj = (
            ladj + self.factor.log().sum() + (self.dim - 1) * 0.5 * torch.tensor(1 - SLOPE**2).log()
        )
        return self.shift + self.factor * z, ladj

    def get_transform(self, *args, **kwargs):
        return PathTransform(self)

    def rsample_and_log_prob(self, n, path=False):
        x = torch.randn(n, self.dim)
        z, ladj = self.call_and_ladj(x)
        return z, dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - ladj

    def __call__(self, *args, **kwargs):
        z, _ = self.rsample_and_log_prob(1)
        return {"z": pyro.sample("z", dist.Delta(z[0], event_dim=1))}


class PathTransform(FlowModule):
    """The transform of a :class:`PathGuide`."""

    def __init__(self, guide):
        super().__init__()
        self.call_and_ladj = guide.call_and_ladj


def model_of(dim):
    return partial(path, dim)


def conditional_sd():
    """The sd of an element of the path given all others, which is that of the best AutoNormal."""
    return ((1 - SLOPE**2) / (1 + SLOPE**2)) ** 0.5
