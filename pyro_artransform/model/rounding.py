# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that their dtype can hardly hold."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .coordinates.families import is_identity_or_exp
from .sites import Latents


class Rounding(NamedTuple):
    """Sites whose draws lose digits, or are cut off."""

    coarse: list[str]  #: sites whose sds are below two spacings of their dtype
    at_edge: list[str]  #: sites of whose draws some reach the edge of what their dtype holds


def find_rounding(latents: Latents, z: Tensor) -> Rounding:
    """The sites that the dtype of their draws ``(n, latent_dim)`` can hardly hold.

    Draws are coarse near the edge of a support. Sites with more or fewer values than coordinates, such as
    simplices, are not checked for that: a value may be constant. At the edge of a dtype, ``exp`` is zero, or
    a logistic function is one, so that the rest of a posterior is cut off.
    """
    found, parts = Rounding([], []), latents.split(z)
    for name, value in latents.constrain(z).items():
        site, part, values = latents.sites[name], parts[name], value.reshape(len(z), -1)
        spacing = torch.finfo(value.dtype).eps * values.abs().mean(0)
        if values.shape[1] == site.size and (values.std(0) < 2 * spacing).any():
            found.coarse.append(name)
        if site.is_unconstrained or not part.numel():
            continue
        is_at_edge = part < math.log(torch.finfo(part.dtype).tiny) + 5.0
        if not is_identity_or_exp(site.bijection):
            is_at_edge = is_at_edge | (part > -math.log(torch.finfo(part.dtype).eps))
        if bool((is_at_edge.double().mean(0) > 0.005).any()):
            found.at_edge.append(name)
    return found
