# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Sampling of a log density by an ensemble of short Hamiltonian chains."""

from .convergence import GOOD_RHAT, Convergence, nested_rhat
from .ensemble import End, Ensemble
from .starts import StartError
from .target import PulledBack, State
from .trajectories import Info, energy_bfmi

__all__ = [  # noqa: RUF022
    "Convergence",
    "End",
    "Ensemble",
    "GOOD_RHAT",
    "Info",
    "PulledBack",
    "StartError",
    "State",
    "energy_bfmi",
    "nested_rhat",
]
