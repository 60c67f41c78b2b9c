# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A Pyro model as a log density of its unconstrained latents, vectorized over draws."""

from .density import LogJoint
from .full_data_density import FullDataDensity
from .relabelling import Relabelling
from .sites import Latents, Site
from .symmetries import Symmetry
from .traces import ModelStructure

__all__ = [
    "FullDataDensity",
    "Latents",
    "LogJoint",
    "ModelStructure",
    "Relabelling",
    "Site",
    "Symmetry",
]
