# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Chains that begin at draws of a guide, run until there are enough effective draws of each latent.

They learn their masses and their step size at first, in rounds that get longer, and again where they
turn out not to mix; only what comes after is kept.
"""

import math
from statistics import geometric_mean
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_integer
from ..capture import ReplayError
from ..joint import LogJoint
from ..joint.coordinates import non_centered
from ..joint.density import CACHED
from ..joint.sites import Latents
from ..time_limit import is_out_of_time, limited
from .base_space import NUM_DRAWS, base_space, by_moments
from .convergence import GOOD_RHAT, Convergence, plain_rhat
from .hamiltonian import HamiltonianChains, PulledBack, State
from .importance import KHAT_OF_VARIANCE
from .importance_weights import ModelAndGuide
from .preconditioning import Preconditioner
from .psis import fit_tail

# R-hat of chains that do not mix, and the rate of acceptance of those that hardly move, of which steps
# are the smallest by then
_BAD_RHAT, _STUCK = 1.1, 0.1
# the acceptance of proposals, of which half are a guide's draws, from which on there are no trajectories, and
# their largest k-hat then: where weights are not nearly bounded, chains stick in the tails (Mengersen and
# Tweedie 1996; twice the acceptance takes a tenth more time: benchmarks/chains.md)
_GOOD_ACCEPTANCE, _BOUNDED = 0.3, 0.25
#: the chains of a model that is fast for many draws at once, of others at least, and one at a time
MOST_CHAINS, FEWEST_CHAINS, CHAINS_BY_LOOP = 64, 16, 8
# effective draws asked for by chain: R-hat is good with some 45, so that more chains would give many more
# than were asked for (6 takes up to twice the time, 25 as long as 12: benchmarks/chains.md)
_DRAWS_BY_CHAIN = 12
# lambda up to which coordinates are those of the prior, as good as
_NEAR = 0.05
# how many latents are ranked before all are
_NUM_SLOWEST = 32
# coordinates of all chains up to which a gradient hardly costs more than that of one
_CACHED_COORDINATES = 2**14
# trajectories of the rounds of warm-up, of the first block that is kept, and after which chains should mix:
# as many at least where weights of proposals have no variance, since these mix the bulk and hide a tail
_WARM_UP, _BLOCK, _PATIENCE = (8, 12, 20), 24, 96
# those that would not agree after so many begin anew; they end after so many, which a regression with one
# scale near zero takes (`seeds` of benchmarks/unseen.md: 1.024 after 2,000, and 1.019 after 2,100 to 2,400)
_ANEW, _MOST_TRAJECTORIES = 2000, 3000
# the factor of the length of trajectories that do not mix, and the greatest length, in quarters of an
# oscillation: a regularized horseshoe has its draws with 8, and not with 1 (benchmarks/chains.md)
_LONGER, _LONGEST = 4, 8
# the share of the number so far that the next block has at most
_GROWTH = 0.5


class _Place(NamedTuple):
    """Where chains move: a density, it pulled back by a transform, the chains, and if that is affine."""

    log_joint: LogJoint
    target: PulledBack
    chains: HamiltonianChains
    is_affine: bool


class GuideChains:
    """Chains of a posterior that begin at draws of a guide.

    Draws of the guide, and as many further out, are proposed, as in an independence sampler [1], which
    sticks in the tails where weights are not bounded [2]: alone where they are accepted often enough, else
    after trajectories.

    ``draws`` are on the unconstrained space, shape ``(C, n, D)``; the chains move in the coordinates of
    ``log_joint``, which has some from the prior where a Gaussian guide of a hierarchy has none.

    :param num_chains: how many, 4 at least; found where it is not given.
    :param num_samples: how many effective draws will be asked for, where that is known.
    :raises ValueError: if there are fewer than 4 chains, the model sub-samples its data, or the guide lacks
        a latent, was made for another model, is a point, has discrete sites, or has too few draws of
        finite density.

    **References**

    1. Markov Chains for Exploring Posterior Distributions (Tierney, 1994),
       https://doi.org/10.1214/aos/1176325750
    2. Rates of Convergence of the Hastings and Metropolis Algorithms (Mengersen, Tweedie, 1996),
       https://doi.org/10.1214/aos/1033066201
    """

    def __init__(
        self,
        subject: ModelAndGuide,
        num_chains: int | None = None,
        num_samples: float = math.inf,
    ) -> None:
        if num_chains is not None:
            check_integer("num_chains", num_chains, 4)
        if subject.log_joint.is_random:
            raise ValueError(
                "model: expected one that sees all its data, got one that sub-samples them, or whose "
                "density is random otherwise"
            )
        count = num_chains or _num_chains(subject.log_joint, num_samples)
        # of a Gaussian guide, which is affine, a gradient costs as much as the model's
        log_joint, to_latent, start, is_affine = base_space(subject, count)
        target = PulledBack(log_joint, to_latent)
        chains = _begin(target, start, count, log_joint.latents)
        self._place = _Place(log_joint, target, chains, is_affine)
        # proposals alone, where the guide is good enough, as the warm-up finds out
        self._by_guide = True
        self._blocks: list[Tensor] = []
        self._known: Convergence | None = None
        self._slowest: Convergence | None = None
        self.num_chains = count
        self.acceptance = 0.0  #: the mean rate of the last block
        #: those of all blocks, of dropped ones too, longer ones as several
        self.num_trajectories = 0

    @property
    def log_joint(self) -> LogJoint:
        """The density, in the coordinates where chains move now."""
        return self._place.log_joint

    @property
    def target(self) -> PulledBack:
        return self._place.target

    @property
    def is_affine(self) -> bool:
        return self._place.is_affine

    @property
    def _chains(self) -> HamiltonianChains:
        return self._place.chains

    @property
    def draws(self) -> Tensor:
        return torch.cat(self._blocks, 1)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Learns masses and step size; draws so far are dropped."""
        self._blocks = []
        try:
            self._learn()
        except ReplayError:
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Goes on from where chains are, where densities and with them all draws so far were wrong."""
        self._chains.evaluate_at(self._chains.state.base)
        _leave_infinite(self._chains, self.num_chains)
        self.warm_up()

    def _learn(self) -> None:
        if self._by_guide:
            # draws of the guide itself, as chains begin, lack what its tails lack
            for _ in limited(range(_WARM_UP[0])):
                self._chains.draw_from_mixture()
            self._by_guide = self._chains.learn_proposals() > _GOOD_ACCEPTANCE
        if self._by_guide:
            return
        for number in limited(_WARM_UP):
            self._adapt(number)
        sizes = [self._chains.step_size]
        for _ in limited(range(_WARM_UP[0])):
            self._chains.step(adapts=True)
            sizes.append(self._chains.step_size)
        # the rate of a single trajectory depends on its length
        self._chains.step_size = geometric_mean(sizes[len(sizes) // 2 :])
        self._chains.learn_proposals()

    def _adapt(self, number: int) -> None:
        chains, states = self._chains, []
        for _ in limited(range(number)):
            chains.step(adapts=True)
            states.append(chains.end)
        if len(states) < number:  # too few to learn from
            return
        states = states[number // 4 :]
        base, gradient = (torch.cat(part) for part in zip(*((s.base, s.gradient) for s in states)))
        # proposals are accepted by values alone, also where there is no gradient
        has_gradient = gradient.isfinite().all(-1)
        if int(has_gradient.sum()) > len(base) // 2:
            chains.preconditioner = Preconditioner.of(base[has_gradient], gradient[has_gradient])

    @torch.no_grad()
    def extend(self, number: int) -> None:
        """Keeps the draws of so many trajectories more; fewer, but one, where the time is over before."""
        try:
            self._extend(number)
            self.target.confirm()
        except ReplayError:
            self._begin_anew()
            self.extend(number)

    def _extend(self, number: int) -> None:
        latents, rates = list[Tensor](), list[float]()
        for _ in limited(range(number), at_least=1):
            rates.append(
                self._chains.draw_from_mixture() if self._by_guide else self._chains.step()
            )
            latents.append(self._chains.state.latent)
        block = torch.stack(latents, 1)
        u, _ = self.log_joint.to_unconstrained(block.flatten(0, 1))
        self._blocks.append(u.reshape(block.shape))
        self._known = self._slowest = None
        self.num_trajectories += len(rates) * self._chains.length
        self.acceptance = math.fsum(rates) / len(rates)

    def convergence(self) -> Convergence:
        """What all draws that are kept say."""
        if self._known is None:
            self._known = Convergence.of(self.draws)
        return self._known

    def _of_slowest(self) -> Convergence:
        """The convergence of the latents whose means agree the least; of all, where that is known."""
        if self._known is not None:
            return self._known
        if self._slowest is None:
            draws = self.draws
            slowest = plain_rhat(draws).topk(min(_NUM_SLOWEST, draws.shape[-1])).indices
            self._slowest = Convergence.of(draws[..., slowest])
        return self._slowest

    def _is_enough(self, num_samples: int) -> bool:
        """Whether the draws are enough: ranks of millions of them take seconds, where others say no first."""
        return all(find().is_enough(num_samples) for find in (self._of_slowest, self.convergence))

    def run(self, num_samples: int, most: int = _MOST_TRAJECTORIES) -> Convergence:
        """Goes on until there are enough effective draws of each latent, or the time is over.

        Chains that would take too many trajectories to agree learn anew from where they are, in units of
        the prior where the model has some, or back if these are no better, and then with longer ones as
        long as these help: a random walk of steps four times as long takes 16 times fewer. What changes with
        the energy alone, as the scale of a thousand latents, is no faster by them. Those that are no better
        after that end.

        :param most: the most trajectories, warm-up not counted, and one of several lengths as several.
        """
        size, patience, before, left = 0, _PATIENCE, list[Tensor](), 0.0
        chains, longest, best, least = self._chains, _LONGEST, 1, math.inf
        other: _Place | None = None
        to_beat = math.inf
        while True:
            if not self._blocks:
                self.warm_up()
            number = max(_BLOCK, math.ceil(min(_GROWTH * size, left)))
            self.extend(min(number, max((most - self.num_trajectories) // chains.length, 1)))
            if is_out_of_time() and before and len(self._blocks) < 2:
                self._blocks, self._known, self._slowest = before, None, None
            size = self.draws.shape[1]
            if is_out_of_time() or self.num_trajectories >= most:
                return self.convergence()
            rhat = float(plain_rhat(self.draws).max())
            is_enough = rhat <= GOOD_RHAT and self._is_enough(num_samples)
            is_long = chains.length * size >= _PATIENCE
            if is_enough and (is_long or not self._is_heavy(KHAT_OF_VARIANCE)):
                return self.convergence()
            left = (
                size * _excess(rhat) if rhat > GOOD_RHAT else self._trajectories_left(num_samples)
            )
            # in trajectories of unit length, these draws, and what it takes to forget a place
            taken = chains.length * size
            cost = taken * (rhat**2 - 1)
            left_for_all = _ANEW - self.num_trajectories + taken
            is_hopeless = cost > (GOOD_RHAT**2 - 1) * left_for_all
            is_worth_it = patience <= taken <= most - self.num_trajectories
            is_heavy = self._by_guide and self._is_heavy(_BOUNDED, 1.0)
            if is_heavy or (is_hopeless and is_worth_it):
                if self.acceptance < _STUCK and not self._by_guide:
                    return self.convergence()
                place, num_gradients = self._place, self.target.num_gradients
                if not (self._by_guide or other) and self._move_to_units_of_prior():
                    other, to_beat = place, cost / chains.step_size
                elif other and math.inf > to_beat <= cost / chains.step_size:
                    # no better for the gradients that they take: back
                    self._place, to_beat = other, math.inf
                    self.target.num_gradients = num_gradients
                elif cost < least and not self._by_guide:
                    least, best, to_beat = cost, chains.length, math.inf
                    chains.length = min(_LONGER * best, longest)
                elif chains.length > best:
                    chains.length = longest = best
                elif not self._by_guide:
                    return self.convergence()
                chains, self._by_guide, before = self._chains, False, self._blocks
                self._blocks, size, patience = [], 0, 2 * patience

    @torch.no_grad()
    def _move_to_units_of_prior(self) -> bool:
        """Goes on from where chains are in units of the prior throughout; false where it has no others.

        The centring that suits most of the mass is wrong in the neck of a funnel.
        """
        as_written, given = self.log_joint.with_coordinates(None), self.log_joint.coordinates
        unit = non_centered(as_written)
        if unit is as_written:
            return False
        if given is not None and bool((given.centered - unit.coordinates.centered).max() < _NEAR):
            return False
        few = max(NUM_DRAWS // self.num_chains, 1)
        # the last draws of all chains are the last rows
        x, _ = unit.from_unconstrained(self.draws[:, -few:].transpose(0, 1).flatten(0, 1))
        to_latent, base = by_moments(x)
        target = PulledBack(unit, to_latent)
        try:
            chains = _begin(target, base[-self.num_chains :], self.num_chains, unit.latents)
        except ValueError:  # beyond what numbers can say
            return False
        target.num_gradients += self.target.num_gradients
        self._place = _Place(unit, target, chains, True)
        return True

    def stay_apart(self) -> bool:
        """Whether chains that move do not agree after many trajectories, as where there are modes."""
        is_bad = float(self.convergence().rhat.max()) > _BAD_RHAT
        return is_bad and self.num_trajectories >= _PATIENCE and self.acceptance >= _STUCK

    def _is_heavy(self, most: float, num_se: float = 0.0) -> bool:
        """Whether the tail of the weights of proposals is heavier than that of an index."""
        if not self._chains.num_proposals:
            return False
        tail = fit_tail(torch.cat(self._chains.proposed))
        return tail.khat - num_se * tail.khat_se > most

    def gradients_left(self, num_samples: int) -> float:
        """How many more each chain needs, about, as far as the draws so far tell."""
        return self._chains.num_stages * self._trajectories_left(num_samples)

    def _trajectories_left(self, num_samples: int) -> float:
        found = self._of_slowest()
        by_ess = num_samples / max(found.min_ess, 1e-3) - 1
        return self.draws.shape[1] * max(by_ess, _excess(float(found.rhat.max())))


def _excess(rhat: float) -> float:
    """How many times as many more draws R-hat needs, which goes to one as their inverse number does."""
    return (rhat**2 - 1) / (GOOD_RHAT**2 - 1) - 1


def _num_chains(log_joint: LogJoint, num_samples: float) -> int:
    """Many where model and guide take many draws in the time of one, and many draws are wanted."""
    if log_joint.strategy == "loop":
        return CHAINS_BY_LOOP
    fast = min(
        log_joint.chunk_size // CACHED,
        _CACHED_COORDINATES // log_joint.latents.latent_dim,
        MOST_CHAINS,
    )
    return int(max(min(fast, num_samples // _DRAWS_BY_CHAIN), FEWEST_CHAINS))


def _begin(target: PulledBack, start: Tensor, count: int, latents: Latents) -> HamiltonianChains:
    """So many chains at points of the base space; those without a finite density begin at others."""
    chains = HamiltonianChains(target, start)
    # a latent that rounding has made equal in all chains never moves, and chains agree on it
    if len(fixed := (chains.state.latent == chains.state.latent[0]).all(0).nonzero()):
        name = latents.name_of(int(fixed[0]))
        raise ValueError(f"guide: expected draws that differ, got one value of {name} in all")
    _leave_infinite(chains, count)
    return chains


def _leave_infinite(chains: HamiltonianChains, count: int) -> None:
    """Puts those of so many chains that have no finite density where others are."""
    usable = chains.state.is_finite.nonzero()[:, 0]
    if len(usable) == count:
        return
    if len(usable) < 2:
        raise ValueError(
            f"guide: expected at least {count} draws of finite density and gradient, got "
            f"{len(usable)}: train it first, or check supports"
        )
    chosen = usable[torch.arange(count, device=usable.device) % len(usable)]
    chains.state = chains.end = State(*(part[chosen] for part in chains.state))
