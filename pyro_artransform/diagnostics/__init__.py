# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How good a posterior is: importance sampling and simulation-based calibration."""

from .calibration import SBC, sbc
from .importance import Importance, importance, psis_resample
from .importance_weights import log_weights
from .psis import ParetoTail, fit_tail, smooth_tail
from .uniformity import simultaneous_bands, uniformity_pvalue

# sorted without regard to case
__all__ = [  # noqa: RUF022
    "Importance",
    "ParetoTail",
    "SBC",
    "fit_tail",
    "importance",
    "log_weights",
    "psis_resample",
    "sbc",
    "simultaneous_bands",
    "smooth_tail",
    "uniformity_pvalue",
]
