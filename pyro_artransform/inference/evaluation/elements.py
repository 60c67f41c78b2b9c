# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Importance weights by mini-batches, where each batch has latents of its own elements.

The elements i of a plate are independent given the latents theta that they share. With draws z_k of the
guide q,

.. math::

    \hat p_i(\theta) = \frac{1}{K} \sum_k \frac{p(y_i, z_{ik} | \theta)}{q(z_{ik} | \theta)}, \qquad
    \hat w(\theta) = \frac{p(\theta)}{q(\theta)} \prod_i \hat p_i(\theta)

are unbiased, the former independently over i, so that the latter are importance weights of theta. One pass
over a loader, with the same draws of theta for each batch, makes them all.

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
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import torch
from pyro.distributions import Delta, validation_enabled
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ...arguments import first_of
from ...diagnostics import Importance
from ...diagnostics.importance import GOOD_GAP, GOOD_KHAT, GOOD_TAIL
from ...diagnostics.psis import fit_tails
from ...joint.handlers import SiteLogProbs
from ...joint.traces import latent_nodes, plate_of_elements, unwrapped
from ...joint.vectorization import ModelFailures, describe
from ...time_limit import is_out_of_time
from ..loader import Batch
from ..optimization.minibatches import MinibatchObjective, PassEstimate
from ..optimization.objective import PyroObjective

_AT_ONCE = 256  # draws that are evaluated at a time


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Elements:
    """How close a guide is to the posterior of each element of a plate, given what all elements share.

    :param plate: the name of the plate.
    :param khat: the Pareto index of the weights of its draws, with its standard error ``khat_se``.
    :param tail_share: how much of its weights is above the cutoff of their tail.
    :param gap: the log evidence of its data less its ELBO, in nats: by the guide's draws, or by draws of the
        prior where these find more, beyond what may be by chance.
    :param index: of each element in the plate, ascending, shape ``(size,)``; ``None`` where a loader does not
        tell: then elements are in the order of a pass over it.
    """

    plate: str
    khat: Tensor
    khat_se: Tensor
    tail_share: Tensor
    gap: Tensor
    index: Tensor | None

    @property
    def trusted(self) -> Tensor:
        """Whether each is trusted, shape ``(size,)``, by the bounds of a whole posterior.

        The largest of many estimates of k-hat is large by chance. Its bound is increased by as many standard
        errors as the largest of so many normal errors has as its median: elements with an index at the bound,
        all of them, are trusted as often as a single one would be.
        """
        bound = GOOD_KHAT + _largest_error(len(self.khat)) * self.khat_se
        is_heavy = (self.khat > bound) & (self.tail_share > GOOD_TAIL)
        return ~is_heavy & (self.gap <= GOOD_GAP)

    @property
    def objection(self) -> str:
        """Those that are not trusted, in words, the worst first; empty where there are none."""
        worst = self.gap.nan_to_num(torch.inf, torch.inf).argsort(descending=True)
        if not (named := [self._fault(k) for k in worst[~self.trusted[worst]].tolist()]):
            return ""
        return (
            f"{len(named):,} of the {len(self.gap):,} elements of plate '{self.plate}' are not good: "
            f"{first_of(named)}: result.elements has them all"
        )

    def _fault(self, place: int) -> str:
        gap, words = self.gap[place], f"k-hat {self.khat[place]:.2f} ± {self.khat_se[place]:.2f}"
        if not gap <= GOOD_GAP:
            words = f"an ELBO {gap:,.2f} nats below the log evidence"
        return f"{self.name_of(place)} ({words})"

    def name_of(self, place: int) -> str:
        """An element in words."""
        if self.index is None:
            return f"element {place} of a pass over the loader"
        return f"element {int(self.index[place])}"

    def __repr__(self) -> str:
        count = f"{int(self.trusted.sum()):,} of {len(self.khat):,}"
        lines = [f"Elements: {count} of plate '{self.plate}' are trusted"]
        for name, values in (("gaps in nats", self.gap), ("k-hats", self.khat)):
            worst = values.topk(min(5, len(values))).indices.tolist()
            named = ", ".join(f"{values[k]:.3g} of {self.name_of(k)}" for k in worst)
            lines.append(f"  largest {name:13}{named}")
        return "\n".join(lines)


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


