# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Warnings that point at the line of the user."""

import sys
import warnings

_PASSED_THROUGH = (__name__.split(".")[0], "torch", "pyro")


def warn_user(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line outside this package, torch and Pyro."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in _PASSED_THROUGH:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
