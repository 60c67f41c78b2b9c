# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The guide of models with plates: a flow for global latents, conditional flows for local ones."""
