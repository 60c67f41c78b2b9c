# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The flows of an amortised guide that need no choice."""

from torch import nn

from ...flows import conditional_iaf, conditional_spline_autoregressive, iaf, spline_autoregressive
from ...transforms import chain


def global_flow(latent_dim: int) -> nn.Module:
    """An IAF of three layers; in one dimension, where that would bend nothing, of splines.

    :param latent_dim: the number of coordinates.
    """
    if latent_dim > 1:
        return iaf(latent_dim, 3)
    return chain([spline_autoregressive(1) for _ in range(3)])


def local_flow(latent_dim: int, context_dim: int) -> nn.Module:
    """A conditional IAF of two layers; in one dimension a conditional spline.

    :param latent_dim: the number of coordinates of an element.
    :param context_dim: the size of the context.
    """
    if latent_dim > 1:
        return conditional_iaf(latent_dim, context_dim, 2)
    return conditional_spline_autoregressive(1, context_dim)
