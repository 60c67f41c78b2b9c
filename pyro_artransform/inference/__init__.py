# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits of guides, MCMC, and summaries of posterior draws."""

from ..diagnostics.checks import Check, FailedCheck, Verdict
from ..posterior import Summary, log_likelihood, predict, summary, to_inference_data
from .chains import Chains
from .config import FitConfig
from .evaluation.elements import Elements
from .fit import fit
from .mcmc import mcmc
from .optimization.training import FitError
from .result import FitResult

__all__ = [
    "Chains",
    "Check",
    "Elements",
    "FailedCheck",
    "FitConfig",
    "FitError",
    "FitResult",
    "Summary",
    "Verdict",
    "fit",
    "log_likelihood",
    "mcmc",
    "predict",
    "summary",
    "to_inference_data",
]
