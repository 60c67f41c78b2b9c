# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a posterior by Hamiltonian chains in the base space of a guide."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integer
from ..diagnostics.chains import GOOD_RHAT, GuideChains
from ..diagnostics.importance_weights import ModelAndGuide
from ..joint.protocols import StructuredGuide
from ..posterior.arviz import chains_to_inference_data
from ..time_limit import TimeLimit
from .config import FitConfig, OptimizationConfig
from .evaluation.evaluate import Evaluation, evaluate
from .evaluation.missed_modes import MissedModes
from .evaluation.verdict import BREAK_SYMMETRY, ELSEWHERE, FitStatus
from .prior_only import warn_of_prior
from .progress import alone, progress_bar, seeded

ENOUGH = "there are enough effective draws of each latent, and chains agree"
TOO_MANY = "so many trajectories were taken that more would hardly help"
CHAINS_COST_LESS = "chains from here cost less than more steps"
# whether chains cost less is asked after so many steps, and then each time after twice as many more; a
# step costs as much as so many gradients of all chains through a Gaussian
# (a structured guide's of many latents, level by level, as so many more), and a gradient through a flow
# as half a step, of which chains take as many as this at least (72 draws of three gradients)
_FIRST_BLOCK, _PRICE_OF_STEP, _PRICE_BY_LEVELS, _FEWEST_GRADIENTS = 300, 4, 12, 216
#: the share of the seconds after which chains end, so that the rest judges them
CHAINS_UNTIL = 0.85
# trajectories that chains are judged by
_NUM_TRIED = 24
# what chains that do not agree speak for
_LATE, _NOT_TRAINED = "Let them run for longer", "Train the guide for longer (num_steps)"
_APART = (
    "They move, but not to each other: the posterior may have several modes, as of labels or signs that can "
    f"be swapped. {BREAK_SYMMETRY}, bound what its priors leave open, or train the guide for longer"
)


@dataclass(frozen=True, eq=False, repr=False)
class Chains:
    """Draws of a posterior by chains, and whether they can be trusted.

    Effective numbers of draws and R-hat are ArviZ's, rank-normalized and split, on the unconstrained
    space and by site of the shape that the site has there.
    """

    #: draws of each site, ``(num_samples,) + site shape``, in random order; fewer where the chains have
    #: not so many in all
    draws: dict[str, Tensor] = field(repr=False)
    by_chain: dict[str, Tensor]  #: all draws of each site, ``(num_chains, n) + site shape``
    ess: dict[str, Tensor]  #: the effective number of draws of the bulk, by site
    ess_tail: dict[str, Tensor]  #: the same of the quantiles of 5 and 95 %
    rhat: dict[str, Tensor]  #: by site
    min_ess: float  #: the smallest effective number of draws of the bulk
    max_rhat: float  #: the largest R-hat
    #: whether R-hat is good, draws of bulk and tails are enough, and no mass was found outside
    trusted: bool
    verdict: str  #: the same in words
    num_chains: int
    num_gradients: int  #: gradients of the model's log density, of warm-up too
    seconds: float  #: wall time
    stopped_because: str  #: why the chains ended

    def __repr__(self) -> str:
        size = next(iter(self.by_chain.values())).shape[1]
        return (
            f"Chains: {self.verdict}\n"
            f"  chains   {self.num_chains} of {size} draws, {self.num_gradients:,} gradients\n"
            f"  time     {self.seconds:.1f} s: {self.stopped_because}"
        )

    def to_inference_data(
        self, model: Callable[..., object], *args: object, **kwargs: object
    ) -> Any:
        """The draws by chain as an ArviZ data set, with predictions and likelihoods.

        :param model: the model of the chains; ``args`` and ``kwargs`` are its arguments.
        :return: as by :func:`~pyro_artransform.posterior.to_inference_data`.
        :raises ImportError: if ArviZ is missing.
        """
        return chains_to_inference_data(model, self.by_chain, args, kwargs)


