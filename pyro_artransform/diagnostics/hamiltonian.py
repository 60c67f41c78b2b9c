# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Hamiltonian chains in the base space of a guide, many side by side.

Pulled back through the transform of a good guide a posterior is nearly a standard normal, so that a
quarter of an oscillation forgets the start, in three gradients: by leapfrog steps, or, of many latents,
where these would have to be twice as many, by one step of three stages. What the guide misjudges is learned
from the chains' own draws and gradients, see :mod:`~pyro_artransform.diagnostics.preconditioning`.

A trajectory is followed by proposals that do not depend on where the chain is, draws of the guide or further
out: so chains enter necks and tails as often as they should, where trajectories come by chance.

**References**

1. MCMC Using Hamiltonian Dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901
2. NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman, Sountsov,
   Dillon, Langmore, Tran, Vasudevan, 2019), https://arxiv.org/abs/1903.03704
3. Markov Chains for Exploring Posterior Distributions (Tierney, 1994),
   https://doi.org/10.1214/aos/1176325750
4. Numerical Integrators for the Hybrid Monte Carlo Method (Blanes, Casas, Sanz-Serna, 2014),
   https://arxiv.org/abs/1405.3153
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ..capture import Captured
from ..joint import LogJoint
from .defensive_mixture import ToLatent, base_draws, log_base_density
from .preconditioning import Preconditioner

# up to so many oscillators three leapfrog steps to a quarter of a period are accepted as often as sought
_MOST_BY_LEAPFROG = 50
# of a stage: a trajectory of unit length has two of the largest at least, and 72 of the smallest
_MIN_STEP_SIZE, _MAX_STEP_SIZE = 0.025, 0.91
# the draws of the mixture after a trajectory at most, the share of chains that they should renew, and the
# rate of acceptance below which there are none, in the last few calls (benchmarks/chains.md)
_MOST_PROPOSALS, _RENEWED, _RARE, _LAST = 8, 0.9, 0.1, 8
_VALUES_OF_GRADIENT = 3  # that take as long
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Stages(NamedTuple):
    """A step of an integrator, in stages of a gradient each: shares by which points move, and then momenta.

    These move by half of the last share before the first step, and by the other half after the last one.
    """

    drifts: tuple[float, ...]
    kicks: tuple[float, ...]


_DRIFT, _KICK = 0.29619504261126, 0.11888010966548
LEAPFROG = Stages((1.0,), (1.0,))
#: that of reference 4, with the least error of the energy of oscillators
THREE_STAGES = Stages((_DRIFT, 1 - 2 * _DRIFT, _DRIFT), (0.5 - _KICK, 0.5 - _KICK, 2 * _KICK))


class State(NamedTuple):
    """Chains at a point of the base space: shapes ``(C, D)``, ``(C, D)``, ``(C,)`` and ``(C, D)``.

    The gradient of a proposal that was accepted is found with the next trajectory.
    """

    base: Tensor
    latent: Tensor
    log_density: Tensor
    gradient: Tensor

    def where(self, is_chosen: Tensor, other: "State") -> "State":
        """These chains where they are chosen, the others elsewhere."""
        rows = is_chosen[:, None]
        return State(*map(torch.where, (rows, rows, is_chosen, rows), self, other))

    @property
    def is_finite(self) -> Tensor:
        """Which chains have a finite density and gradient, shape ``(C,)``."""
        return self.log_density.isfinite() & self.gradient.isfinite().all(-1)


