# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How good a posterior is: importance sampling, calibration, errors of each mean and sd, evidence."""

from .calibration import SBC, sbc, simultaneous_bands, uniformity_pvalue
from .comparison import ComparedModel, Comparison, compare
from .importance import Importance, ParetoTail, fit_tail, importance, psis_resample, smooth_tail
from .importance_weights import log_weights
from .marginals import Marginals, marginals

__all__ = [  # noqa: RUF022
    "ComparedModel",
    "Comparison",
    "Importance",
    "Marginals",
    "ParetoTail",
    "SBC",
    "compare",
    "fit_tail",
    "importance",
    "log_weights",
    "marginals",
    "psis_resample",
    "sbc",
    "simultaneous_bands",
    "smooth_tail",
    "uniformity_pvalue",
]
