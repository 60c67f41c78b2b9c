# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Verdicts: importance sampling, draws of chains, and what they say in words."""
