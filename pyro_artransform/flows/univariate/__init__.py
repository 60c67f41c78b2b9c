# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Univariate families, which map parameters to increasing bijections of the real line."""

from .affine import (
    Affine,
    Hinged,
    HingedTransform,
    MonotonicAffineTransform,
    Standardizing,
    soft_bound,
    unbind_params,
)
from .base import ElementwiseTransform, Univariate, split_params
from .monotone import MonotoneNeural, MonotoneNeuralTransform, MonotoneTransform
from .spline import MonotonicRQSTransform, RationalQuadraticSpline

__all__ = [
    "Affine",
    "ElementwiseTransform",
    "Hinged",
    "HingedTransform",
    "MonotoneNeural",
    "MonotoneNeuralTransform",
    "MonotoneTransform",
    "MonotonicAffineTransform",
    "MonotonicRQSTransform",
    "RationalQuadraticSpline",
    "Standardizing",
    "Univariate",
    "soft_bound",
    "split_params",
    "unbind_params",
]
