# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A short mean-field fit from several points at once, as a place to start from."""

from collections.abc import Callable

import torch
from torch import Tensor

from .gaussians import Gaussians

_NUM_STEPS = 150
_NUM_PARTICLES = 8
_STEP_SIZE = 0.1
_DECAY = 0.985


def mean_field(
    log_density: Callable[[Tensor], Tensor], points: Tensor, init_scale: float = 0.1
) -> Gaussians:
    """Independent Gaussians fitted from each point for a while, by Adam.

    :param log_density: a function of ``(n, D)`` that returns ``(n,)``.
    :param points: where to start, shape ``(S, D)``.
    :param init_scale: the standard deviations to start with.
    :return: S Gaussians with diagonal scales.

    **References**

    1. Automatic Differentiation Variational Inference (Kucukelbir, Tran, Ranganath, Gelman, Blei,
       2017), https://arxiv.org/abs/1603.00788
    """
    loc = points.detach().clone().requires_grad_()
    log_scale = torch.full_like(loc, init_scale).log().detach().requires_grad_()
    adam = torch.optim.Adam([loc, log_scale], lr=_STEP_SIZE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, _DECAY)
    for _ in range(_NUM_STEPS):
        loc.grad, log_scale.grad = _gradients(log_density, loc, log_scale)
        adam.step()
        schedule.step()
    return Gaussians(loc.detach(), torch.diag_embed(log_scale.detach().exp()))


@torch.enable_grad()
def _gradients(
    log_density: Callable[[Tensor], Tensor], loc: Tensor, log_scale: Tensor
) -> list[Tensor]:
    """The gradients of the negative ELBOs, zero for a start where they are not finite."""
    noise = torch.randn_like(loc.detach().expand(_NUM_PARTICLES, *loc.shape))
    draws = loc + noise * log_scale.exp()
    value = log_density(draws.reshape(-1, draws.shape[-1])).sum()
    loss = -value / _NUM_PARTICLES - log_scale.sum()
    gradients = torch.autograd.grad(loss, [loc, log_scale])
    usable = torch.stack([g.isfinite().all(-1) for g in gradients]).all(0)[:, None]
    return [torch.where(usable, g, torch.zeros_like(g)) for g in gradients]
