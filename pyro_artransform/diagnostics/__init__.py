# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics of a posterior: importance sampling, errors of marginals, evidence."""

from .checks import Check, FailedCheck, Verdict
from .convergence import ModeShares
from .importance_sampling import Importance, importance
from .importance_weights import log_weights
from .marginals import Marginals
from .plates import ConditionalDiagnostics, ElementDiagnostics, PlateDiagnostics
from .psis import ParetoTail, fit_tail, smooth_tail

__all__ = [
    "Check",
    "ConditionalDiagnostics",
    "ElementDiagnostics",
    "FailedCheck",
    "Importance",
    "Marginals",
    "ModeShares",
    "ParetoTail",
    "PlateDiagnostics",
    "Verdict",
    "fit_tail",
    "importance",
    "log_weights",
    "smooth_tail",
]
