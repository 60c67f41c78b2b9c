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
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, validation_enabled
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ...diagnostics import Importance
from ...diagnostics.importance import GOOD_GAP, GOOD_KHAT, GOOD_TAIL
from ...diagnostics.psis import fit_tails
from ...joint import LogJoint
from ...joint.element_terms import score_by_element, sum_by_element
from ...joint.handlers import SiteLogProbs
from ...joint.traces import (
    latent_nodes,
    plate_nesting,
    subsampled_plates,
    subsampling_scale,
    unwrapped,
)
from ...joint.vectorization import DrawPlate, Draws, GuideSampler, Terms, evaluate_many
from ...time_limit import is_out_of_time
from ..loader import Batch
from ..optimization.objective import MinibatchObjective, PassEstimate, PyroObjective

#: the largest variance of log weights by noise: of pseudo-marginal chains it is about the best (Doucet, Pitt,
#: Deligiannidis, Kohn 2015, https://arxiv.org/abs/1210.1871)
MOST_NOISE = 1.0
#: why nothing is known where a guide has the latents that all data share alone
NOT_BY_ELEMENT = "weights of mini-batches are noise"
# draws that are evaluated at a time
_AT_ONCE = 256
# in which densities of the same draw, by two batches, may differ
_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Elements:
    """How close a guide is to the posterior of each element of a plate, given what all elements share.

    :param plate: the name of the plate.
    :param index: of each element in the plate, ascending, shape ``(size,)``; ``None`` where a loader does not
        tell: then elements are in the order of a pass over it.
    :param khat: the Pareto index of the weights of its draws, with its standard error ``khat_se``.
    :param tail_share: how much of its weights is above the cutoff of their tail.
    :param gap: the log evidence of its data less its ELBO, in nats.
    """

    plate: str
    index: Tensor | None
    khat: Tensor
    khat_se: Tensor
    tail_share: Tensor
    gap: Tensor

    @property
    def trusted(self) -> Tensor:
        """Whether each is within the bounds of trust, as those of a whole posterior.

        The largest of many estimates of k-hat is large by chance. Its bound is increased by as many
        standard errors as the largest of so many normal errors has as its median: elements with an index
        at the bound, all of them, are trusted as often as a single one would be.
        """
        median = torch.tensor(0.5, dtype=torch.float64) ** (1 / len(self.khat))
        bound = GOOD_KHAT + torch.special.ndtri(median) * self.khat_se
        is_heavy = (self.khat > bound) & (self.tail_share > GOOD_TAIL)
        return (self.gap <= GOOD_GAP) & ~is_heavy

    def name_of(self, place: int) -> str:
        """An element in words."""
        if self.index is None:
            return f"element {place} of a pass over the loader"
        return f"element {int(self.index[place])}"


class ElementWeights(NamedTuple):
    """What a pass over a loader says of a guide with latents of the elements of mini-batches.

    :param shared: the weights of the latents that all elements share, with the ELBO of these alone; ``None``
        if there are none.
    :param noise: the variance of their logarithms that is due to the draws of elements.
    :param num_inner: how many draws of each element there were for each of these.
    """

    elements: Elements
    shared: Importance | None
    noise: float
    num_inner: int


class _UnknownError(Exception):
    """Weights of elements are not known, for the reason that it gives."""


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
    if not isinstance(objective, PyroObjective):
        return NOT_BY_ELEMENT
    try:
        _check_pass(passed)
        with validation_enabled(False):
            return _weigh(minibatches, objective, num_gradients)
    except _UnknownError as error:
        return str(error)


def _check_pass(passed: PassEstimate) -> None:
    """Refuses a pass over a loader that is not one of all data, each row once."""
    if not passed.share:
        raise _UnknownError("the loader is not known to have each row once in an epoch")
    if abs(passed.loader_share - 1) > 1e-6:
        share = 100 * passed.loader_share
        raise _UnknownError(
            f"a pass over the loader is {share:.3g} % of the data that the model scales batches up to"
        )
    if passed.share < 1 - 1e-6:
        raise _UnknownError(
            f"a pass saw {100 * passed.share:.3g} % of the data, in {passed.num_batches} batches"
        )


