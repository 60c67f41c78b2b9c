# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits that are quick, for tests of what a fit does and not of how well it does it."""

import io
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from pyro_artransform import fit
from pyro_artransform.inference import FitResult

Numbers = Mapping[str, float]
#: Fewer draws, and points of searches, so that a fit takes a fraction of a second.
QUICK_START: Numbers = {
    "first_draws._NUM_DRAWS": 100,
    "first_draws._NUM_FOR_START": 50,
    "first_draws._MOST_TRAJECTORIES": 6,
    "initialization.start._NUM_COMPARED": 256,
}
QUICK: Numbers = {
    **QUICK_START,
    "evaluation.evaluate._NUM_SAMPLES": 500,
    "evaluation.evaluate._NUM_NOISY": 50,
    "problem.NUM_COMPARED": 128,
    "optimization.minibatches._NUM_DRAWS": 100,
}
#: A fit that decides by itself after tens of steps.
SOON: Numbers = {
    **QUICK,
    "optimization.schedule._WINDOW": 18,
    "optimization.schedule._MAX_CONSTANT": 90,
    "optimization.schedule._SMALL_GAP": -1.0,
}


def with_step_size(size: float) -> Numbers:
    names = ("_STEP_SIZE", "_MODEL_STEP_SIZE")
    return {**QUICK, **{f"optimization.training.{name}": size for name in names}}


@contextmanager
def with_numbers(numbers: Numbers) -> Iterator[None]:
    """Replaces constants of ``inference``, by the names of module and constant."""
    with ExitStack() as stack:
        for name, value in numbers.items():
            stack.enter_context(patch(f"pyro_artransform.inference.{name}", value))
        yield


def quick_fit(*args: Any, numbers: Numbers = QUICK, **options: Any) -> FitResult:
    """A fit with other ``numbers``; none for those of the package."""
    with with_numbers(numbers):
        return fit(*args, **options)


class Interrupting(io.StringIO):
    """A stream at whose first line on draws the user presses Ctrl-C."""

    def write(self, text):
        if text.startswith("Draws"):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.fixture
def quick() -> Iterator[None]:
    with with_numbers(QUICK):
        yield
