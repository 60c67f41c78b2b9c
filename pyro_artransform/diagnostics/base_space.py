# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The base space that chains of a guide move in: a density, and a transform of a standard normal to it."""

from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..joint import LogJoint
from ..joint.coordinates import coordinates_at, non_centered
from ..joint.protocols import PriorGuide, TransformedGuide
from ..transforms.flow_module import call_and_ladj_over_vectors
from .defensive_mixture import ToLatent
from .importance_weights import ModelAndGuide, check_same_latents

# draws of a guide that is taken by its means and sds, and those at which the curvature is asked
NUM_DRAWS, _NUM_CENTERED = 10_000, 8
# the dimensions up to which an affine transform is a matrix, and points that tell whether it is affine
_MOST_DENSE, _NUM_PROBES = 1200, 8


def base_space(subject: ModelAndGuide, count: int) -> tuple[LogJoint, ToLatent, Tensor, bool]:
    """A density, a transform of a standard normal to its coordinates, points ``(count, D)``, if it is affine.

    A guide that offers no transform is taken by its means and sds, and so is a Gaussian one of a hierarchy:
    it is no more than a place and a scale, which coordinates from the prior can have too.
    """
    log_joint, given = subject.log_joint, None
    draws = subject.draws(2)  # an error if it is not a guide of this model
    transform = transform_of(subject)
    if transform is not None:
        guide = partial(subject.guide, *subject.args, **subject.kwargs)
        check_same_latents(log_joint, guide)
        start = torch.randn_like(draws[:1].expand(count, -1))
        affine = _affine(transform, start)
        given = log_joint, affine or transform, start, affine is not None
        if affine is None or isinstance(cast(object, subject.guide), PriorGuide):
            return given
    unit = non_centered(log_joint)
    if given is not None and unit is log_joint:
        return given
    draws = subject.draws(max(NUM_DRAWS, count))
    draws = draws[draws.isfinite().all(-1)]
    if unit is not log_joint and len(draws):
        found = coordinates_at(log_joint, unit.coordinates, draws[:_NUM_CENTERED])
        log_joint = log_joint.with_coordinates(found)
        draws, _ = log_joint.from_unconstrained(draws)
        draws = draws[draws.isfinite().all(-1)]
    if len(draws) < count:
        raise ValueError(
            f"guide: expected at least {count} finite draws, got {len(draws)}: train it first, or "
            "check supports"
        )
    to_latent, base = by_moments(draws)
    return log_joint, to_latent, base[:count], True


def by_moments(draws: Tensor) -> tuple[ToLatent, Tensor]:
    """The transform of a standard normal to the means and sds of draws ``(n, D)``, and where it has these."""
    finite = draws[draws.isfinite().all(-1)]
    loc, scale = finite.mean(0), finite.std(0).clamp_min(torch.finfo(draws.dtype).tiny)
    ladj = scale.log().sum()
    return lambda base: (loc + base * scale, ladj.expand(len(base))), (draws - loc) / scale


def transform_of(subject: ModelAndGuide) -> ToLatent | None:
    """The transform of a standard normal to the guide's draws; ``None`` where it offers none."""
    guide: object = subject.guide
    if not isinstance(guide, TransformedGuide):
        return None
    try:
        # products with AutoMultivariateNormal's matrix are ten times slower where it has no graph
        with torch.enable_grad():
            if subject.log_joint.coordinates is not None and isinstance(guide, PriorGuide):
                transform = guide.transform_in_coordinates()
            else:
                transform = guide.get_transform(*subject.args, **subject.kwargs)
    except NotImplementedError:  # some of Pyro's guides have no more than the method
        return None
    return partial(call_and_ladj_over_vectors, transform)


def _affine(transform: ToLatent, like: Tensor) -> ToLatent | None:
    """An affine transform as a matrix, many times faster than the layers of a flow; else ``None``.

    Chains are right in any coordinates, so that it may be affine to round-off only.
    """
    dim = like.shape[-1]
    if dim > _MOST_DENSE:
        return None
    probes = torch.randn_like(like[:1].expand(_NUM_PROBES, -1))
    origin, unit = torch.zeros_like(probes[:1]), torch.diag_embed(torch.ones_like(like[0]))
    with torch.no_grad():
        found, ladjs = transform(torch.cat([origin, probes]))
        loc, ladj = found[0], ladjs[0]
        # most others are found out by a few rows; the matrix takes one for each dimension
        if not torch.allclose(ladjs, ladj.expand_as(ladjs), rtol=1e-4, atol=1e-4):
            return None
        matrix = torch.cat([transform(part)[0] for part in unit.split(256)]) - loc
    error = (loc + probes @ matrix - found[1:]).abs().amax(0)
    scale = matrix.square().sum(0).sqrt()
    if not bool((error <= 10 * torch.finfo(like.dtype).eps ** 0.5 * scale).all()):
        return None
    return lambda base: (loc + base @ matrix, ladj.expand(len(base)))
