# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A Pyro model as a function of its latents: many draws at once, on the unconstrained space."""

from .density import LogJoint
from .mean_density import MeanLogJoint
from .protocols import LogDensity
from .sites import Latents, Site
from .traces import ModelStructure

__all__ = [
    "Latents",
    "LogDensity",
    "LogJoint",
    "MeanLogJoint",
    "ModelStructure",
    "Site",
]
