# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Importance weights by mini-batches, where each batch has latents of its own elements.

The elements i of a plate are independent given the latents theta that they share. With draws z_k of the
guide q,

.. math::

    \hat p_i(\theta) = \frac{1}{K} \sum_k \frac{p(y_i, z_{ik} | \theta)}{q(z_{ik} | \theta)}, \qquad
    \hat w(\theta) = \frac{p(\theta)}{q(\theta)} \prod_i \hat p_i(\theta)

are unbiased, the former independently over i, so that the latter are importance weights of theta: exact
ones, of a larger space that has all draws of the elements. One pass over a loader, with the same theta for
each batch, makes them all.

**References**

1. The Pseudo-Marginal Approach for Efficient Monte Carlo Computations (Andrieu, Roberts, 2009),
   https://doi.org/10.1214/07-AOS574
2. Importance Sampling Squared for Bayesian Inference in Latent Variable Models (Tran, Scharth, Pitt, Kohn,
   2013), https://arxiv.org/abs/1309.3339
3. Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife Variational Inference
   (Nowozin, 2018), https://openreview.net/forum?id=HyZoi-WRb
4. Efficient Implementation of Markov Chain Monte Carlo When Using an Unbiased Likelihood Estimator (Doucet,
   Pitt, Deligiannidis, Kohn, 2015), https://arxiv.org/abs/1210.1871
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from pyro.distributions import validation_enabled
from torch import Tensor

from ...arguments import first_of
from ...diagnostics import Importance
from ...diagnostics.importance import GOOD_GAP, GOOD_KHAT, GOOD_TAIL
from ...diagnostics.psis import fit_tails
from ...joint.vectorization import describe
from ...time_limit import is_out_of_time
from ..optimization.minibatches import MinibatchObjective, PassEstimate
from ..optimization.objective import PyroObjective
from .element_draws import ElementDraws, UnknownWeightsError
from .verdict import ELSEWHERE, about_some, about_weights

# the largest variance of log weights by noise: of pseudo-marginal chains it is about the best (reference 4)
_MOST_NOISE = 1.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Elements:
    """How close a guide is to the posterior of each element of a plate, given what all elements share.

    :param plate: the name of the plate.
    :param khat: the Pareto index of the weights of its draws, with its standard error ``khat_se``.
    :param gap: the log evidence of its data less its ELBO, in nats: by the guide's draws, or by draws of the
        prior where these find more, beyond what may be by chance.
    :param tail_share: how much of its weights is above the cutoff of their tail, by mini-batches.
    :param objections: to those that are not trusted, in words, by their place in these.
    :param index: of each element in the plate, ascending, shape ``(size,)``; ``None`` where a loader does not
        tell: then elements are in the order of a pass over it.
    """

    plate: str
    khat: Tensor
    khat_se: Tensor
    gap: Tensor
    objections: Mapping[int, str]
    index: Tensor | None
    tail_share: Tensor | None = None

    @property
    def trusted(self) -> Tensor:
        """Whether each is trusted, shape ``(size,)``."""
        found = torch.ones_like(self.gap, dtype=torch.bool)
        found[list(self.objections)] = False
        return found

    @property
    def objection(self) -> str:
        """To all of them, with the worst named; empty where each is trusted."""
        if not self.objections:
            return ""
        worst = self.gap.nan_to_num(torch.inf, torch.inf).argsort(descending=True).tolist()
        named = [f"{self.name_of(k)} ({self.objections[k]})" for k in worst if k in self.objections]
        return (
            f"{len(named):,} of the {len(self.gap):,} elements of plate '{self.plate}' are not good: "
            f"{first_of(named)}: result.elements has them all"
        )

    def __repr__(self) -> str:
        count = f"{int(self.trusted.sum()):,} of {len(self.khat):,}"
        lines = [f"{type(self).__name__}: {count} of plate '{self.plate}' are trusted"]
        for name, values in (("gaps in nats", self.gap), ("k-hats", self.khat)):
            worst = values.topk(min(5, len(values))).indices.tolist()
            named = ", ".join(f"{values[k]:.3g} of {self.name_of(k)}" for k in worst)
            lines.append(f"  largest {name:13}{named}")
        return "\n".join(lines)

    def name_of(self, place: int) -> str:
        """An element in words."""
        if self.index is None:
            return f"element {place} of a pass over the loader"
        return f"element {int(self.index[place])}"


