# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""In which coordinates a fit starts: how centred latents are, by the curvature and the ELBO."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...joint import LogJoint
from ...joint.coordinates import Coordinates, centered_by_curvature
from ...joint.mean_density import MeanLogJoint
from ...joint.protocols import PriorGuide
from .initial_guide import InitialGuide

# draws of the start that the curvature is averaged over
_NUM_DRAWS = 8
# how far lambda has to be from where a start was found for another one to be looked for
_FAR = 0.05


def find_in_coordinates(
    density: LogJoint | MeanLogJoint,
    guide: PriorGuide,
    coordinates: Coordinates,
    find: Callable[[bool], InitialGuide],
) -> InitialGuide:
    """Starts a guide in the coordinates whose start has the largest ELBO.

    Tried are those that the guide has, those that the curvature at the first start asks for, and the model
    as it is written; the last two from where the first start is.

    :param density: the log joint density, in the coordinates of the guide.
    :param coordinates: these, which change in place.
    :param find: starts the guide, near where it is or from many points.
    :raises ValueError: if none of the starts is finite.
    """
    found: list[tuple[InitialGuide, list[Tensor]]] = []
    first = coordinates.centered.detach().clone()

    def attempt(centered: Tensor, point: Tensor, is_near: bool) -> None:
        coordinates.centered.data.copy_(centered)
        guide.start_at(density.from_unconstrained(point[None])[0][0])
        try:
            initial = find(is_near)
        except ValueError:  # as the model is written it may have no finite start
            if not found:
                raise
            return
        found.append((initial, [parameter.detach().clone() for parameter in guide.parameters()]))

    with torch.no_grad():
        start, _ = density.to_unconstrained(density.start[None])
    attempt(first, start[0], is_near=False)
    with torch.no_grad():
        z, _ = guide.rsample_and_log_prob(_NUM_DRAWS)
        unit = density.with_coordinates(coordinates.non_centered(density.latents))
        u, _ = density.to_unconstrained(z)
        x, _ = unit.from_unconstrained(u)
    second = centered_by_curvature(unit, x)
    for centered in (second, torch.ones_like(first)):
        if bool((centered - first).abs().max() > _FAR):
            attempt(centered, u.mean(0), is_near=True)
    best, saved = max(found, key=lambda pair: pair[0].elbo)
    with torch.no_grad():
        for parameter, value in zip(guide.parameters(), saved):
            parameter.copy_(value)
    return best
