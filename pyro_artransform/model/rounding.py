# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that their dtype can hardly hold."""

import math

import torch
from torch import Tensor

from .coordinates.families import is_identity_or_exp
from .sites import Latents

# draws this near to the smallest number of a dtype are at its edge, and the share of them that matters
_NATS_TO_EDGE, _MOST_AT_EDGE = 5.0, 0.005


def coarse_sites(latents: Latents, z: Tensor) -> list[str]:
    """The sites whose sds over draws ``(n, latent_dim)`` are below two spacings of their dtype.

    This happens near the edge of a support. Skips sites with more or fewer values than coordinates, such as
    simplices: a value may be constant.
    """
    found = []
    for name, value in latents.constrain(z).items():
        values = value.reshape(len(z), -1)
        spacing = torch.finfo(value.dtype).eps * values.abs().mean(0)
        if values.shape[1] == latents.sites[name].size and (values.std(0) < 2 * spacing).any():
            found.append(name)
    return found


def sites_at_edge(latents: Latents, z: Tensor) -> list[str]:
    """The sites of whose draws ``(n, latent_dim)`` some reach the edge of what their dtype holds.

    There ``exp`` is zero, or a logistic function is one, so that the rest of a posterior is cut off.
    """
    found = []
    for name, part in latents.split(z).items():
        if latents.sites[name].is_unconstrained or not part.numel():
            continue
        is_at_edge = part < math.log(torch.finfo(part.dtype).tiny) + _NATS_TO_EDGE
        if not is_identity_or_exp(latents.sites[name].bijection):
            is_at_edge = is_at_edge | (part > -math.log(torch.finfo(part.dtype).eps))
        if bool((is_at_edge.double().mean(0) > _MOST_AT_EDGE).any()):
            found.append(name)
    return found
