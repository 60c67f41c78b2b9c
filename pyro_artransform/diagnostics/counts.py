# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of numbers of draws, steps and the like."""

from typing import Any


def check_counts(**counts: Any) -> None:
    """Checks numbers that count something.

    :param counts: the numbers by name.
    :raises ValueError: if one is no positive integer.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
