# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Measures why chains have not mixed; ``Check.JUMPS`` and ``Check.UNDETERMINED`` say it in words.

**References**

1. The error of the energy of a smooth density falls as the square of the step size: MCMC Using Hamiltonian
   Dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901
"""

import torch
from torch import Tensor

from ..model import LogJoint
from ..model.graphs.dependencies import value_and_gradient
from .preconditioning import Preconditioner
from .target import State, TransformedDensity
from .trajectories import Integrator, integrate


def jumps(
    target: TransformedDensity,
    state: State,
    step_size: float,
    kernel: tuple[Preconditioner, Integrator],
) -> bool:
    """Whether the error of the energy does not shrink with the step size: the density has jumps.

    A tenth of the chains has an error of half a nat after ten steps, and after 500 that are as long together.
    """
    momentum, shares = torch.randn_like(state.base), []
    energy = momentum.square().sum(-1) / 2 - state.log_density
    for number in (10, 500):
        end, last = integrate(target, state, momentum, 10 / number * step_size, number, *kernel)
        error = last.square().sum(-1) / 2 - end.log_density - energy
        shares.append(float((~(error.abs() < 0.5)).double().mean()))
    return min(shares) > 0.1


def undetermined(log_joint: LogJoint, draws: Tensor) -> list[int]:
    """The latents that neither prior nor data determine, so that their draws drift without end.

    The covariances of draws and of gradients are inverse to each other for a normal density; in a direction
    without prior and data the gradients vanish, while draws vary.

    :param draws: on the unconstrained space, shape ``(n, D)``.
    """
    z = draws[:: max(len(draws) // 200, 1)]
    _, gradient = value_and_gradient(log_joint.with_coordinates(None), z)
    is_finite = gradient.isfinite().all(-1)
    z, gradient = z[is_finite].double(), gradient[is_finite].double()
    if len(z) < 4 * z.shape[1]:
        return []
    scale = z.std(0).clamp_min(torch.finfo(z.dtype).tiny)
    z, gradient = (z - z.mean(0)) / scale, gradient * scale
    variances, axes = torch.linalg.eigh(torch.cov(z.T).reshape(z.shape[1], -1))
    root = axes * variances.clamp_min(0.0).sqrt()
    curvature, directions = torch.linalg.eigh(root.T @ (gradient.T @ gradient / len(z)) @ root)
    if not bool(curvature[0] < 0.01):  # one for a normal density
        return []
    moved = (root @ directions[:, 0]).abs()
    return (moved > 0.5).nonzero()[:, 0].tolist()
