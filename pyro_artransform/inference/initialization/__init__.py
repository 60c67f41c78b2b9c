# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Initial guides: the Gaussian that matches draws and gradients of the ensemble, or the guide as it is."""