class PulledBack:
    """The log density log p(T(x)) + log |det T'(x)| of a posterior p in the base space of a transform T.

    ``num_gradients`` counts the points where it was evaluated, of which a value alone is a third.
    """

    def __init__(self, log_joint: LogJoint, to_latent: ToLatent) -> None:
        self.to_latent, self._log_joint = to_latent, log_joint
        self.num_gradients = 0
        self._captured = list[Captured]()
        parts: list[Callable[[Tensor], tuple[Tensor, ...]]] = [self._with_gradient, self._value]
        if log_joint.strategy != "loop":
            parts[:] = self._captured = [*map(Captured, parts)]
        self._evaluate_part, self._value_of_part = parts

    def __call__(self, base: Tensor) -> State:
        """Points, shape ``(C, D)``, with latents, log densities and gradients, a chunk at a time."""
        self.num_gradients += len(base)
        parts = base.detach().split(self._log_joint.chunk_size)
        return State(base.detach(), *map(torch.cat, zip(*map(self._evaluate_part, parts))))

    def values(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``(n, D)`` and log densities ``(n,)`` alone, at points ``(n, D)``."""
        self.num_gradients += len(base) // _VALUES_OF_GRADIENT
        parts = base.split(self._log_joint.chunk_size)
        latent, log_density = map(torch.cat, zip(*map(self._value_of_part, parts)))
        return latent, log_density

    def confirm(self) -> None:
        """Compares what was replayed last with the density itself.

        :raises ReplayError: if it is another; so do evaluations now and then.
        """
        for captured in self._captured:
            captured.confirm()

    @torch.no_grad()
    def _value(self, base: Tensor) -> tuple[Tensor, ...]:
        latent, ladj = self.to_latent(base)
        return latent, self._log_joint(latent) + ladj

    def _with_gradient(self, base: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            base = base.detach().requires_grad_()
            latent, ladj = self.to_latent(base)
            log_density = self._log_joint(latent) + ladj
            (gradient,) = torch.autograd.grad(log_density.sum(), base)
        return latent.detach(), log_density.detach(), gradient


class HamiltonianChains:
    """Chains of a target from points ``(C, D)``, moved by :meth:`step`."""

    def __init__(self, target: PulledBack, start: Tensor) -> None:
        self._target = target
        self.evaluate_at(start)
        self.preconditioner = Preconditioner.identity(start)
        # the error of the energy grows as h^2 sqrt(D)
        self.step_size = min(2 * start.shape[-1] ** -0.25, _MAX_STEP_SIZE)
        self._stages = LEAPFROG if start.shape[-1] <= _MOST_BY_LEAPFROG else THREE_STAGES
        self.length = 1  #: the mean length of trajectories, in quarters of an oscillation
        self._num_steps = 0
        #: the draws of the mixture that follow a trajectory
        self.num_proposals = _MOST_PROPOSALS
        self.num_stages = 0  #: the gradients of the last trajectory

    def evaluate_at(self, base: Tensor) -> None:
        """Puts the chains at points ``(C, D)``; what was accepted so far is forgotten."""
        self.state, self._has_gradient = self._target(base), True
        #: that of the last trajectory, with gradients, which proposals leave out
        self.end = self.state
        #: the log weights of all draws of the mixture, up to a constant, and the rates of acceptance
        self.proposed, self.rates = list[Tensor](), list[float]()

    def draw_from_mixture(self) -> float:
        """Each chain's next places are draws of the mixture, wherever it is; the mean acceptance.

        Some at once, by values alone: which are accepted is found after that, one after the other.
        """
        here, num_chains, count = self.state, len(self.state.base), max(self.num_proposals, 1)
        base = base_draws(here.base.repeat(count, 1))
        latent, log_density = self._target.values(base)
        weights = log_density - log_base_density(base)
        weights = torch.where(weights.isfinite(), weights, -torch.inf)
        self.proposed.append(weights)
        own, rates = here.log_density - log_base_density(here.base), list[Tensor]()
        chosen = torch.full_like(own, -1, dtype=torch.long)
        for number, weight in enumerate(weights.split(num_chains)):
            rates.append((weight - own).clamp(max=0).exp())
            is_accepted = torch.rand_like(own) < rates[-1]
            own = torch.where(is_accepted, weight, own)
            chosen = torch.where(is_accepted, number, chosen)
        rows = chosen.clamp(min=0) * num_chains + torch.arange(num_chains, device=base.device)
        there = State(base[rows], latent[rows], log_density[rows], here.gradient)
        self.state, self._has_gradient = there.where(chosen >= 0, here), False
        self.num_stages = math.ceil(count / _VALUES_OF_GRADIENT)
        self.rates.append(float(torch.stack(rates).mean()))
        return self.rates[-1]

    def learn_proposals(self) -> float:
        """The last rates, by which there are as many from now on as renew nine of ten chains; or none."""
        rate = fmean(self.rates[-_LAST:]) if self.rates else 0.0
        if rate < _RARE:
            self.num_proposals = 0
        elif rate < 1:
            needed = math.ceil(math.log(1 - _RENEWED) / math.log1p(-rate))
            self.num_proposals = min(needed, _MOST_PROPOSALS)
        return rate

    def step(self, adapts: bool = False) -> float:
        """A trajectory of all chains, accepted or not, and proposals; the mean probability of the former."""
        self._num_steps += 1
        # in all steps the same length may be a whole period
        share = self._num_steps * _GOLDEN_RATIO % 1
        length = math.pi / 2 * (0.85 + (2 * self.length - 1.7) * share)
        each = len(self._stages.kicks)
        count = math.ceil(length / (each * self.step_size))
        if not self._has_gradient:
            self.state, self._has_gradient = self._target(self.state.base), True
        momentum = torch.randn_like(self.state.base)
        step_size, preconditioner, stages = length / count, self.preconditioner, self._stages
        proposal, gain = integrate(
            self._target, self.state, momentum, step_size, count, preconditioner, stages
        )
        threshold = torch.rand_like(gain).log()
        self.state = proposal.where(threshold < gain, self.state)
        rates = gain.clamp(max=0).exp()
        if adapts:
            # a wall ends trajectories of any step size: those count that it leaves, if it leaves some
            inside = rates[gain > -torch.inf]
            counted = inside if 4 * len(inside) > len(rates) else rates
            self.step_size = _adapted(self.step_size, float(counted.mean()))
        self.num_stages, self.end = 0, self.state
        if self.num_proposals:
            self.draw_from_mixture()
        self.num_stages += count * each + (not self._has_gradient)
        return float(rates.mean())


def integrate(
    evaluate: Callable[[Tensor], State],
    start: State,
    momentum: Tensor,
    step_size: float,
    num_steps: int,
    preconditioner: Preconditioner,
    stages: Stages,
) -> tuple[State, Tensor]:
    """The end of trajectories, and the energy that they have lost, ``(C,)``.

    One whose density or gradient is not finite on the way ends where it began, and is never accepted.
    """
    energy = start.log_density - momentum.square().sum(-1) / 2
    is_finite, state = torch.ones_like(start.log_density, dtype=torch.bool), start
    last = stages.kicks[-1] / 2
    momentum = momentum + last * step_size * preconditioner.transposed(start.gradient)
    kicks = (*(stages.kicks * num_steps)[:-1], last)
    for drift, kick in zip(stages.drifts * num_steps, kicks):
        state = evaluate(state.base + drift * step_size * preconditioner(momentum))
        is_finite = is_finite & state.is_finite
        if not bool(is_finite.all()):
            state = state.where(is_finite, start)
        momentum = momentum + kick * step_size * preconditioner.transposed(state.gradient)
    gain = state.log_density - momentum.square().sum(-1) / 2 - energy
    return state, torch.where(is_finite & gain.isfinite(), gain, -torch.inf)


def _adapted(step_size: float, acceptance: float) -> float:
    """The step size of an acceptance rate of 0.8, from that of another one.

    The rate is 2 Phi(-s / 2), where s grows with the square of the step size (Neal 2011, 5.4.4).
    """
    rates = [0.8, min(max(acceptance, 0.02), 0.999)]
    tails = torch.tensor(rates, dtype=torch.float64, device="cpu") / 2
    sought, found = (-2 * torch.special.ndtri(tails)).tolist()
    factor = math.sqrt(sought / found)
    wanted = step_size * min(max(factor, 1 / 3), 1.5)
    return min(max(wanted, _MIN_STEP_SIZE), _MAX_STEP_SIZE)
