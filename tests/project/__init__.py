# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
