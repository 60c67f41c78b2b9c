# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What surrounds a fit: its seed, Ctrl-C between two of its steps, and its progress bar."""

import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pyro
from pyro.util import get_rng_state, set_rng_state


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and torch, and at the end puts them back."""
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
    """The first Ctrl-C only sets the event, so that no step is cut off; the second one interrupts."""
    requested, old = threading.Event(), signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    # no signal arrives in other threads, and a handler that is not Python's could not be put back
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and old is not None:
        signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        if is_main and old is not None:
            signal.signal(signal.SIGINT, old)


@dataclass
class ProgressBar:
    """A bar of ``tqdm`` with the mean objective of the last 50 steps; ``None`` shows nothing."""

    bar: Any
    is_live: bool = True  #: on a terminal or in a notebook; elsewhere it is one line at the end
    objective: str = "ELBO"  #: losses are the negative of it

    def say(self, what: str) -> None:
        """Shows what is being done."""
        if self.bar is not None:
            self.bar.set_description(what, refresh=self.is_live)

    def update(
        self, losses: Sequence[float], total: int | None, epoch: str = "", batch: str = ""
    ) -> None:
        """Goes on to the number of losses; in all there are ``total``, if that is known."""
        if self.bar is None:
            return
        self.bar.total = total
        if epoch:
            self.bar.set_description(epoch, refresh=False)
        words = [batch] if batch else []
        recent = [loss for loss in losses[-50:] if math.isfinite(loss)]
        if recent:
            words.append(f"{self.objective} {-math.fsum(recent) / len(recent):.3f}")
        self.bar.set_postfix_str(", ".join(words), refresh=False)
        self.bar.update(len(losses) - self.bar.n)


@contextmanager
def progress_bar(shown: bool, objective: str = "ELBO") -> Iterator[ProgressBar]:
    """A progress bar, closed at the end; an empty one where ``tqdm`` is not installed."""
    bar, is_live = None, True
    if shown:
        with suppress(ImportError):
            from tqdm.auto import tqdm

            # a notebook shows widgets, and what is written to stderr, though it is not a terminal
            is_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
            is_notebook |= type(sys.stderr).__module__ == "ipykernel.iostream"
            is_live = is_notebook or sys.stderr.isatty()
            wait = {} if is_live else {"mininterval": math.inf, "delay": 1e-9}
            bar = tqdm(unit="step", dynamic_ncols=True, **wait)
    with nullcontext() if bar is None else bar:
        yield ProgressBar(bar, is_live, objective)
        if bar is not None:
            bar.delay = 0.0  # or else a bar that was never shown is not shown at its end
