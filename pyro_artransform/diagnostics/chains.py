# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Short Hamiltonian chains in the base space of a guide, each paired with one of a known distribution.

Pulled back through the transform of a good guide a posterior is nearly a standard normal, so that
unit masses do, and a quarter of an oscillation forgets the start. Directions in which it is much
wider or narrower are stretched: chains with unit masses would hardly move along a wide one, and
nothing in a single latent would show it. Each chain has a companion of the same random numbers, from
the standard normal itself: the better the guide, the less noise is left in their difference.

**References**

1. MCMC Using Hamiltonian Dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901
2. Mixing of Hamiltonian Monte Carlo on Strongly Log-Concave Distributions 2: Numerical Integrators
   (Mangoubi, Smith, 2019), https://arxiv.org/abs/1708.07114, for chains of common momenta
3. NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman, Sountsov,
   Dillon, Langmore, Tran, Vasudevan, 2019), https://arxiv.org/abs/1903.03704
4. Iterative Methods for the Solution of Eigenvalue Problems (Lanczos, 1950),
   https://doi.org/10.6028/jres.045.026
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from statistics import geometric_mean
from typing import NamedTuple

import torch
from torch import Tensor

from ..joint import LogJoint
from ..joint.protocols import TransformedGuide
from ..transforms.flow_module import call_and_ladj_over_vectors

ToLatent = Callable[[Tensor], tuple[Tensor, Tensor]]  #: points to values and log-determinants

_MAX_STEP_SIZE = 1.2  # an oscillator of unit frequency is stable up to 2
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

_DIFFERENCE = 0.1  # of gradients whose mean over the points is a smooth function


class State(NamedTuple):
    """Chains at a point of the base space: shapes ``(C, D)``, ``(C, D)``, ``(C,)`` and ``(C, D)``."""

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
    """The log density log p(T(x)) + log |det T'(x)| of a posterior p in the base space of a transform T."""

    def __init__(self, log_joint: LogJoint, to_latent: ToLatent) -> None:
        self.to_latent, self._log_joint = to_latent, log_joint

    def __call__(self, base: Tensor) -> State:
        """Points, shape ``(C, D)``, with latents, log densities and gradients, a chunk at a time."""
        parts = []
        for part in base.detach().split(self._log_joint.chunk_size):
            with torch.enable_grad():
                latent, ladj = self.to_latent(part.requires_grad_())
                log_density = self._log_joint(latent) + ladj
                (gradient,) = torch.autograd.grad(log_density.sum(), part)
            parts.append((part.detach(), latent.detach(), log_density.detach(), gradient))
        return State(*map(torch.cat, zip(*parts)))


class Averages:
    """Sums of a chain's values and of their squares, in units of the guide, shape ``(C, D)``.

    A step counts its proposal by the probability of acceptance, and the point before by the rest,
    which has the same expectation and less noise.
    """

    def __init__(self, values: Tensor) -> None:
        self.values, self._count = values, 0
        self._first, self._second = torch.zeros_like(values), torch.zeros_like(values)

    def move(self, proposed: Tensor, probability: Tensor, accepted: Tensor, counts: bool) -> None:
        if counts:
            share = probability[:, None].to(proposed)
            for power, total in ((1, self._first), (2, self._second)):
                total += share * proposed**power + (1 - share) * self.values**power
            self._count += 1
        self.values = torch.where(accepted[:, None], proposed, self.values)

    @property
    def first(self) -> Tensor:
        """The mean value of each chain."""
        return self._first / self._count

    def about(self, center: Tensor) -> Tensor:
        """The mean squared distance of each chain from a center of shape ``(D,)``."""
        return self._second / self._count - 2 * center * self.first + center.square()