@torch.no_grad()
def weigh_elements(
    minibatches: MinibatchObjective, passed: PassEstimate, num_gradients: int
) -> ElementWeights | str:
    """Weighs draws of the elements of all mini-batches, and of what these share; or says why it cannot.

    :param passed: what a first pass over the loader has found.
    :param num_gradients: the draws of mini-batches that a fit took: not many more are taken.
    """
    try:
        with validation_enabled(False):
            return passed.obstacle or _weigh(minibatches, num_gradients)
    except Exception as error:  # a model or a guide that does not take many draws of a batch
        return f"its elements could not be weighed ({describe(error)})"


def _weigh(minibatches: MinibatchObjective, num_gradients: int) -> ElementWeights:
    stream, config = minibatches.stream.whole, minibatches.config
    inner = num_gradients // (stream.num_batches * config.num_shared)
    draws = _Draws(minibatches, min(max(inner, config.min_inner), config.max_inner))
    logs, parts, indices = list[Tensor](), list[Tensor](), list[Tensor]()
    for batch, rows in stream.one_pass_with_rows():
        if is_out_of_time():
            raise TimeoutError("there was no time for the draws of each element")
        elements, by_prior, index = draws.log_ratios(batch)
        columns = _columns(elements, by_prior)
        logs.append(elements.logsumexp(1).sum(-1) - columns.shape[1] * math.log(draws.inner))
        parts.append(columns)
        if index is None and rows is not None and len(rows) == columns.shape[1]:
            index = torch.as_tensor(rows, device="cpu")
        indices += [] if index is None else [index]
    index = torch.cat(indices) if len(indices) == len(parts) else None
    return _judged(draws, torch.stack(logs).sum(0), torch.cat(parts, 1), index)


def _judged(draws: "_Draws", total: Tensor, found: Tensor, index: Tensor | None) -> ElementWeights:
    """What is known after a pass, by the columns of :func:`_columns` and the index of each, if known."""
    if index is not None:
        index, order = index.sort()
        found = found[:, order]
    khat, khat_se, tail_share, gap, noises, more, error = found
    gap = gap + torch.where(more > GOOD_GAP + (2 + _largest_error(len(gap))) * error, more, 0.0)
    numbers = {"khat": khat, "khat_se": khat_se, "tail_share": tail_share, "gap": gap}
    elements = Elements(plate=draws.plate, index=index, **numbers)
    noise, shared = float(noises.sum()), None
    if draws.shared and draws.log_ratio_of_shared is not None:
        shared = Importance.from_log_weights(total + draws.log_ratio_of_shared)
        shared = replace(shared, elbo=min(shared.elbo + noise / 2, shared.log_evidence))
    return ElementWeights(elements, shared, noise, draws.inner)


def _columns(log_ratios: Tensor, by_prior: Tensor) -> Tensor:
    """What is known of the elements of a batch, a column each.

    That is k-hat, its standard error, the share of the tail, the gap, the noise of the log weights, and the
    log evidence by the prior over that by the guide, with its standard error.

    :param log_ratios: shape ``(shared draws, draws, elements)``, as those by the prior.
    """
    inner, log_sums = log_ratios.shape[1], log_ratios.logsumexp(1)
    log_means, shares = log_sums - math.log(inner), log_ratios.softmax(1).nan_to_num(0.0)
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
    return torch.stack([khat, khat_se, tail_share, gap, noise, log_mean, error])


