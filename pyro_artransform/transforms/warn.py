# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Warnings that point at the line of the user."""

import sys
import warnings

_PACKAGE = __name__.split(".")[0]
_PASSED_THROUGH = (_PACKAGE, "torch", "pyro")


def warn_user(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line outside this package, torch and Pyro.

    :param message: what is wrong and what to do.
    :param category: the class of the warning.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _root(frame.f_globals) in _PASSED_THROUGH:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _root(namespace: dict[str, object]) -> str:
    return str(namespace.get("__name__", "")).split(".")[0]
