# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Why chains have not mixed, where that can be seen.

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

# steps of a trajectory, the shares by which its step size is reduced, and the error in nats that still occurs
# at a smaller step size if the density jumps
_NUM_STEPS, _SHARES, _ERROR = 10, (1.0, 0.02), 0.5
# the share of chains that must show it
_MOST = 0.1
# draws at which gradients are evaluated, and their least number per dimension; product of the variances of
# draws and gradients, one for a normal density, below which a direction is not determined; sds by which its
# latents move
_NUM_DRAWS, _DRAWS_BY_DIM, _UNDETERMINED, _MOST_MOVED = 200, 4, 0.01, 0.5


def jumps(
    target: TransformedDensity,
    state: State,
    step_size: float,
    kernel: tuple[Preconditioner, Integrator],
) -> bool:
    """Whether the error of the energy does not shrink with the step size: the density has jumps.

    Trajectories have the same length at each step size.
    """
    momentum, shares = torch.randn_like(state.base), []
    energy = momentum.square().sum(-1) / 2 - state.log_density
    for share in _SHARES:
        number = round(_NUM_STEPS / share)
        end, last = integrate(target, state, momentum, share * step_size, number, *kernel)
        error = last.square().sum(-1) / 2 - end.log_density - energy
        shares.append(float((~(error.abs() < _ERROR)).double().mean()))
    return min(shares) > _MOST


def undetermined(log_joint: LogJoint, draws: Tensor) -> list[int]:
    """The latents that neither prior nor data determine, so that their draws drift without end.

    The covariances of draws and of gradients are inverse to each other for a normal density; in a direction
    without prior and data the gradients vanish, while draws vary.

    :param draws: on the unconstrained space, shape ``(n, D)``.
    """
    z = draws[:: max(len(draws) // _NUM_DRAWS, 1)]
    _, gradient = value_and_gradient(log_joint.with_coordinates(None), z)
    is_finite = gradient.isfinite().all(-1)
    z, gradient = z[is_finite].double(), gradient[is_finite].double()
    if len(z) < _DRAWS_BY_DIM * z.shape[1]:
        return []
    scale = z.std(0).clamp_min(torch.finfo(z.dtype).tiny)
    z, gradient = (z - z.mean(0)) / scale, gradient * scale
    variances, axes = torch.linalg.eigh(torch.cov(z.T).reshape(z.shape[1], -1))
    root = axes * variances.clamp_min(0.0).sqrt()
    curvature, directions = torch.linalg.eigh(root.T @ (gradient.T @ gradient / len(z)) @ root)
    if not bool(curvature[0] < _UNDETERMINED):
        return []
    moved = (root @ directions[:, 0]).abs()
    return (moved > _MOST_MOVED).nonzero()[:, 0].tolist()
