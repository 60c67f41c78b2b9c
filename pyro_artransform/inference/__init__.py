# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits of guides, and what draws of a posterior say."""

from ..posterior import Summary, log_likelihood, summary, to_inference_data
from .config import FitConfig
from .fit import fit
from .optimization.nonfinite import FitError
from .result import FitResult

__all__ = [
    "FitConfig",
    "FitError",
    "FitResult",
    "Summary",
    "fit",
    "log_likelihood",
    "summary",
    "to_inference_data",
]
