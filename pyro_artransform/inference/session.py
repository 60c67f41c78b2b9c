# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What surrounds a fit: its seed, Ctrl-C between two of its steps, and its progress bar."""

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pyro
from pyro.util import get_rng_state, set_rng_state

_SHOWN = 50


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and torch, and then puts them back to where they were.

    :param seed: the seed; ``None`` does nothing.
    """
    if seed is None:
        yield
        return
    state = get_rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)


@contextmanager
def noted_interrupts() -> Iterator[threading.Event]:
    """While open, the first Ctrl-C only sets the event, and the second one interrupts as always.

    A step that is cut off half way would leave some parameters moved and others not. Outside of the
    main thread, where no signal arrives, this does nothing.
    """
    requested, old = threading.Event(), None

    def handle(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    if threading.current_thread() is threading.main_thread():
        old = signal.getsignal(signal.SIGINT)
    if old is None:  # a handler that is not Python's could not be put back
        yield requested
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, old)


@dataclass
class ProgressBar:
    """A bar of ``tqdm`` with the mean ELBO of the last steps.

    :param bar: the bar; ``None`` shows nothing.
    """

    bar: Any

    def say(self, what: str) -> None:
        """Shows what is being done."""
        if self.bar is not None:
            self.bar.set_description(what)

    def update(
        self, losses: Sequence[float], total: int | None, epoch: str = "", batch: str = ""
    ) -> None:
        """Goes on to the number of losses.

        :param losses: one for each step.
        :param total: the number of steps in all, if it is known.
        :param epoch: the number of the epoch, in words.
        :param batch: the number of the mini-batch in it, in words.
        """
        if self.bar is None:
            return
        if total is not None:
            self.bar.total = total
        if epoch:
            self.bar.set_description(epoch, refresh=False)
        recent = [loss for loss in losses[-_SHOWN:] if math.isfinite(loss)]
        elbo = f"ELBO {-math.fsum(recent) / len(recent):.3f}" if recent else ""
        if batch or elbo:
            self.bar.set_postfix_str(", ".join(filter(None, (batch, elbo))), refresh=False)
        self.bar.update(len(losses) - self.bar.n)


@contextmanager
def progress_bar(shown: bool) -> Iterator[ProgressBar]:
    """A progress bar, closed at the end; an empty one where ``tqdm`` is not installed.

    :param shown: whether there is to be one.
    """
    bar = None
    if shown:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            bar = tqdm(unit="step", dynamic_ncols=True)
    try:
        yield ProgressBar(bar)
    finally:
        if bar is not None:
            bar.close()