def objections_to(khat: Tensor, khat_se: Tensor, tail_share: Tensor, gap: Tensor) -> dict[int, str]:
    """What keeps elements from being trusted, in words: the bounds are those of a whole posterior.

    The largest of many estimates of k-hat is large by chance. Its bound is increased by as many standard
    errors as the largest of so many normal errors has as its median: elements with an index at the bound,
    all of them, are trusted as often as a single one would be.
    """
    bound = GOOD_KHAT + _largest_error(len(khat)) * khat_se
    is_heavy, is_far = (khat > bound) & (tail_share > GOOD_TAIL), ~(gap <= GOOD_GAP)
    return {
        k: f"an ELBO {gap[k]:,.2f} nats below the log evidence"
        if is_far[k]
        else f"k-hat {khat[k]:.2f} ± {khat_se[k]:.2f}"
        for k in (is_heavy | is_far).nonzero()[:, 0].tolist()
    }


def _largest_error(count: int) -> float:
    """The median of the largest of so many standard normal errors."""
    return NormalDist().inv_cdf(0.5 ** (1 / count))


class ElementWeights(NamedTuple):
    """What a pass over a loader says of a guide with latents of the elements of mini-batches."""

    elements: Elements
    #: the weights of the latents that all elements share, if there are some, with the ELBO of these alone
    shared: Importance | None
    noise: float  #: the variance of their logarithms that is due to the draws of elements
    num_inner: int  #: how many draws of each element there were for each of these

    def objection(self, remedy: str) -> str:
        """To the guide, with a remedy, if known; empty where all is trusted."""
        if self.elements.objections:
            return about_some(self.elements.objection, remedy)
        if self.noise > _MOST_NOISE:
            more = "more draws of each element (MinibatchConfig.min_inner)"
            return (
                "nothing is known of the latents that all elements share: with "
                f"{self.num_inner} draws of each element their log weights have a variance of "
                f"{self.noise:.2g} by noise alone, above {_MOST_NOISE:.0f}"
                + (f". Use {more}, or {remedy}" if remedy else "")
            )
        return "" if self.shared is None else "; ".join(about_weights(self.shared, remedy))

    @property
    def praise(self) -> str:
        """The verdict where all is trusted."""
        elements, words, why = self.elements, "Trusted: ", ""
        worst = int(elements.khat.argmax())
        if elements.khat[worst] > GOOD_KHAT:
            why = "as the largest of so many good ones is by chance"
            if elements.tail_share is not None and elements.tail_share[worst] <= GOOD_TAIL:
                why = "of a tail too light to matter"
            why = f" (above {GOOD_KHAT}, {why})"
        if (shared := self.shared) is not None:
            gap = max(shared.log_evidence - shared.elbo, 0.0)
            words += (
                f"of the latents that all elements share the ELBO is {gap:.3f} nats below the log evidence "
                f"{shared.log_evidence:.3f}, k-hat is {shared.khat:.2f} ± {shared.khat_se:.2f}; "
            )
        return (
            f"{words}of {len(elements.khat):,} elements of plate '{elements.plate}' the largest such "
            f"distance is {elements.gap.max():.3f} nats, and the largest k-hat {elements.khat[worst]:.2f}"
            f"{why}{ELSEWHERE['none']}"
        )


@torch.no_grad()
def weigh_elements(
    minibatches: MinibatchObjective, passed: PassEstimate, num_gradients: int
) -> ElementWeights | str:
    """Weighs draws of the elements of all mini-batches, and of what these share.

    :param passed: what a first pass over the loader has found.
    :param num_gradients: the draws of mini-batches that a fit took: not many more are taken.
    :return: or why that cannot be done, in words.
    """
    objective = minibatches.objective
    try:
        _check_pass(passed)
        if not isinstance(objective, PyroObjective):
            raise UnknownWeightsError("weights of mini-batches are noise")
        with validation_enabled(False):
            return _weigh(minibatches, objective, num_gradients)
    except UnknownWeightsError as error:
        return str(error)
    except Exception as error:  # a model or a guide that does not take many draws of a batch
        return f"its elements could not be weighed ({describe(error)})"


def _check_pass(passed: PassEstimate) -> None:
    """Refuses a pass over a loader that is not one of all data, each row once."""
    if not passed.share:
        raise UnknownWeightsError(
            "the loader is not known to have each row once in an epoch (drop_last=True may leave rows out)"
        )
    if abs(passed.loader_share - 1) > 1e-6:
        share = 100 * passed.loader_share
        raise UnknownWeightsError(
            f"a pass over the loader is {share:.3g} % of the data that the model scales its batches up to: "
            "check the size of the plate"
        )
    if passed.share < 1 - 1e-6:
        raise UnknownWeightsError(
            f"a pass saw {100 * passed.share:.3g} % of the data, in {passed.num_batches} batches"
        )


