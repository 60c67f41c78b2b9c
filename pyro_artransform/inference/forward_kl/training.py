# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Steps of maximum likelihood that end when held-out draws become no more probable."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...joint.protocols import ScaledSteps
from ..config import DrawsConfig
from ..optimization.optimizers import Adam
from ..optimization.training import FitError
from .densities import Density, Rows, log_probs


@dataclass
class LikelihoodTraining:
    """Adam on mini-batches of draws, with a step size that goes down where held-out draws gain nothing.

    :param density: what is trained.
    :param rows: the draws that it is trained on.
    :param held_out: those that say when to stop.
    :param scales: the guide, if it scales steps.
    :param config: the numbers behind all of it.
    """

    density: Density
    rows: Rows
    held_out: Rows
    scales: ScaledSteps | None
    config: DrawsConfig
    #: the negative mean log-density of the mini-batch of each step, NaN where the step was skipped
    losses: list[float] = field(default_factory=list)
    #: the mean log-density of held-out draws at each look
    history: list[float] = field(default_factory=list)
    num_skipped: int = 0

    def __post_init__(self) -> None:
        self._parameters = self.density.parameters()
        if not self._parameters:
            raise ValueError("density: expected parameters to train, got none")
        self._optimizer = self._new_optimizer()
        self._batches = self._indices()
        self._norms: list[float] = []
        self._level = self._looks_since_gain = self._skipped_in_a_row = 0
        self._to_beat = -math.inf
        self._start = self._best = self._values()
        self._start_rows = self._best_rows = log_probs(self.density, self.held_out)
        self._look_at(self._start_rows)

    def _new_optimizer(self) -> Adam:
        return Adam(self._parameters, self.config.step_size, self.config.betas, self.scales)

    def _indices(self) -> Iterator[Tensor]:
        """Indices of mini-batches, all draws once before one comes again."""
        device, count = self.rows.values.device, len(self.rows.values)
        while True:
            yield from torch.randperm(count, device=device).split(self.config.batch_size)

    def step(self) -> None:
        """Takes one step, or skips it where the loss or its gradient is not finite.

        :raises FitError: if that is so in many steps in a row.
        """
        batch = self.rows.take(next(self._batches))
        loss = -(self.density.log_prob(batch) + batch.offset).mean()
        loss.backward()
        limit = self.config.clip_factor * statistics.median(self._norms or [math.inf])
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit).item()
        is_finite = math.isfinite(norm) and math.isfinite(loss.item())
        if is_finite:
            self._norms = [*self._norms[1 - self.config.clip_window :], norm]
            self._skipped_in_a_row = 0
            self._optimizer.step(self.config.step_factors[self._level])
        else:
            self._skip()
        self.losses.append(loss.item() if is_finite else math.nan)
        for parameter in self._parameters:
            parameter.grad = None

    def _skip(self) -> None:
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.config.max_skips:
            raise FitError(
                "the fit stopped: the log-density of draws or its gradient was not finite in "
                f"{self._skipped_in_a_row} steps in a row. Are the draws in the support of the density?"
            )

    def look(self) -> bool:
        """Looks at the held-out draws; says whether the fit is over.

        After a number of looks without a gain it goes on from the best parameters with smaller steps.
        """
        return self._look_at(log_probs(self.density, self.held_out))

    def _look_at(self, rows: Tensor) -> bool:
        value = rows.mean().item()
        self.history.append(value)
        if value > self._best_rows.mean().item():
            self._best, self._best_rows = self._values(), rows
        self._looks_since_gain += 1
        if value > self._to_beat + self.config.min_gain * self.rows.values.shape[-1]:
            self._to_beat, self._looks_since_gain = value, 0
        if self._looks_since_gain < self.config.patience:
            return False
        if self._level + 1 == len(self.config.step_factors):
            return True
        self._level, self._looks_since_gain = self._level + 1, 0
        self._use(self._best)
        self._optimizer = self._new_optimizer()
        return False

    def _values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def conclude(self) -> bool:
        """Ends with the parameters of the best look, or those of the start; says whether with the former.

        Of few draws some look seems good by chance: the gain has to exceed its noise.
        """
        gains = self._best_rows - self._start_rows
        noise = self.config.min_gain_in_se * gains.std() / len(gains) ** 0.5
        is_gain = bool(gains.mean() > noise) or not bool(gains.isfinite().all())
        self._use(self._best if is_gain else self._start)
        return is_gain

    @torch.no_grad()
    def _use(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values):
            parameter.copy_(value)
