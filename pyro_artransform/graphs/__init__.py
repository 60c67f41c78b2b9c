# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Markov graphs: orders of elimination, colourings, and Gaussians with sparse precisions."""

from .markov_graph import (
    Coloring,
    Elimination,
    MarkovGraph,
    color_columns,
    eliminate,
    graph_levels,
)
from .padding import PaddedGroup, padded_groups
from .sparse_gaussian import PrecisionPattern, SparseGaussian

__all__ = [
    "Coloring",
    "Elimination",
    "MarkovGraph",
    "PaddedGroup",
    "PrecisionPattern",
    "SparseGaussian",
    "color_columns",
    "eliminate",
    "graph_levels",
    "padded_groups",
]
