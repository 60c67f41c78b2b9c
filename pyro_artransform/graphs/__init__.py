# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Markov graphs: orders of elimination, colourings, and Gaussians with sparse precisions."""
