# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Many short chains of a posterior, in groups that begin far apart, run until they agree.

Nothing is known of the posterior before: chains climb from their starts, learn the scale of all directions,
the step size and the length of trajectories in rounds that get longer, and then go on until superchains, the
groups that began at one point, have the same distribution of each latent.

**References**

1. Nested R-hat: Assessing the Convergence of Markov Chain Monte Carlo When Running Many Short Chains
   (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, 2024), https://arxiv.org/abs/2110.13017
"""

import math
from enum import Enum

import torch
from torch import Tensor

from ..arguments import check_integer
from ..capture import ReplayError
from ..joint import LogJoint
from ..joint.density import CACHED
from ..time_limit import is_out_of_time, limited
from .conditional_gaussian import ConditionalGaussian
from .convergence import GOOD_RHAT, Convergence, effective_draws, nested_rhat, nested_rhat_of_values
from .modes import IndependentProposals, Modes, groups_of
from .moving_chains import MovingChains
from .target import ToLatent
from .trajectories import MANY_DIVERGENT, Info, share_of_divergent

#: superchains, chains of each where a model is fast for many draws at once, and where it is not
SUPERCHAINS, MOST_CHAINS, FEWEST_CHAINS, CHAINS_BY_LOOP = 8, 64, 16, 8
# effective draws asked for by chain, and numbers of all chains up to which a gradient costs as one
_DRAWS_BY_CHAIN, _CACHED_COORDINATES, _SHARE_OF_CACHE = 12, 2**15, 4
# trajectories of the first block after the warm-up, and the most in all
_BLOCK, _MOST_TRAJECTORIES = 16, 3000
# the share of draws that is a transient, and left out
_TRANSIENT = 1 / 3
# latents that are ranked before all are
_NUM_SLOWEST = 32
#: the nested R-hat above which chains may be in different modes
MODES_RHAT = 1.1
# the draws of a chain from which on modes are looked for, the share of all but the first
# below which slow chains are no modes, and the least share of proposals in one
_NUM_FOR_MODES, _LEAST_SHARE_OF_OTHERS, _LEAST_SHARE = 24, 0.01, 0.05
# how often step sizes are halved because trajectories diverge
_MOST_HALVED = 3
# trajectories after which chains end if far more would be needed, and if too many diverge
_PATIENCE, _ENOUGH_DIVERGENT = 96, 48


class End(Enum):
    """Why an ensemble ended."""

    ENOUGH = "there are enough effective draws of each latent, and chains agree"
    APART = "superchains stay in modes that chains do not move between"
    LIMIT = "the limit of trajectories of a fit without draws= was reached"
    TOO_MANY = "far more trajectories would be needed"
    DIVERGENT = "so many trajectories diverged that more draws would not be trusted"
    OUT_OF_TIME = "the time was over"


class Ensemble(MovingChains):
    """Superchains of a log joint density.

    :param log_joint: the density, in the coordinates where chains move.
    :param num_samples: how many effective draws will be asked for, where that is known.
    :param num_chains: how many chains; found where it is not given.
    :param to_latent: a transform of a standard normal, nearly, to these coordinates, in whose base space
        chains move; without one they climb from quantiles of the prior.
    :raises ValueError: if there are fewer than 4 chains, the model sub-samples its data, or too few starts
        have a finite density.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        num_samples: float = math.inf,
        num_chains: int | None = None,
        to_latent: ToLatent | None = None,
    ) -> None:
        if num_chains is not None:
            check_integer("num_chains", num_chains, 4)
        if log_joint.is_random:
            raise ValueError(
                "model: expected one that sees all its data, got one that sub-samples them, or whose "
                "density is random otherwise"
            )
        count = num_chains or _num_chains(log_joint, num_samples)
        num_superchains = next((k for k in (SUPERCHAINS, 4) if count % k == 0), count)
        super().__init__(log_joint, count, num_superchains, to_latent)
        self._blocks, self._infos = list[Tensor](), list[Info]()
        self._convergence: Convergence | None = None
        self._slowest = torch.zeros(0, dtype=torch.long, device=log_joint.start.device)
        self.modes: Modes | None = None  #: those that starts led to, where there are several
        self.left_out = 0.0  #: the share of modes that were left out, about
        self.end, self._num_halved = End.TOO_MANY, 0

    @property
    def num_trajectories(self) -> int:
        """Trajectories of each chain since the warm-up."""
        return sum(block.shape[1] for block in self._blocks)

    @property
    def draws(self) -> Tensor:
        """Draws on the unconstrained space, without the transient: shape ``(C, n, D)``."""
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks, 1)]
        (draws,) = self._blocks
        return draws[:, math.floor(_TRANSIENT * draws.shape[1]) :]

    @property
    def infos(self) -> list[Info]:
        """Of the trajectories that draws come from."""
        return self._infos[len(self._infos) - self.draws.shape[1] :]

    def convergence(self) -> Convergence:
        """What the draws say: the nested R-hat, and effective numbers of draws."""
        if self._convergence is None:
            rhat = nested_rhat(self.draws, self.num_superchains)
            self._convergence = Convergence(rhat, *effective_draws(self.draws))
        return self._convergence

    def share_beyond(self) -> Tensor:
        """For each latent the share beyond an outer 1 % quantile of its draws, shape ``(D,)``.

        By Laplace's approximation; zero where there is no field, or its priors say how it scales with others.
        """
        found, fitted = torch.zeros_like(self.log_joint.start), self._target.to_latent
        if isinstance(fitted, ConditionalGaussian) and not self._has_parents[fitted.of_field].all():
            latents, _ = self.log_joint.from_unconstrained(self.draws.flatten(0, 1))
            found[fitted.of_globals] = fitted.share_beyond(latents)
        return found

    @torch.no_grad()
    def run(self, num_samples: int, most: int = _MOST_TRAJECTORIES) -> Convergence:
        """Goes on until there are enough effective draws of each latent, or no hope, or the time is over.

        :param most: the most trajectories of a chain, warm-up not counted.
        """
        while True:
            try:
                self.end = self._run(num_samples, most)
                return self.convergence()
            except ReplayError:  # densities, and with them all draws so far, were wrong
                self._forget()
                if self._has_begun:
                    self._state = self._target(self._state.base)

    def _run(self, num_samples: int, most: int) -> End:
        if not self._blocks:
            self._warm_up()
        number = _BLOCK
        while True:
            self._extend(number)
            self._target.confirm()
            if is_out_of_time():
                return End.OUT_OF_TIME
            size = self.num_trajectories
            if self._diverge():
                if self._num_halved < _MOST_HALVED:
                    self._step_size.value /= 2
                    self._num_halved += 1
                    self._forget()
                    number = _BLOCK
                    continue
                if size >= _ENOUGH_DIVERGENT:
                    return End.DIVERGENT
            rhat = nested_rhat_of_values(self.draws, self.num_superchains)
            worst, ess = float(rhat.max()), 0.0
            if worst <= GOOD_RHAT:
                found = self._of_slowest(rhat)
                if found.is_enough(num_samples):
                    found = self.convergence()
                    if found.is_enough(num_samples):
                        return End.ENOUGH
                    count = _count(found.least)
                    self._slowest = torch.cat(
                        [
                            found.least.topk(count, largest=False).indices,
                            found.rhat.topk(count).indices,
                        ]
                    )
                worst, ess = float(found.rhat.max()), found.min_ess
            if worst <= GOOD_RHAT:
                more = size * (num_samples / max(ess, 1.0) - 1)
                number = math.ceil(min(max(more, size / 8), size))
            else:
                # R-hat goes to one as the inverse number of draws does
                more = size * ((worst**2 - 1) / (GOOD_RHAT**2 - 1) - 1)
                number = math.ceil(size / 3)
            if worst > MODES_RHAT and self.draws.shape[1] >= _NUM_FOR_MODES and self._are_apart():
                return End.APART
            if not self._blocks:
                number = _BLOCK
                continue
            if size >= most or (size >= _PATIENCE and size + more > 4 * most):
                return End.LIMIT if most < _MOST_TRAJECTORIES else End.TOO_MANY
            number = max(min(number, most - size), _BLOCK)

    def _diverge(self) -> bool:
        """Whether trajectories leave a corner out, and so do independent proposals."""
        return self._proposals is None and share_of_divergent(self.infos) > MANY_DIVERGENT

    def _of_slowest(self, rhat: Tensor) -> Convergence:
        """The convergence of the latents that mix least, and of the last ones to pass: all are costlier."""
        slowest = torch.cat([rhat.topk(_count(rhat)).indices, self._slowest])
        draws = self.draws[..., slowest]
        return Convergence(nested_rhat(draws, self.num_superchains), *effective_draws(draws))

    def _forget(self) -> None:
        self._blocks, self._infos = [], []
        self._convergence = None

    def _extend(self, number: int) -> None:
        """Keeps the draws of so many trajectories more; fewer, but one, where the time is over before."""
        latents, bases = list[Tensor](), list[Tensor]()
        for _ in limited(range(number), at_least=1):
            self._infos.append(self._step().without_points())
            latents.append(self._state.latent)
            bases.append(self._state.base)
        self._recent = torch.stack(bases, 1)
        block = torch.stack(latents, 1)
        u, _ = self.log_joint.to_unconstrained(block.flatten(0, 1))
        self._blocks.append(u.reshape(block.shape))
        self._convergence = None

    def _are_apart(self) -> bool:
        """Whether chains are in modes, although they jump; those of modes without mass begin anew."""
        draws = self.draws
        if int(groups_of(draws, -torch.stack([i.energy for i in self.infos], 1))[0].max()) == 0:
            return False
        # densities of the unconstrained space
        flat = self.log_joint.with_coordinates(None)(draws.flatten(0, 1)).reshape(draws.shape[:2])
        modes = Modes.of(draws, flat)
        is_left_out = modes.is_negligible[modes.group]
        if bool(is_left_out.any()):
            self.left_out += float(modes.share[modes.is_negligible].sum())
            self._begin_anew(is_left_out)
            self._forget()
            self._warm_up()
        elif self.modes is None:
            parts = [self._recent[modes.group == k].flatten(0, 1) for k in modes.group.unique()]
            share = modes.share.clamp_min(_LEAST_SHARE)
            self._proposals, self.modes = IndependentProposals.at_modes(parts, share), modes
            self._forget()
        else:
            self.modes = modes
            # else chains that are slow in a tail
            return float(modes.share[1:].sum()) > _LEAST_SHARE_OF_OTHERS
        return False


def _count(latents: Tensor) -> int:
    return min(_NUM_SLOWEST, len(latents))


def _num_chains(log_joint: LogJoint, num_samples: float) -> int:
    """Many where a model takes many draws in the time of one, and many draws are wanted."""
    if log_joint.strategy == "loop":
        return CHAINS_BY_LOOP
    fast = min(
        log_joint.chunk_size // (_SHARE_OF_CACHE * CACHED),
        _CACHED_COORDINATES // log_joint.latents.latent_dim,
        num_samples // _DRAWS_BY_CHAIN,
        MOST_CHAINS,
    )
    return max(int(fast) // SUPERCHAINS * SUPERCHAINS, FEWEST_CHAINS)