def mcmc(
    model: Callable[..., object],
    guide: Callable[..., object],
    num_samples: int,
    *args: object,
    num_chains: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    max_seconds: float | None = None,
    **kwargs: object,
) -> Chains:
    """Draws of a posterior by many short Hamiltonian chains that begin at draws of a guide.

    In the base space of a good guide the posterior is nearly a standard normal, so that chains move far
    in a few steps, whatever k-hat is. They go on until the worst latent has ``num_samples`` effective
    draws, of its bulk and of its tails, and R-hat is at most 1.02, or 3,000 trajectories were not enough,
    or the time is over, or Ctrl-C ends them: the result says which. Between trajectories draws of the guide,
    and of heavy tails around it, are proposed, which lead to tails and, in few dimensions, to other modes. In
    many chains do not jump between modes that are far apart, and may never enter a tail that the guide does
    not lead to: up to 200 latents both are searched for, and reported.

    Any guide of continuous latents will do: one with a transform, as Pyro's Gaussian and flow guides
    and those of this package have, by its transform, another one by the means and sds of its draws, and
    so a Gaussian one of a hierarchy, in coordinates from the prior.

    :param model: a Pyro model that sees all its data.
    :param guide: a guide of it; ``args`` and ``kwargs`` are the arguments of both.
    :param num_samples: how many effective draws of each latent.
    :param num_chains: how many chains, 4 at least; by default one for each 12 draws, 16 to 64, fewer where
        many draws at once take long, and 8 where the model runs for one draw after the other.
    :param seed: makes the draws repeatable, and leaves the generators as they were.
    :param progress: whether to show a progress bar, where ``tqdm`` is installed.
    :param max_seconds: the wall time after which chains end with what there is.
    :raises ValueError: if a number is out of its range, the model sub-samples its data, or the guide
        lacks a latent, was made for another model, is a point, has discrete sites, or has too few
        draws of finite density.
    :raises RuntimeError: in ``torch.inference_mode``, or inside of one of Pyro's handlers.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_artransform.inference import mcmc
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(3))
        >>> chains = mcmc(model, AutoNormal(model), 100, seed=0, progress=False)
        >>> chains.draws["z"].shape, chains.trusted
        (torch.Size([100, 3]), True)

    **References**

    1. NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman, Sountsov,
       Dillon, Langmore, Tran, Vasudevan, 2019), https://arxiv.org/abs/1903.03704
    2. Rank-Normalization, Folding, and Localization: An Improved R-hat for Assessing Convergence of
       MCMC (Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021), https://arxiv.org/abs/1903.08008
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("mcmc: expected gradients, got torch.inference_mode: leave it")
    check_integer("num_samples", num_samples)
    if seed is not None:
        check_integer("seed", seed, 0)
    with (
        alone("mcmc"),
        seeded(seed),
        progress_bar(progress) as bar,
        TimeLimit(max_seconds, bar.tick, bar.say) as limit,
    ):
        limit.enter_phase(CHAINS_UNTIL)
        subject = ModelAndGuide.of(model, guide, args, kwargs)
        why = warn_of_prior(subject.log_joint)
        bar.say("chains")
        chains = GuideChains(subject, num_chains, num_samples)
        chains.run(num_samples)
        reason = limit.reason
        bar.say("verdict")
        limit.enter_phase(1.0, has_grace=True)
        config = FitConfig().for_strategy(subject.log_joint.strategy)
        status = FitStatus(prior_only=why)
        found = evaluate(subject, status, config, chains=chains)
        return to_chains(chains, num_samples, found.outside, limit, reason, found.missed, why)


class Sampling:
    """Draws that a fit was asked for: when its steps end, and what comes then.

    :param num_draws: how many effective draws of each latent.
    :param ends_steps: whether steps end once chains cost less.
    """

    def __init__(
        self, subject: ModelAndGuide, num_draws: int, limit: TimeLimit, ends_steps: bool
    ) -> None:
        self._subject, self._num_draws, self._limit = subject, num_draws, limit
        self._next = 0 if ends_steps else math.inf
        self._block, self._num_steps = _FIRST_BLOCK, -1
        self.chains: GuideChains | None = None  #: those of the guide as it was last

    def is_due(self, num_steps: int) -> bool:
        """Whether, after a number of steps, it is to be asked what chains cost."""
        if num_steps < self._next:
            return False
        self._num_steps, self._next = num_steps, num_steps + self._block
        return True

    def cost_less(self) -> bool:
        """Whether chains from the guide as it is would cost less than steps, and chains after them."""
        self.chains = chains = GuideChains(self._subject, None, self._num_draws)
        chains.warm_up()
        chains.extend(_NUM_TRIED)
        if self._limit.is_over():
            return False
        left = chains.gradients_left(self._num_draws)
        guide: object = self._subject.guide
        many = self._subject.log_joint.latents.latent_dim >= OptimizationConfig.many_latents
        by_levels = chains.is_affine and many and isinstance(guide, StructuredGuide)
        price = _PRICE_BY_LEVELS if by_levels else _PRICE_OF_STEP
        if not chains.is_affine:
            left *= price / 2
        cost_of_steps = price * (self._block + _FEWEST_GRADIENTS / 2)
        self._block *= 2
        return left <= cost_of_steps

    def judge(
        self, status: FitStatus, config: FitConfig, num_steps: int
    ) -> tuple[Evaluation, Chains]:
        """The guide's evaluation, and the draws of chains: of those tried, if no step came after."""
        if self.chains is None or num_steps != self._num_steps:
            self.chains = GuideChains(self._subject, None, self._num_draws)
        self._limit.enter_phase(CHAINS_UNTIL)
        self._limit.say("chains")
        self.chains.run(self._num_draws)
        reason = self._limit.reason
        self._limit.enter_phase(1.0, has_grace=True)
        found = evaluate(self._subject, status, config, chains=self.chains)
        about = found.outside, self._limit, reason, found.missed, status.prior_only
        return found, to_chains(self.chains, self._num_draws, *about)


