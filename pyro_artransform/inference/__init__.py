# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits of guides to the posterior of a model, with a verdict."""

from .fitting import fit
from .optimization.training import FitError
from .result import FitResult

__all__ = ["FitError", "FitResult", "fit"]
