# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Hamiltonian trajectories of many chains in parallel, with a step size per chain.

**References**

1. MCMC Using Hamiltonian Dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901
2. Numerical Integrators for the Hybrid Monte Carlo Method (Blanes, Casas, Sanz-Serna, 2014),
   https://arxiv.org/abs/1405.3153
3. A Conceptual Introduction to Hamiltonian Monte Carlo (Betancourt, 2017),
   https://arxiv.org/abs/1701.02434
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .preconditioning import Preconditioner
from .target import TOO_FAR, State


class Integrator(NamedTuple):
    """A symmetric splitting step with one gradient per stage: drifts of positions, then kicks of momenta.

    Half of the last kick precedes the first step, and the other half ends the last one.
    """

    drifts: tuple[float, ...]
    kicks: tuple[float, ...]

    @property
    def num_stages(self) -> int:
        return len(self.kicks)


_DRIFT, _KICK = 0.29619504261126, 0.11888010966548
LEAPFROG = Integrator((1.0,), (1.0,))
#: the integrator of reference 2 with the smallest energy error for oscillators
THREE_STAGES = Integrator((_DRIFT, 1 - 2 * _DRIFT, _DRIFT), (0.5 - _KICK, 0.5 - _KICK, 2 * _KICK))


class TrajectoryInfo(NamedTuple):
    """One trajectory of each chain: shapes ``(C,)``, and ``(C, D)`` for points.

    :param acceptance: the acceptance probability of the proposal.
    :param is_accepted: whether the proposal was accepted.
    :param is_divergent: whether the energy error exceeded 1,000 nats, or was not a number.
    :param energy: the Hamiltonian at the start of the trajectory.
    :param proposal: the end point; ``momentum`` are its preconditioned momenta, ``duration`` the integration
        time.
    """

    acceptance: Tensor
    is_accepted: Tensor
    is_divergent: Tensor
    energy: Tensor
    proposal: State
    momentum: Tensor
    duration: Tensor

    def without_points(self) -> "TrajectoryInfo":
        """Drops points and momenta, which take the memory of five draws."""
        none = self.momentum.new_empty(len(self.momentum), 0)
        proposal = self.proposal._replace(base=none, latent=none, gradient=none)
        return self._replace(proposal=proposal, momentum=none)


def share_of_divergent(infos: Sequence[TrajectoryInfo], is_finite: bool = True) -> float:
    """The share of trajectories that diverged at a finite density, or at a non-finite one.

    A non-finite density marks the edge of a support, or an overflow of the dtype.
    """
    finite = torch.stack([info.proposal.log_density.isfinite() for info in infos])
    is_divergent = torch.stack([info.is_divergent for info in infos])
    return float((is_divergent & (finite == is_finite)).double().mean())


def integrator_of(dim: int) -> Integrator:
    """The integrator that needs fewer gradients in ``dim`` dimensions (benchmarks/chains.md)."""
    return LEAPFROG if dim <= 50 else THREE_STAGES


def trajectory(
    target: Callable[[Tensor], State],
    state: State,
    step_size: Tensor,
    num_steps: int,
    preconditioner: Preconditioner,
    integrator: Integrator,
) -> tuple[State, TrajectoryInfo]:
    """The next state of each chain, after a Metropolis accept step.

    :param step_size: the step size of each chain, shape ``(C, 1)``, summed over the stages of a step.
    """
    momentum = torch.randn_like(state.base)
    energy = momentum.square().sum(-1) / 2 - state.log_density
    end, momentum = integrate(
        target, state, momentum, step_size, num_steps, preconditioner, integrator
    )
    gain = energy - (momentum.square().sum(-1) / 2 - end.log_density)
    is_divergent = ~(gain > -TOO_FAR)
    gain = torch.where(is_divergent, -torch.inf, gain)
    is_accepted = torch.rand_like(gain).log() < gain
    info = TrajectoryInfo(
        acceptance=gain.clamp(max=0).exp(),
        is_accepted=is_accepted,
        is_divergent=is_divergent,
        energy=energy,
        proposal=end,
        momentum=momentum,
        duration=step_size[:, 0] * num_steps,
    )
    return end.where(is_accepted, state), info


def integrate(
    target: Callable[[Tensor], State],
    start: State,
    momentum: Tensor,
    step_size: Tensor | float,
    num_steps: int,
    preconditioner: Preconditioner,
    integrator: Integrator,
) -> tuple[State, Tensor]:
    """Integrates trajectories; returns end points and momenta.

    A trajectory that meets a non-finite density or gradient ends with a log density of minus infinity.
    """
    is_finite, state = torch.ones_like(start.log_density, dtype=torch.bool), start
    last = integrator.kicks[-1] / 2
    momentum = momentum + last * step_size * preconditioner.transposed(start.gradient)
    kicks = (*(integrator.kicks * num_steps)[:-1], last)
    for drift, kick in zip(integrator.drifts * num_steps, kicks):
        state = target(state.base + drift * step_size * preconditioner(momentum))
        is_finite = is_finite & state.is_finite
        if not bool(is_finite.all()):
            state = state.where(is_finite, start)
        momentum = momentum + kick * step_size * preconditioner.transposed(state.gradient)
    log_density = torch.where(is_finite, state.log_density, -torch.inf)
    return state._replace(log_density=log_density), momentum


def energy_bfmi(energies: Tensor) -> Tensor:
    """The energy Bayesian fraction of missing information (E-BFMI) of each chain, from energies ``(C, n)``.

    Below 0.3 momenta explore energy levels too slowly (reference 3, section 6.1). NaN for one energy.
    """
    if energies.shape[1] < 2:
        return energies.new_full(energies.shape[:1], torch.nan)
    change = energies.diff(dim=1).square().mean(1)
    return change / energies.var(1)
