# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Modes that chains do not move between, and the posterior mass of each."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor

from ..diagnostics.convergence import ModeShares, mean_ess
from ..model import LogJoint
from ..model.protocols import FlowGuide
from .target import State

Value = TypeVar("Value")

#: distance between chains of different modes, in sds within chains
APART = 6.0
_MOST_MODES = 8
# draws per dimension needed to estimate a covariance
_DRAWS_BY_DIM = 4
#: a mode is negligible if its evidence is this many nats below that of the first, plus nats per dimension
NEGLIGIBLE, NEGLIGIBLE_BY_DIM = 10.0, 2.0
# degrees of freedom of Student's t proposals
_DEGREES = 5.0
# A chain is lost if its acceptance rate is below the first bound and it is not _ABOVE nats above the chains
# whose rate exceeds the second, or if it is _BELOW nats below these.
STUCK, MOVES, _ABOVE, _BELOW, _BELOW_BY_ROOT_DIM = 0.15, 0.3, 5.0, 50.0, 5.0


def _unchanged(value: Value) -> Value:
    return value


class Modes(NamedTuple):
    """Groups of chains in separate modes.

    :param group: the group of each chain, shape ``(C,)``; 0 has the most mass.
    :param share: the approximate posterior mass of each group, shape ``(num_groups,)``.
    :param gap: nats by which the evidence of each group is below that of the first, same shape.
    :param differs: the largest distance between groups in each coordinate, in sds, shape ``(D,)``.
    :param loc: the mean of each group, shape ``(num_groups, D)``.
    :param scale: the sds of each group, same shape.
    :param to_image: maps points ``(n, D)`` to the image of the posterior in which these are.
    """

    group: Tensor
    share: Tensor
    gap: Tensor
    differs: Tensor
    loc: Tensor
    scale: Tensor
    to_image: Callable[[Tensor], Tensor] = _unchanged

    @property
    def is_negligible(self) -> Tensor:
        """Whether groups have negligible mass, ``(num_groups,)``; short chains underestimate entropy."""
        return self.gap > NEGLIGIBLE + NEGLIGIBLE_BY_DIM * len(self.differs)

    @classmethod
    def of(cls, draws: Tensor, log_density: Tensor) -> "Modes":
        """Finds modes by draws ``(C, n, D)`` in any coordinates and their log densities ``(C, n)`` there.

        The log evidence of a mode is its mean log density plus its entropy, here that of a Gaussian.
        """
        group, differs = groups_of(draws, log_density)
        num_groups = int(group.max()) + 1
        # use the same entropy estimate for all modes
        least = min(int((group == k).sum()) * draws.shape[1] for k in range(num_groups))
        is_dense = least >= _DRAWS_BY_DIM * draws.shape[-1]
        parts = [draws[group == k].flatten(0, 1) for k in range(num_groups)]
        # draws in the neck of a funnel may have no finite density in these coordinates
        finite = torch.where(log_density.isfinite(), log_density, torch.nan)
        evidence = torch.stack(
            [
                finite[group == k].nanmean() + _entropy(part, is_dense)
                for k, part in enumerate(parts)
            ]
        )
        evidence = evidence.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        order = evidence.argsort(descending=True)
        share, gap = evidence[order].softmax(0), evidence[order[0]] - evidence[order]
        loc, scale = (
            torch.stack(each)[order] for each in zip(*((p.mean(0), _sds(p)) for p in parts))
        )
        return cls(order.argsort()[group], share, gap, differs, loc, scale)

    def parts(self, draws: Tensor) -> list[Tensor]:
        """The draws ``(C, n, D)`` of each group, ``(m, D)``, without empty groups, in one image."""
        points = self.to_image(draws.flatten(0, 1))
        group = self.nearest(points)
        return [points[group == k] for k in group.unique()]

    def mass(self, draws: Tensor | None, name_of: Callable[[int], str]) -> ModeShares | None:
        """The mass of each group in draws ``(C, n, D)`` of chains that move between groups.

        :param draws: ``None`` for the approximation by Gaussians.
        :return: ``None`` if the draws are of one group.
        """
        names = tuple(name_of(i) for i in (self.differs > APART).nonzero()[:, 0].tolist())
        if draws is None:
            return ModeShares(self.share, torch.full_like(self.share, torch.nan), names)
        group = self.nearest(draws.flatten(0, 1)).view(draws.shape[:2])
        is_in = torch.stack([(group == k).to(draws) for k in group.unique()], -1)
        share, ess = is_in.mean((0, 1)), mean_ess(is_in).clamp_min(1)
        return (
            ModeShares(share, (share * (1 - share) / ess).sqrt(), names) if len(share) > 1 else None
        )

    def num_single(self, num_superchains: int) -> int:
        """The number of groups reached by the chains of one superchain only."""
        by_start = self.group.view(num_superchains, -1)
        reached = [int((by_start == k).any(1).sum()) for k in range(len(self.share))]
        return reached.count(1)

    def shares_of(self, points: Tensor) -> Tensor:
        """The share of points ``(n, D)`` nearest to each group: shape ``(num_groups,)``."""
        return self.nearest(points).bincount(minlength=len(self.loc)) / len(points)

    def nearest(self, points: Tensor) -> Tensor:
        """The group nearest to each point ``(n, D)``, in its sds, shape ``(n,)``."""
        points = self.to_image(points)
        distances = [
            ((points - loc) / scale).square().sum(-1) for loc, scale in zip(self.loc, self.scale)
        ]
        return torch.stack(distances).argmin(0)


