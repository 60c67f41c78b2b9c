# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""When the step size goes down, when a fit ends, and what its parameters are averaged over."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ...diagnostics import fit_tail
from ...diagnostics.importance import GOOD_KHAT
from ..config import OptimizationConfig
from .objective import Objective

PLATEAU = "the ELBO stopped moving"
NOTHING_TO_WIN = "the guide is the posterior, as far as its weights tell: nothing is left to win"
LITTLE_TO_WIN = "little was left to win, as far as its weights tell"
LIMIT = (
    "the largest number of steps that a fit takes by itself was reached while the ELBO still moved"
)


class Score(NamedTuple):
    """What parameters are judged by; an unknown gap to the evidence is infinite."""

    elbo: float = -math.inf
    khat: float = math.inf
    gap: float = math.inf


def score_of(objective: Objective, num_draws: int) -> Score:
    """The score of the present parameters by fresh draws."""
    draws = objective.elbo_draws(num_draws)
    elbo = draws.mean().item()
    if not math.isfinite(elbo):
        return Score()
    if not objective.has_weights:
        return Score(elbo, 0.0)
    khat = fit_tail(draws).khat
    # weights with a heavy tail know too little of the evidence
    return Score(elbo, khat, gap_of(draws) if khat < GOOD_KHAT else math.inf)


def quick_score(objective: Objective, config: OptimizationConfig) -> Score:
    """The score where little may be left to win; elsewhere an unknown one, by few draws."""
    # for small gaps half the variance of the log weights is the gap
    few = objective.elbo_draws(config.check_draws)
    if not 0.5 * few.var() <= 2 * config.min_improvement:  # NaN is far off as well
        return Score()
    return score_of(objective, config.selection_draws)


def is_good(score: Score, config: OptimizationConfig) -> bool:
    """Whether nothing is left to win, as far as the weights tell."""
    return score.gap <= config.good_gap and score.khat <= config.tail_good_khat


def gap_of(log_weights: Tensor) -> float:
    """How far the ELBO is from the log evidence, in nats, by the log weights of draws of the guide."""
    log_evidence = log_weights.logsumexp(0) - math.log(len(log_weights))
    return float(log_evidence - log_weights.mean())


