# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""In which coordinates a fit starts: how centred latents are, by the curvature and the ELBO."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...joint import LogJoint
from ...joint.coordinates import centered_by_curvature
from ...joint.mean_density import MeanLogJoint
from ...joint.protocols import FlowGuide, PriorGuide, StructuredGuide
from ..config import InitializationConfig
from .initial_guide import (
    FAR,
    NUM_DRAWS,
    InitialGuide,
    find_initial_guide,
    restore_parameters,
    saved_parameters,
)
from .sparse_start import find_sparse_start

# gradients that the curvature takes at most
_MOST_GRADIENTS = 4096
# points of a search near where a start is
_NUM_NEAR = 2
# units of the prior throughout are tried where the data of some element are weaker than the prior
_WEAK = 0.5


def find_start(
    density: LogJoint | MeanLogJoint,
    model: Callable[[], object],
    guide: FlowGuide,
    config: InitializationConfig,
) -> InitialGuide:
    """Starts a flow guide at the best candidate for it, in the coordinates where this has the largest ELBO.

    Tried are the coordinates that the guide has, those that the curvature at the first start asks for, the
    model as it is written, and units of the prior throughout; the last three from where the first start is.

    :param density: the log joint density, in the coordinates of the guide, which change in place.
    :raises ValueError: if none of the starts is finite.
    """

    def find(settings: InitializationConfig) -> InitialGuide:
        if isinstance(guide, StructuredGuide):
            return find_sparse_start(density, model, guide, settings)
        return find_initial_guide(density, model, guide, settings)

    coordinates = density.coordinates
    if coordinates is None or not (isinstance(guide, PriorGuide) and guide.chooses_coordinates):
        return find(config)
    near = replace(config, num_points=_NUM_NEAR, num_points_by_loop=_NUM_NEAR)
    found: list[tuple[InitialGuide, list[Tensor]]] = []
    first = coordinates.centered.detach().clone()

    def attempt(centered: Tensor, point: Tensor, settings: InitializationConfig) -> None:
        coordinates.centered.data.copy_(centered)
        coordinates.unit.data.copy_(density.prior_scales(point))
        guide.start_at(density.from_unconstrained(point[None])[0][0])
        try:
            initial = find(settings)
        except ValueError:  # as the model is written it may have no finite start
            if not found:
                raise
            return
        found.append((initial, saved_parameters(guide)))

    with torch.no_grad():
        start, _ = density.to_unconstrained(density.start[None])
    attempt(first, start[0], config)
    with torch.no_grad():
        fewer = _MOST_GRADIENTS // (2 * len(first))
        z, _ = guide.rsample_and_log_prob(min(NUM_DRAWS, max(fewer, 1)))
        unit_scales = coordinates.non_centered(density.latents)
        unit = density.with_coordinates(unit_scales)
        u, _ = density.to_unconstrained(z)
        x, _ = unit.from_unconstrained(u)
    second = centered_by_curvature(unit, x)
    others = [second, torch.ones_like(first)]
    if bool((second < _WEAK).any()):
        others.append(unit_scales.centered)
    for centered in others:
        if bool((centered - first).abs().max() > FAR):
            attempt(centered, u.mean(0), near)
    best, saved = max(found, key=lambda pair: pair[0].elbo)
    restore_parameters(guide, saved)
    return best
