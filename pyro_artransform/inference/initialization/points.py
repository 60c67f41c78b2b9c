# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Overdispersed points of finite density that a search for a start, or for modes, begins at."""

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from ...joint import LogJoint
from ...time_limit import limited
from .gaussians import evaluate_density

# the innermost shell of points, in units of the space, and the ratio of two radii: six reach to fifty
_RADIUS, _GROWTH = 1.0, 2.2
# points that are tried in each shell, also where they are evaluated one at a time
_NUM_TRIED, _NUM_TRIED_BY_LOOP = 64, 4
# Stan's radius of starts around the origin, and of draws of an improper prior
_STANS_RADIUS = 2.0
_MAX_HALVINGS = 12  # of the way to a point of finite density


def starting_points(log_density: LogJoint, center: Tensor, count: int) -> Tensor:
    """Points ``(n, D)``, n at most ``count``: the center, draws of the prior, and of shells around it.

    One is near the origin of the unconstrained space, where Stan starts: medians and draws of a vague
    prior may all be far from where the data can be. Those without a finite density are moved towards one
    that has it.
    """
    near_origin = _STANS_RADIUS * (2 * torch.rand_like(center) - 1)
    found = [center, log_density.start, log_density.from_unconstrained(near_origin[None])[0][0]]
    for _ in range(max((count - 1) // 3, 1)):
        found.append(_prior_draw(log_density))
    num_tried = _NUM_TRIED_BY_LOOP if log_density.strategy == "loop" else _NUM_TRIED
    for k in limited(range(count - len(found))):
        noise = torch.randn_like(center.expand(num_tried, -1))
        shell = center + _RADIUS * _GROWTH**k * noise
        found.append(shell[evaluate_density(log_density, shell).argmax()])
    points = torch.stack(found[:count])
    points = points[points.isfinite().all(-1)]
    is_good = evaluate_density(log_density, points).isfinite()
    good = points[is_good]
    for _ in range(_MAX_HALVINGS):
        if not len(good) or bool(is_good.all()):
            break
        points = torch.where(is_good[:, None], points, 0.5 * (points + good[0]))
        is_good = evaluate_density(log_density, points).isfinite()
    return points[is_good]


def _prior_draw(log_density: LogJoint) -> Tensor:
    """A draw of the prior; the start where the model refuses it."""
    latents, start = log_density.latents, log_density.start

    def sampled(site: dict[str, Any]) -> Tensor:
        try:
            value: Tensor = site["fn"].sample().detach()
        except NotImplementedError:  # an improper prior has no draws
            near = latents.split(start)[site["name"]]
            near = near + _STANS_RADIUS * torch.randn_like(near)
            value = latents.sites[site["name"]].bijection(near)
        return value

    quiet = pyro.validation_enabled(False)
    try:
        with quiet, torch.no_grad(), poutine.block(), InitMessenger(sampled):
            trace = poutine.trace(log_density.run).get_trace()
    except (torch.linalg.LinAlgError, ValueError):
        return start
    values: dict[str, Any] = {name: trace.nodes[name]["value"] for name in latents.sites}
    return log_density.from_unconstrained(latents.unconstrain(values)[None])[0][0]
