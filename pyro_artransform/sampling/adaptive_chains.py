# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Chains that find their starts and adapt their kernel in warm-up rounds."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .._base.arguments import first_of
from .._base.comparison import tolerance
from .._base.time_limit import until_deadline
from ..model import LogJoint
from ..model.coordinates.centering import with_gaussian_sites
from ..model.coordinates.coordinates import Coordinates
from ..model.relabelling import Relabelling
from ..model.sites import Latents
from ..model.symmetries import Symmetry, confirmed, find_symmetries
from .adaptation import StepSize, TrajectoryLength
from .conditional_gaussian import MOST_GLOBALS, ConditionalGaussian, LatentGaussianField
from .images import random_images
from .modes import MOVES, STUCK, IndependentProposals, lost_chains
from .preconditioning import Preconditioner, fisher_divergence
from .starts import StartError, check_has_gradient, initial_ascent, overdispersed, select_dispersed
from .target import State, TransformedDensity, identity
from .trajectories import TrajectoryInfo, integrator_of, trajectory

# trajectories in each warm-up round
_WARM_UP = (8, 12, 20, 30, 10, 8)
# the round after which the model as it is written is tried, and a field is fitted again; a field is looked
# for, and Gaussian sites are tried, after earlier ones, except for the first
_LAST_TRIED = 3
# Fisher divergence above which a field is looked for (in benchmarks/chains.md 0.4 for a linear state space
# model, which is faster without, and 1.3 for stochastic volatility)
_FAR = 0.5
# maximum number of steps of a trajectory, in the first round and after the warm-up
_FEW_STEPS, _MANY_STEPS = 10, 500
# step sizes of chains are jittered down to this share, as otherwise some chains stay stuck
_SMALLEST = 0.35
# in warm-up a chain's step size grows by this factor when accepted, and shrinks when rejected
_GROWTH = 1.5