def _weigh(
    minibatches: MinibatchObjective, objective: PyroObjective, num_gradients: int
) -> ElementWeights:
    stream, config, parts = minibatches.stream.whole, minibatches.config, list[_ElementsOfBatch]()
    inner = num_gradients // (stream.num_batches * config.num_shared)
    inner = min(max(inner, config.min_inner), config.max_inner)
    first = next(stream.one_pass(1))
    counts = config.num_shared, inner
    weigher = _Weigher.of(objective, minibatches.log_joint, first, counts)
    total, noise = torch.zeros(config.num_shared, dtype=torch.float64, device="cpu"), 0.0
    for batch, rows in stream.one_pass_with_rows():
        if is_out_of_time():
            raise _UnknownError("there was no time for the draws of each element")
        log_ratios, index = weigher.log_ratios(batch)
        log_sums, shares = log_ratios.logsumexp(1), log_ratios.softmax(1).nan_to_num(0.0)
        log_means = log_sums - math.log(inner)
        total += log_means.sum(-1)
        # the relative variance of each mean over draws of an element
        noise += float((inner * shares.square().sum(1) - 1).mean(0).sum()) / (inner - 1)
        # to the second order without the bias of a mean of few
        gap = inner / (inner - 1) * (log_means.mean(0) - log_ratios.mean((0, 1)))
        if index is None and rows is not None and len(rows) == len(gap):
            index = torch.as_tensor(rows, device="cpu")
        # over the mean of the others: the evidence of an element varies with what all share
        of_others = log_sums[:, None] + torch.log1p(-shares) - math.log(inner - 1)
        relative = (log_ratios - of_others).flatten(0, 1)
        parts.append(_ElementsOfBatch.of(relative, gap, index))
    shared = None
    if weigher.shared:
        shared = Importance.from_log_weights(total + weigher.log_ratio_of_shared)
        shared = replace(shared, elbo=min(shared.elbo + noise / 2, shared.log_evidence))
    return ElementWeights(_joined(weigher.plate, parts), shared, noise, inner)


class _ElementsOfBatch(NamedTuple):
    columns: Tensor  # k-hat, its standard error, the share of the tail, the gap, by element
    place: Tensor | None  # their indices in the plate

    @classmethod
    def of(cls, log_ratios: Tensor, gap: Tensor, index: Tensor | None) -> "_ElementsOfBatch":
        """Of the log ratios of the draws of each, shape ``(n, elements)``."""
        tails = fit_tails(log_ratios)
        cutoffs = torch.tensor([tail.log_cutoff for tail in tails], dtype=torch.float64)
        above = log_ratios.softmax(0) - (cutoffs - log_ratios.logsumexp(0)).exp()
        columns = [
            torch.tensor([tail.khat for tail in tails], dtype=torch.float64),
            torch.tensor([tail.khat_se for tail in tails], dtype=torch.float64),
            above.clamp_min(0).sum(0).nan_to_num(1.0),
            gap.nan_to_num(torch.inf, torch.inf),
        ]
        return cls(torch.stack(columns), index)


def _joined(plate: str, parts: Sequence[_ElementsOfBatch]) -> Elements:
    columns, index = torch.cat([part.columns for part in parts], 1), None
    indices = [part.place for part in parts if part.place is not None]
    if len(indices) == len(parts):
        index, order = torch.cat(indices).sort()
        columns = columns[:, order]
    return Elements(plate, index, *columns)


def _plate_of_elements(model: poutine.Trace) -> str:
    """The plate whose elements are those of mini-batches."""
    latents = [node["cond_indep_stack"] for node in latent_nodes(model)]
    names = list(dict.fromkeys(frame.name for frame in subsampled_plates(model)))
    if not names:  # as of an autoencoder: each latent is of an element of the batch
        common = set.intersection(*({frame.name for frame in frames} for frames in latents))
        names = [frame.name for frame in latents[0] if frame.name in common][:1]
    if len(names) != 1:
        got = f"those of {names}" if names else "none"
        raise _UnknownError(
            f"mini-batches are not known to be the elements of one plate, but {got}"
        )
    if not any(frame.name == names[0] for frames in latents for frame in frames):
        raise _UnknownError(f"there are no latents in plate '{names[0]}'")
    if any(frame.name == names[0] and frame.dim is None for frames in latents for frame in frames):
        raise _UnknownError(f"plate '{names[0]}' is a loop")
    return names[0]


