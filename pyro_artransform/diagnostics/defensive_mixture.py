# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a guide and of heavy tails around it in one sample, whose weights know of more than the guide.

A guide whose tails are lighter than those of the posterior hardly draws there, and its weights do not show
what is missing. Half of these draws are the guide's, half begin further out in its base space, so that the
densities of both are known without an inverse: a Cauchy of all coordinates for a tail of all, and one of a
single coordinate, any, for tails of one among many, which the first has no draws of. All count by the
density of the mixture, so that no weight is more than twice that of the guide alone.

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
from ..time_limit import limited
from .hamiltonian import ToLatent

_LOG_2PI = math.log(2 * math.pi)
_CHUNK = 1000


class MixtureDraws(NamedTuple):
    """Draws ``(n, D)`` of strata, and what they count for: logs of weights ``(n,)``, up to constants."""

    draws: Tensor
    of_posterior: Tensor
    of_guide: Tensor
    num_own: int  #: how many of them are the guide's, which come first

    @classmethod
    def of_guide_alone(cls, draws: Tensor, log_weights: Tensor) -> "MixtureDraws":
        return cls(draws, log_weights, torch.zeros_like(log_weights), len(draws))

    def standard_error(self, shares: Tensor) -> Tensor:
        """That of a sum of shares ``(n, D)`` of the draws, each stratum with its own mean."""
        strata = [each for each in shares.tensor_split([self.num_own]) if len(each)]
        return torch.stack([len(each) * each.var(0) for each in strata]).sum(0).sqrt()


@torch.no_grad()
def mixture_draws(
    log_joint: LogJoint, to_latent: ToLatent, like: Tensor, count: int
) -> MixtureDraws:
    """Draws of the unconstrained space, of a guide that takes a standard normal to a density's coordinates.

    :param like: a tensor ``(*, D)`` of the dtype and on the device of the draws.
    """
    chunks, half = list[tuple[Tensor, ...]](), count // 2
    own = torch.randn_like(like[:1].expand(half, -1))
    for base in limited(torch.cat([own, _far_out(own)]).split(_CHUNK), at_least=1):
        latent, ladj = to_latent(base)
        normal = -0.5 * (base.square() + _LOG_2PI)
        log_guide, log_mixture = normal.sum(-1), _log_mixture(base, normal)
        log_posterior = torch.cat([*map(log_joint, latent.split(log_joint.chunk_size))]) + ladj
        draws, _ = log_joint.to_unconstrained(latent)
        chunks.append((draws, log_posterior - log_mixture, log_guide - log_mixture))
    draws, *logs = map(torch.cat, zip(*chunks))
    # some are so far out that their squares overflow, or the density has no value
    is_usable = draws.square().isfinite().all(-1) & logs[0].isfinite()
    of_posterior, of_guide = (each.where(is_usable, -torch.inf) for each in logs)
    return MixtureDraws(draws.where(is_usable[:, None], 0.0), of_posterior, of_guide, half)


def _far_out(noise: Tensor) -> Tensor:
    """As many points as those of standard normal noise ``(n, D)``: of both Cauchys, in turn."""
    far = torch.randn_like(noise)
    tails = torch.randn_like(noise[:, :1]).abs()
    far[::2] /= tails[::2]
    some = far[1::2]
    at = torch.randint(noise.shape[1], (len(some), 1), device=noise.device)
    some.scatter_(1, at, some.gather(1, at) / tails[1::2])
    return far


def _log_mixture(base: Tensor, normal: Tensor) -> Tensor:
    """The log density ``(n,)`` of half of a standard normal, whose terms are given, and a quarter of each."""
    dim, half = base.shape[1], 0.5 * (1 + base.shape[1])
    log_normal = normal.sum(-1)
    log_far = -half * (base.square().sum(-1).log1p() + math.log(math.pi)) + math.lgamma(half)
    of_one = -base.square().log1p() - math.log(math.pi) - normal
    log_one = log_normal + of_one.logsumexp(-1) - math.log(dim)
    logs = torch.stack([log_normal + math.log(2), log_far, log_one])
    return logs.logsumexp(0) - math.log(4)
