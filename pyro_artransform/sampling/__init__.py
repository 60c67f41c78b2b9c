# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Posterior draws from an ensemble of short Hamiltonian chains."""

from .chains import Chains
from .ensemble import Ensemble, StopReason
from .run_mcmc import mcmc
from .starts import StartError
from .target import State, TransformedDensity
from .trajectories import TrajectoryInfo, energy_bfmi

__all__ = [
    "Chains",
    "Ensemble",
    "StartError",
    "State",
    "StopReason",
    "TrajectoryInfo",
    "TransformedDensity",
    "energy_bfmi",
    "mcmc",
]