@dataclass(frozen=True)
class Schedule:
    """A constant step size for as long as the ELBO improves, then half a cosine down to zero.

    The last steps of all are for the tails of the posterior, at a smaller step size.

    :param max_constant: the longest constant phase in steps, where the fit finds its end itself.
    :param epoch: the steps in which the noise of mini-batches cancels; 1 without a loader.
    :param averaged_steps: the steps that the running average of the parameters reaches back, at least.
    :param averaged_share: the same as a share of the steps so far.
    :param num_steps: the number of steps that was asked for; ``None`` where the fit finds its end.
    :param end: the number of steps in all; ``None`` while neither it nor what follows is known.
    """

    config: OptimizationConfig
    max_constant: int
    min_decay: int
    epoch: int = 1
    tail_steps: int = 0
    averaged_steps: int = 100
    averaged_share: float = 0.0
    num_steps: int | None = None
    end: int | None = None
    decay_start: int = 0
    tail_start: int = 0
    reason: str = ""

    def of_length(self, num_steps: int | None) -> "Schedule":
        """The schedule of a given number of steps; itself without one."""
        if num_steps is None:
            return self
        tail_start = num_steps - min(self.tail_steps, num_steps // 10)
        return replace(
            self,
            num_steps=num_steps,
            end=num_steps,
            decay_start=math.ceil(self.config.constant_share * tail_start),
            tail_start=tail_start,
            reason=f"all {num_steps} steps that were asked for were taken",
        )

    def without_steps(self, reason: str) -> "Schedule":
        """The schedule of a fit that has nothing to do."""
        return replace(self, end=0, reason=reason)

    def ending_at(self, step: int, reason: str) -> "Schedule":
        """The schedule of a fit that ends now."""
        return replace(self, end=step, tail_start=min(self.tail_start, step), reason=reason)

    def observe(self, losses: Sequence[float], gap: Callable[[], float]) -> "Schedule":
        """The schedule after the losses of all steps: once they stop falling the step size does.

        :param gap: how far the ELBO is from the evidence, in nats; 0 where that is not known.
        """
        config, step = self.config, len(losses)
        if self.end is not None or step < 2 * config.window:
            return self
        window = self.whole_epochs(config.window, config.min_epochs)
        if step < 2 * window or step % self.whole_epochs(config.window // 6):
            return self
        is_still = self._is_still(losses[-2 * window : -window], losses[-window:])
        if not is_still and step < self.max_constant:
            return self
        decay = self._decay_after(step)
        if gap() > config.long_decay_gap:
            decay = max(decay, config.max_decay)
        return self._decaying(step, decay, PLATEAU if is_still else LIMIT)

    def _decay_after(self, step: int) -> int:
        longest = max(self.config.max_decay, self.whole_epochs(1, self.config.min_epochs))
        return min(max(math.ceil(self.config.decay_share * step), self.min_decay), longest)

    def expected_end(self, step: int) -> int:
        """The number of steps in all; while it is not known, that of a fit that stops moving now."""
        if self.end is not None:
            return self.end
        still = max(step, 2 * self.whole_epochs(self.config.window, self.config.min_epochs))
        return still + self.whole_epochs(self._decay_after(still)) + self.tail_steps

    def _decaying(self, step: int, decay: int, reason: str) -> "Schedule":
        """The schedule whose step size goes down from now on."""
        tail_start = step + self.whole_epochs(decay)
        end = tail_start + self.tail_steps
        return replace(self, decay_start=step, tail_start=tail_start, end=end, reason=reason)

    def is_for_check(self, step: int) -> bool:
        """Whether to check, after a number of steps, what is left to win."""
        every = self.config.check_every
        return self.num_steps is None and step >= 2 * every and step % every == 0

    def after_check(self, step: int, score: Score) -> "Schedule":
        """The schedule after a check: it ends where nothing is left to win, or soon with little left."""
        config = self.config
        if is_good(score, config):
            return self.ending_at(step, NOTHING_TO_WIN)
        if self.end is None and score.gap <= config.min_improvement:
            decay = max(math.ceil(config.decay_share * step), config.min_good_decay)
            return self._decaying(step, decay, LITTLE_TO_WIN)
        return self

    def whole_epochs(self, steps: int, min_epochs: int = 1) -> int:
        """A number of steps rounded up to whole epochs, and to a number of these."""
        if self.epoch == 1:
            return steps
        return self.epoch * max(math.ceil(steps / self.epoch), min_epochs)

    def _is_still(self, before: Sequence[float], after: Sequence[float]) -> bool:
        """Whether the mean did not fall by more than is worth while, or than can be seen."""
        if self.epoch > 1:  # the differences between the batches of an epoch are no noise
            starts = range(0, len(before), self.epoch)
            before = [_mean_and_variance(before[k : k + self.epoch])[0] for k in starts]
            after = [_mean_and_variance(after[k : k + self.epoch])[0] for k in starts]
        (old, old_var), (new, new_var) = _mean_and_variance(before), _mean_and_variance(after)
        return not old - new > max(self.config.min_improvement, math.sqrt(old_var + new_var))

    def is_for_tails(self, step: int) -> bool:
        """Whether the next step, after a number of steps, is for the tails."""
        return self.end is not None and step >= self.tail_start

    def is_over(self, step: int) -> bool:
        """Whether a number of steps is enough."""
        return self.end is not None and step >= self.end

    def factor(self, step: int) -> float:
        """What to multiply the step size by, after a number of steps."""
        begin, decay_start, end, size = 0, self.decay_start, self.tail_start, 1.0
        if self.is_for_tails(step):
            begin = decay_start = self.tail_start
            end, size = self.end or begin, self.config.tail_step_size
        size *= min(1.0, (step - begin + 1) / self.config.warm_up)
        if self.end is None:
            return size
        share = max(step - decay_start, 0) / max(end - decay_start, 1)
        return size * 0.5 * (1 + math.cos(math.pi * share))

    def average_weight(self, step: int) -> float:
        """The weight of the newest parameters in their average, by a share that of polynomial decay.

        See Shamir, Zhang, 2013, https://arxiv.org/abs/1212.1824.
        """
        reach = max(self.averaged_steps, self.averaged_share * step)
        return 1 / min(reach, step + 1)


def new_schedule(
    config: OptimizationConfig, by_path: bool, num_batches: int | None, is_random: bool
) -> Schedule:
    """The schedule of a fit that finds its end itself, by what is noisy in its steps."""
    epoch, is_noisy = num_batches or 1, num_batches is not None or is_random
    longest = config.max_constant_path if by_path else config.max_constant_pyro
    return Schedule(
        config,
        max_constant=max(longest, config.max_constant_epochs * epoch),
        min_decay=config.min_noisy_decay if is_noisy else config.min_decay,
        epoch=epoch,
        tail_steps=config.tail_steps if by_path and num_batches is None else 0,
        averaged_steps=max(config.averaged_steps, config.averaged_epochs * epoch),
        averaged_share=config.averaged_share if is_noisy else 0.0,
    )


def _mean_and_variance(losses: Sequence[float]) -> tuple[float, float]:
    """The mean of the finite numbers, and its variance."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return math.nan, math.nan
    mean = math.fsum(finite) / len(finite)
    variance = math.fsum((loss - mean) ** 2 for loss in finite) / (len(finite) - 1)
    return mean, variance / len(finite)
