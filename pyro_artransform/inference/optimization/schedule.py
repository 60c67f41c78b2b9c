# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""When the step size goes down, and when a fit ends."""

import math
from collections.abc import Callable, Sequence
from typing import Any

_WARM_UP = 20
_CONSTANT_SHARE = 0.4  # of a given number of steps
_WINDOW = 300
_DECAY_SHARE = 0.6  # of the constant phase
MIN_DECAY, _MAX_DECAY = 400, 1500
# of a guide that is further from the evidence than this, in nats, small steps still make much
_MUCH, _LONG_DECAY = 0.2, 2800
_MIN_EPOCHS = 3  # in a window, and in the decay
# an improvement from one window to the next that is too small to go on for, in nats
_STILL = 0.004
_NUM_TAIL_STEPS = 100
_TAIL_FACTOR = 0.2
_STATE = ("decay_start", "tail_start", "end", "reason")

PLATEAU = "the ELBO stopped moving"
LIMIT = (
    "the largest number of steps that a fit takes by itself was reached while the ELBO still moved"
)
GIVEN = "all {} steps that were asked for were taken"


class Schedule:
    """A constant step size for as long as the ELBO improves, then half a cosine down to zero.

    The last steps of all are for the tails of the posterior, with a smaller step size.

    :param num_steps: the number of steps; by default the fit finds out itself.
    :param max_constant: the longest constant phase, where it does.
    :param has_tail_steps: whether there are steps for the tails.
    :param epoch: the number of steps that see all data once: the schedule looks at whole epochs.
    :param min_decay: the shortest time for the step size to go down.
    """

    def __init__(
        self,
        num_steps: int | None,
        max_constant: int,
        has_tail_steps: bool = False,
        epoch: int = 1,
        min_decay: int = MIN_DECAY,
    ) -> None:
        self.max_constant = max_constant
        self._epoch, self._min_decay = epoch, min_decay
        self._has_tail_steps = has_tail_steps
        self.decay_start: int | None = None
        self.tail_start: int | None = None
        self.end: int | None = None
        self.reason = ""
        if num_steps is not None:
            tail = min(_NUM_TAIL_STEPS, num_steps // 10) if has_tail_steps else 0
            decay_start = math.ceil(_CONSTANT_SHARE * (num_steps - tail))
            self._set_ends(decay_start, num_steps - tail, num_steps)
            self.reason = GIVEN.format(num_steps)

    def _set_ends(self, decay_start: int, tail_start: int, end: int) -> None:
        self.decay_start, self.tail_start, self.end = decay_start, tail_start, end

    def is_for_tails(self, step: int) -> bool:
        """Whether the step after so many steps is for the tails."""
        return self.tail_start is not None and step >= self.tail_start

    def skip_tails(self) -> None:
        """Ends before the steps for the tails, unless the number of steps was given."""
        if self.reason in (PLATEAU, LIMIT):
            self.end = self.tail_start

    def factor(self, step: int) -> float:
        """What to multiply the step size by.

        :param step: the number of steps taken before.
        """
        warm_up = min(1.0, (step + 1) / _WARM_UP)
        if self.decay_start is None or self.tail_start is None or self.end is None:
            return warm_up
        if step >= self.tail_start:
            tail_warm_up = min(1.0, (step - self.tail_start + 1) / _WARM_UP)
            return _TAIL_FACTOR * tail_warm_up * _half_cosine(step, self.tail_start, self.end)
        return warm_up * _half_cosine(step, self.decay_start, self.tail_start)

    def is_over(self, step: int) -> bool:
        """Whether so many steps are enough."""
        return self.end is not None and step >= self.end

    def observe(self, losses: Sequence[float], gap: Callable[[], float]) -> None:
        """Looks at the losses so far, and ends the constant phase once they have stopped falling.

        :param losses: one for each step, those of skipped steps not finite.
        :param gap: how far the ELBO is from the evidence, in nats; 0 where that is not known.
        """
        step, window = len(losses), self._whole(_WINDOW, _MIN_EPOCHS)
        if self.end is not None or step < 2 * window or step % self._whole(_WINDOW // 6):
            return
        before, after = losses[-2 * window : -window], losses[-window:]
        is_still = _is_still(_by_epoch(before, self._epoch), _by_epoch(after, self._epoch))
        if is_still or step >= self.max_constant:
            longest = max(_MAX_DECAY, self._whole(1, _MIN_EPOCHS))
            decay = min(max(math.ceil(_DECAY_SHARE * step), self._min_decay), longest)
            decay = max(decay, _LONG_DECAY) if gap() > _MUCH else decay
            tail = _NUM_TAIL_STEPS if self._has_tail_steps else 0
            self._set_ends(step, step + self._whole(decay), step + self._whole(decay) + tail)
            self.reason = PLATEAU if is_still else LIMIT

    def _whole(self, steps: int, min_epochs: int = 1) -> int:
        """At least so many steps that make whole epochs, and at least so many of them."""
        if self._epoch == 1:
            return steps
        return self._epoch * max(math.ceil(steps / self._epoch), min_epochs)

    def state(self) -> dict[str, Any]:
        """Everything that changes, as plain data."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` returned."""
        for name in _STATE:
            setattr(self, name, state[name])


def _half_cosine(step: int, start: int, end: int) -> float:
    """One up to the start, then down to zero at the end."""
    share = max(step - start, 0) / max(end - start, 1)
    return 0.5 * (1 + math.cos(math.pi * share))


def _by_epoch(losses: Sequence[float], epoch: int) -> list[float]:
    """The mean of each epoch, in which the differences between batches are no noise."""
    if epoch == 1:
        return list(losses)
    epochs = (losses[start : start + epoch] for start in range(0, len(losses), epoch))
    return [_mean_and_variance(values)[0] for values in epochs]


def _is_still(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the mean did not fall by more than is worth while, or than can be seen."""
    (old, old_var), (new, new_var) = _mean_and_variance(before), _mean_and_variance(after)
    return not old - new > max(_STILL, math.sqrt(old_var + new_var))


def _mean_and_variance(losses: Sequence[float]) -> tuple[float, float]:
    """The mean of the finite numbers, and its variance."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return math.nan, math.nan
    mean = math.fsum(finite) / len(finite)
    variance = math.fsum((loss - mean) ** 2 for loss in finite) / (len(finite) - 1)
    return mean, variance / len(finite)
