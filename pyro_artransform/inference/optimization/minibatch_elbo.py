# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO of a guide whose data come in mini-batches: for steps, for comparisons, and at the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...joint import LogDensity, LogJoint, MeanLogJoint
from ..config import MinibatchConfig
from ..loader import Batch, BatchStream
from .objective import BatchObjective, Objective, PathObjective

_ROUND_OFF = 1e-6


class PassEstimate(NamedTuple):
    """The ELBO in nats as the mean over batches.

    Its standard error is that of draws, and of batches as far as not all of them were seen; the
    share of all data that were is 0 where it is not known. ``log_weights`` are those of all data.
    ``loader_share`` is how much of the data that batches are scaled up to a loader has that passes over
    each row once, 1 where it is not known.
    """

    elbo: float
    elbo_se: float
    num_draws: int
    num_batches: int
    share: float
    log_weights: Tensor | None = None
    loader_share: float = 1.0


class _Term(NamedTuple):
    """The mean of one batch, the variance of it by its draws, and the batch's weight and scale."""

    mean: float
    variance: float
    weight: float
    scale: float


def validation_batches(stream: BatchStream, config: MinibatchConfig) -> list[Batch]:
    """Some of the batches of an epoch, at least one, on which parameters are compared."""
    found = list(stream.whole.one_pass(config.num_compared))
    if not found:
        raise ValueError("loader: expected at least one batch, got none")
    return found


@dataclass
class MinibatchObjective(Objective):
    """An objective that sees the next batch of a stream at each step, and the same ones otherwise.

    The last batch of an epoch may be short. A model that scales it up to all data would count its
    rows more than others', so its step is smaller: then the steps of an epoch add up to the
    gradient of all data. Steps for the tails do not exist: log weights of mini-batches are noise.

    :param objective: the objective for any batch.
    :param stream: the stream of batches, of which there may be a share in each process.
    :param log_joint: the log joint density of the model.
    :param validation: the batches on which parameters are compared.
    :param config: how many draws and batches there are.
    """

    objective: BatchObjective
    stream: BatchStream
    log_joint: LogJoint
    validation: list[Batch]
    config: MinibatchConfig

    def __post_init__(self) -> None:
        self._last = self.objective
        self._least_scale = min(map(self._scale, self.validation))

    def _scale(self, batch: Batch) -> float:
        """How much the model scales a batch up."""
        return self.log_joint.structure(*batch).scale

    def _weight(self, batch: Batch) -> float:
        """The rows of a batch by those of the largest for validation; one if nothing is scaled."""
        return self._least_scale / self._scale(batch)

    def loss(self, num_particles: int) -> Tensor:
        batch = self.stream.next()
        self._last = self.objective.with_arguments(batch)
        loss, weight = self._last.loss(num_particles), self._weight(batch)
        # the value stays that of the ELBO
        return loss if weight == 1 else loss.detach() + weight * (loss - loss.detach())

    def parameters(self) -> dict[str, Tensor]:
        return self.objective.parameters()

    def is_guide_alone(self) -> bool:
        return self.objective.is_guide_alone()

    @torch.no_grad()
    def elbo_draws(self, count: int) -> Tensor:
        """Each of them the mean over the batches for validation."""
        divisor = self.config.draws_divisor * len(self.validation)
        estimate = self._estimator(max(count // divisor, self.config.min_draws))
        weights = [self._weight(batch) for batch in self.validation]
        total = sum(weights)
        draws = [w / total * estimate(batch) for w, batch in zip(weights, self.validation)]
        return torch.stack(draws).sum(0)

    def _estimator(self, count: int) -> Callable[[Batch], Tensor]:
        """Draws of the ELBO of a batch; the same draws for all, where all have the same latents.

        The log weights of much data vary less than those of little, and their mean over all batches
        is that of all data.
        """
        objective = self.objective
        if not isinstance(objective, PathObjective):
            return lambda batch: objective.with_arguments(batch).elbo_draws(count)
        z, log_q = objective.guide.rsample_and_log_prob(count)
        return lambda batch: objective.with_arguments(batch).log_density(z) - log_q

    def nonfinite_sites(self) -> list[str]:
        return self._last.nonfinite_sites()

    def mean_log_joint(self) -> LogDensity:
        """The mean log joint density of several batches, in which an initial guide is found."""
        few = self.validation[:: math.ceil(len(self.validation) / self.config.num_for_start)]
        return MeanLogJoint(self.log_joint, few, [self._weight(batch) for batch in few])

    @torch.no_grad()
    def over_a_pass(self) -> PassEstimate:
        """The ELBO from one pass over the loader, or from batches that are spread over it."""
        config, are_common = self.config, isinstance(self.objective, PathObjective)
        count = config.num_draws // min(self.stream.whole.num_batches, config.max_batches)
        count = min(max(count, config.min_draws), config.max_draws)
        estimate = self._estimator(config.num_common_draws if are_common else count)
        terms, weighted = list[_Term](), list[Tensor]()
        for batch in self.stream.whole.one_pass(config.max_batches):
            draws, weight = estimate(batch), self._weight(batch)
            variance = 0.0 if are_common else (draws.var() / len(draws)).item()
            terms.append(_Term(draws.mean().item(), variance, weight, self._scale(batch)))
            weighted.append(weight * draws)
        share = self._share_seen(terms)
        elbo, elbo_se = _mean_and_error(terms, share)
        loader_share = self._loader_share(terms)
        if not are_common:
            numbers = elbo, elbo_se, count * len(terms), len(terms), share
            return PassEstimate(*numbers, loader_share=loader_share)
        log_weights = sum(weighted[1:], weighted[0]) / sum(term.weight for term in terms)
        error = math.hypot((log_weights.double().var() / len(weighted[0])).sqrt().item(), elbo_se)
        is_exact = abs(_seen(terms) - 1) < _ROUND_OFF and share > 0
        weights = log_weights if is_exact else None
        numbers = elbo, error, len(weighted[0]), len(terms), share
        return PassEstimate(*numbers, weights, loader_share)

    def _share_seen(self, terms: list[_Term]) -> float:
        """How much of all data these batches are, from 0 to 1; 0 where it is not known."""
        whole = self.stream.whole
        if not whole.is_partition:
            return 0.0
        share = len(terms) / whole.num_batches
        return min(share, _seen(terms)) if _are_scaled(terms) else share

    def _loader_share(self, terms: list[_Term]) -> float:
        """How much of what batches are scaled up to a whole pass is; 1 where it is not known."""
        whole = self.stream.whole
        is_whole = whole.is_partition and len(terms) == whole.num_batches
        return _seen(terms) if is_whole and _are_scaled(terms) else 1.0


def _are_scaled(terms: list[_Term]) -> bool:
    return any(term.scale != 1 for term in terms)


def _seen(terms: list[_Term]) -> float:
    """How much of all data these batches are by their scales."""
    return sum(1 / term.scale for term in terms)


def _mean_and_error(terms: list[_Term], share: float) -> tuple[float, float]:
    """The weighted mean of independent means, a share of all that there are, and its error."""
    total = sum(term.weight for term in terms)
    shares = [term.weight / total for term in terms]
    mean = math.fsum(s * term.mean for s, term in zip(shares, terms))
    by_draws = math.fsum(s**2 * term.variance for s, term in zip(shares, terms))
    deviations = math.fsum(s**2 * (term.mean - mean) ** 2 for s, term in zip(shares, terms))
    by_batches = deviations * len(shares) / max(len(shares) - 1, 1)
    return mean, math.sqrt(by_draws + max(1 - share, 0.0) * by_batches)
