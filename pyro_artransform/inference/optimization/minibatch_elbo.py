# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO of a guide whose data come in mini-batches: for steps, for comparisons, and at the end."""

import math
from collections.abc import Callable, Sequence
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
    """The ELBO as the mean over the batches of a pass.

    :param elbo: in nats.
    :param elbo_se: its standard error, that of draws, and of batches as far as not all of them were seen.
    :param share: of all data that were seen; 0 where it is not known.
    :param log_weights: of all data; ``None`` where they are not known.
    :param loader_share: how much of the data that batches are scaled up to the whole loader has; 1 where
        it is not known.
    """

    elbo: float
    elbo_se: float
    num_draws: int
    num_batches: int
    share: float
    log_weights: Tensor | None = None
    loader_share: float = 1.0


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
        config, whole = self.config, self.stream.whole
        are_common = isinstance(self.objective, PathObjective)
        count = config.num_draws // min(whole.num_batches, config.max_batches)
        count = min(max(count, config.min_draws), config.max_draws)
        estimate = self._estimator(config.num_common_draws if are_common else count)
        means, variances, weights, scales = [], [], [], []
        weighted = list[Tensor]()
        for batch in whole.one_pass(config.max_batches):
            draws = estimate(batch)
            means.append(draws.mean().item())
            variances.append(0.0 if are_common else (draws.var() / len(draws)).item())
            weights.append(self._weight(batch))
            scales.append(self._scale(batch))
            weighted.append(weights[-1] * draws)
        num_batches = len(means)
        seen = sum(1 / scale for scale in scales)  # the part of all data by the scales
        is_scaled = any(scale != 1 for scale in scales)
        share = num_batches / whole.num_batches if whole.is_partition else 0.0
        loader_share = seen if is_scaled and share == 1 else 1.0
        share = min(share, seen) if is_scaled else share
        elbo, elbo_se = _mean_and_error(means, variances, weights, share)
        if not are_common:
            numbers = elbo, elbo_se, count * num_batches, num_batches, share
            return PassEstimate(*numbers, loader_share=loader_share)
        log_weights = sum(weighted[1:], weighted[0]) / sum(weights)
        error = math.hypot((log_weights.double().var() / len(log_weights)).sqrt().item(), elbo_se)
        is_exact = abs(seen - 1) < _ROUND_OFF and share > 0
        numbers = elbo, error, len(log_weights), num_batches, share
        return PassEstimate(*numbers, log_weights if is_exact else None, loader_share)


def _mean_and_error(
    means: Sequence[float], variances: Sequence[float], weights: Sequence[float], share: float
) -> tuple[float, float]:
    """The weighted mean of independent means, a share of all that there are, and its error."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    mean = math.fsum(s * own for s, own in zip(shares, means))
    by_draws = math.fsum(s**2 * variance for s, variance in zip(shares, variances))
    deviations = math.fsum(s**2 * (own - mean) ** 2 for s, own in zip(shares, means))
    by_batches = deviations * len(shares) / max(len(shares) - 1, 1)
    return mean, math.sqrt(by_draws + max(1 - share, 0.0) * by_batches)
