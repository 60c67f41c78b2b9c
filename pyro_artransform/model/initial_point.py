# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Initial points at which a log density is finite."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .graphs.dependencies import value_and_gradient

# half-widths of the uniform distributions on the unconstrained space from which points are drawn
_HALF_WIDTHS = (0.0, *(0.5,) * 5, *(2.0,) * 15)


def usable_point(
    log_density: Callable[[Tensor], Tensor], u: Tensor, needs_digits: bool = False
) -> Tensor:
    """A point ``(latent_dim,)``, or another one where the density or its gradient is not finite there.

    Tried are the origin and points uniform in (-0.5, 0.5) and (-2, 2), as in Stan.

    :param needs_digits: whether a density of so many nats that it has lost precision is of no use either.
    """
    here, is_usable = _value_at(log_density, u)
    if is_usable and (not needs_digits or abs(here) * torch.finfo(u.dtype).eps <= 1):
        return u
    least = here if is_usable else -math.inf
    torch.manual_seed(0)
    for half_width in _HALF_WIDTHS:
        point = half_width * (2 * torch.rand_like(u) - 1)
        there, is_usable = _value_at(log_density, point)
        if is_usable and there > least:
            return point
    return u


def _value_at(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[float, bool]:
    """The density at a point, and whether density and gradient are finite there."""
    try:
        value, slope = value_and_gradient(log_density, u[None])
    except RuntimeError:  # no gradient, which is reported elsewhere
        return float(log_density(u[None])), True
    return float(value), bool(value.isfinite() & slope.isfinite().all())
