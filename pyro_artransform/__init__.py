# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Autoregressive transforms and flow guides for Pyro."""

import importlib
from typing import Any

from . import diagnostics, inference, posterior, sampling, testing
from .flows import conditioners, transforms, univariate
from .flows.builders import (
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
from .flows.transforms import AutoregressiveTransform, ConditionalAutoregressiveTransform
from .guides import (
    AutoAmortized,
    AutoAutoregressive,
    AutoIAF,
    AutoMAF,
    AutoStructuredFlow,
    FlowDistribution,
    MixtureGuide,
)
from .inference import FitResult, fit
from .sampling import mcmc

__version__ = "0.3.0"

__all__ = [
    "AutoAmortized",
    "AutoAutoregressive",
    "AutoIAF",
    "AutoMAF",
    "AutoStructuredFlow",
    "AutoregressiveTransform",
    "ConditionalAutoregressiveTransform",
    "FitResult",
    "FlowDistribution",
    "MixtureGuide",
    "affine_autoregressive",
    "conditional_affine_autoregressive",
    "conditional_iaf",
    "conditional_maf",
    "conditional_spline_autoregressive",
    "conditioners",
    "diagnostics",
    "fit",
    "hinged_marginals",
    "iaf",
    "inference",
    "maf",
    "mcmc",
    "posterior",
    "sampling",
    "spline_autoregressive",
    "spline_marginals",
    "testing",
    "transforms",
    "univariate",
]


def __getattr__(name: str) -> Any:
    """``plots`` needs an extra, and is imported when it is first used."""
    if name == "plots":
        return importlib.import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
