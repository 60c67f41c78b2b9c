# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits to given draws: maximum likelihood, which is the forward KL divergence."""