class PairedChains:
    """Chains of a target that start at points, ``(C, D)``, paired with those of the standard normal.

    Averages are in units of the guide, of location and scale ``(D,)``.
    """

    def __init__(
        self, target: PulledBack, start: Tensor, companions: Tensor, loc: Tensor, scale: Tensor
    ) -> None:
        self._target, self._loc, self._scale = target, loc, scale
        self._state, self._companion = target(start), _standard_normal(companions)
        self.values = Averages(self._standardized(self._state.latent))
        self.companion_values = Averages(self._latents_of(companions))
        # the error of the energy grows as h^2 sqrt(D)
        self.step_size = min(1.4 * start.shape[-1] ** -0.25, _MAX_STEP_SIZE)

    def run(self, num_warm_up: int, num_steps: int) -> None:
        """Adapts the step size, then takes the steps that count."""
        sizes = []
        for i in range(num_warm_up + num_steps):
            # a length in quarters of an oscillation; in all steps the same may be a whole period
            length = math.pi / 2 * (0.7 + 0.5 * (i * _GOLDEN_RATIO % 1))
            rate = self._step(length, counts=i >= num_warm_up)
            if i < num_warm_up:
                self.step_size = _adapted(self.step_size, rate)
                sizes.append(self.step_size)
            if i == num_warm_up - 1:
                # the rate of a single trajectory depends on its length
                self.step_size = geometric_mean(sizes[num_warm_up // 2 :])

    def _step(self, length: float, counts: bool) -> float:
        """One trajectory of all chains, accepted or not; the mean probability of that."""
        num_leapfrogs = min(max(math.ceil(length / self.step_size), 2), 25)
        size = min(length / num_leapfrogs, self.step_size)
        momentum = torch.randn_like(self._state.base)
        threshold = torch.rand_like(self._state.log_density).log()
        path = momentum, size, num_leapfrogs
        proposal, gain = leapfrog(self._target, self._state, *path)
        other, other_gain = leapfrog(_standard_normal, self._companion, *path)
        accepted, probability = threshold < gain, gain.clamp(max=0).exp()
        self.values.move(self._standardized(proposal.latent), probability, accepted, counts)
        self._state = proposal.where(accepted, self._state)
        accepted, chances = threshold < other_gain, other_gain.clamp(max=0).exp()
        self.companion_values.move(self._latents_of(other.base), chances, accepted, counts)
        self._companion = other.where(accepted, self._companion)
        return float(probability.mean())

    def _standardized(self, latent: Tensor) -> Tensor:
        return (latent - self._loc) / self._scale

    def _latents_of(self, base: Tensor) -> Tensor:
        return self._standardized(self._target.to_latent(base)[0])


def leapfrog(
    evaluate: Callable[[Tensor], State],
    start: State,
    momentum: Tensor,
    step_size: float,
    steps: int,
) -> tuple[State, Tensor]:
    """The end of trajectories by the leapfrog integrator, and the energy that they have lost, ``(C,)``.

    One whose density or gradient is not finite on the way ends where it began, and is never accepted.
    """
    energy = start.log_density - momentum.square().sum(-1) / 2
    is_finite, state = torch.ones_like(start.log_density, dtype=torch.bool), start
    momentum = momentum + step_size / 2 * start.gradient
    for i in range(steps):
        state = evaluate(state.base + step_size * momentum)
        is_finite = is_finite & state.is_finite
        state = state.where(is_finite, start)
        share = 1.0 if i < steps - 1 else 0.5
        momentum = momentum + share * step_size * state.gradient
    gain = state.log_density - momentum.square().sum(-1) / 2 - energy
    return state, torch.where(is_finite & gain.isfinite(), gain, -torch.inf)


def _standard_normal(base: Tensor) -> State:
    """The standard normal as a target, its latents left out."""
    return State(base, base, -base.square().sum(-1) / 2, -base)


def _adapted(step_size: float, acceptance: float) -> float:
    """The step size of an acceptance rate of 0.8, from that of another one.

    The rate is 2 Phi(-s / 2), where s grows with the square of the step size (Neal 2011, 5.4.4). It
    is above the usual 0.65, since fewer pairs part.
    """
    rates = [0.8, min(max(acceptance, 0.02), 0.999)]
    tails = torch.tensor(rates, dtype=torch.float64, device="cpu") / 2
    wanted, found = (-2 * torch.special.ndtri(tails)).tolist()
    factor = math.sqrt(wanted / found)
    return min(step_size * min(max(factor, 1 / 3), 1.5), _MAX_STEP_SIZE)


class Stretched(NamedTuple):
    """A linear map that stretches orthonormal directions, shape ``(D, k)``, by factors, ``(k,)``."""

    directions: Tensor
    factors: Tensor

    def __call__(self, base: Tensor) -> Tensor:
        return base + (base @ self.directions * (self.factors - 1)) @ self.directions.T

    def inverse(self, image: Tensor) -> Tensor:
        return Stretched(self.directions, self.factors.reciprocal())(image)


def guide_transform(
    guide: object, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> ToLatent | None:
    """The transform of a standard normal that a guide is; ``None`` if it does not offer one."""
    if not isinstance(guide, TransformedGuide):
        return None
    try:
        # products with AutoMultivariateNormal's matrix are ten times slower where it has no graph
        with torch.enable_grad():
            transform = guide.get_transform(*args, **kwargs)
    except NotImplementedError:  # some of Pyro's guides have no more than the method
        return None
    return partial(call_and_ladj_over_vectors, transform)


def misjudged_directions(target: PulledBack, points: Tensor) -> Stretched:
    """Ritz vectors of the mean Hessian at points, ``(n, D)``, stretched to unit curvature."""
    points, directions = points[:32], points.new_zeros((points.shape[1], 0))
    images, candidate = [], torch.randn_like(points[0])
    for _ in range(min(24, points.shape[1])):  # each costs two gradients at each point
        direction = _orthogonal(candidate, directions)
        if direction.norm() < 1e-3 * candidate.norm():  # nothing new
            direction = _orthogonal(torch.randn_like(candidate), directions)
        direction = direction / direction.norm()
        directions = torch.cat([directions, direction[:, None]], 1)
        candidate = _times_hessian(target, points, direction)
        images.append(candidate)
    projected = directions.T @ torch.stack(images, 1)
    curvatures, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    is_far = (curvatures < 0.5) | (curvatures > 2.0)  # others are forgotten in a few steps
    # an sd grows or shrinks 100 times at most
    factors = curvatures[is_far].clamp(1e-4, 1e4).rsqrt()
    return Stretched(directions @ rotation[:, is_far], factors)


def _orthogonal(vector: Tensor, directions: Tensor) -> Tensor:
    """A vector less its part in some orthonormal directions; once is not enough for round-off."""
    for _ in range(2):
        vector = vector - directions @ (directions.T @ vector)
    return vector


def _times_hessian(target: PulledBack, points: Tensor, direction: Tensor) -> Tensor:
    """The mean Hessian of minus the log density, times a direction, where that is finite."""
    step = _DIFFERENCE * direction
    ahead, behind = target(points + step), target(points - step)
    is_finite = ahead.is_finite & behind.is_finite
    change = (behind.gradient - ahead.gradient)[is_finite]
    return change.mean(0) / (2 * _DIFFERENCE) if len(change) else direction
