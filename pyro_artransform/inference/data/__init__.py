# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Mini-batches: loaders, and checks that model, guide and loader go together."""