def _weigh(
    minibatches: MinibatchObjective, objective: PyroObjective, num_gradients: int
) -> ElementWeights:
    stream, config = minibatches.stream.whole, minibatches.config
    inner = num_gradients // (stream.num_batches * config.num_shared)
    inner = min(max(inner, config.min_inner), config.max_inner)
    first, counts = next(stream.one_pass(1)), (config.num_shared, inner)
    weigher = ElementDraws(objective, minibatches.log_joint, first, counts)
    total = torch.zeros(config.num_shared, dtype=torch.float64, device="cpu")
    parts, indices = list[Tensor](), list[Tensor]()
    for batch, rows in stream.one_pass_with_rows():
        if is_out_of_time():
            raise UnknownWeightsError("there was no time for the draws of each element")
        log_ratios, by_prior, index = weigher.log_ratios(batch)
        log_weights, columns = _weigh_batch(log_ratios, by_prior)
        total += log_weights
        parts.append(columns)
        if index is None and rows is not None and len(rows) == columns.shape[1]:
            index = torch.as_tensor(rows, device="cpu")
        indices += [] if index is None else [index]
    *tails, gaps, noises, more, error = torch.cat(parts, 1)
    is_more = more > GOOD_GAP + (2 + _largest_error(len(more))) * error
    found = torch.stack([*tails, gaps + torch.where(is_more, more, 0.0)])
    places, noise, shared = None, float(noises.sum()), None
    if len(indices) == len(parts):
        places, order = torch.cat(indices).sort()
        found = found[:, order]
    if weigher.log_ratio_of_shared is not None and weigher.shared:
        shared = Importance.from_log_weights(total + weigher.log_ratio_of_shared)
        shared = replace(shared, elbo=min(shared.elbo + noise / 2, shared.log_evidence))
    numbers = dict(zip(("khat", "khat_se", "tail_share", "gap"), found))
    about: Any = {"objections": objections_to(**numbers), "index": places}
    elements = Elements(plate=weigher.plate, **about, **numbers)
    return ElementWeights(elements, shared, noise, inner)


def _weigh_batch(log_ratios: Tensor, by_prior: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch adds to the log weights of shared draws; and by element, in rows, what is known of each.

    That is k-hat, its standard error, the share of the tail, the gap, the noise of the log weights, and the
    log evidence by the prior over that by the guide, with its standard error.

    :param log_ratios: shape ``(shared draws, draws, elements)``, as those by the prior.
    """
    inner = log_ratios.shape[1]
    log_sums, shares = log_ratios.logsumexp(1), log_ratios.softmax(1).nan_to_num(0.0)
    log_means = log_sums - math.log(inner)
    # to the second order without the bias of a mean of few
    gap = inner / (inner - 1) * (log_means.mean(0) - log_ratios.mean((0, 1)))
    # the relative variance of each mean over draws of an element
    noise = (inner * shares.square().sum(1) - 1).mean(0) / (inner - 1)
    # over the mean of the others: the evidence of an element varies with what all share
    of_others = log_sums[:, None] + torch.log1p(-shares) - math.log(inner - 1)
    relative = (log_ratios - of_others).flatten(0, 1)
    tails = [(tail.khat, tail.khat_se, tail.log_cutoff) for tail in fit_tails(relative)]
    khat, khat_se, log_cutoff = relative.new_tensor(tails).T
    above = relative.softmax(0) - (log_cutoff - relative.logsumexp(0)).exp()
    tail_share = above.clamp_min(0).sum(0).nan_to_num(1.0)
    # where the guide does not draw, its estimate of the evidence is too small, and the prior's larger
    more = (by_prior - log_means[:, None]).flatten(0, 1)
    error = (more.softmax(0).square().sum(0) - 1 / len(more)).clamp_min(0.0).sqrt().nan_to_num(0.0)
    log_mean = (more.logsumexp(0) - math.log(len(more))).nan_to_num(0.0)
    gap = gap.nan_to_num(torch.inf, torch.inf)
    return log_means.sum(-1), torch.stack([khat, khat_se, tail_share, gap, noise, log_mean, error])
