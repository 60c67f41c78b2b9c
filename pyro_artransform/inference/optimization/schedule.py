# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""When the step size goes down, when a fit ends, and what its parameters are averaged over."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...diagnostics.importance import GOOD_KHAT, KHAT_OF_VARIANCE
from ...diagnostics.psis import fit_tail
from ..config import OptimizationConfig

PLATEAU = "the ELBO stopped moving"
NOTHING_TO_WIN = "the guide is the posterior, as far as its weights tell: nothing is left to win"
LITTLE_TO_WIN = "little was left to win, as far as its weights tell"
LIMIT = (
    "the largest number of steps that a fit takes by itself was reached while the ELBO still moved"
)
# steps in which the step size rises at first, the constant part of a given number of steps, and the steps
# that the average of parameters reaches back at least
_WARM_UP, _CONSTANT_SHARE, _AVERAGED_STEPS = 20, 0.4, 100
# epochs in a window, and in the longest constant phase where these are more steps
_MIN_EPOCHS, _MAX_EPOCHS = 3, 20


def remaining_gap(draws: Tensor, is_start: bool = False) -> float:
    """What the ELBO lacks to the evidence in nats, by log weights ``(n,)``.

    It is inf where they do not know it; of a start where they may have no variance either, as those of a
    Gaussian of a posterior with a tail, whose gap is 0.001 nats and whose k-hat 0.9.
    """
    # weights with a heavy tail know too little of the evidence
    bound, num_se = (KHAT_OF_VARIANCE, 1.0) if is_start else (GOOD_KHAT, 0.0)
    tail, elbo = fit_tail(draws), draws.mean()
    if not math.isfinite(elbo) or tail.khat + num_se * tail.khat_se > bound:
        return math.inf
    return float(draws.logsumexp(0) - math.log(len(draws)) - elbo)


@dataclass(frozen=True)
class Schedule:
    """A constant step size for as long as the ELBO improves, then half a cosine down to zero.

    :param epoch: the steps in which the noise of mini-batches cancels; 1 without a loader.
    :param num_steps: the number of steps that were asked for, if they were.
    :param end: the number of steps in all; ``None`` while it is not known.
    """

    config: OptimizationConfig
    epoch: int = 1
    num_steps: int | None = None
    end: int | None = None
    decay_start: int = 0
    reason: str = ""

    def of_length(self, num_steps: int | None) -> "Schedule":
        """The schedule of a given number of steps; itself without one."""
        if num_steps is None:
            return self
        return replace(
            self,
            num_steps=num_steps,
            end=num_steps,
            decay_start=math.ceil(_CONSTANT_SHARE * num_steps),
            reason=f"all {num_steps} steps that were asked for were taken",
        )

    def ending_at(self, step: int, reason: str) -> "Schedule":
        """The schedule of a fit that ends now."""
        return replace(self, end=step, reason=reason)

    def observe(self, losses: Sequence[float]) -> "Schedule":
        """The schedule after the losses of all steps: once they stop falling the step size does."""
        step = len(losses)
        if self.end is not None or step % self.whole_epochs(self.config.window // 6):
            return self
        if self.is_still(losses):
            return self._decaying(step, PLATEAU)
        if step >= max(self.config.max_constant, _MAX_EPOCHS * self.epoch):
            return self._decaying(step, LIMIT)
        return self

    def _decaying(self, step: int, reason: str) -> "Schedule":
        """The schedule whose step size goes down from now on."""
        return replace(self, decay_start=step, end=self._end_of_decay(step), reason=reason)

    def _end_of_decay(self, start: int) -> int:
        return start + self.whole_epochs(math.ceil(self.config.decay_share * start))

    def expected_end(self, step: int) -> int:
        """The number of steps in all; while it is not known, that of a fit that stops moving now."""
        still = max(step, 2 * self.whole_epochs(self.config.window, _MIN_EPOCHS))
        return self._end_of_decay(still) if self.end is None else self.end

    def is_for_check(self, step: int) -> bool:
        """Whether to check, after a number of steps, what is left to win."""
        every = self.config.check_every
        return self.end is None and step >= 2 * every and step % every == 0

    def after_check(self, step: int, gap: float) -> "Schedule":
        """The schedule after a check of the gap to the evidence: with a good one the step size falls."""
        if gap > self.config.good_gap:
            return self
        return self._decaying(step, LITTLE_TO_WIN) if step else self.ending_at(0, NOTHING_TO_WIN)

    def whole_epochs(self, steps: int, min_epochs: int = 1) -> int:
        """A number of steps rounded up to whole epochs, and to a number of these."""
        if self.epoch == 1:
            return steps
        return self.epoch * max(math.ceil(steps / self.epoch), min_epochs)

    def is_still(self, losses: Sequence[float]) -> bool:
        """Whether the mean fell by no more than is worth while, or can be seen; not of too few to tell."""
        window = self.whole_epochs(self.config.window, _MIN_EPOCHS)
        before, after = losses[-2 * window : -window], losses[-window:]
        if len(losses) < 2 * window:
            return False
        if self.epoch > 1:  # the differences between the batches of an epoch are no noise
            starts = range(0, len(before), self.epoch)
            before = [_mean_and_variance(before[k : k + self.epoch])[0] for k in starts]
            after = [_mean_and_variance(after[k : k + self.epoch])[0] for k in starts]
        (old, old_var), (new, new_var) = _mean_and_variance(before), _mean_and_variance(after)
        return not old - new > max(self.config.min_improvement, math.sqrt(old_var + new_var))

    def is_over(self, step: int) -> bool:
        """Whether a number of steps is enough."""
        return self.end is not None and step >= self.end

    def factor(self, step: int) -> float:
        """What to multiply the step size by, after a number of steps."""
        size = min(1.0, (step + 1) / _WARM_UP)
        if self.end is None:
            return size
        share = max(step - self.decay_start, 0) / max(self.end - self.decay_start, 1)
        return size * 0.5 * (1 + math.cos(math.pi * share))

    def average_weight(self, step: int) -> float:
        """The weight of the newest parameters in their average, by a share that of polynomial decay.

        See Stochastic Gradient Descent for Non-smooth Optimization: Convergence Results and Optimal
        Averaging Schemes (Shamir, Zhang, 2013), https://arxiv.org/abs/1212.1824.
        """
        reach = max(_AVERAGED_STEPS, self.config.averaged_share * step)
        return 1 / min(reach, step + 1)


def _mean_and_variance(losses: Sequence[float]) -> tuple[float, float]:
    """The mean of the finite numbers, and its variance."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return math.nan, math.nan
    mean = math.fsum(finite) / len(finite)
    variance = math.fsum((loss - mean) ** 2 for loss in finite) / (len(finite) - 1)
    return mean, variance / len(finite)
