# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Autoregressive transforms and flow guides for Pyro."""

from . import conditioners, testing, transforms, univariate
from .flows import (
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_iaf,
    conditional_maf,
    conditional_spline_autoregressive,
    iaf,
    maf,
    spline_autoregressive,
)
from .guides import AutoAutoregressive, AutoIAF, AutoMAF

__version__ = "0.1.0"

__all__ = [
    "AutoAutoregressive",
    "AutoIAF",
    "AutoMAF",
    "affine_autoregressive",
    "conditional_affine_autoregressive",
    "conditional_iaf",
    "conditional_maf",
    "conditional_spline_autoregressive",
    "conditioners",
    "iaf",
    "maf",
    "spline_autoregressive",
    "testing",
    "transforms",
    "univariate",
]
