# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Initial points at which a log density is finite."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .graphs.dependencies import value_and_gradient


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
        known = values_at(log_density, u[None])
    except RuntimeError:  # no gradient, which is reported elsewhere
        log_density(u[None])
        return InitialPoint(u, False)
    generator = torch.Generator(u.device).manual_seed(0)
    uniform = partial(torch.rand, 1, len(u), dtype=u.dtype, device=u.device, generator=generator)
    half_widths = (0.0, *(0.5,) * 5, *(2.0,) * 15)
    others = (half_width * (2 * uniform() - 1) for half_width in half_widths)
    found = usable_points(log_density, u[None], known, others, needs_digits)
    return InitialPoint(found[0], True)


def usable_points(
    log_density: Callable[[Tensor], Tensor],
    points: Tensor,
    known: tuple[Tensor, Tensor],
    others: Iterable[Tensor],
    needs_digits: bool = False,
) -> Tensor:
    """Points ``(n, D)``, each replaced by the first usable one of others where it is of no use.

    :param known: :func:`values_at` the points.
    :param others: points ``(n, D)``, in the order in which they are tried.
    """
    value, is_usable = known
    least, is_good = value.masked_fill(~is_usable, -torch.inf), is_usable
    if needs_digits:
        is_good = is_good & (value.abs() * torch.finfo(points.dtype).eps <= 1)
    for each in others:
        if bool(is_good.all()):
            break
        value, is_usable = values_at(log_density, each)
        is_better = ~is_good & is_usable & (value > least)
        points, is_good = torch.where(is_better[:, None], each, points), is_good | is_better
    return points


def values_at(log_density: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """The density at points ``(n, D)``, and whether density and gradient are finite there, both ``(n,)``."""
    value, slope = value_and_gradient(log_density, points)
    return value, value.isfinite() & slope.isfinite().all(-1)
