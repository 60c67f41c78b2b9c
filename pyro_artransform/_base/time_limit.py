# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Wall-time limits and Ctrl-C for computations of several phases."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from .arguments import check_positive

INTERRUPTED = "it was interrupted"
OUT_OF_TIME = "the time limit was reached"
# maximum wall seconds of a result phase after Ctrl-C
_GRACE = 1.0

T = TypeVar("T")


class TimeLimit:
    """Ends the current phase after a share of the seconds, or at Ctrl-C.

    In a ``with`` block the first Ctrl-C only ends phases, so that results so far are kept; the second one
    interrupts. Loops in phases iterate over :func:`until_deadline`.

    :param max_seconds: the wall time of all phases; ``None`` for no limit.
    :param tick: called in each iteration of a loop.
    :param say: called with a description of the current activity.
    :param tell: called with sentences that stay when the activity is over.
    """

    def __init__(
        self,
        max_seconds: float | None = None,
        tick: Callable[[], object] = lambda: None,
        say: Callable[[str], object] = lambda _: None,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._began, self._most = time.perf_counter(), math.inf
        if max_seconds is not None:
            self._most = check_positive("max_seconds", max_seconds)
        self._phase_end, self._grace, self._interrupted = self._most, 0.0, math.inf
        self.tick, self.say, self.tell = tick, say, tell
        self.can_abandon = False  #: whether :func:`check_time` raises when the phase is over

    @property
    def seconds(self) -> float:
        """The wall time so far."""
        return time.perf_counter() - self._began

    @property
    def reason(self) -> str:
        """Why the current phase is over; empty if it is not."""
        if not self.is_over():
            return ""
        return INTERRUPTED if self.was_interrupted else OUT_OF_TIME

    @property
    def was_interrupted(self) -> bool:
        """Whether Ctrl-C ended a phase."""
        return math.isfinite(self._interrupted)

    @property
    def end(self) -> float:
        """When the current phase ends, in seconds since the start."""
        return min(self._phase_end, self._interrupted + self._grace)

    def is_over(self) -> bool:
        """Whether the current phase is over."""
        return self.seconds >= self.end

    def enter_phase(self, share: float, *, has_grace: bool = False) -> None:
        """Starts a phase, which ends after a share of all seconds.

        :param has_grace: whether the phase may run for a second after Ctrl-C, to make the result.
        """
        self._phase_end, self._grace = share * self._most, _GRACE if has_grace else 0.0
        if self.was_interrupted:
            self._interrupted = self.seconds

    def interrupt(self, *_: object) -> None:
        """Ends all phases; a second call raises ``KeyboardInterrupt``."""
        if self.was_interrupted:
            raise KeyboardInterrupt
        self._interrupted = self.seconds

    def __enter__(self) -> "TimeLimit":
        self._token = _present.set(self)
        self._handler = signal.getsignal(signal.SIGINT)
        # only the main thread gets signals, and a handler from outside Python could not be restored
        is_main = threading.current_thread() is threading.main_thread()
        self._is_handling = is_main and self._handler is not None
        if self._is_handling:
            signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        _present.reset(self._token)
        if self._is_handling:
            signal.signal(signal.SIGINT, self._handler)


_ENDLESS = TimeLimit()
_present = ContextVar("time_limit", default=_ENDLESS)


def until_deadline(items: Iterable[T], *, at_least: int = 0) -> Iterator[T]:
    """Yields items until the current phase is over.

    :param at_least: the number of items to yield in any case.
    """
    for index, item in enumerate(items):
        if index >= at_least and is_out_of_time():
            return
        yield item


def is_out_of_time() -> bool:
    """Whether the current phase is over."""
    limit = _present.get()
    limit.tick()
    return limit.is_over()


class OutOfTimeError(Exception):
    """Ends a computation that is of no use unless it is finished."""


class abandonable:
    """A block that ends at the next :func:`check_time` after the end of the phase, if that is allowed."""

    def __init__(self, is_allowed: bool = True) -> None:
        self._limit, self._is_allowed = _present.get(), is_allowed

    def __enter__(self) -> None:
        self._before, self._limit.can_abandon = self._limit.can_abandon, self._is_allowed

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._limit.can_abandon = self._before
        return kind is OutOfTimeError and self._is_allowed


def check_time() -> None:
    """Raises an ``OutOfTimeError`` inside an :func:`abandonable` block whose phase is over."""
    if _present.get().can_abandon and is_out_of_time():
        raise OutOfTimeError


def has_limit() -> bool:
    """Whether the current phase has an end, so that its work must come in small parts."""
    return math.isfinite(_present.get().end)
