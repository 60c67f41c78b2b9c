# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Where superchains begin: at points that are further apart than draws of the posterior.

Chains that begin together agree before any of them has been in a tail. So scales that other priors
depend on begin at quantiles of their priors, small and large ones among them, and stay there while all other
latents climb: thus some superchains begin in the neck of a funnel, and some at its mouth.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..joint import LogJoint
from .modes import NEGLIGIBLE, NEGLIGIBLE_BY_DIM
from .preconditioning import Preconditioner
from .target import PulledBack, State

# sds of the prior by which starts are spread (benchmarks/tails.md)
_SPREAD = 1.3
# steps of Adam, their first and last size in units of the spread, and the last ones, whose points make the
# first preconditioner
_CLIMB, _FIRST, _SMALLEST, _LAST = 60, 0.3, 0.003, 10
# spreads of other points where the density is not finite
_SPREADS_OF_OTHERS = (1.0, 2.0, 0.5, 4.0, 0.25, 1.0, 2.0, 0.5, 0.1, 0.01)


class Starts(NamedTuple):
    """Where superchains may begin, in the coordinates of a density.

    :param base: the points, shape ``(K * M, D)``, those of a superchain one after the other.
    :param unit: by how much they are spread in each coordinate, of the same shape.
    :param is_held: which coordinates are not to climb, shape ``(D,)``.
    :param has_parents: which have a prior that depends on other latents, of the same shape.
    """

    base: Tensor
    unit: Tensor
    is_held: Tensor
    has_parents: Tensor


def latin_hypercube(num_points: int, like: Tensor) -> Tensor:
    """Points ``(num_points, D)``, each coordinate spread over quantiles of a wide normal distribution.

    Every other point alone is such a hypercube, too, and so are the rest. See Sliced Latin Hypercube Designs
    (Qian, 2012), https://doi.org/10.1080/01621459.2011.644132
    """
    size = math.ceil(num_points / 2)
    noise = torch.rand((3, 2, size, like.shape[-1]), dtype=like.dtype, device=like.device)
    # each slice has one of two neighbouring strata
    pair, is_upper = noise[0].argsort(1), (noise[1, :1] < 0.5).expand_as(noise[1]).clone()
    is_upper[1] = ~is_upper[1]
    stratum = 2 * pair + is_upper.gather(1, pair)
    points = torch.special.ndtri((stratum + noise[2]) / (2 * size))
    return _SPREAD * points.transpose(0, 1).flatten(0, 1)[:num_points]


@torch.no_grad()
def overdispersed(log_joint: LogJoint, num_superchains: int, size: int = 1) -> Starts:
    """The model's start, and others that are spread around it, ``size`` for each superchain.

    Those of every other superchain are spread as the prior is; the rest, among which the model's start is the
    first, by at most one on the unconstrained space, since a vague prior says nothing of where the posterior
    is. Points of a superchain have the same values of coordinates that are held.
    """
    start, latents = log_joint.start, log_joint.latents
    num_points = num_superchains * size
    z = latin_hypercube(num_points, start).unflatten(0, (size, num_superchains)).transpose(0, 1)
    held = latin_hypercube(num_superchains, start)[:, None]
    written = log_joint.with_coordinates(None)
    wide = written.prior_scales(written.start)
    narrow = wide.clamp_max(1.0)
    has_parents, is_scale = torch.zeros((2, *start.shape), dtype=torch.bool, device=start.device)
    if log_joint.coordinates is not None:
        is_mapped = log_joint.coordinates.centered < 1
        wide, narrow = wide.masked_fill(is_mapped, 1.0), narrow.masked_fill(is_mapped, 1.0)
        start = torch.where(is_mapped, 0.0, start)
        parts = latents.views(has_parents), latents.views(is_scale)
        for name, depends in log_joint.mapped_sites(with_shapes=True).items():
            parts[0][name].fill_(depends)
            parts[1][name].fill_(not (depends or latents.sites[name].is_unconstrained))
    is_held = is_scale & has_parents.any()
    is_wide = torch.arange(num_superchains, device=start.device)[:, None] % 2 == 0
    unit = torch.where(is_wide, wide, narrow).repeat_interleave(size, 0)
    points = start + unit * torch.where(is_held, held, z).flatten(0, 1)
    points[size] = log_joint.start
    for spread in _SPREADS_OF_OTHERS:
        is_bad = ~log_joint(points).isfinite()
        if not is_bad.any():
            break
        others = start + spread * wide * latin_hypercube(num_points, start)
        points = torch.where(is_bad[:, None], others, points)
    return Starts(points, unit, is_held, has_parents)


def climb(target: PulledBack, starts: Starts) -> tuple[State, Preconditioner]:
    """Points higher up, not at a mode, and how a density is stretched there, as far as points tell."""
    base, unit, is_held, _ = starts
    first, second = torch.zeros_like(base), torch.zeros_like(base)
    states = list[State]()
    for step in range(1, _CLIMB + 1):
        states = [*states[1 - _LAST :], target(base)]
        gradient = (unit * states[-1].gradient).nan_to_num(0.0, 0.0, 0.0).masked_fill(is_held, 0.0)
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient.square()
        size = (second / (1 - 0.95**step)).sqrt().clamp_min(1e-8)
        rate = _FIRST * (_SMALLEST / _FIRST) ** (step / _CLIMB)
        base = base + rate * unit * first / (1 - 0.9**step) / size
    known = State.cat(states)
    known = known.at(known.is_finite)
    if len(known.base) < 2:
        return target(base), Preconditioner.identity(base)
    return target(base), Preconditioner.of(known.base, known.gradient)


def far_apart(state: State, scale: Tensor, num_superchains: int) -> Tensor:
    """Of the points of each superchain one that is far from those of others: their places, ``(K,)``.

    :param state: points ``(K * M, D)`` after the climb, of which those are left out that are far below the
        best one of their superchain.
    :param scale: by which coordinates are measured, shape ``(D,)``.
    """
    points, dim = state.base / scale, len(scale)
    density = torch.where(state.is_finite, state.log_density, -torch.inf).unflatten(
        0, (num_superchains, -1)
    )
    size, best = density.shape[1], density.amax(1, keepdim=True)
    is_high = (density >= best - NEGLIGIBLE - NEGLIGIBLE_BY_DIM * dim).flatten()
    # the first of the second superchain is the model's start
    chosen = {1: size}
    for k in (0, *range(2, num_superchains)):
        own = torch.arange(k * size, (k + 1) * size, device=points.device)
        distance = torch.cdist(points[own], points[[*chosen.values()]]).amin(1).nan_to_num(0.0)
        chosen[k] = int(own[(distance * is_high[own] + is_high[own]).argmax()])
    return torch.tensor(
        [chosen[k] for k in range(num_superchains)], dtype=torch.long, device=points.device
    )
