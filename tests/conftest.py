# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Tests run in float64, so that round-off does not hide a wrong formula.

The rest of what a test starts from is in the conftest.py at the root. Doctests share that and no
more: they run in PyTorch's own default dtype, as their readers do.
"""

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def _float64(_fresh_start: None) -> None:
    torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as Python has it, which a shell takes away from what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
