# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A model of whole data or of a mini-batch, and its data."""

import pyro
import torch
from pyro import distributions as dist

SIZE = 7


def model(y, scale=1.0):
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 3.0))
    width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", SIZE, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(loc, width * scale), obs=y)


Y = torch.linspace(-1.0, 2.0, SIZE)
