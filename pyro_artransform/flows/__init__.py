# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Autoregressive transforms: univariate families, conditioners, the transform of both, and builders."""

from typing import Any

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


def __getattr__(name: str) -> Any:
    """Names what there is, as for users of ``zuko.flows``."""
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}, but {', '.join(__all__)}; docs/coming_from.md lists "
        "what replaces the names of Zuko and others, such as maf(input_dim) for zuko.flows.MAF"
    )
