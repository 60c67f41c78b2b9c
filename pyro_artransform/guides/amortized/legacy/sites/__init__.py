# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The sample sites of a guide: their records, their packing into one vector, checks of models."""
