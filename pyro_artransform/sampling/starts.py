# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Starts of superchains, overdispersed relative to the posterior.

Chains with close starts agree before any of them has visited a tail. So scale parameters of other priors
start at quantiles of their priors, from small to large, and are held there while all other latents ascend.
Some superchains thus start in the neck of a funnel, and some at its mouth.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._base.time_limit import until_deadline
from ..model import LogJoint
from ..model.density import CACHED
from ..model.initial_point import usable_points, values_at
from .modes import NEGLIGIBLE, NEGLIGIBLE_BY_DIM
from .preconditioning import Preconditioner
from .target import TOO_FAR, State, TransformedDensity

SUPERCHAINS = 8  #: of one chain each, if the model is looped over
_MOST_CHAINS, _FEWEST_CHAINS = 64, 16  # of a vectorized model
# spread of the starts in sds of the prior (benchmarks/tails.md)
_SPREAD = 1.3
# half-width of the uniform distribution of starts on the unconstrained space, as that of Stan's
_UNIFORM = 2.0
# Adam steps, first and last learning rate in units of the spread, and number of last steps whose points give
# the first preconditioner
_CLIMB, _FIRST, _SMALLEST, _LAST = 60, 0.3, 0.003, 10


def usual_num_chains(log_joint: LogJoint, num_samples: float) -> int:
    """The number of chains: more if many draws cost as much as one, and many are requested."""
    if log_joint.strategy == "loop":
        return SUPERCHAINS
    fast = min(
        log_joint.chunk_size // (4 * CACHED),
        2**15 // log_joint.latents.latent_dim,  # so many coordinates cost as much as one
        num_samples / 12,
        _MOST_CHAINS,
    )
    return max(int(fast) // SUPERCHAINS * SUPERCHAINS, _FEWEST_CHAINS)


class Starts(NamedTuple):
    """Candidate starts of superchains, in the coordinates of a density.

    :param base: the points, shape ``(K * M, D)``, with those of a superchain contiguous.
    :param unit: the spread of each coordinate of each point, same shape.
    :param is_held: which coordinates are held during the ascent, shape ``(D,)``.
    :param has_parents: which coordinates have a prior that depends on other latents, shape ``(D,)``.
    """

    base: Tensor
    unit: Tensor
    is_held: Tensor
    has_parents: Tensor


class StartError(ValueError):
    """No chain can start: no start has a finite density and gradient."""


def check_has_gradient(density: LogJoint) -> None:
    """Raises a ``StartError`` if no gradient of a density reaches its latents."""
    if not density.has_gradient:
        raise StartError(
            "expected a log density with a gradient with respect to the latents, got one without: does the "
            "model use torch.no_grad, or detach them?"
        )


def latin_hypercube(num_points: int, like: Tensor) -> Tensor:
    """A Latin hypercube ``(num_points, D)`` in (0, 1).

    Points of even and of odd index are each such a hypercube, too. See Sliced Latin Hypercube Designs (Qian,
    2012), https://doi.org/10.1080/01621459.2011.644132
    """
    size = math.ceil(num_points / 2)
    noise = torch.rand((3, 2, size, like.shape[-1]), dtype=like.dtype, device=like.device)
    # each slice has one of two neighbouring strata
    pair, is_upper = noise[0].argsort(1), (noise[1, :1] < 0.5).expand_as(noise[1]).clone()
    is_upper[1] = ~is_upper[1]
    stratum = 2 * pair + is_upper.gather(1, pair)
    return ((stratum + noise[2]) / (2 * size)).transpose(0, 1).flatten(0, 1)[:num_points]


def wide_normal(num_points: int, like: Tensor) -> Tensor:
    """A Latin hypercube ``(num_points, D)`` at quantiles of a wide normal distribution."""
    return _SPREAD * torch.special.ndtri(latin_hypercube(num_points, like))


def uniform(log_joint: LogJoint, unit: Tensor, half_width: float) -> Tensor:
    """Points of the unit cube, moved to one on the unconstrained space, in the coordinates."""
    return log_joint.from_unconstrained(half_width * (2 * unit - 1))[0]


@torch.no_grad()
def overdispersed(log_joint: LogJoint, num_superchains: int, size: int = 1) -> Starts:
    """Points spread over the prior and the unconstrained space, and the model's start.

    Every other superchain is spread like the prior. The rest, of which the first begins with the model's
    start, are uniform in (-2, 2) on the unconstrained space, since a vague prior does not locate the
    posterior. Points of a superchain share the values of held coordinates.
    """
    start, latents = log_joint.start, log_joint.latents
    num_points = num_superchains * size
    # points of a superchain are far apart in the hypercube
    cube = latin_hypercube(num_points, start).unflatten(0, (size, num_superchains)).transpose(0, 1)
    cube = cube.flatten(0, 1)
    held = wide_normal(num_superchains, start).repeat_interleave(size, 0)
    written = log_joint.with_coordinates(None)
    wide = written.prior_scales(written.start)
    narrow = wide.clamp_max(1.0)
    has_parents, is_scale = torch.zeros((2, *start.shape), dtype=torch.bool, device=start.device)
    if log_joint.coordinates is not None:
        is_mapped = log_joint.coordinates.centered < 1
        # a coordinate of one is a distance of one prior scale
        narrow = torch.where(is_mapped, narrow / wide, narrow)
        wide = wide.masked_fill(is_mapped, 1.0)
        start = torch.where(is_mapped, 0.0, start)
        parts = latents.views(has_parents), latents.views(is_scale)
        for name, depends in log_joint.mapped_sites(with_shapes=True).items():
            parts[0][name].fill_(depends)
            parts[1][name].fill_(not (depends or latents.sites[name].is_unconstrained))
    is_held = is_scale & has_parents.any()
    is_wide = torch.arange(num_superchains, device=start.device).repeat_interleave(size) % 2 == 0
    is_wide = is_wide[:, None]
    unit = torch.where(is_wide, wide, narrow)
    near = uniform(log_joint, cube, _UNIFORM)
    points = torch.where(is_wide, start + wide * _SPREAD * torch.special.ndtri(cube), near)
    points = torch.where(is_held, start + unit * held, points)
    points[size] = log_joint.start
    known, others = values_at(log_joint, points), _others(log_joint, start, wide, num_points)
    points = usable_points(log_joint, points, known, others)
    return Starts(points, unit, is_held, has_parents)


def _others(log_joint: LogJoint, start: Tensor, wide: Tensor, num_points: int) -> Iterator[Tensor]:
    """Points to replace those without a finite density, ``(num_points, D)``.

    In units of the prior, from narrower uniform distributions, and near the model's start.
    """
    for spread in (1.0, 0.5):
        yield start + spread * wide * wide_normal(num_points, start)
    for half_width in (_UNIFORM, 0.5, 0.0):
        yield uniform(log_joint, latin_hypercube(num_points, start), half_width)
    for spread in (0.1, 0.01, 0.0):
        yield log_joint.start + spread * wide_normal(num_points, start)


def initial_ascent(target: TransformedDensity, starts: Starts) -> tuple[State, Preconditioner]:
    """Ascends from starts, short of a mode; returns the states and a first preconditioner.

    A step after which the density is lower by 1,000 nats, or not finite, is taken back, and later ones are a
    quarter as long.
    """
    base, unit, is_held, _ = starts
    first, second = torch.zeros_like(base), torch.zeros_like(base)
    states, share = list[State](), torch.ones_like(base[:, 0])
    for step in until_deadline(range(1, _CLIMB + 1), at_least=1):
        state = target(base)
        if states:
            state, has_fallen = _taken_back(state, states[-1])
            share = torch.where(has_fallen, share / 4, share)
            first = first.masked_fill(has_fallen[:, None], 0.0)
        states = [*states[1 - _LAST :], state]
        gradient = (unit * state.gradient).nan_to_num(0.0, 0.0, 0.0).masked_fill(is_held, 0.0)
        gradient = gradient.clamp(-1e15, 1e15)  # whose square is finite
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient.square()
        size = (second / (1 - 0.95**step)).sqrt().clamp_min(1e-8)
        rate = _FIRST * (_SMALLEST / _FIRST) ** (step / _CLIMB) * share[:, None]
        base = state.base + rate * unit * first / (1 - 0.9**step) / size
    known = State.cat(states)
    known = known.at(known.is_usable)
    state, _ = _taken_back(target(base), states[-1])
    if len(known.base) < 2:
        return state, Preconditioner.identity(base)
    return state, Preconditioner.of(known.base, known.gradient)


def _taken_back(state: State, before: State) -> tuple[State, Tensor]:
    """The states without steps after which the density has fallen, and which steps these are, ``(C,)``."""
    is_lower = ~(state.log_density > before.log_density - TOO_FAR)
    has_fallen = is_lower & before.log_density.isfinite()
    return before.where(has_fallen, state), has_fallen


def select_dispersed(state: State, scale: Tensor, num_superchains: int) -> Tensor:
    """Indices ``(K,)`` of one point per superchain, chosen far from those of the others.

    :param state: points ``(K * M, D)`` after the ascent; those with a density far below the best of their
        superchain are left out.
    :param scale: the units of distances, shape ``(D,)``.
    """
    points, dim = state.base / scale, len(scale)
    density = torch.where(state.is_usable, state.log_density, -torch.inf).unflatten(
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
