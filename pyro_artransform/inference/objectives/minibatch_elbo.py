# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO of a guide whose data come in mini-batches: for steps, for comparisons, and at the end."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...joint import LogDensity, LogJoint, MeanLogJoint
from ..config import MinibatchConfig
from ..data.loader import Batch, BatchStream
from .objective import BatchObjective, Objective
from .path_gradient import PathObjective

_ROUND_OFF = 1e-6


class PassEstimate(NamedTuple):
    """The ELBO as the mean over batches, from independent draws for each or from common ones.

    :param elbo: in nats.
    :param elbo_se: its standard error, from the variation over draws, and over batches as far as
        not all of them were seen.
    :param num_draws: how many draws there were in all.
    :param num_batches: over how many batches.
    :param share: how much of the data they are, from 0 to 1; 0 where it is not known.
    :param log_weights: those of all data, where they are known.
    """

    elbo: float
    elbo_se: float
    num_draws: int
    num_batches: int
    share: float
    log_weights: Tensor | None = None


class _Term(NamedTuple):
    """The mean of one batch, the variance of it by its draws, and the batch's weight and scale."""

    mean: float
    variance: float
    weight: float
    scale: float


def validation_batches(stream: BatchStream, config: MinibatchConfig) -> list[Batch]:
    """Some of the batches of an epoch, at least one, on which parameters are compared."""
    found = list(stream.one_pass(config.num_compared))
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
    :param stream: the stream of batches.
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
        self.compare_on(self.validation)

    def compare_on(self, validation: list[Batch]) -> None:
        """Compares parameters on these batches from now on."""
        self.validation = validation
        self._least_scale = min(map(self._scale, validation))

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

    def elbo_draws(self, count: int) -> Tensor:
        """Each of them the mean over the batches for validation."""
        divisor = self.config.draws_divisor * len(self.validation)
        draws = max(count // divisor, self.config.min_draws)
        weights = [self._weight(batch) for batch in self.validation]
        if isinstance(self.objective, PathObjective):
            # the same draws for all: the log weights of much data vary less than those of little
            z, log_q = _draws(self.objective, draws)
            found = []
            for batch in self.validation:
                found.append(self.objective.with_arguments(batch).log_density(z) - log_q)
        else:
            found = [self.objective.with_arguments(b).elbo_draws(draws) for b in self.validation]
        shares = [weight / sum(weights) for weight in weights]
        return torch.stack([share * values for share, values in zip(shares, found)]).sum(0)

    def nonfinite_sites(self) -> list[str]:
        return self._last.nonfinite_sites()

    def mean_log_joint(self) -> LogDensity:
        """The mean log joint density of several batches, in which an initial guide is found."""
        few = self.validation[:: math.ceil(len(self.validation) / self.config.num_for_start)]
        return MeanLogJoint(self.log_joint, few, [self._weight(batch) for batch in few])

    def over_a_pass(self) -> PassEstimate:
        """The ELBO from one pass over the loader, or from batches that are spread over it."""
        if isinstance(self.objective, PathObjective):
            return self._with_common_draws(self.objective)
        config = self.config
        total = min(self.stream.num_batches, config.max_batches)
        count = min(max(config.num_draws // total, config.min_draws), config.max_draws)
        terms = []
        for batch in self.stream.one_pass(total):
            draws = self.objective.with_arguments(batch).elbo_draws(count).double()
            mean, variance = draws.mean().item(), (draws.var() / len(draws)).item()
            terms.append(_Term(mean, variance, self._weight(batch), self._scale(batch)))
        share = self._share_seen(terms)
        return PassEstimate(*_mean_and_error(terms, share), count * len(terms), len(terms), share)

    def _with_common_draws(self, objective: PathObjective) -> PassEstimate:
        """The same for a guide whose latents are the same for all batches, and so its draws.

        Then the mean over all batches is the log weight of all data, draw by draw.
        """
        z, log_q = _draws(objective, self.config.num_common_draws)
        total, terms = torch.zeros_like(log_q), []
        for batch in self.stream.one_pass(self.config.max_batches):
            values, weight = objective.with_arguments(batch).log_density(z), self._weight(batch)
            total += weight * values
            terms.append(_Term((values - log_q).mean().item(), 0.0, weight, self._scale(batch)))
        share = self._share_seen(terms)
        log_weights = total / sum(term.weight for term in terms) - log_q
        elbo, by_batches = _mean_and_error(terms, share)
        by_draws = (log_weights.double().var() / len(z)).sqrt().item()
        error = math.hypot(by_draws, by_batches)
        is_exact = abs(_seen(terms) - 1) < _ROUND_OFF and share > 0
        weights = log_weights if is_exact else None
        return PassEstimate(elbo, error, len(z), len(terms), share, weights)

    def _share_seen(self, terms: list[_Term]) -> float:
        """How much of all data these batches are, from 0 to 1; 0 where it is not known."""
        if not self.stream.is_partition:
            return 0.0
        share = len(terms) / self.stream.num_batches
        is_scaled = any(term.scale != 1 for term in terms)
        return min(share, _seen(terms)) if is_scaled else share


@torch.no_grad()
def _draws(objective: PathObjective, count: int) -> tuple[Tensor, Tensor]:
    return objective.guide.rsample_and_log_prob(count)


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
