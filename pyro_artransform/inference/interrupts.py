# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Ctrl-C between two steps, not in the middle of one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While open, the first Ctrl-C only sets a flag, and the second one interrupts as always.

    A step that is cut off half way would leave some parameters moved and others not. Outside of the
    main thread, where no signal arrives, this does nothing.
    """

    def __init__(self) -> None:
        #: whether there was one
        self.requested = False
        self._old: Any = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._old = signal.getsignal(signal.SIGINT)
        # a handler that is not Python's could not be put back
        if self._old is not None:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
            self._old = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