def to_chains(
    chains: GuideChains,
    num_samples: int,
    outside: Sequence[str],
    limit: TimeLimit,
    reason: str,
    missed: MissedModes,
    prior_only: str = "",
) -> Chains:
    """Draws, their convergence, and whether they can be trusted, in words.

    :param outside: what they lack although chains agree, in words.
    :param reason: why the time was over, if it was.
    :param missed: how other modes were searched for.
    :param prior_only: why the posterior is the prior, in a sentence, if it is.
    """
    found, latents = chains.convergence(), chains.log_joint.latents
    min_ess, max_rhat = float(found.bulk.min()), float(found.rhat.max())
    draws = chains.draws
    count, size, dim = draws.shape
    flat = draws.reshape(-1, dim)
    values = latents.constrain(flat)
    chosen = torch.randperm(len(flat), device=flat.device)[:num_samples]
    objections, worst = [], latents.name_of(int(found.rhat.argmax()))
    if not max_rhat <= GOOD_RHAT:
        cause = _LATE if reason else _NOT_TRAINED
        objections.append(
            f"chains do not agree: R-hat is {max_rhat:.3f} for {worst}, above {GOOD_RHAT}. "
            f"{_APART if chains.stay_apart() else cause}"
        )
    for ess, where in ((found.bulk, ""), (found.tail, " for its tails")):
        if not float(ess.min()) >= num_samples:
            worst = latents.name_of(int(ess.argmin()))
            short = f"{float(ess.min()):.0f} effective draws{where}, not {num_samples}"
            objections.append(f"{worst} has {short}")
    objections += outside
    head = f"{prior_only} " if prior_only else ""
    words = f"{head}Draws not trusted: {'; '.join(objections)}."
    if not objections:
        end = ELSEWHERE["none"] if missed.searched_by == "none" else "."
        words = (
            f"Draws trusted: {min_ess:,.0f} effective draws of the worst latent, R-hat at most "
            f"{max_rhat:.3f}, by {count} chains of {size} draws{end}"
        )
    return Chains(
        draws={name: value[chosen] for name, value in values.items()},
        by_chain={k: v.reshape(count, size, *v.shape[1:]) for k, v in values.items()},
        ess=latents.split(found.bulk),
        ess_tail=latents.split(found.tail),
        rhat=latents.split(found.rhat),
        min_ess=min_ess,
        max_rhat=max_rhat,
        trusted=not objections,
        verdict=words,
        num_chains=count,
        num_gradients=chains.target.num_gradients,
        seconds=limit.seconds,
        stopped_because=ENOUGH if found.is_enough(num_samples) else reason or TOO_MANY,
    )
