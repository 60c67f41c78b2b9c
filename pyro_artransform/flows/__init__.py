# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Autoregressive transforms: univariate families, conditioners, the transform of both, and builders."""

from . import conditioners, transforms, univariate
from .builders import (
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_iaf,
    conditional_maf,
    conditional_spline_autoregressive,
    hinged_marginals,
    iaf,
    maf,
    spline_autoregressive,
    spline_marginals,
)
from .transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
    FlowDistribution,
)

__all__ = [
    "AutoregressiveTransform",
    "ConditionalAutoregressiveTransform",
    "FlowDistribution",
    "affine_autoregressive",
    "conditional_affine_autoregressive",
    "conditional_iaf",
    "conditional_maf",
    "conditional_spline_autoregressive",
    "conditioners",
    "hinged_marginals",
    "iaf",
    "maf",
    "spline_autoregressive",
    "spline_marginals",
    "transforms",
    "univariate",
]
