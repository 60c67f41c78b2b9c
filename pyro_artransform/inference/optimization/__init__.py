# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Steps: the training loop, optimizers, step sizes, and selection among parameters."""