class _Draws:
    """Draws of a guide and their weights by element, batch after batch, with the same shared draws.

    :param inner: how many draws of elements there are for each of these.
    """

    def __init__(self, minibatches: MinibatchObjective, inner: int) -> None:
        objective, self._log_joint = minibatches.objective, minibatches.log_joint
        if not (isinstance(objective, PyroObjective) and objective.is_vectorized):
            raise ValueError("model and guide do not draw many elements at once in a plate")
        if self._log_joint.is_enumerated:
            raise ValueError("the model has discrete latents, which are summed out")
        self._objective, self.inner = objective, inner
        guide, model = objective.traces()
        self.plate = plate_of_elements(model)
        most = max(min(_AT_ONCE, self._log_joint.chunk_size) // inner, 1)
        # numbers of shared draws, as many at a time as fit into memory with draws of elements
        self._parts = torch.arange(minibatches.config.num_shared, device="cpu").split(most)
        runs = [objective.draws(objective.guide, {}, len(part)) for part in self._parts]
        #: draws of the guide's sites outside of the plate, but for what follows from others
        self.shared = {
            node["name"]: torch.cat([run.values[node["name"]] for run in runs])
            for node in latent_nodes(guide)
            if all(frame.name != self.plate for frame in node["cond_indep_stack"])
            and not isinstance(unwrapped(node["fn"]), Delta)
        }
        #: the log density of the model less that of the guide of these, which the first batch says
        self.log_ratio_of_shared: Tensor | None = None
        self._check_independence()

    def _check_independence(self) -> None:
        """Refuses a model in which an element depends on others: it does not go with them to another draw."""
        objective, given = self._objective, {k: v[[0, 0]] for k, v in self.shared.items()}
        drawn = objective.draws(objective.guide, given, 2)
        mixed = dict(drawn.values)
        for name, event_dim in self._log_joint.latents.event_dims.items():
            if (frame := drawn.frame(name, self.plate)) is not None:
                mixed[name] = _exchanged(mixed[name], (frame.dim or -1) - event_dim)
        one, other = (
            objective.draws(objective.model, values, 2).by_element(self.plate)[0]
            for values in (drawn.values, mixed)
        )
        if not _are_close(other, _exchanged(one, 1)):
            raise ValueError(f"elements of plate '{self.plate}' depend on each other")

    def log_ratios(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """The log ratios of model and guide, ``(shared draws, draws, elements)``, in float64.

        The others are the log densities of the data at as many draws of the elements' prior, and the indices
        of the elements, if the guide has them.
        """
        of_batch, parts = self._objective.with_arguments(batch), list[list[Tensor]]()
        for rows in self._parts:
            repeated = rows.repeat_interleave(self.inner)
            given = {name: value[repeated] for name, value in self.shared.items()}
            drawn = of_batch.draws(of_batch.guide, given, len(repeated))
            scored = of_batch.draws(of_batch.model, drawn.values, len(repeated))
            pairs = zip(scored.by_element(self.plate), drawn.by_element(self.plate))
            found = [p.double() - q.double() for p, q in pairs]
            found.append(self._by_prior(of_batch, drawn, len(repeated)).double())
            finite = [each.nan_to_num(-torch.inf, torch.inf, -torch.inf) for each in found]
            parts.append([each.to("cpu").unflatten(0, (len(rows), -1)) for each in finite])
        elements, of_shared, by_prior = map(torch.cat, zip(*parts))
        if self.log_ratio_of_shared is None:
            self.log_ratio_of_shared = of_shared.amax(1)
        if not _are_close(of_shared, self.log_ratio_of_shared[:, None]):
            raise ValueError(
                f"densities outside of plate '{self.plate}' depend on the mini-batch, or on its elements"
            )
        guide: object = of_batch.guide
        is_known = isinstance(guide, AutoGuide) and guide.create_plates is not None
        indices = drawn.values[self.plate].flatten().to("cpu") if is_known else None
        return elements, by_prior, indices

    def _by_prior(self, objective: PyroObjective, drawn: SiteLogProbs, n: int) -> Tensor:
        """The log densities of the data by element at draws of its prior, zero where it has no such draws."""
        own = {name for name in drawn.frames if drawn.frame(name, self.plate)}
        given = {name: value for name, value in drawn.values.items() if name not in own}
        try:
            scored = objective.draws(objective.model, given, n)
        except (NotImplementedError, *ModelFailures):  # an improper prior, or a draw that is none
            return torch.full_like(drawn.by_element(self.plate)[0], -torch.inf)
        return scored.by_element(self.plate, left_out=own)[0]


def _exchanged(draws: Tensor, dim: int) -> Tensor:
    """Two draws that have exchanged every other entry of a dimension."""
    found = draws.clone()
    rows = found.movedim(dim, 1)
    rows[:, 1::2] = rows[:, 1::2].flip(0)
    return found


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """Whether log densities of the same draws are the same but for round-off."""
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-2, equal_nan=True)
