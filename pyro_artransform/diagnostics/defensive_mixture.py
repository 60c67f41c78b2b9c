# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A mixture of a guide and of heavy tails around it, whose draws know of more than the guide's.

A guide whose tails are lighter than those of the posterior hardly draws there, and its weights do not show
what is missing. Half of the draws of the mixture are the guide's, half are further out in its base space, so
that the densities of both are known without an inverse: a quarter is a Cauchy of all coordinates for a tail
of all, and a quarter a Cauchy of a single coordinate, any, for a tail of one among many, which the first has
no draws of. No weight over the mixture is more than twice that over the guide alone. They tell of single
latents.

**References**

1. Weighted Average Importance Sampling and Defensive Mixture Distributions (Hesterberg, 1995),
   https://doi.org/10.1080/00401706.1995.10484303
2. Safe and Effective Importance Sampling (Owen, Zhou, 2000),
   https://doi.org/10.1080/01621459.2000.10473909
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..joint import LogJoint
from ..sampling.target import ToLatent
from ..time_limit import limited

_LOG_PI = math.log(math.pi)
_CHUNK = 1000
_FAR = -10.0  # log weights of the guide where a draw of its own is one of ten thousands at most


class MixtureDraws(NamedTuple):
    """Draws ``(n, D)`` of a mixture, or a guide, and what they count for: logs of weights ``(n,)``."""

    draws: Tensor
    of_posterior: Tensor
    of_guide: Tensor
    has_tails: bool = True  #: whether they are those of a mixture

    @classmethod
    def of_guide_alone(cls, draws: Tensor, log_weights: Tensor) -> "MixtureDraws":
        return cls(draws, log_weights, torch.zeros_like(log_weights), False)


@torch.no_grad()
def mixture_draws(
    log_joint: LogJoint, to_latent: ToLatent, like: Tensor, count: int
) -> MixtureDraws:
    """Draws of the unconstrained space, of a guide that takes a standard normal to a density's coordinates.

    :param like: a tensor ``(*, D)`` of the dtype and on the device of the draws.
    """
    chunks = list[tuple[Tensor, ...]]()
    for base in limited(base_draws(like[:1].expand(count, -1)).split(_CHUNK), at_least=1):
        latent, ladj = to_latent(base)
        log_posterior = log_joint(latent) + ladj
        draws, _ = log_joint.to_unconstrained(latent)
        log_density = log_base_density(base)
        log_guide = _log_normal(base).sum(-1) - log_density
        # models fail far out, as by overflow, which says nothing of where the guide draws
        is_failed = ~log_posterior.isfinite() & (log_guide < _FAR)
        log_posterior = log_posterior.masked_fill(is_failed, -torch.inf)
        chunks.append((draws, log_posterior - log_density, log_guide))
    draws, *logs = map(torch.cat, zip(*chunks))
    # the guide has none so far out that squares overflow; where the density is zero it has its own share
    is_near = draws.square().isfinite().all(-1)
    of_posterior, of_guide = (each.where(is_near, -torch.inf) for each in logs)
    return MixtureDraws(draws.where(is_near[:, None], 0.0), of_posterior, of_guide)


def base_draws(like: Tensor) -> Tensor:
    """Draws of the mixture in the base space, of the shape ``(n, D)`` of other points."""
    base, tail = torch.randn_like(like), torch.randn_like(like[:, :1]).abs()
    part = torch.randint(4, tail.shape, device=like.device)
    at = torch.randint(like.shape[1], tail.shape, device=like.device)
    is_far = (part == 2) | ((part == 3) & (at == torch.arange(like.shape[1], device=like.device)))
    return torch.where(is_far, base / tail, base)


def log_base_density(base: Tensor) -> Tensor:
    """The log density of the mixture at points ``(*, D)`` of the base space, shape ``(*,)``."""
    dim, half, log_normals = base.shape[-1], 0.5 * (1 + base.shape[-1]), _log_normal(base)
    log_normal = log_normals.sum(-1)
    log_all = -half * (base.square().sum(-1).log1p() + _LOG_PI) + math.lgamma(half)
    # of all coordinates but one, by sums from both sides: a difference has no digits left far out
    none = torch.zeros_like(log_normals[..., :1])
    before = torch.cat([none, log_normals[..., :-1]], -1).cumsum(-1)
    after = torch.cat([none, log_normals.flip(-1)[..., :-1]], -1).cumsum(-1).flip(-1)
    log_one = (before + after - base.square().log1p() - _LOG_PI).logsumexp(-1) - math.log(dim)
    return torch.stack([log_normal + math.log(2), log_all, log_one]).logsumexp(0) - math.log(4)


def _log_normal(base: Tensor) -> Tensor:
    return -0.5 * (base.square() + math.log(2) + _LOG_PI)
