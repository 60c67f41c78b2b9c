# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates that are angles: whole turns leave the density as it is, and count the same mass again."""

import math

import torch
from torch import Tensor

from ...joint import LogDensity
from ..initialization.gaussians import evaluate_density

# the density of an angle is the same after these turns, that of a proper prior is not where they lead
# beyond some standard deviations of the draws
_TURNS, _BEYOND = (1.0, -32.0), 4.0
_TOLERANCE = 1e-3  # nats, to which round-off is added
_MOST_VALUES = 2**23  # of points that are evaluated at once: 64 MB in double precision


def wrapped(angles: Tensor) -> Tensor:
    """Angles less whole turns, from -pi to pi."""
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi


def find_circular(log_density: LogDensity, draws: Tensor) -> Tensor | None:
    """Which coordinates ``(D,)`` of draws ``(n, D)`` are angles; ``None`` without."""
    points, spread = draws[:1], draws.std(0) / (2 * math.pi)
    value = evaluate_density(log_density, points)
    tolerance = _TOLERANCE + 10 * torch.finfo(value.dtype).eps * value.abs()
    circular = spread.isfinite().nonzero()[:, 0]
    for turns in _TURNS:
        if not len(circular):
            return None
        kept = []
        for some in circular.split(max(_MOST_VALUES // points.shape[-1], 1)):
            # a wide density changes little within its own width
            size = turns * (_BEYOND * spread[some] / abs(turns)).ceil().clamp_min(1)
            shifts = torch.zeros_like(points.expand(len(some), -1))
            shifts.scatter_(1, some[:, None], 2 * math.pi * size[:, None])
            change = evaluate_density(log_density, points + shifts) - value
            kept.append(some[change.abs() <= tolerance])
        circular = torch.cat(kept)
    if not len(circular):
        return None
    is_circular = torch.zeros_like(draws[0], dtype=torch.bool)
    is_circular[circular] = True
    return is_circular


def fold(draws: Tensor, is_circular: Tensor | None) -> tuple[Tensor, float]:
    """Draws ``(n, D)`` with each angle within half a turn of its mean, and the entropy of the turns."""
    if is_circular is None:
        return draws, 0.0
    center = torch.atan2(draws.sin().mean(0), draws.cos().mean(0))
    folded = torch.where(is_circular, center + wrapped(draws - center), draws)
    return folded, _entropy_of_turns(draws[:, is_circular], folded[:, is_circular])


def _entropy_of_turns(draws: Tensor, folded: Tensor) -> float:
    """The entropy of turns given angles, by which an ELBO is too large, with Miller's correction.

    See Note on the Bias of Information Estimates (Miller, 1955).
    """
    total, size = 0.0, math.isqrt(len(draws))  # of pieces in which the angle counts as the same
    for angles, within in zip(draws.double().mT, folded.double().mT):
        turns, nats = ((angles - within) / (2 * math.pi)).round(), 0.0
        for piece in turns[within.argsort()].split(size):
            counts = piece.unique(return_counts=True)[1]
            shares = counts / len(piece)
            entropy = -(shares * shares.log()).sum() + (len(counts) - 1) / (2 * len(piece))
            nats += entropy.item() * len(piece)
        total += nats / len(turns)
    return total
