# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Every univariate family by name: a new one is one more line."""

from pyro_artransform.univariate import (
    Affine,
    Hinged,
    MonotoneNeural,
    RationalQuadraticSpline,
    Standardizing,
)

FAMILIES = {
    "affine": Affine,
    "affine, narrow": lambda: Affine(bound=0.5),
    "standardizing": Standardizing,
    "hinged": Hinged,
    "hinged, one knot": lambda: Hinged(knots=[0.5], width=0.1),
    "spline": RationalQuadraticSpline,
    "spline, two bins": lambda: RationalQuadraticSpline(count_bins=2, bound=3),
    "monotone": MonotoneNeural,
    "monotone, one unit": lambda: MonotoneNeural(count_units=1),
}