@dataclass
class _Weigher:
    """Draws of a guide and their weights by element, batch after batch, with the same shared draws.

    :param counts: of shared draws, and of draws of elements given each.
    :param plate: the plate whose elements a batch has.
    :param shared: draws of the guide's sites outside of it, placed in a plate of draws.
    :param log_ratio_of_shared: the log density of the model less that of the guide of these.
    """

    log_joint: LogJoint
    guide: Callable[..., object]
    counts: tuple[int, int]
    plate: str
    num_plates: int
    shared: dict[str, Tensor]
    log_ratio_of_shared: Tensor

    @classmethod
    def of(
        cls, objective: PyroObjective, log_joint: LogJoint, batch: Batch, counts: tuple[int, int]
    ) -> "_Weigher":
        """With draws of what is shared."""
        args, kwargs = batch
        run = partial(objective.guide, *args, **kwargs)
        with poutine.block():
            traces = (
                poutine.trace(objective.model).get_trace(*args, **kwargs),
                poutine.trace(run).get_trace(),
            )
        plate, num_plates = _plate_of_elements(traces[0]), plate_nesting(*traces)
        if not GuideSampler(run, num_plates).is_vectorized:
            raise _UnknownError("the guide does not draw many elements at once in a plate")
        found = cls(
            log_joint, objective.guide, counts, plate, num_plates, {}, torch.tensor(torch.nan)
        )
        scored, _, _ = found._run_guide(batch, {}, counts[0])
        for node in latent_nodes(traces[1]):
            is_shared = all(frame.name != plate for frame in node["cond_indep_stack"])
            # a Delta follows from the others
            if is_shared and not isinstance(unwrapped(node["fn"]), Delta):
                found.shared[node["name"]] = scored.values[node["name"]]
        return found

    def log_ratios(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Log ratios ``(shared draws, draws, elements)`` in float64, and indices if the guide has them."""
        elements, rest, (count, inner) = list[Tensor](), list[Tensor](), self.counts
        at_once = max(min(_AT_ONCE, self.log_joint.chunk_size) // inner, 1)
        for rows in torch.arange(count, device="cpu").split(at_once):
            repeated = rows.repeat_interleave(inner)
            given = {name: value[repeated.to(value.device)] for name, value in self.shared.items()}
            scored, frame, of_guide = self._run_guide(batch, given, len(repeated))
            of_model = self._run_model(batch, scored, frame, len(repeated))
            shape = (len(rows), inner)
            differences = (
                of_model[k].double() - of_guide[k].double() for k in ("elements", "rest")
            )
            ratios, of_shared = (d.reshape((*shape, *d.shape[1:])).to("cpu") for d in differences)
            elements.append(ratios.nan_to_num(-torch.inf, torch.inf, -torch.inf))
            rest.append(of_shared[:, 0])
        found = torch.cat(rest)
        if self.log_ratio_of_shared.isnan().all():
            self.log_ratio_of_shared = found
        is_same = torch.isclose(found, self.log_ratio_of_shared, rtol=1e-4, atol=_TOLERANCE)
        if not is_same.all():
            raise _UnknownError(
                f"densities outside of plate '{self.plate}' depend on the mini-batch"
            )
        is_known = isinstance(self.guide, AutoGuide) and self.guide.create_plates is not None
        indices = scored.values[self.plate].flatten().to("cpu") if is_known else None
        return torch.cat(elements), indices

    def _run_guide(
        self, batch: Batch, given: Draws, n: int
    ) -> tuple[SiteLogProbs, CondIndepStackFrame, Terms]:
        """Draws of a batch, the frame of the plate, and their log densities by element."""
        draws, scored = DrawPlate(n, self.num_plates), SiteLogProbs(given)
        with poutine.block(), scored:
            draws.run(partial(self.guide, *batch.args, **batch.kwargs))
        stacks = scored.frames.values()
        frame = next(f for frames in stacks for f in frames if f.name == self.plate)
        like = next(value for name, value in scored.values.items() if name in scored.log_probs)
        found = sum_by_element(draws, frame, scored.log_probs, scored.frames, like)
        return scored, frame, {**found, "elements": found["elements"] / subsampling_scale(frame)}

    def _run_model(
        self, batch: Batch, scored: SiteLogProbs, frame: CondIndepStackFrame, n: int
    ) -> Terms:
        """The log densities of the model at draws of the guide, by element."""
        log_joint = self.log_joint.bound_to(*batch)
        shapes = self.log_joint.structure(*batch).shapes
        values = {name: scored.values[name].reshape((n, *shape)) for name, shape in shapes.items()}
        indices = {k: v for k, v in scored.values.items() if k not in scored.log_probs}
        like = next(iter(values.values()))

        def evaluate(draws: Draws, size: int | None) -> Terms:
            plate = DrawPlate(size, self.num_plates)
            placed = {**plate.place(draws, log_joint.latents.event_dims), **indices}
            return score_by_element(
                log_joint.run, plate, placed, frame, like, log_joint.is_enumerated
            )

        def failed(draws: Draws) -> Terms:
            nan = like.new_full((), torch.nan)
            return {"elements": nan.expand(frame.size), "rest": nan}

        return evaluate_many(evaluate, values, log_joint.strategy, failed)
