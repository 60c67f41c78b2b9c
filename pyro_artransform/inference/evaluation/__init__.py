# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Verdicts in words, from importance sampling and from draws of chains."""
