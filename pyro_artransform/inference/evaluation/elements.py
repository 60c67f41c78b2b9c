# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Importance weights with mini-batches whose elements have latents of their own.

Elements are independent given the latents that they share, and the mean weight of an element's draws is an
unbiased estimate of its likelihood. The product over elements weighs a draw of the shared latents. See
Importance Sampling Squared for Bayesian Inference in Latent Variable Models (Tran, Scharth, Pitt, Kohn,
2013), https://arxiv.org/abs/1309.3339
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from pyro.distributions import Delta, validation_enabled
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..._base.comparison import agree
from ..._base.time_limit import is_out_of_time
from ...diagnostics import Importance
from ...diagnostics.importance_sampling import GOOD_GAP
from ...diagnostics.plates import PlateDiagnostics, largest_error
from ...diagnostics.psis import fit_tails, share_above
from ...model.traces import latent_nodes, plate_of_elements, unwrapped
from ...model.vectorization import Draws, Evaluate, Terms, describe, evaluate_many, stack
from ..loader import Batch
from ..optimization.minibatches import MinibatchObjective, PassEstimate
from ..optimization.objective import OF_LOG_DENSITIES, BatchObjective, PyroObjective

# draws of the latents that all elements share, and the fewest and most draws of each element for each of them
_NUM_SHARED, _MIN_INNER, _MAX_INNER = 250, 4, 16


class ElementWeights(NamedTuple):
    """The importance weights of a pass over a loader, for a guide with latents of elements."""

    elements: PlateDiagnostics
    #: the weights and the ELBO of the shared latents alone; ``None`` if there are none
    shared: Importance | None
    noise: float  #: the variance of the shared log weights that is due to the draws of elements
    num_inner: int  #: the number of draws of each element per draw of the shared latents


@torch.no_grad()
def weigh_elements(
    minibatches: MinibatchObjective, passed: PassEstimate, num_gradients: int
) -> ElementWeights | str:
    """Weighs draws of the elements of all mini-batches and of shared latents, or returns why it cannot.

    :param num_gradients: the gradients of all steps, which limit the number of draws.
    """
    try:
        with validation_enabled(False):
            return passed.obstacle or _weighed(minibatches, num_gradients)
    except Exception as error:  # the model or the guide may not support many draws of a batch
        return f"importance weights of elements could not be computed ({describe(error)})"


