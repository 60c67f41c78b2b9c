# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Initial points at which a log density is finite."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .graphs.dependencies import value_and_gradient

# half-widths of the uniform distributions on the unconstrained space from which points are drawn
_HALF_WIDTHS = (0.0, *(0.5,) * 5, *(2.0,) * 15)


class InitialPoint(NamedTuple):
    """A point ``(latent_dim,)``, and whether a gradient of the density reaches it."""

    u: Tensor
    has_gradient: bool


def usable_point(
    log_density: Callable[[Tensor], Tensor], u: Tensor, needs_digits: bool = False
) -> InitialPoint:
    """A point, or another one where the density or its gradient is not finite there.

    Tried are the origin and points uniform in (-0.5, 0.5) and (-2, 2), as in Stan.

    :param needs_digits: whether a density of so many nats that it has lost precision is of no use either.
    """
    try:
        here, is_usable = _value_at(log_density, u)
    except RuntimeError:  # no gradient, which is reported elsewhere
        log_density(u[None])
        return InitialPoint(u, False)
    if is_usable and (not needs_digits or abs(here) * torch.finfo(u.dtype).eps <= 1):
        return InitialPoint(u, True)
    least = here if is_usable else -math.inf
    torch.manual_seed(0)
    for half_width in _HALF_WIDTHS:
        point = half_width * (2 * torch.rand_like(u) - 1)
        there, is_usable = _value_at(log_density, point)
        if is_usable and there > least:
            return InitialPoint(point, True)
    return InitialPoint(u, True)


def _value_at(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[float, bool]:
    """The density at a point, and whether density and gradient are finite there."""
    value, slope = value_and_gradient(log_density, u[None])
    return float(value), bool(value.isfinite() & slope.isfinite().all())
