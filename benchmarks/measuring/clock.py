# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What a run records as it goes: rows (step, CPU seconds, value)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

#: effective draws of the worst coordinate that a run ends with
ESS = 400


@dataclass
class Record:
    """What a run has to show, and its clock, which stands still while it is looked at.

    :param limit: CPU seconds after which the run ends.
    """

    limit: float
    rows: list[tuple[int, float, float]] = field(default_factory=list)
    paused_for: float = 0.0
    began: float = field(default_factory=time.process_time)

    @property
    def seconds(self) -> float:
        return time.process_time() - self.began - self.paused_for

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here takes no time."""
        began = time.process_time()
        yield
        self.paused_for += time.process_time() - began

    def note(self, step: int, measure: Callable[[], Any]) -> float:
        """Adds a row, whose value is measured while the clock stands still."""
        seconds = self.seconds
        with self.paused():
            value = float(measure())
        self.rows.append((step, seconds, value))
        return value
