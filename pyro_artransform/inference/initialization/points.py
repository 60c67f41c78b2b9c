# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Points on the unconstrained space to start from, near and far."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from ...joint import LogDensity
from .gaussians import evaluated

_RADIUS = 2.0
# the shells reach from one unit of the unconstrained space to about a hundred
_NEAR, _WIDER = 1.0, 2.2
_TRIED, _TRIED_BY_LOOP = 64, 4
_MAX_HALVINGS = 12


def starting_points(
    log_joint: LogDensity, model: Callable[[], Any], home: Tensor, count: int
) -> Tensor:
    """Points at which the density is finite: home, draws of the prior, points around, points far out.

    A point without a finite density is drawn towards one that has it.

    :param log_joint: the log joint density of the model.
    :param model: the model, with its arguments.
    :param home: where the guide is, shape ``(latent_dim,)``.
    :param count: how many there are at most.
    :return: shape ``(S, latent_dim)``, S from 0 to ``count``.
    """
    num_prior = max((count - 1) // 3, 1)
    drawn = [home, log_joint.start]
    drawn += [_prior_point(log_joint, model) for _ in range(num_prior)]
    drawn += _best_of_shells(log_joint, home, count - len(drawn))
    return _drawn_home(log_joint, torch.stack(drawn[:count]))


def _best_of_shells(log_joint: LogDensity, home: Tensor, count: int) -> list[Tensor]:
    """Around home, near and further out, in each shell the point of the largest density of several."""
    tried = _TRIED_BY_LOOP if log_joint.strategy == "loop" else _TRIED
    spreads = [_NEAR * _WIDER**k for k in range(max(count, 0))]
    found = []
    for spread in spreads:
        points = home + spread * torch.randn_like(home.expand(tried, -1))
        found.append(points[evaluated(log_joint, points).argmax()])
    return found


def _prior_point(log_joint: LogDensity, model: Callable[[], Any]) -> Tensor:
    def sampled(site: Any) -> Tensor:
        try:
            value: Tensor = site["fn"].sample().detach()
        except NotImplementedError:  # an improper prior has no draws
            start = log_joint.latents.split(log_joint.start)[site["name"]]
            bijection = log_joint.latents.sites[site["name"]].bijection
            value = bijection(start + _RADIUS * torch.randn_like(start))
        return value

    quiet = pyro.validation_enabled(False)
    try:
        with quiet, torch.no_grad(), poutine.block(), InitMessenger(sampled):
            trace = poutine.trace(model).get_trace()
    except (torch.linalg.LinAlgError, ValueError):  # the model refuses some draws of its prior
        return log_joint.start
    nodes: Any = trace.nodes
    values = {name: nodes[name]["value"] for name in log_joint.latents.sites}
    return log_joint.latents.unconstrain(values)


def _drawn_home(log_joint: LogDensity, points: Tensor) -> Tensor:
    """Draws points without a finite density towards the first one that has it."""
    points = points[points.isfinite().all(-1)]
    is_good = evaluated(log_joint, points).isfinite()
    if not bool(is_good.any()):
        return points[:0]
    home = points[is_good][0]
    for _ in range(_MAX_HALVINGS):
        if bool(is_good.all()):
            break
        points = torch.where(is_good[:, None], points, 0.5 * (points + home))
        is_good = evaluated(log_joint, points).isfinite()
    return points[is_good]
