# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Why chains have not mixed, where that can be seen.

**References**

1. The error of the energy of a smooth density falls as the square of the step size: MCMC Using Hamiltonian
   Dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901
2. Stein's identity, E[(z - E z) d log p / dz] = -1 for each latent of a proper density: A Bound for the Error
   in the Normal Approximation to the Distribution of a Sum of Dependent Random Variables (Stein, 1972),
   https://projecteuclid.org/euclid.bsmsp/1200514239
"""

import torch
from torch import Tensor

from ..graphs.dependencies import value_and_gradient
from ..joint import LogJoint
from .preconditioning import Preconditioner
from .target import PulledBack, State
from .trajectories import Integrator, integrate

# steps of a trajectory, the shares by which its step size is reduced, and the error in nats that still occurs
# at a smaller step size if the density jumps
_NUM_STEPS, _SHARES, _ERROR = 10, (1.0, 0.1), 0.5
# the share of chains that must show it
_MOST = 0.1
# draws at which gradients are evaluated, and the value of Stein's identity, -1 for a proper density, above
# which prior and data do not determine a latent
_NUM_DRAWS, _UNDETERMINED = 100, -0.1


def jumps(
    target: PulledBack, state: State, step_size: float, kernel: tuple[Preconditioner, Integrator]
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

    :param draws: on the unconstrained space, shape ``(n, D)``.
    """
    z = draws[:: max(len(draws) // _NUM_DRAWS, 1)]
    _, gradient = value_and_gradient(log_joint.with_coordinates(None), z)
    found = ((z - z.mean(0)) * gradient).mean(0)
    return (found > _UNDETERMINED).nonzero()[:, 0].tolist()
