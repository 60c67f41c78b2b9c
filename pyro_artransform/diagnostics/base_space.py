# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Chains in the base space of a guide: a density, and a transform from a standard normal."""

import math
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..joint import LogJoint
from ..joint.coordinates import coordinates_at, non_centered
from ..joint.protocols import PriorGuide, TransformedGuide
from ..sampling import Ensemble
from ..sampling.target import ToLatent
from ..transforms.flow_module import call_and_ladj_over_vectors
from .importance_weights import NUM_DRAWS, ModelAndGuide, check_same_latents

_MOST_DENSE = 1200  # the most dimensions of an affine transform that is stored as a matrix


def ensemble_of(
    subject: ModelAndGuide, num_samples: float = math.inf, num_chains: int | None = None
) -> Ensemble:
    """Chains in the base space of a guide, where the posterior is nearly a standard normal.

    :raises ValueError: if there are fewer than 4 chains, the model subsamples its data, or the guide lacks
        a latent, was made for another model, is a point, has discrete sites, or has too few finite draws.
    """
    if subject.log_joint.is_random:
        return Ensemble(subject.log_joint)  # raises the error for a random density
    log_joint, to_latent = base_space(subject)
    return Ensemble(log_joint, num_samples, num_chains, to_latent)


def base_space(subject: ModelAndGuide) -> tuple[LogJoint, ToLatent]:
    """A density, and a transform from a standard normal to its coordinates.

    A guide without a transform is replaced by the means and sds of its draws. So is a Gaussian guide of a
    hierarchy, whose location and scale carry over to coordinates from the prior.
    """
    log_joint, affine = subject.log_joint, None
    draws = subject.draws(2)  # raises an error if the guide does not belong to this model
    transform = transform_of(subject)
    if transform is not None:
        check_same_latents(log_joint, partial(subject.guide, *subject.args, **subject.kwargs))
        affine = _affine(transform, draws)
        if affine is None or isinstance(cast(object, subject.guide), PriorGuide):
            return log_joint, affine or transform
    unit = non_centered(log_joint)
    if affine is not None and unit is log_joint:
        return log_joint, affine
    draws = subject.draws(NUM_DRAWS)
    draws = draws[draws.isfinite().all(-1)]
    if unit is not log_joint and len(draws):
        coordinates = coordinates_at(log_joint, unit.coordinates, draws)
        log_joint = log_joint.with_coordinates(coordinates)
        draws, _ = log_joint.from_unconstrained(draws)
        draws = draws[draws.isfinite().all(-1)]
    if len(draws) < 2:
        raise ValueError(
            f"guide: expected finite draws, got {len(draws)}: train it first, or check supports"
        )
    # a latent rounded to the same value in all draws would never move, and chains would agree on it
    if len(fixed := (draws == draws[0]).all(0).nonzero()):
        name = log_joint.latents.name_of(int(fixed[0]))
        raise ValueError(
            f"guide: expected draws that differ, got the same value of {name} in all of them"
        )
    loc, scale = draws.mean(0), draws.std(0).clamp_min(torch.finfo(draws.dtype).tiny)
    ladj = scale.log().sum()
    return log_joint, lambda base: (loc + base * scale, ladj.expand(len(base)))


def transform_of(subject: ModelAndGuide) -> ToLatent | None:
    """The transform from a standard normal to the guide's draws; ``None`` if the guide has none."""
    guide: object = subject.guide
    if not isinstance(guide, TransformedGuide):
        return None
    try:
        # without an autograd graph, products with AutoMultivariateNormal's matrix are ten times slower
        with torch.enable_grad():
            if subject.log_joint.coordinates is not None and isinstance(guide, PriorGuide):
                transform = guide.transform
            else:
                transform = guide.get_transform(*subject.args, **subject.kwargs)
    except NotImplementedError:  # some of Pyro's guides have the method without an implementation
        return None
    return partial(call_and_ladj_over_vectors, transform)


def _affine(transform: ToLatent, like: Tensor) -> ToLatent | None:
    """An affine transform as a matrix, many times faster than the layers of a flow; else ``None``.

    It may be affine only up to round-off, since chains are correct in any coordinates.
    """
    dim, probes = like.shape[-1], torch.randn_like(like)
    if dim > _MOST_DENSE:
        return None
    unit = torch.ones_like(like[0]).diag()
    with torch.no_grad():
        parts = torch.cat([0 * unit[:1], probes, unit]).split(256)
        images, ladjs = map(torch.cat, zip(*map(transform, parts)))
    loc, ladj = images[0], ladjs[0]
    moved, matrix = (images[1:] - loc).split([len(probes), dim])
    error, scale = (probes @ matrix - moved).abs().amax(0), matrix.square().sum(0).sqrt()
    is_affine = error <= 10 * torch.finfo(like.dtype).eps ** 0.5 * scale
    if not (is_affine.all() and torch.allclose(ladjs, ladj, rtol=1e-4, atol=1e-4)):
        return None
    return lambda base: (loc + base @ matrix, ladj.expand(len(base)))