def _weighed(minibatches: MinibatchObjective, num_gradients: int) -> ElementWeights:
    """The weights of a pass over all batches; errors say why there are none."""
    stream = minibatches.stream.whole
    draws = _Draws(minibatches.objective, num_gradients // stream.num_batches // _NUM_SHARED)
    total, parts, indices = draws.log_ratio_of_shared, list[Tensor](), list[Tensor]()
    for batch, rows in stream.one_pass_with_rows():
        if is_out_of_time():
            raise TimeoutError("the time limit was reached before all elements were drawn")
        log_ratios, by_prior, index = found = draws.of_batch(batch, rows or [])
        if len(index) == log_ratios.shape[-1]:  # batches may overlap
            is_new = ~torch.isin(index, torch.cat([index[:0], *indices]))
            log_ratios, by_prior, index = (each[..., is_new] for each in found)
        total = total + (log_ratios.logsumexp(0) - math.log(draws.inner)).sum(-1)
        parts.append(_columns(log_ratios, by_prior))
        indices += [index] if len(index) == log_ratios.shape[-1] else []
    columns, is_known = torch.cat(parts, 1), len(indices) == len(parts)
    elements = _judged(draws.plate, columns, torch.cat(indices) if is_known else None)
    shared, noise = Importance.from_log_weights(total), float(columns[-1].sum())
    shared = replace(shared, elbo=min(shared.elbo + noise / 2, shared.log_evidence))
    own = shared if draws.names else None
    return ElementWeights(elements, own, noise, draws.inner)


def _judged(plate: str, found: Tensor, index: Tensor | None) -> PlateDiagnostics:
    """The elements after a pass, from the rows of :func:`_columns` and the index of each, if known."""
    if index is not None:
        index, order = index.sort()
        found = found[:, order]
    khat, se, share, gap, more, error, _ = found
    gap = gap + torch.where(more > GOOD_GAP + (2 + largest_error(len(gap))) * error, more, 0.0)
    return PlateDiagnostics(
        plate=plate, khat=khat, khat_se=se, tail_share=share, gap=gap, index=index
    )


def _columns(log_ratios: Tensor, by_prior: Tensor) -> Tensor:
    """Diagnostics of the elements of a batch, ``(7, elements)``, from ``(draws, shared draws, elements)``.

    The rows are k-hat, its standard error, the tail share, the gap, the log ratio of the evidence estimated
    from the prior to that from the guide, its standard error, and the noise of the log weights. The gap has
    its bias for few draws removed to second order. See Debiasing Evidence Approximations: On
    Importance-weighted Autoencoders and Jackknife Variational Inference (Nowozin, 2018),
    https://openreview.net/forum?id=HyZoi-WRb
    """
    inner, log_sums = len(log_ratios), log_ratios.logsumexp(0)
    log_means, shares = log_sums - math.log(inner), log_ratios.softmax(0).nan_to_num(0.0)
    gap = inner / (inner - 1) * (log_means.mean(0) - log_ratios.mean((0, 1)))
    # the relative variance of the mean weight of an element
    noise = (inner * shares.square().sum(0) - 1).mean(0) / (inner - 1)
    # relative to the mean of the other draws, as an element's evidence varies with the shared latents
    of_others = log_sums + torch.log1p(-shares) - math.log(inner - 1)
    relative = (log_ratios - of_others).flatten(0, 1)
    tails = [(tail.khat, tail.khat_se, tail.log_cutoff) for tail in fit_tails(relative)]
    khat, khat_se, log_cutoff = relative.new_tensor(tails).T
    tail_share = share_above(relative, log_cutoff)
    # if the guide misses part of the posterior, its evidence estimate is too small and the prior's larger
    more = (by_prior - log_means).flatten(0, 1)
    error = (more.softmax(0).square().sum(0) - 1 / len(more)).clamp_min(0.0).sqrt().nan_to_num(0.0)
    log_mean = (more.logsumexp(0) - math.log(len(more))).nan_to_num(0.0)
    gap = gap.nan_to_num(torch.inf, torch.inf)
    return torch.stack([khat, khat_se, tail_share, gap, log_mean, error, noise])


class _Draws:
    """Draws of a guide and their weights by element and batch, with common draws of shared latents."""

    def __init__(self, objective: BatchObjective, num_inner: int) -> None:
        if not (isinstance(objective, PyroObjective) and objective.is_vectorized):
            raise ValueError("model and guide do not vectorize over draws")
        if objective.log_joint.is_enumerated:
            raise ValueError("the model has discrete latents, which are summed out")
        guide, model = objective.traces()
        self._objective, self.plate = objective, plate_of_elements(model)
        self.inner = min(max(num_inner, _MIN_INNER), _MAX_INNER)
        # sites outside the plate that are not determined by others
        nodes = [n for n in latent_nodes(guide) if not isinstance(unwrapped(n["fn"]), Delta)]
        stacks = {n["name"]: {frame.name for frame in n["cond_indep_stack"]} for n in nodes}
        self.names = [name for name, plates in stacks.items() if self.plate not in plates]
        self._given: Draws = {"_draw": torch.arange(_NUM_SHARED, device="cpu")}
        values = self._of_all(lambda _, n: objective.draws(objective.guide, {}, n or 1).values)
        self._given = {**self._given, **{name: values[name] for name in self.names}}
        self.log_ratio_of_shared = self._of_all(partial(objective.log_ratios, self.plate))["others"]
        objective.check_elements(self.plate, {k: v[[0, 0]] for k, v in self._given.items()})

    def _of_all(self, evaluate: Evaluate) -> Terms:
        """Evaluates terms at all shared draws, in chunks that fit into memory."""
        at_once = self._objective.log_joint.chunk_size
        return evaluate_many(evaluate, self._given, "plate", None, at_once)

    def of_batch(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Log ratios and log densities of data at prior draws, ``(draws, shared draws, elements)`` each.

        The third value has the indices of the elements: the guide's, if it has any, or ``rows``.
        """
        objective = self._objective.with_arguments(batch)
        guide: object = objective.guide
        log_ratios = partial(objective.log_ratios, self.plate)
        terms = stack([self._of_all(log_ratios) for _ in range(self.inner)])
        others = self.log_ratio_of_shared.expand_as(terms["others"])
        if not agree(terms["others"], others, *OF_LOG_DENSITIES):
            outside = f"densities outside of plate '{self.plate}'"
            raise ValueError(f"{outside} depend on the mini-batch, or on its elements")
        index = torch.as_tensor(rows, device="cpu")
        if isinstance(guide, AutoGuide) and guide.create_plates is not None:
            index = objective.draws(objective.guide, {}, 1).values[self.plate].flatten().to("cpu")
        return terms["elements"], terms["by_prior"], index
