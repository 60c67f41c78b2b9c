# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Many short chains of a posterior, in superchains with dispersed starts, run until they agree.

The warm-up assumes nothing about the posterior: chains ascend from their starts and adapt the preconditioner,
the step size and the trajectory length in several rounds. Sampling then continues until superchains, groups
of chains with a common start, agree on the distribution of each latent.

**References**

1. Nested R-hat: Assessing the Convergence of Markov Chain Monte Carlo When Running Many Short Chains
   (Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman, 2024), https://arxiv.org/abs/2110.13017
"""

import math
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from .._base.arguments import check_integer
from .._base.time_limit import abandonable, is_out_of_time, until_deadline
from ..diagnostics.convergence import (
    GOOD_RHAT,
    MANY_DIVERGENT,
    MODES_RHAT,
    Convergence,
    ModeShares,
    effective_draws,
    nested_rhat,
    nested_rhat_of_values,
)
from ..model import LogJoint
from ..model.protocols import FlowGuide
from ..model.relabelling import Relabelling
from ..model.replay.capture import ReplayError
from .adaptive_chains import AdaptiveChains
from .causes import jumps, undetermined
from .conditional_gaussian import ConditionalGaussian
from .images import images, with_functionals
from .modes import GuideProposal, IndependentProposals, Modes, groups_of
from .starts import SUPERCHAINS, usual_num_chains
from .trajectories import TrajectoryInfo, share_of_divergent

# trajectories in the first block after the warm-up, and maximum in total
_BLOCK, _MOST_TRAJECTORIES = 16, 3000
# maximum number of gradients per chain
_MOST_GRADIENTS = 40_000
# share of draws discarded as a transient
_TRANSIENT = 1 / 3
# draws per chain before modes are looked for; mass outside the first mode below which slow chains do not
# count as modes; minimum share of the proposals in a mode
_NUM_FOR_MODES, _LEAST_SHARE_OF_OTHERS, _LEAST_SHARE = 24, 0.01, 0.05
# maximum number of times that the step size is halved because of divergences
_MOST_HALVED = 3
# trajectories before chains may stop because far more would be needed, and half of those for divergences
_PATIENCE = 96


class StopReason(Enum):
    """Why an ensemble stopped."""

    ENOUGH = "there are enough effective draws of each latent, and chains agree"
    APART = "superchains stay in different modes"
    LIMIT = "the maximum number of trajectories without draws= was reached"
    TOO_MANY = "far more trajectories would be needed"
    DIVERGENT = "too many trajectories diverged for more draws to be trusted"
    OUT_OF_TIME = "the time limit was reached"


class Ensemble(AdaptiveChains):
    """An ensemble of superchains that samples a log joint density.

    :param log_joint: the density, in the coordinates in which chains move.
    :param num_samples: the number of effective draws that ``run`` will be asked for, if known.
    :param num_chains: the number of chains; by default chosen from the cost of the density.
    :raises ValueError: if there are fewer than 4 chains, or the model subsamples its data.
    :raises StartError: by ``run``, if no start has a finite density and gradient.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        num_samples: float = math.inf,
        num_chains: int | None = None,
    ) -> None:
        if num_chains is not None:
            check_integer("num_chains", num_chains, 4)
        if log_joint.is_random:
            raise ValueError(
                "model: expected one that sees all its data, got one that subsamples them or has a random "
                "density"
            )
        count = num_chains or usual_num_chains(log_joint, num_samples)
        num_superchains = next((k for k in (SUPERCHAINS, 4) if count % k == 0), count)
        super().__init__(log_joint, count, num_superchains)
        self._blocks, self._infos = list[Tensor](), list[TrajectoryInfo]()
        self._has_stayed = False
        self._before = self._blocks, self._infos  # the second warm-up, if time runs out in it
        self._convergence: Convergence | None = None
        self._slowest = torch.zeros(0, dtype=torch.long, device=log_joint.start.device)
        self.modes: Modes | None = None  #: the modes, where chains are in several
        self.num_single = 0  #: the number of modes that chains reached from one start only
        self.left_out = 0.0  #: approximate mass of the modes that were discarded
        self.end, self._num_halved = StopReason.TOO_MANY, 0
        self._images: tuple[Tensor, Relabelling | None] | None = None

    @property
    def num_trajectories(self) -> int:
        """Trajectories of each chain since the warm-up."""
        return sum(block.shape[1] for block in self._blocks)

    @property
    def draws(self) -> Tensor:
        """Draws on the unconstrained space, without the transient: shape ``(C, n, D)``.

        If the posterior has symmetries, the images nearest to each other, unless chains mix over all images:
        then superchains are in different images, and should agree.
        """
        return self._shown()[0]

    @property
    def to_image(self) -> Relabelling | None:
        """How draws were mapped to one image of a posterior with symmetries; ``None`` if they were not."""
        return self._shown()[1]

    def _shown(self) -> tuple[Tensor, Relabelling | None]:
        """The draws, and how they were mapped to one image."""
        if not self.symmetries:
            return self._raw, None
        if self._images is None:
            known = self.symmetries, self.log_joint.latents, self.num_superchains
            self._images = images(self._raw, *known)
        return self._images

    @property
    def _raw(self) -> Tensor:
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks, 1)]
        (draws,) = self._blocks
        return draws[:, math.floor(_TRANSIENT * draws.shape[1]) :]

    @property
    def infos(self) -> list[TrajectoryInfo]:
        """The trajectories that produced the draws."""
        return self._infos[len(self._infos) - self._raw.shape[1] :]

    def convergence(self) -> Convergence:
        """Nested R-hat and effective sample sizes of the draws."""
        if self._convergence is None:
            rhat = nested_rhat(self.draws, self.num_superchains)
            found = Convergence(rhat, *effective_draws(self.draws))
            if self.symmetries:
                energies = torch.stack([info.energy for info in self.infos], 1)
                known = self.symmetries, self.log_joint.latents, self.num_superchains
                found = with_functionals(found, self._raw, energies, *known)
            self._convergence = found
        return self._convergence

    def share_beyond(self) -> Tensor:
        """The mass of each latent beyond an outer 1 % quantile of its draws, shape ``(D,)``.

        Uses Laplace's approximation. Zero except for globals of a field some of whose priors have no parents.
        """
        found, fitted = torch.zeros_like(self.log_joint.start), self._target.to_latent
        given = self.log_joint.coordinates
        if isinstance(fitted, ConditionalGaussian) and (
            given is None or bool((given.centered[fitted.of_field] == 1).any())
        ):
            latents, _ = self.log_joint.from_unconstrained(self.draws.flatten(0, 1))
            found[fitted.of_globals] = fitted.share_beyond(latents)
        return found

    def has_jumps(self) -> bool:
        """Whether trajectories are rejected because the log density jumps."""
        size = self.step_size
        return jumps(self._target, self._state, size, (self._preconditioner, self._integrator))

    def undetermined(self) -> list[int]:
        """The latents that neither prior nor data determine, see ``sampling.causes``."""
        return undetermined(self.log_joint, self.draws.flatten(0, 1))

    @torch.no_grad()
    def propose_from(self, guide: FlowGuide, density: LogJoint) -> None:
        """Begins the draws anew, with jumps to draws of a guide.

        :param density: the log joint density in the coordinates of the guide.
        """
        self._proposals = IndependentProposals(
            GuideProposal(guide, density, self._to_base, self._from_base)
        )
        self._forget()
        self._extend(_BLOCK)

    def parts(self) -> list[Tensor]:
        """The draws of each mode, ``(n, D)``; of all, if chains found one only."""
        return [self.draws.flatten(0, 1)] if self.modes is None else self.modes.parts(self._raw)

    def mode_shares(self) -> ModeShares | None:
        """The mass of the modes that chains found; ``None`` for one mode."""
        if self.modes is None:
            return None
        name_of = self.log_joint.latents.name_of
        return self.modes.mass(None if self.end is StopReason.APART else self._raw, name_of)

    @torch.no_grad()
    def run(self, num_samples: int, most: int = _MOST_TRAJECTORIES) -> Convergence:
        """Runs until each latent has ``num_samples`` effective draws, or stops early, see ``StopReason``.

        :param most: the maximum number of trajectories per chain, without the warm-up.
        """
        while True:
            try:
                self.end = StopReason.OUT_OF_TIME
                with abandonable():
                    self.end = self._run(num_samples, most)
                self._target.confirm()
                if not self._blocks:
                    self._blocks, self._infos = self._before
                if not self._blocks:
                    self._stay()
                return self.convergence()
            except ReplayError:  # replayed densities were wrong, and so are all draws so far
                self._forget()
                if self._has_begun:
                    self._state = self._target(self._state.base)

    def _run(self, num_samples: int, most: int) -> StopReason:
        if self._has_stayed:  # time was over before the first trajectory
            self._forget()
            self._has_stayed = False
        if not self._blocks:
            self._warm_up()
        number = _BLOCK
        while True:
            self._extend(number)
            if is_out_of_time():
                return StopReason.OUT_OF_TIME
            size = self.num_trajectories
            if self._diverge():
                if self._num_halved < _MOST_HALVED:
                    self._step_size.value /= 2
                    self._num_halved += 1
                    self._forget()
                    number = _BLOCK
                    continue
                if size >= _PATIENCE // 2:
                    return StopReason.DIVERGENT
            rhat, ess = self._worst(num_samples)
            if rhat <= GOOD_RHAT and ess >= num_samples:
                return StopReason.ENOUGH
            if rhat <= GOOD_RHAT:
                more = size * (num_samples / max(ess, 1.0) - 1)
                number = math.ceil(min(max(more, size / 8), size))
            else:
                # R-hat squared minus one shrinks as the inverse of the number of draws
                more = size * ((rhat**2 - 1) / (GOOD_RHAT**2 - 1) - 1)
                number = math.ceil(size / 3)
            if rhat > MODES_RHAT and self.draws.shape[1] >= _NUM_FOR_MODES and self._are_apart():
                return StopReason.APART
            is_slow = rhat > GOOD_RHAT and size >= _PATIENCE and more > 2 * size
            if self._blocks and is_slow and not self._has_adapted_again:
                self._adapt_again()
            if not self._blocks:
                number = _BLOCK
                continue
            if self.num_gradients >= _MOST_GRADIENTS * self.num_chains:
                return StopReason.TOO_MANY
            if size >= most or (size >= _PATIENCE and size + more > 4 * most):
                return StopReason.LIMIT if most < _MOST_TRAJECTORIES else StopReason.TOO_MANY
            number = max(min(number, most - size), _BLOCK)

    def _worst(self, num_samples: int) -> tuple[float, float]:
        """The largest R-hat and the smallest ESS, of all latents only if the slowest ones pass."""
        rhat = nested_rhat_of_values(self.draws, self.num_superchains)
        if float(rhat.max()) > GOOD_RHAT:
            return float(rhat.max()), 0.0
        # of the latents with the largest R-hat and of the last ones to pass
        slowest = torch.cat([rhat.topk(_count(rhat)).indices, self._slowest])
        draws = self.draws[..., slowest]
        found = Convergence(nested_rhat(draws, self.num_superchains), *effective_draws(draws))
        if found.is_enough(num_samples):
            found = self.convergence()
            last = found.least.topk(_count(rhat), largest=False).indices
            self._slowest = torch.cat([last, found.rhat.topk(_count(rhat)).indices])
        return float(found.rhat.max()), found.min_ess

    def _adapt_again(self) -> None:
        """A second warm-up, since the first one ended before chains were in the posterior."""
        self._has_adapted_again = True
        if self.modes is not None and not self.symmetries:  # otherwise draws are in several images
            last = self._raw[:, -self._num_recent :].flatten(0, 1)
            group = self.modes.nearest(last).reshape(self.num_chains, -1)
            self._propose(group, self.modes.shares_of(last))
        before = self._blocks, self._infos
        self._forget()
        self._before = before
        self._warm_up()

    def _diverge(self) -> bool:
        """Whether too many trajectories diverge for the draws to be trusted, with no other proposals."""
        return self._proposals is None and share_of_divergent(self.infos) > MANY_DIVERGENT

    def _forget(self) -> None:
        self._blocks, self._infos = [], []
        self._before = self._blocks, self._infos
        self._convergence = self._images = None

    def _extend(self, number: int) -> None:
        """Adds the draws of ``number`` trajectories; fewer if time runs out."""
        is_loop, infos, latents = self.log_joint.strategy == "loop", [], []
        for _ in until_deadline(range(number)):
            with abandonable():
                info, latent = self._step().without_points(), self._state.latent
                # the map to the unconstrained space may be slow, too
                latents.append(self.log_joint.to_unconstrained(latent)[0] if is_loop else latent)
                infos.append(info)
        if not infos:
            return
        self._num_recent = len(infos)
        block = torch.stack(latents, 1)
        if not is_loop:
            block = self.log_joint.to_unconstrained(block.flatten(0, 1))[0].reshape(block.shape)
        self._infos += infos
        self._blocks.append(block)
        self._convergence = self._images = None

    def _stay(self) -> None:
        """Makes the present points of chains the only draws, at the model's start if they have none."""
        if not self._has_begun:
            start = self.log_joint.start.expand(self.num_chains, -1)
            self._state = self._target(start[:1]).at(
                torch.zeros_like(start[:, 0], dtype=torch.long)
            )
        energy, none = -self._state.log_density, torch.zeros_like(self._state.log_density)
        info = TrajectoryInfo(none, none > 0, none > 0, energy, self._state, self._state.base, none)
        self._infos.append(info.without_points())
        self._has_stayed = True
        start = self.log_joint.to_unconstrained(self._state.latent[:1])[0]
        if self._has_begun and self.log_joint.strategy != "loop":
            start = self.log_joint.to_unconstrained(self._state.latent)[0]
        self._blocks.append(start.expand(self.num_chains, -1)[:, None])

    def _are_apart(self) -> bool:
        """Whether chains stay in modes although they jump; restarts chains in negligible modes."""
        draws = self.draws
        if int(groups_of(draws, -torch.stack([i.energy for i in self.infos], 1))[0].max()) == 0:
            return False
        # log densities on the unconstrained space
        flat = self.log_joint.with_coordinates(None)(draws.flatten(0, 1)).reshape(draws.shape[:2])
        modes = Modes.of(draws, flat)
        if (image := self.to_image) is not None:
            modes = modes._replace(to_image=partial(image.of_latents, self.log_joint.latents))
        is_left_out = modes.is_negligible[modes.group]
        if bool(is_left_out.any()):
            self.left_out += float(modes.share[modes.is_negligible].sum())
            self._begin_anew(is_left_out)
            self._forget()
            self._warm_up()
        elif self.modes is None:
            self._propose(modes.group[:, None].expand(draws.shape[:2]), modes.share)
            self.modes = modes
            self.num_single = modes.num_single(self.num_superchains)
            self._forget()
        else:
            self.modes = modes
            # otherwise these are chains that are slow in a tail
            return float(modes.share[1:].sum()) > _LEAST_SHARE_OF_OTHERS
        return False

    def _propose(self, group: Tensor, share: Tensor) -> None:
        """Lets chains jump between groups of the last draws ``(C, n)``, proposed by their shares."""
        recent = self._raw[:, -self._num_recent :]
        group = group[:, -recent.shape[1] :]
        recent = self._to_base(recent.flatten(0, 1)).view_as(recent)
        groups = group.unique()
        parts = [recent[group == k] for k in groups]
        self._proposals = IndependentProposals.at_modes(
            parts, share[groups].clamp_min(_LEAST_SHARE)
        )


def _count(latents: Tensor) -> int:
    """How many of the slowest latents are checked before all the others."""
    return min(32, len(latents))
