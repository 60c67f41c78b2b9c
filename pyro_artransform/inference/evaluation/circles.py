# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Latents on a circle: of Pyro's distributions of angles, whose support is all real numbers.

Every mode of such a density is there again after each turn, and all of these are one mode.
"""

import math

import torch
from torch import Tensor

from ...joint import LogDensity
from ..initialization.gaussians import evaluate_density

# so many turns leave the density of an angle as it is, and that of any proper prior not
_TURNS = (1.0, -32.0)
# nats, to which round-off is added
_TOLERANCE = 1e-3


def find_circular(log_density: LogDensity, draws: Tensor) -> Tensor | None:
    """Which coordinates are angles: their draws stay within a turn, after which all is the same.

    :param draws: draws of a guide, shape ``(n, D)``.
    :return: shape ``(D,)``, of booleans; ``None`` if there is no angle.
    """
    within = (draws.std(0) < 2 * math.pi).nonzero()[:, 0]
    points = draws[:1]
    value = evaluate_density(log_density, points)
    tolerance = _TOLERANCE + 10 * torch.finfo(value.dtype).eps * value.abs()
    for turns in _TURNS:
        if not len(within):
            return None
        shifts = torch.zeros_like(points.expand(len(within), -1))
        shifts[torch.arange(len(within)), within] = 2 * math.pi * turns
        change = evaluate_density(log_density, points + shifts) - value
        within = within[change.abs() <= tolerance]
    if not len(within):
        return None
    is_circular = torch.zeros_like(draws[0], dtype=torch.bool)
    is_circular[within] = True
    return is_circular


def shortest(differences: Tensor, is_circular: Tensor | None) -> Tensor:
    """Differences of points of shape ``(*, D)``, those of angles the shorter way around."""
    if is_circular is None:
        return differences
    wrapped = torch.remainder(differences + math.pi, 2 * math.pi) - math.pi
    return torch.where(is_circular, wrapped, differences)


def fold(points: Tensor, is_circular: Tensor | None, center: Tensor | None = None) -> Tensor:
    """Points of shape ``(n, D)`` with each angle within half a turn of a center.

    :param center: shape ``(D,)``; the mean direction of the points unless it is given.
    """
    if is_circular is None:
        return points
    if center is None:
        center = torch.atan2(points.sin().mean(0), points.cos().mean(0))
    folded = center + shortest(points - center, is_circular)
    return torch.where(is_circular, folded, points)
