# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Several Gaussians on the unconstrained space, and how well each of them fits a density."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# evaluated at once: a bound on memory
_CHUNK = 2048


class Gaussians(NamedTuple):
    """S Gaussians: ``loc`` of shape ``(S, D)``, ``scale_tril`` of shape ``(S, D, D)``."""

    loc: Tensor
    scale_tril: Tensor

    def take(self, index: Any) -> "Gaussians":
        """Those at an index."""
        return Gaussians(self.loc[index], self.scale_tril[index])

    def log_volume(self) -> Tensor:
        """The log-determinants of the scales, shape ``(S,)``."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def diagonal(self) -> "Gaussians":
        """The independent Gaussians nearest in KL(q|p): of the same conditional deviations."""
        precision = torch.cholesky_inverse(self.scale_tril).diagonal(dim1=-2, dim2=-1)
        return Gaussians(self.loc, torch.diag_embed(precision.rsqrt()))


def noise(like: Tensor, count: int) -> Tensor:
    """Antithetic standard normal draws, so that a Gaussian's first moment has no noise.

    :param like: gives dimension, dtype and device, shape ``(S, D)``.
    :param count: how many, an even number.
    :return: shape ``(count, D)``.
    """
    half = torch.randn_like(like[:1].expand(count // 2, -1))
    return torch.cat([half, -half])


def elbos(log_density: Callable[[Tensor], Tensor], gaussians: Gaussians, noise: Tensor) -> Tensor:
    """The ELBO of each Gaussian on common noise; ``-inf`` where it is not finite.

    :param log_density: a function of ``(n, D)`` that returns ``(n,)``.
    :param gaussians: S Gaussians.
    :param noise: standard normal draws, shape ``(K, D)``.
    :return: shape ``(S,)``.
    """
    draws = gaussians.loc[:, None] + noise @ gaussians.scale_tril.mT
    entropy = 0.5 * (noise**2).sum(-1).mean() + 0.5 * noise.shape[-1] * math.log(2 * math.pi)
    return evaluated(log_density, draws).mean(-1) + gaussians.log_volume() + entropy


@torch.no_grad()
def evaluated(log_density: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """A log-density at points of shape ``batch + (D,)``, ``-inf`` where it is not a finite number."""
    rows = points.reshape(-1, points.shape[-1]).split(_CHUNK)
    found = torch.cat([log_density(chunk) for chunk in rows])
    return found.nan_to_num(-torch.inf, -torch.inf, -torch.inf).reshape(points.shape[:-1])
