# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Every univariate family by name: a new one is one more line."""

from pyro_artransform.univariate import (
    Additive,
    Affine,
    GatedAffine,
    Hinged,
    MonotoneNeural,
    RationalQuadraticSpline,
    Standardizing,
)

FAMILIES = {
    "affine": Affine,
    "affine, narrow": lambda: Affine(bound=0.5),
    "additive": Additive,
    "standardizing": Standardizing,
    "gated": GatedAffine,
    "gated, half open": lambda: GatedAffine(gate_bias=0.0),
    "hinged": Hinged,
    "hinged, one knot": lambda: Hinged(knots=[0.5], width=0.1),
    "spline": RationalQuadraticSpline,
    "spline, two bins": lambda: RationalQuadraticSpline(count_bins=2, bound=3),
    "spline, many bins": lambda: RationalQuadraticSpline(count_bins=16, bound=8.0),
    "monotone": MonotoneNeural,
    "monotone, one unit": lambda: MonotoneNeural(count_units=1),
    "monotone, many units": lambda: MonotoneNeural(count_units=16),
}

STARTS_AT_IDENTITY = {name: new for name, new in FAMILIES.items() if not name.startswith("gated")}
