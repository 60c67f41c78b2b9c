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

from ..joint import LogJoint
from .gaussians import evaluated

_RADIUS = 2.0
# a mode that is further away than this, by the units of the unconstrained space, will not be found
_FAR = (4.0, 10.0, 25.0)
_MAX_HALVINGS = 12


def starting_points(
    log_joint: LogJoint, model: Callable[[], Any], home: Tensor, count: int
) -> Tensor:
    """Points at which the density is finite: home, draws of the prior, points around, points far out.

    A point without a finite density is drawn towards home until it has one.

    :param log_joint: the log joint density of the model.
    :param model: the model, with its arguments.
    :param home: where the guide is, shape ``(latent_dim,)``.
    :param count: how many there are at most.
    :return: shape ``(S, latent_dim)``, S from 0 to ``count``.
    """
    num_prior = max((count - 1) // 3, 1)
    drawn = [home, log_joint.latents.start]
    drawn += [_prior_point(log_joint, model) for _ in range(num_prior)]
    while len(drawn) < count:
        k = len(drawn) - num_prior - 2
        spread = _FAR[(k // 2) % len(_FAR)] if k % 2 else _RADIUS
        drawn.append(home + spread * torch.randn_like(home))
    return _drawn_home(log_joint, torch.stack(drawn[:count]), home)


def _prior_point(log_joint: LogJoint, model: Callable[[], Any]) -> Tensor:
    def sampled(site: Any) -> Tensor:
        try:
            value: Tensor = site["fn"].sample().detach()
        except NotImplementedError:  # an improper prior has no draws
            known = log_joint.latents.sites[site["name"]]
            value = known.bijection(known.start + _RADIUS * torch.randn_like(known.start))
        return value

    quiet = pyro.validation_enabled(False)
    try:
        with quiet, torch.no_grad(), poutine.block(), InitMessenger(sampled):
            trace = poutine.trace(model).get_trace()
    except (torch.linalg.LinAlgError, ValueError):  # the model refuses some draws of its prior
        return log_joint.latents.start
    nodes: Any = trace.nodes
    values = {name: nodes[name]["value"] for name in log_joint.latents.sites}
    return log_joint.unconstrain(values)


def _drawn_home(log_joint: LogJoint, points: Tensor, home: Tensor) -> Tensor:
    points = torch.where(points.isfinite(), points, home)
    for _ in range(_MAX_HALVINGS):
        lost = ~evaluated(log_joint, points).isfinite()
        if not bool(lost.any()):
            break
        points = torch.where(lost[:, None], 0.5 * (points + home), points)
    return points[evaluated(log_joint, points).isfinite()]
