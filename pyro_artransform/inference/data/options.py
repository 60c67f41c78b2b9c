# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of what a fit is given."""

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from pyro.poutine.messenger import Messenger


def keyword_only(function: Callable[..., Any]) -> set[str]:
    """The names of a function's keyword-only parameters.

    :param function: a function.
    """
    parameters = inspect.signature(function).parameters.items()
    return {name for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def check_names(model: Callable[..., Any], options: Collection[str]) -> None:
    """Checks that a model has no parameter of the name of an option.

    :param model: a Pyro model.
    :param options: the names that are taken.
    :raises ValueError: if it has, and it is not bound.
    """
    taken = sorted(set(options) & set(_free_names(model)))
    if taken:
        raise ValueError(
            f"the model has a parameter '{taken[0]}', which is an option of fit: expected another "
            f"name, or bind it first, as in functools.partial(model, {taken[0]}=...)"
        )


def _free_names(model: Any) -> list[str]:
    """The names of a model's parameters, without those that are bound already."""
    if isinstance(model, partial) and isinstance(model.func, partial):
        return _free_names(model.func)
    if isinstance(model, partial) and model.args and isinstance(model.args[0], Messenger):
        return _free_names(model.args[1])  # a handler of Pyro around a function
    if isinstance(model, partial):
        names = _free_names(model.func)[len(model.args) :]
        return [name for name in names if name not in model.keywords]
    try:
        return list(inspect.signature(getattr(model, "forward", model)).parameters)
    except (TypeError, ValueError):  # not every callable says what it takes
        return []
