# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussians on the unconstrained space: their ELBOs for a density, and mean-field fits to it."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import InitializationConfig

#: a log-density: a function of ``(n, D)`` that returns ``(n,)``
Density = Callable[[Tensor], Tensor]

# points evaluated at once: a bound on memory
_CHUNK = 2048


class Gaussians(NamedTuple):
    """S Gaussians: ``loc`` of shape ``(S, D)``, ``scale_tril`` of shape ``(S, D, D)``."""

    loc: Tensor
    scale_tril: Tensor

    def take(self, index: Tensor | list[int]) -> "Gaussians":
        """Those at an index."""
        return Gaussians(self.loc[index], self.scale_tril[index])

    def log_volume(self) -> Tensor:
        """The log-determinants of the scales, shape ``(S,)``."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def diagonal(self) -> "Gaussians":
        """The independent Gaussians nearest in KL(q|p): of the same conditional deviations."""
        precision = torch.cholesky_inverse(self.scale_tril).diagonal(dim1=-2, dim2=-1)
        return Gaussians(self.loc, torch.diag_embed(precision.rsqrt()))


def concatenate(parts: Iterable[Gaussians]) -> Gaussians:
    """The Gaussians of all parts."""
    locs, scale_trils = zip(*parts)
    return Gaussians(torch.cat(locs), torch.cat(scale_trils))


def antithetic_noise(like: Tensor, count: int) -> Tensor:
    """Antithetic standard normal draws, so that the first moment of a Gaussian has no noise.

    :param like: gives dimension, dtype and device, shape ``(S, D)``.
    :param count: how many, an even number.
    :return: shape ``(count, D)``.
    """
    half = torch.randn_like(like[:1].expand(count // 2, -1))
    return torch.cat([half, -half])


def elbos(log_density: Density, gaussians: Gaussians, noise: Tensor) -> Tensor:
    """The ELBO of each Gaussian on common noise; ``-inf`` where it is not finite.

    :param log_density: the log-density.
    :param gaussians: S Gaussians.
    :param noise: standard normal draws, shape ``(K, D)``.
    :return: shape ``(S,)``.
    """
    draws = gaussians.loc[:, None] + noise @ gaussians.scale_tril.mT
    entropy = 0.5 * (noise**2).sum(-1).mean() + 0.5 * noise.shape[-1] * math.log(2 * math.pi)
    return evaluate_density(log_density, draws).mean(-1) + gaussians.log_volume() + entropy


@torch.no_grad()
def evaluate_density(log_density: Density, points: Tensor) -> Tensor:
    """A log-density at points of shape ``batch + (D,)``, ``-inf`` where it is not a finite number."""
    values = list(map(log_density, points.reshape(-1, points.shape[-1]).split(_CHUNK)))
    return (
        torch.cat(values).nan_to_num(-torch.inf, -torch.inf, -torch.inf).reshape(points.shape[:-1])
    )


def fit_mean_field(log_density: Density, points: Tensor, config: InitializationConfig) -> Gaussians:
    """Independent Gaussians fitted by a few steps of Adam from each point.

    :param log_density: the log-density.
    :param points: the initial locations, shape ``(S, D)``.
    :param config: steps, particles and step size.
    :return: S Gaussians with diagonal scales.

    **References**

    1. Automatic Differentiation Variational Inference (Kucukelbir, Tran, Ranganath, Gelman, Blei,
       2017), https://arxiv.org/abs/1603.00788
    """
    loc = points.detach().clone().requires_grad_()
    log_scale = torch.full_like(loc, config.narrow_scale).log().detach().requires_grad_()
    adam = torch.optim.Adam([loc, log_scale], config.mean_field_step_size, config.mean_field_betas)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, config.mean_field_decay)
    for _ in range(config.mean_field_steps):
        noise = torch.randn_like(points.expand(config.mean_field_particles, *points.shape))
        loc.grad, log_scale.grad = _elbo_gradients(log_density, loc, log_scale, noise)
        adam.step()
        schedule.step()
    return Gaussians(loc.detach(), torch.diag_embed(log_scale.detach().exp()))


@torch.enable_grad()
def _elbo_gradients(
    log_density: Density, loc: Tensor, log_scale: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the negative ELBOs, zero for a Gaussian where they are not finite."""
    draws = loc + noise * log_scale.exp()
    value = log_density(draws.reshape(-1, draws.shape[-1])).sum()
    loss = -value / len(noise) - log_scale.sum()
    by_loc, by_scale = torch.autograd.grad(loss, [loc, log_scale])
    usable = (by_loc.isfinite() & by_scale.isfinite()).all(-1, keepdim=True)
    zero = torch.zeros_like(loc)
    return torch.where(usable, by_loc, zero), torch.where(usable, by_scale, zero)