def groups_of(draws: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
    """The group of each chain ``(C,)``, and the largest distance in each coordinate ``(D,)``, in sds.

    A minor mode may be wide, so that only log densities ``(C, n)`` of draws ``(C, n, D)`` separate it.
    """
    draws = torch.cat([draws, log_density[..., None]], -1)
    means, sds = draws.mean(1), draws.std(1)
    # some chains may be stuck, and some modes narrow
    widest = torch.maximum(sds[:, None], sds).maximum(sds.median(0).values)
    apart = ((means[:, None] - means).abs() / widest).nan_to_num(0.0)
    group = _components(apart.amax(-1) < APART)
    if int(group.max()) >= _MOST_MODES:  # chains have not mixed at all
        group = torch.zeros_like(group)
    return group, apart.flatten(0, 1).amax(0)[:-1]


def lost_chains(states: Sequence[State], moves: Tensor) -> Tensor:
    """Whether chains are stuck, have far lower densities, or are in a negligible mode, shape ``(C,)``.

    :param states: all chains after each trajectory; ``moves``, ``(C,)``, counts accepted trajectories.
    """
    number, dim = len(states), states[0].base.shape[-1]
    log_density = torch.stack([state.log_density for state in states[number // 2 :]]).mean(0)
    is_moving = moves >= MOVES * number
    typical = log_density[is_moving].median() if bool(is_moving.any()) else log_density.max()
    below = _BELOW + _BELOW_BY_ROOT_DIM * dim**0.5
    # chains stuck at far higher densities are in a narrow mode, which must be kept
    is_stuck = (moves < STUCK * number) & ~(log_density > typical + _ABOVE + dim**0.5)
    is_lost = is_stuck | ~(log_density > typical - below)
    if number >= 12:  # chains have settled in modes
        later = states[number // 4 :]
        base, log_density = (
            torch.stack(part, 1) for part in zip(*((s.base, s.log_density) for s in later))
        )
        modes = Modes.of(base, log_density)
        is_lost |= modes.is_negligible[modes.group]
    return is_lost


class StudentTMixture(NamedTuple):
    """A mixture of K Student's t distributions that solves for all points at once, unlike PyTorch's.

    :param log_share: log weights, shape ``(K,)``.
    :param loc: locations, shape ``(K, D)``.
    :param scale_tril: their lower-triangular scales, each ``(D, D)``.
    """

    log_share: Tensor
    loc: Tensor
    scale_tril: list[Tensor]

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        """Points ``(n, D)``."""
        index = torch.multinomial(self.log_share.exp(), shape[0], replacement=True)
        points = torch.randn(
            (shape[0], self.loc.shape[1]), dtype=self.loc.dtype, device=self.loc.device
        )
        halves = torch.full_like(points[:, :1], _DEGREES / 2)
        points = points * dist.Gamma(halves, halves).sample().rsqrt()
        for k, root in enumerate(self.scale_tril):
            points = torch.where(index[:, None] == k, self.loc[k] + points @ root.T, points)
        return points

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density at points ``(n, D)``, shape ``(n,)``."""
        found, dim = list[Tensor](), self.loc.shape[1]
        for loc, root in zip(self.loc, self.scale_tril):
            z = torch.linalg.solve_triangular(root, (value - loc).T, upper=False)
            width = root.diagonal().log().sum()
            found.append(-(_DEGREES + dim) / 2 * (z.square().sum(0) / _DEGREES).log1p() - width)
        constant = math.lgamma((_DEGREES + dim) / 2) - math.lgamma(_DEGREES / 2)
        constant -= dim / 2 * math.log(_DEGREES * math.pi)
        return (torch.stack(found, -1) + self.log_share).logsumexp(-1) + constant


class IndependentProposals:
    """Independence Metropolis proposals, which move chains between modes and into tails.

    :param distribution: the proposal of points ``(D,)`` of the base space, heavier-tailed than the posterior.

    **References**

    1. Markov Chains for Exploring Posterior Distributions (Tierney, 1994),
       https://doi.org/10.1214/aos/1176325750
    2. A Framework for Adaptive MCMC Targeting Multimodal Distributions (Pompe, Holmes, Łatuszyński, 2020),
       https://arxiv.org/abs/1812.02609
    """

    def __init__(self, distribution: "StudentTMixture | GuideProposal") -> None:
        self._distribution = distribution

    @classmethod
    def at_modes(cls, base: Sequence[Tensor], share: Tensor) -> "IndependentProposals":
        """Proposes from a mixture of Student's t distributions fitted to draws ``(n, D)`` of each mode."""
        loc = torch.stack([part.mean(0) for part in base])
        # densities are double where data are, whatever the dtype of latents
        log_share = (share / share.sum()).to(loc).log()
        return cls(StudentTMixture(log_share, loc, [*map(_scale_tril, base)]))

    def step(
        self,
        target: Callable[[Tensor], State],
        state: State,
        to_image: Callable[[State], State] = _unchanged,
        back: Callable[[State], State] = _unchanged,
    ) -> State:
        """The next state of each chain, after a Metropolis-Hastings accept step.

        :param to_image: maps states to random images of a posterior with symmetries, and ``back`` from there.
            Modes have different numbers of images, and proposals are near one of each.
        """
        points = self._distribution.sample((len(state.base),))
        there = target(points)
        here_weight, there_weight = (
            each.log_density - self._distribution.log_prob(each.base)
            for each in (to_image(state), there)
        )
        is_accepted = torch.rand_like(here_weight).log() < there_weight - here_weight
        there = back(there)
        return there.where(is_accepted & there.is_finite, state)


class GuideProposal(NamedTuple):
    """Draws of a guide as proposals.

    :param density: the log joint density in the coordinates of the guide.
    :param to_base: maps unconstrained points to the base space of chains, and ``from_base`` back, with the
        log-determinant.
    """

    guide: FlowGuide
    density: LogJoint
    to_base: Callable[[Tensor], Tensor]
    from_base: Callable[[Tensor], tuple[Tensor, Tensor]]

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        """Points of the base space, ``(n, D)``."""
        z, _ = self.guide.rsample_and_log_prob(shape[0])
        return self.to_base(self.density.to_unconstrained(z)[0])

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of the guide at points of the base space, ``(n,)``."""
        u, ladj = self.from_base(value)
        z, of_guide = self.density.from_unconstrained(u)
        return self.guide.log_density(z) + of_guide + ladj


def _sds(draws: Tensor) -> Tensor:
    return draws.std(0).clamp_min(torch.finfo(draws.dtype).tiny)


def _scale_tril(draws: Tensor) -> Tensor:
    """The Cholesky factor of the covariance of draws ``(n, D)``, diagonal if there are few draws."""
    scale = _sds(draws)
    if draws.shape[1] == 1 or len(draws) < _DRAWS_BY_DIM * draws.shape[1]:
        return scale.diag()
    correlation = torch.corrcoef(draws.T) + 1e-6 * torch.ones_like(scale).diag()
    return scale[:, None] * torch.linalg.cholesky(correlation)


def _components(is_near: Tensor) -> Tensor:
    """Labels the connected components of an adjacency matrix ``(C, C)``."""
    label = torch.arange(len(is_near), device=is_near.device)
    for _ in range(len(is_near)):
        label = torch.where(is_near, label, len(is_near)).amin(1)
    return label.unique(return_inverse=True)[1]


def _entropy(draws: Tensor, is_dense: bool) -> Tensor:
    """The entropy of a Gaussian with the covariance of draws ``(n, D)``, or with their variances only."""
    dim = draws.shape[-1]
    scale = _sds(draws)
    entropy = scale.log().sum() + dim * (1 + math.log(2 * math.pi)) / 2
    if is_dense and dim > 1:
        entropy = entropy + torch.linalg.slogdet(torch.corrcoef(draws.T))[1] / 2
    return entropy
