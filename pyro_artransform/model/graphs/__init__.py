# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Markov graphs: elimination orders, colourings, and Gaussians with sparse precision matrices."""

from .markov_graph import Elimination, MarkovGraph, eliminate
from .sparse_gaussian import PrecisionPattern, SparseGaussian

__all__ = ["Elimination", "MarkovGraph", "PrecisionPattern", "SparseGaussian", "eliminate"]
