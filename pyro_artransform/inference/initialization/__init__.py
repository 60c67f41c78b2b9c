# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Initialization of guides at a Gaussian that matches draws and gradients of an ensemble."""
