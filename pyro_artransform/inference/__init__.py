# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits of guides, and what draws of a posterior say."""

from .fit import fit
from .posterior import Summary, log_likelihood, summary, to_inference_data
from .result import FitResult
from .training import FitError

__all__ = [
    "FitError",
    "FitResult",
    "Summary",
    "fit",
    "log_likelihood",
    "summary",
    "to_inference_data",
]
