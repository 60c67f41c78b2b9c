# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Negative ELBOs: by the path gradient, by Pyro's estimators, and on mini-batches."""
