# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The schedule of the step size, the end of a fit, and the weights of the parameter average."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...diagnostics.importance_sampling import GOOD_GAP, GOOD_KHAT, GOOD_TAIL
from ...diagnostics.psis import fit_tail, share_above

PLATEAU = "the ELBO stopped improving"
NOTHING_TO_WIN = "the importance weights show little difference between guide and posterior"
LITTLE_TO_WIN = "the importance weights show that little could still be gained"
FILLED = "the steps that max_seconds allows were taken"
LIMIT = "the default maximum of steps was reached while the ELBO was still improving"
STOPPED = "the callback asked to stop"
NUM_COMPARED = 1000  #: draws for an estimate of the gap, every quarter of a window
# steps whose mean ELBO is compared with that of the preceding window, and the longest phase of constant step
# size; from benchmarks/price.md, as are all numbers here without a source
_WINDOW, _MAX_CONSTANT = 100, 3000
# the improvement between windows below which training stops: in nats, and as a share of the gap
_MIN_IMPROVEMENT, _MIN_SHARE = 0.01, 0.1
# the gap in nats at which training stops: 0.02 after the first window, and as much more after each other one,
# since a further nat costs more steps, up to the second; mini-batches begin with that, as thousands of
# latents take 300 steps and 25 s from 0.07 to 0.04 nats (benchmarks/crossed.md)
_SMALL_GAP, MOST_GAP = 0.02, 0.05
# steps of the decay, of one that trains the tails, and the fraction of the step size it starts from
_DECAY, _DECAY_OF_TAILS, _DECAY_FACTOR = 150, 50, 0.3
# the largest k-hat with which training stops without a decay
_KHAT_AT_END = 0.6
# the share of a fixed number of steps spent in decay, from the full step size: the guide may still be far off
_DECAY_SHARE = 0.4
# parameters are averaged over about the last 1/8 of all steps; 1/3 still included the climb of Pyro's
# Gaussian guides
_AVERAGED_PARTS = 8
# epochs in a window, and in the longest constant phase if that is more steps
_MIN_EPOCHS, _MAX_EPOCHS = 3, 20


def remaining_gap(draws: Tensor, most_khat: float = GOOD_KHAT) -> float:
    """The gap between the ELBO and the evidence in nats, estimated from log weights ``(n,)``.

    It is inf if k-hat is larger than ``most_khat``, so that the weights do not estimate it, and the tail has
    a share of the weights. A Gaussian guide of a heavy-tailed posterior may have a gap of 0.001 nats and a
    k-hat of 0.9.
    """
    tail = fit_tail(draws)
    share = float(share_above(draws, draws.new_tensor(tail.log_cutoff)))
    # with fewer draws the share of a tail is less certain than in the verdict
    return math.inf if tail.khat > most_khat and share > GOOD_TAIL / 4 else _gap(draws)


