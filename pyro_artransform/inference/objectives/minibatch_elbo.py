# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO of a guide whose data come in mini-batches: for steps, for comparisons, and at the end."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...joint import LogDensity, LogJoint, MeanLogJoint
from ..data.loader import Batch, Batches
from .elbo import Objective, PathObjective

# batches that candidates are compared on
_NUM_HELD = 32
# batches whose mean density a start is looked for in
_NUM_FOR_START = 8
# of the draws that a comparison has without mini-batches: those are of all data
_SHARE_OF_DRAWS = 4
_MIN_DRAWS, _MAX_DRAWS = 8, 256
_NUM_ESTIMATES = 4
_MAX_BATCHES = 500
_NUM_DRAWS = 4000
_NUM_COMMON_DRAWS = 1000
_ROUND_OFF = 1e-6


def hold(batches: Batches) -> list[Batch]:
    """Some of the batches of an epoch, at least one, to compare on.

    :param batches: a stream of batches.
    :raises ValueError: if there is none.
    """
    held = list(batches.one_pass(_NUM_HELD))
    if not held:
        raise ValueError("loader: expected at least one batch, got none")
    return held


class MinibatchObjective:
    """An objective that sees the next batch of a stream at each step, and the same ones otherwise.

    The last batch of an epoch may be short. A model that scales it up to all data would count its
    rows more than others', so that its step is the smaller: then the steps of an epoch add up to
    the gradient of all data.

    :param objective: the objective for any batch.
    :param batches: the stream.
    :param log_joint: the log joint density of the model.
    :param held: the batches on which candidates are compared.
    """

    has_weights = False

    def __init__(
        self, objective: Objective, batches: Batches, log_joint: LogJoint, held: list[Batch]
    ) -> None:
        self._objective, self._batches = objective, batches
        self._log_joint = log_joint
        self.compare_on(held)

    def compare_on(self, held: list[Batch]) -> None:
        """Compares on these batches from now on.

        :param held: the batches.
        """
        self._held = held
        self._least_scale = min(self._log_joint.structure(*batch).scale for batch in held)

    def loss(self, num_particles: int) -> Tensor:
        batch = self._batches.next()
        self._objective.see(*batch)
        loss = self._objective.loss(num_particles)
        weight = self.weight(batch)
        # the value stays that of the ELBO
        return loss if weight == 1 else loss.detach() + weight * (loss - loss.detach())

    def tail_loss(self, num_particles: int) -> Tensor:
        # the log weights of mini-batches say nothing of tails
        return self.loss(num_particles)

    def weight(self, batch: Batch) -> float:
        """How many rows a batch has beside the largest of those held; one where nothing is scaled.

        :param batch: a batch.
        """
        return self._least_scale / self._log_joint.structure(*batch).scale

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._objective.see(args, kwargs)

    def parameters(self) -> dict[str, Tensor]:
        self._objective.see(*self._held[0])
        return self._objective.parameters()

    def step_units(self) -> dict[str, Tensor]:
        return self._objective.step_units()

    def elbo_draws(self, count: int, num_estimates: int = _NUM_ESTIMATES) -> Tensor:
        """Each of them the mean over the batches that are held."""
        draws = max(count // (_SHARE_OF_DRAWS * len(self._held)), _MIN_DRAWS)
        weights = [self.weight(batch) for batch in self._held]
        if isinstance(self._objective, PathObjective):
            # the same draws for all: the log weights of much data vary less than those of little
            z, log_q = self._objective.draws(draws)
            found = [self._log_density(self._objective, batch, z) for batch in self._held]
            found = [values - log_q for values in found]
        else:
            found = [self.draws_of(batch, draws, num_estimates) for batch in self._held]
        total = sum(weights)
        return torch.stack([w / total * v for w, v in zip(weights, found)]).sum(0)

    @staticmethod
    def _log_density(objective: PathObjective, batch: Batch, z: Tensor) -> Tensor:
        objective.see(*batch)
        return objective.log_density(z)

    def draws_of(self, batch: Batch, count: int, num_estimates: int = _NUM_ESTIMATES) -> Tensor:
        """Estimates of the ELBO of one batch.

        :param batch: the batch.
        :param count: the number of draws.
        :param num_estimates: as for ``elbo_draws``.
        """
        self._objective.see(*batch)
        return self._objective.elbo_draws(count, num_estimates)

    def culprits(self) -> list[str]:
        return self._objective.culprits()

    def for_start(self) -> LogDensity:
        """The mean log joint density of several batches."""
        few = self._held[:: math.ceil(len(self._held) / _NUM_FOR_START)]
        return MeanLogJoint(self._log_joint, few, [self.weight(batch) for batch in few])

    def over_a_pass(self) -> "PassEstimate":
        """The ELBO from one pass over the loader, or from batches that are spread over it."""
        if isinstance(self._objective, PathObjective):
            return self._on_common_draws(self._objective)
        total = min(self._batches.num_batches, _MAX_BATCHES)
        count = min(max(_NUM_DRAWS // total, _MIN_DRAWS), _MAX_DRAWS)
        seen = _Seen()
        for batch in self._batches.one_pass(total):
            draws = self.draws_of(batch, count).double()
            seen.means.append(draws.mean().item())
            seen.errors.append((draws.var() / len(draws)).item())
            self._note(seen, batch)
        share = self._share_seen(seen.scales)
        elbo, elbo_se = _mean_and_error(seen, share)
        return PassEstimate(elbo, elbo_se, count * len(seen.means), len(seen.means), share, None)

    def _on_common_draws(self, objective: PathObjective) -> "PassEstimate":
        """The same for a guide whose latents are the same for all batches: draws need be no others.

        Then the mean over all batches is the log weight with all data, draw by draw.
        """
        z, log_q = objective.draws(_NUM_COMMON_DRAWS)
        total, seen = torch.zeros_like(log_q), _Seen()
        for batch in self._batches.one_pass(_MAX_BATCHES):
            values = self._log_density(objective, batch, z)
            total += self.weight(batch) * values
            seen.means.append((values - log_q).mean().item())
            seen.errors.append(0.0)
            self._note(seen, batch)
        share = self._share_seen(seen.scales)
        log_weights = total / sum(seen.weights) - log_q
        elbo, by_batches = _mean_and_error(seen, share)
        by_draws = (log_weights.double().var() / len(z)).sqrt().item()
        is_exact = abs(sum(1 / scale for scale in seen.scales) - 1) < _ROUND_OFF and share > 0
        return PassEstimate(
            elbo,
            math.hypot(by_draws, by_batches),
            len(z),
            len(seen.means),
            share,
            log_weights if is_exact else None,
        )

    def _note(self, seen: "_Seen", batch: Batch) -> None:
        seen.weights.append(self.weight(batch))
        seen.scales.append(self._log_joint.structure(*batch).scale)

    def _share_seen(self, scales: list[float]) -> float:
        """How much of all data these batches are, from 0 to 1; 0 where it is not known."""
        if not self._batches.is_partition:
            return 0.0
        share = len(scales) / self._batches.num_batches
        is_scaled = any(scale != 1 for scale in scales)
        return min(share, sum(1 / scale for scale in scales)) if is_scaled else share


class PassEstimate(NamedTuple):
    """The ELBO as the mean over batches.

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
    log_weights: Tensor | None


class _Seen:
    """What was seen of each batch."""

    def __init__(self) -> None:
        self.means: list[float] = []
        #: the variance of each mean by its draws
        self.errors: list[float] = []
        self.weights: list[float] = []
        self.scales: list[float] = []


def _mean_and_error(seen: _Seen, share: float) -> tuple[float, float]:
    """The weighted mean of independent means, and its standard error.

    :param share: of all there are, how many these are: the rest would vary as they do.
    """
    shares = [weight / sum(seen.weights) for weight in seen.weights]
    mean = math.fsum(s * m for s, m in zip(shares, seen.means))
    by_draws = math.fsum(s**2 * e for s, e in zip(shares, seen.errors))
    deviations = math.fsum(s**2 * (m - mean) ** 2 for s, m in zip(shares, seen.means))
    by_batches = deviations * len(shares) / max(len(shares) - 1, 1)
    return mean, math.sqrt(by_draws + max(1 - share, 0.0) * by_batches)
