# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The surroundings of a fit: its seed, its progress bar, and exclusion of other handlers and threads."""

import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.util import get_rng_state, set_rng_state

_lock = threading.RLock()
_SECONDS_OF_LINE = 30


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Waits for fits in other threads, since all threads share Pyro's stack of handlers.

    :raises RuntimeError: inside a handler that changes models, since a fit would partly ignore it.
    """
    with _lock:
        harmless = TraceMessenger, BlockMessenger
        handlers = [type(h).__name__ for h in _PYRO_STACK if not isinstance(h, harmless)]
        if handlers:
            raise RuntimeError(
                f"{name}: expected to be called outside of Pyro's handlers, got {', '.join(handlers)}, which "
                f"would be partly ignored. Apply them to the model, as in {name}(poutine.condition(model, "
                "data), ...)"
            )
        yield


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and torch, and restores their states at the end."""
    if seed is None:
        yield
        return
    with generators_at(get_rng_state()):
        pyro.set_rng_seed(seed)
        yield


@contextmanager
def generators_at(state: dict[str, Any]) -> Iterator[None]:
    """Sets the generators to a state that ``pyro.util.get_rng_state`` gave, and restores them at the end."""
    now = get_rng_state()
    set_rng_state(state)
    try:
        yield
    finally:
        set_rng_state(now)


class _Lines:
    """A stream that writes each state of a progress bar as a line of a log."""

    def write(self, text: str) -> None:
        if words := text.strip():
            sys.stderr.write(f"{words}\n")

    def flush(self) -> None:
        sys.stderr.flush()


@dataclass
class ProgressBar:
    """A ``tqdm`` bar with the mean ELBO of the last 50 steps; ``None`` shows nothing."""

    bar: Any
    is_live: bool = True  #: redrawn in a terminal or notebook; elsewhere a line every half minute

    def say(self, what: str) -> None:
        """Shows the current phase."""
        if self.bar is not None:
            steps = ", {n_fmt} steps" if self.bar.n else ""
            self.bar.bar_format = f"{{desc}} [{{elapsed}}{steps}{{postfix}}]"
            self.bar.set_description_str(what, refresh=self.is_live)

    def tell(self, sentence: str) -> None:
        """Writes a line above the bar, which stays."""
        if self.bar is not None:
            self.bar.write(sentence, file=sys.stderr)

    def tick(self) -> None:
        """Refreshes the elapsed time in phases without steps."""
        if self.bar is not None and time.time() - self.bar.last_print_t > self.bar.mininterval:
            self.bar.last_print_t = time.time()
            self.bar.refresh()

    def update(
        self, losses: Sequence[float], total: int | None, epoch: str = "", batch: str = ""
    ) -> None:
        """Advances the bar to the number of losses, out of ``total`` if that is known."""
        if self.bar is None:
            return
        self.bar.total, self.bar.bar_format = total, None
        if epoch:
            self.bar.set_description_str(epoch, refresh=False)
        words = [batch] if batch else []
        recent = [loss for loss in losses[-50:] if math.isfinite(loss)]
        if recent:
            words.append(f"ELBO {-math.fsum(recent) / len(recent):.3f}")
        self.bar.set_postfix_str(", ".join(words), refresh=False)
        self.bar.update(len(losses) - self.bar.n)


@contextmanager
def progress_bar(shown: bool) -> Iterator[ProgressBar]:
    """A progress bar, which stays if the block ends well, and is cleared for the message of an error."""
    if not shown:
        yield ProgressBar(None)
        return
    from tqdm.auto import tqdm

    # a notebook can redraw widgets and stderr, although it is not a terminal
    is_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    is_notebook |= type(sys.stderr).__module__ == "ipykernel.iostream"
    is_live = is_notebook or sys.stderr.isatty()
    # without a delay the bar is shown when it is made, and with a longer one not at its end
    wait = {"mininterval": _SECONDS_OF_LINE, "delay": 1e-9, "file": _Lines()}
    options = {"leave": False, **({} if is_live else wait)}
    with tqdm(unit=" step", dynamic_ncols=is_live, **options) as bar:
        yield ProgressBar(bar, is_live)
        bar.leave = True