def _gap(draws: Tensor) -> float:
    """The log of the mean weight less the mean log weight; inf if that is not finite."""
    found = float(draws.logsumexp(0) - math.log(len(draws)) - draws.mean())
    return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Schedule:
    """A constant step size while the ELBO improves, then a half-cosine decay to zero.

    The decay starts from the average of the parameters.

    :param epoch: the number of steps over which mini-batch noise cancels; 1 without a loader.
    :param num_compared: the number of draws for an estimate of the gap.
    :param num_steps: the number of steps the user requested, or ``None``.
    :param end: the total number of steps, ``None`` while unknown.
    :param is_for_tails: whether steps of the decay train the tails.
    :param dim: the number of latents.
    :param gap: the last estimate of the gap in nats; inf if there is none.
    :param small_gap: a gap at which training stops in any window; -inf if there is none.
    """

    epoch: int = 1
    num_compared: int = NUM_COMPARED
    num_steps: int | None = None
    end: int | None = None
    decay_start: int = 0
    reason: str = ""
    is_for_tails: bool = False
    dim: int = 1
    gap: float = math.inf
    small_gap: float = -math.inf

    def of_length(self, num_steps: int | None) -> "Schedule":
        """The schedule for a fixed number of steps; unchanged for ``None``."""
        if num_steps is None:
            return self
        return replace(
            self,
            num_steps=num_steps,
            end=num_steps,
            decay_start=num_steps - int(_DECAY_SHARE * num_steps),
            reason=f"the requested number of steps ({num_steps}) was taken",
        )

    def ending_at(self, step: int, reason: str) -> "Schedule":
        """The schedule of a fit that ends at this step."""
        start = step if self.end is None else min(self.decay_start, step)
        return replace(self, decay_start=start, end=step, reason=reason)

    def observe(self, losses: Sequence[float]) -> "Schedule":
        """Updates the schedule with the losses of all steps: the decay starts once they stop falling."""
        step = len(losses)
        if self.end is not None or step % self.whole_epochs(_WINDOW // 4):
            return self
        if self.is_still(losses):
            return self._decaying(step, PLATEAU)
        if step >= max(_MAX_CONSTANT, _MAX_EPOCHS * self.epoch):
            return self._decaying(step, LIMIT)
        return self

    def within_time(self, step: int, left: float) -> "Schedule":
        """The schedule whose decay fills the rest of the time, once that is a third of all steps.

        :param left: the number of steps for which there is time, but their seconds vary.
        """
        if self.end is not None or left > 0.5 * step:
            return self
        end = step + max(int(0.9 * left), 1)
        return replace(self, decay_start=step, end=end, reason=FILLED)

    def _decaying(self, step: int, reason: str, num_steps: int = _DECAY) -> "Schedule":
        """The schedule whose decay starts at this step."""
        end = step + self.whole_epochs(num_steps)
        return replace(self, decay_start=step, end=end, reason=reason)

    def expected_end(self, step: int) -> int:
        """The total number of steps; while unknown, the number if the ELBO stopped moving now."""
        still = max(step, 2 * self.whole_epochs(_WINDOW, _MIN_EPOCHS))
        return still + self.whole_epochs(_DECAY) if self.end is None else self.end

    def is_for_check(self, step: int) -> bool:
        """Whether the gap is to be checked after this number of steps."""
        every = _WINDOW // 4
        return self.end is None and step >= 2 * every and step % every == 0

    @property
    def num_few(self) -> int:
        """The number of draws that show whether a gap is far from small, and compare guides on all data."""
        return self.num_compared // 8

    def after_check(self, step: int, log_weights: Callable[[int], Tensor]) -> "Schedule":
        """Checks the gap to the evidence: the decay starts if it is small enough.

        Steps end if k-hat is small, too; otherwise the decay trains the tails.

        :param log_weights: returns the log weights of a number of draws.
        """
        later = min(max(step / _WINDOW, 1) * _SMALL_GAP, MOST_GAP)
        small_gap = max(self.small_gap, later)
        # the gap of normal log weights is half of their variance, so that few draws show a large one
        if (clear := _gap(log_weights(self.num_few))) > 3 * small_gap:
            return replace(self, gap=clear)
        found = replace(self, gap=remaining_gap(log_weights(self.num_compared)))
        if found.gap > small_gap:
            return found
        # with 1,000 draws the standard error of k-hat is 0.15; with mini-batches, whose draws are passes over
        # all data, the verdict has no more either
        times = 1 if self.small_gap > 0 else 5
        more = log_weights(times * self.num_compared)
        if remaining_gap(more, _KHAT_AT_END) <= small_gap:
            return found.ending_at(step, NOTHING_TO_WIN)
        # a thousand draws may not see a tail
        is_little = step > 0 and remaining_gap(more) <= small_gap
        return found._decaying(step, LITTLE_TO_WIN, _DECAY_OF_TAILS) if is_little else found

    def with_loss_of_decay(self, log_weights: Callable[[int], Tensor]) -> "Schedule":
        """Chooses the loss of the decay: that for the tails if k-hat is not small.

        Otherwise steps end on a plateau: the average is as good as the end of a decay. They also do at a
        large gap, to which training of the tails would add.

        :param log_weights: returns the log weights of a number of draws.
        """
        is_heavy = self.reason == LITTLE_TO_WIN
        is_heavy |= remaining_gap(log_weights(self.num_compared), _KHAT_AT_END) == math.inf
        found, start = replace(self, is_for_tails=is_heavy), self.decay_start
        if self.reason in (PLATEAU, LIMIT):
            end = start + (_DECAY_OF_TAILS if is_heavy and self.gap <= GOOD_GAP else 0)
            found = replace(found, end=end)
        return found

    def whole_epochs(self, steps: int, min_epochs: int = 1) -> int:
        """A number of steps rounded up to whole epochs, at least ``min_epochs``."""
        if self.epoch == 1:
            return steps
        return self.epoch * max(math.ceil(steps / self.epoch), min_epochs)

    def is_still(self, losses: Sequence[float]) -> bool:
        """Whether the mean loss fell by less than the minimal improvement or its standard error.

        The minimal improvement is a share of the gap, if that is large. If the standard error is the larger
        one, windows are twice as long.
        """
        gap = self.gap if math.isfinite(self.gap) else 0.0
        least = max(_MIN_IMPROVEMENT, _MIN_SHARE * gap)
        for window in (self.whole_epochs(k * _WINDOW, _MIN_EPOCHS) for k in (1, 2)):
            if len(losses) < 2 * window:
                return False
            fell, error = self._fall(losses[-2 * window : -window], losses[-window:])
            if error <= least:
                break
        return not fell > max(least, error)

    def _fall(self, before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
        """By how much the mean loss of two windows fell, and the standard error of this."""
        if self.epoch > 1:  # differences between the batches of an epoch are not noise
            starts = range(0, len(before), self.epoch)
            before = [_mean_and_variance(before[k : k + self.epoch])[0] for k in starts]
            after = [_mean_and_variance(after[k : k + self.epoch])[0] for k in starts]
        (old, old_var), (new, new_var) = _mean_and_variance(before), _mean_and_variance(after)
        return old - new, math.sqrt(old_var + new_var)

    def is_over(self, step: int) -> bool:
        """Whether the fit is over after this number of steps."""
        return self.end is not None and step >= self.end

    def factor(self, step: int) -> float:
        """The factor on the step size after a number of steps."""
        if self.end is None or step < self.decay_start:
            return min(1.0, (step + 1) / 20)
        share = (step - self.decay_start) / (self.end - self.decay_start)
        size = _DECAY_FACTOR if self.num_steps is None else 1.0
        return size * 0.5 * (1 + math.cos(math.pi * share))

    def step_size(self, largest: float) -> float:
        """A step size in sds of the latents: at most ``largest``, and half the distance from the optimum.

        A gap of g nats of D latents is a distance of about sqrt(2 g / D) sds in each, and the random walk of
        longer steps would first increase it.
        """
        distance = math.sqrt(2 * max(self.gap, _SMALL_GAP) / self.dim)
        return min(largest, 0.5 * distance)

    def average_weight(self, step: int) -> float:
        """The weight of the current parameters in the polynomial-decay average.

        See Stochastic Gradient Descent for Non-smooth Optimization: Convergence Results and Optimal
        Averaging Schemes (Shamir, Zhang, 2013), https://arxiv.org/abs/1212.1824.
        """
        return _AVERAGED_PARTS / max(step, _AVERAGED_PARTS)


def _mean_and_variance(losses: Sequence[float]) -> tuple[float, float]:
    """The mean of the finite losses, and the variance of this mean."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return math.nan, math.nan
    mean = math.fsum(finite) / len(finite)
    variance = math.fsum((loss - mean) ** 2 for loss in finite) / (len(finite) - 1)
    return mean, variance / len(finite)
