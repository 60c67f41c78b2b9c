# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Verdicts: importance sampling, missed modes, and what they say in words."""