class AdaptiveChains:
    """Chains of a log joint density, in superchains with a common start each.

    :param log_joint: the density, in the coordinates in which chains move at first.
    """

    def __init__(self, log_joint: LogJoint, num_chains: int, num_superchains: int) -> None:
        self.num_chains, self.num_superchains = num_chains, num_superchains
        self._target = TransformedDensity(log_joint)
        dim = log_joint.latents.latent_dim
        self._integrator, self._step_size = integrator_of(dim), StepSize(dim)
        self._state: State
        self._has_begun = False
        self._field: tuple[LogJoint, LatentGaussianField] | None = None
        self._has_searched = self._has_adapted_again = False  # for a field; after a warm-up
        #: of the step size of each chain, after a warm-up and in its rounds with one of its own for each
        self._factor: Tensor
        self._own_factor: Tensor
        self._has_moved: Tensor
        self._proposals: IndependentProposals | None = None
        #: symmetries of the posterior: chains start in one of its images
        self.symmetries: tuple[Symmetry, ...] = ()

    @property
    def log_joint(self) -> LogJoint:
        """The density, in the current coordinates."""
        return self._target.log_joint

    @property
    def step_size(self) -> float:
        """The maximum step size over chains, for all stages of a step, after a warm-up."""
        return self._integrator.num_stages * self._step_size.value

    @property
    def has_proposals(self) -> bool:
        """Whether independent proposals alternate with trajectories."""
        return self._proposals is not None

    @property
    def num_gradients(self) -> int:
        return self._target.num_gradients

    def _start(self) -> State:
        """Places chains at the starts of their superchains, and makes the first preconditioner."""
        size = self.num_chains // self.num_superchains
        check_has_gradient(self.log_joint)
        # as many points as chains, so that one captured gradient serves both
        starts = overdispersed(self.log_joint, self.num_superchains, size)
        self._has_parents = starts.has_parents
        state, self._preconditioner = initial_ascent(self._target, starts)
        chosen = select_dispersed(state, self._preconditioner.scale, self.num_superchains)
        state = state.at(chosen.repeat_interleave(size))
        is_usable = state.is_usable
        usable = is_usable.nonzero()[:, 0]
        if not len(usable):
            raise StartError(self._why_no_start(state.latent))
        chosen = torch.arange(self.num_chains, device=usable.device)
        others = usable[chosen // size * size % len(usable)]
        return state.at(torch.where(is_usable, chosen, others))

    def _why_no_start(self, latent: Tensor) -> str:
        """The message for a density that is not finite at any start."""
        latents, point = self.log_joint.latents, self.log_joint.to_unconstrained(latent[:1])[0]
        values = {k: v[0].flatten()[:4].tolist() for k, v in latents.constrain(point).items()}
        points = [f"{k} = [{', '.join(f'{x:.4g}' for x in v)}]" for k, v in values.items()]
        sites = self.log_joint.nonfinite_sites(latent) or ["the gradient"]
        hint = "Give an init_loc_fn with values at which density and gradient are finite"
        if not latents.sites.keys() & {*sites}:
            hint = f"The prior may exclude the data: check supports, priors and data. {hint}"
        return (
            "expected a starting point with finite log density and gradient, got none of "
            f"{len(latent)}: {first_of(sites)} is not finite. Tried were the model's initial values, "
            "quantiles of the prior, the origin of the unconstrained space and points uniform in (-2, 2) "
            f"there, such as {first_of(points)}. {hint}"
        )

    def _warm_up(self) -> None:
        """Adapts the kernel and the coordinates, from the starts or the current states."""
        if not self._has_begun:
            self._state, self._has_begun = self._start(), True
            self.symmetries = find_symmetries(*self._for_symmetries())
            self._move_to_one_image()
        dim = self._state.base.shape[-1]
        self._step_size, self._length, self._count = StepSize(dim), TrajectoryLength(), 0
        self._factor = torch.ones_like(self._state.base[:, 0])
        index, repeats = 0, 6
        while index < len(_WARM_UP):
            number, is_last = _WARM_UP[index], index >= len(_WARM_UP) - 2
            states = self._adapt(number, _FEW_STEPS * (4 if index else 1), not is_last)
            if len(states) < number:
                return
            if index < len(_WARM_UP) - 1:
                self._learn(self._rejoined(states, not is_last))
                self._move_to_one_image()
            if 1 <= index < _LAST_TRIED:
                self._try_field(states)
            # the sd of a normal log density is 0.7 times the root of the dimension
            if index and repeats and _rise(states) > 0.5 * dim**0.5:
                repeats -= 1
                continue
            if self._target.to_latent is not identity:
                if index == _LAST_TRIED:
                    self._transform_field(states)  # refit at draws closer to the posterior
            elif index != _LAST_TRIED or not self._go_on_as_written(states):
                self._approximate_likelihood(states, index)
            index += 1
        if self.symmetries:
            self.symmetries = confirmed(self.symmetries, *self._for_symmetries())

    def _for_symmetries(self) -> tuple[LogJoint, Latents, Tensor]:
        """The density as the model is written, its latents, and the distinct states of chains."""
        usable = self._state.at(self._state.is_usable)
        u = self.log_joint.to_unconstrained(usable.latent)[0].unique(dim=0)
        return self.log_joint.with_coordinates(None), self.log_joint.latents, u

    def _move_to_one_image(self) -> None:
        """Moves chains to images that are near to each other; during adaptation only, to stay exact."""
        if self.symmetries:
            u = self.log_joint.to_unconstrained(self._state.latent)[0]
            latents = self.log_joint.latents
            to_image = Relabelling.of(self.symmetries, latents.constrain(u))
            self._state = self._mapped(partial(to_image.of_latents, latents), self._state)

    def _to_base(self, u: Tensor) -> Tensor:
        """Maps points ``(n, D)`` of the unconstrained space to the base space of chains."""
        latent, _ = self.log_joint.from_unconstrained(u)
        to_latent = self._target.to_latent
        return to_latent.inverse(latent) if isinstance(to_latent, ConditionalGaussian) else latent

    def _from_base(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """Inverts :meth:`_to_base`; also the log-determinant ``(n,)``."""
        latent, of_latent = self._target.to_latent(base)
        u, ladj = self.log_joint.to_unconstrained(latent)
        return u, of_latent + ladj

    @property
    def _has_many_dependent_sites(self) -> bool:
        """Whether the priors of so many sites depend on other latents that the model loops over them.

        Its states are sums or scans in coordinates of the prior; with Gaussian sites gradients take longer.
        """
        parts = self.log_joint.latents.views(self._has_parents).values()
        return sum(bool(part.any()) for part in parts) > MOST_GLOBALS

    def _try_field(self, states: list[State]) -> None:
        """Looks for a field where chains are far from a Gaussian, or mix slowly, or the model loops."""
        is_wanted = (
            self._has_many_dependent_sites
            or self._has_adapted_again
            or bool(_divergence(_last(states))[0] > _FAR)
        )
        if is_wanted and not self._has_searched:
            self._field, self._has_searched = self._find_field(), True
        if self._target.to_latent is identity:
            self._transform_field(states)

    def _adapt(self, number: int, most_steps: int, by_chain: bool) -> list[State]:
        """Runs chains, adapting step size and length; returns the state after each trajectory.

        :param by_chain: whether to adapt a step size per chain, so that chains in narrow regions move.
        """
        states, self._moves = list[State](), torch.zeros_like(self._state.base[:, 0])
        factor, logs = torch.ones_like(self._moves), list[Tensor]()
        for _ in until_deadline(range(number)):
            start = self._state.base
            info = self._step(most_steps, factor if by_chain else self._factor)
            self._step_size.update(info)
            self._length.update(start, info, self._preconditioner)
            # a longer step, of nearly a whole period, would return to its start
            self._step_size.limit(2 * self._length.value / self._integrator.num_stages)
            self._moves += info.is_accepted
            states.append(self._state)
            if by_chain:
                factor = torch.where(info.is_accepted, factor * _GROWTH, factor / _GROWTH)
                factor = factor.clamp(0.01, 1.0)
                logs.append(factor.log())
        if logs:
            self._has_moved = self._moves >= MOVES * number
            self._own_factor = torch.stack(logs[len(logs) // 2 :]).mean(0).exp()
        self._step_size.settle()
        return states

    def _step(self, most_steps: int = _MANY_STEPS, factor: Tensor | None = None) -> TrajectoryInfo:
        factor = self._factor if factor is None else factor
        self._count += 1
        stages, like = self._integrator.num_stages, self._state.base[:, :1]
        size = stages * self._step_size.value
        num_steps = math.ceil(self._length.next(self._count) / size)
        sizes = size * (_SMALLEST + (1 - _SMALLEST) * torch.rand_like(like)) * factor[:, None]
        self._state, info = trajectory(
            self._target,
            self._state,
            sizes,
            max(min(num_steps, most_steps // stages), 1),
            self._preconditioner,
            self._integrator,
        )
        if self._proposals is not None:
            maps = list[Callable[[State], State]]()
            if self._count % 2:  # modes that are their own images need no others
                given = self.symmetries, self.log_joint.latents, self._state.base
                maps = [partial(self._mapped, image) for image in random_images(*given)]
            self._state = self._proposals.step(self._target, self._state, *maps)
        return info

    def _mapped(self, image: Callable[[Tensor], Tensor], state: State) -> State:
        """States at the images of their points on the unconstrained space."""
        u = self.log_joint.to_unconstrained(state.latent)[0]
        return self._target(self._to_base(image(u)))

    def _rejoined(self, states: list[State], is_by_chain: bool) -> State:
        """Restarts lost chains; returns the later states of all others.

        Those that moved as long as chains had step sizes of their own keep them: they are in a narrow mode.
        """
        if not is_by_chain:
            is_narrow = (self._moves < STUCK * len(states)) & self._has_moved
            self._factor = torch.where(is_narrow, self._own_factor, 1.0)
            self._moves = torch.where(is_narrow, len(states), self._moves)
        is_lost, states = lost_chains(states, self._moves), states[len(states) // 4 :]
        if bool(is_lost.all()):
            return State.cat(states)
        self._begin_anew(is_lost)
        return State.cat([state.at(~is_lost) for state in states])

    def _begin_anew(self, is_lost: Tensor) -> None:
        """Restarts chains at the states of others, of the same superchain if some are left."""
        size = self.num_chains // self.num_superchains
        usable = (~is_lost).nonzero()[:, 0]
        source = torch.arange(self.num_chains, device=is_lost.device)
        for chain in is_lost.nonzero()[:, 0].tolist():
            near = usable[usable // size == chain // size]
            pool = near if len(near) else usable
            source[chain] = pool[int(torch.randint_like(pool[:1], len(pool)))]
        self._state = self._state.at(source)

    def _learn(self, states: State) -> None:
        states = states.at(states.is_usable)
        self._preconditioner = Preconditioner.of(states.base, states.gradient)

    def _approximate_likelihood(self, states: list[State], index: int) -> None:
        """Tries Gaussian sites, see ``model.coordinates.gaussian_sites``, after some rounds."""
        if not 1 <= index <= _LAST_TRIED or self._has_many_dependent_sites:
            return
        known = State.cat(states[len(states) // 2 :])
        known = known.at(known.is_usable)
        other = with_gaussian_sites(self.log_joint, known.base, known.gradient)
        if other is self.log_joint:
            return
        if self._target.gaussian_sites is None:
            target = TransformedDensity(other, before=self._target)
        else:
            target = self._target.with_gaussian_sites(other)
        self._go_on_in(target, states)

    def _go_on_as_written(self, states: list[State]) -> bool:
        """Tries the coordinates of the model as it is written; returns whether they are taken."""
        if self.log_joint.coordinates is None:
            return False
        target = TransformedDensity(self.log_joint.with_coordinates(None), before=self._target)
        # without coordinates from the prior, chains may miss the neck of a funnel (benchmarks/tails.md)
        self._go_on_in(target, states, (0.5, 0.5))
        return self._target is target

    def _find_field(self) -> tuple[LogJoint, LatentGaussianField] | None:
        """Finds a field, and a density in coordinates from its prior, or as the model is written.

        A sequence whose location is the previous state has a sparse graph only in the latter.
        """
        densities, given = [self.log_joint], self.log_joint.coordinates
        if given is not None and bool(self._has_parents.any()):
            if given.gaussian_sites is not None:  # otherwise the captured density is shared
                densities = [self.log_joint.with_coordinates(given.with_gaussian_sites(None))]
            centered = given.centered.masked_fill(self._has_parents, 1.0)
            other = Coordinates(given.latents, given.with_location, centered, given.unit)
            densities.append(self.log_joint.with_coordinates(other))
        found = ((density, LatentGaussianField.of(density)) for density in densities)
        return next(((density, field) for density, field in found if field is not None), None)

    def _transform_field(self, states: list[State]) -> None:
        """Tries coordinates in which a field is nearly normal given its globals."""
        if self._field is None:
            return
        density, field = self._field
        settled = states[-max(len(states) // 3, 1) :]
        u, _ = self.log_joint.to_unconstrained(torch.cat([state.latent for state in settled]))
        latent, _ = density.from_unconstrained(u)
        sds = latent.std(0).clamp_min(torch.finfo(latent.dtype).tiny ** 0.5)
        try:
            fitted = ConditionalGaussian(field, density, latent, sds)
        except ValueError:  # no curvature near the draws
            return
        self._go_on_in(TransformedDensity(density, fitted, self._target), states)

    def _go_on_in(
        self,
        target: TransformedDensity,
        states: list[State],
        factor: tuple[float, float] = (1.0, math.inf),
    ) -> None:
        """Moves chains to other coordinates if these lower the Fisher divergence by a factor.

        :param factor: at the median draw, and at the 95 % quantile.
        """
        # lost chains have been restarted since the last of these
        states = [*_last(states), self._state]
        before = State.cat(states)
        u, ladj = self.log_joint.to_unconstrained(before.latent)
        latent, of_inverse = target.log_joint.from_unconstrained(u)
        is_same = True
        if isinstance(to_latent := target.to_latent, ConditionalGaussian):
            known = target(to_latent.inverse(latent))
        else:
            known = target(latent)
            # of u, in case that the model uses a latent otherwise than its factors say
            change = known.log_density + of_inverse - before.log_density + ladj
            scale = 1 + before.log_density.abs().median()
            is_same = bool(change.abs().median() <= scale * tolerance(change))
        bound = _divergence(states) * known.base.new_tensor(factor)
        if not (is_same and bool((_divergence([known]) < bound).all())):
            self._target.num_gradients = target.num_gradients
            return
        self._target = target
        count = len(latent)
        self._state = known.at(torch.arange(count - self.num_chains, count, device=latent.device))
        self._learn(known)


def _last(states: list[State]) -> list[State]:
    return states[-max(len(states) // 4, 1) :]


def _rise(states: list[State]) -> float:
    """The rise of the median log density from the first to the last quarter of states."""
    first, last = (
        torch.cat([state.log_density for state in part])
        for part in (states[: max(len(states) // 4, 1)], _last(states))
    )
    return float(last.median() - first.median())


def _divergence(states: list[State]) -> Tensor:
    """The Fisher divergence between the density at the states and a Gaussian, ``(2,)``."""
    known = State.cat(states)
    known = known.at(known.is_usable)
    if len(known.base) < 2:
        return known.base.new_full((2,), math.inf)
    return fisher_divergence(known.base, known.gradient)
