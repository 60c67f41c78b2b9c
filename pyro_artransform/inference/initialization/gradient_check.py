# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks the gradient of a model's log density against its values, to detect detached latents.

Along a line segment the values must rise by the integral of the gradient (here by Simpson's rule). If
latents are detached, as by ``float(z)``, the missing rise is a smooth function, so that it is proportional
to the length of the segment at nearly every point. Kinks, jumps, round-off and strong curvature are not.
"""

import torch
from torch import Tensor

from ..._base.arguments import first_of
from ..._base.comparison import ROUND_OFF
from ...model import LogJoint
from ...model.graphs.dependencies import value_and_gradient
from ...sampling.starts import check_has_gradient

# the number of points, their unconstrained distance from a center, and half the lengths of segments
_NUM_POINTS, _SPREAD = 6, 0.3
_STEPS = [0.1 / 5**k for k in range(5)]
# the least missing share of the rise, its tolerance between lengths, and how many must exceed round-off
_SHARE, _SLACK, _NUM_SHOWN = 0.01, 0.2, 3
# the share of points that must show it, since the missing part may vanish at some
_MOST = 0.65


def check_gradient(density: LogJoint, center: Tensor) -> None:
    """Raises a ``ValueError`` if the density has no gradient, or its gradient lacks a part in some latents.

    :param center: shape ``(latent_dim,)``, on the unconstrained space.
    """
    check_has_gradient(density)
    if density.is_random:
        return
    written, latents = density.with_coordinates(None), density.latents
    u = center.detach()[None]
    if _lacking(written, u, torch.ones_like(u)) > _MOST:
        axes = torch.ones_like(center).diag()
        lacking = [i for i, axis in enumerate(axes) if _lacking(written, u, axis) > 0.5 * _MOST]
        names = first_of([latents.name_of(i) for i in lacking]) or "some latents"
        raise ValueError(
            "expected a log density with the full gradient with respect to the latents, got one whose "
            f"gradient lacks a part for {names}: do not use float(), .item(), .numpy() or .detach() on "
            "anything computed from latents, nor torch.no_grad"
        )


def _lacking(density: LogJoint, center: Tensor, moved: Tensor) -> float:
    """The share of points around a center at which the gradient in the coordinates ``moved`` lacks a part."""
    shape, generator = (2, _NUM_POINTS, 1, center.shape[-1]), torch.Generator().manual_seed(0)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    (noise, direction), steps = drawn.to(center), center.new_tensor(_STEPS)
    points, shifts = center + _SPREAD * noise, steps[:, None] * moved * direction.sign()
    left, right, sizes = points - shifts, points + shifts, [len(steps), len(steps), 1]
    lines = torch.cat([left, right, points], 1)
    value, gradient = value_and_gradient(density, lines.flatten(0, 1))
    eps = max(density.latents.eps, torch.finfo(value.dtype).eps)
    value = value.double().unflatten(0, lines.shape[:2])
    begin, end, _ = value.split(sizes, 1)
    first, last, middle = gradient.double().reshape(lines.shape).split(sizes, 1)
    expected = ((right.double() - left.double()) * (first + 4 * middle + last)).sum(-1) / 6
    missing, steps = end - begin - expected, steps.double()
    usable = missing.isfinite().all(-1)
    if int(usable.sum()) < 3:
        return 0.0
    rate, rise = missing[usable] / steps, expected[usable].abs() / steps
    slope = rate.median(-1, keepdim=True).values
    noise_level = ROUND_OFF * eps * value[usable].abs().amax()
    is_shown = slope.abs() * steps > noise_level
    is_alike = (rate - slope).abs() <= _SLACK * slope.abs()
    is_large = slope.abs() > _SHARE * rise
    lacks = (is_alike | ~is_shown).all(-1) & (is_shown.sum(-1) >= _NUM_SHOWN) & is_large.all(-1)
    return lacks.double().mean().item()
