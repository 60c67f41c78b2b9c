# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The guide of a fit: in second place, by name, or chosen for the model."""

import inspect
from collections.abc import Callable, Mapping

from torch import nn

from ..arguments import check_callable

Function = Callable[..., object]
Args = tuple[object, ...]
#: of a model, its arguments and whether they are a mini-batch: a guide, and why it is this one
Chooser = Callable[..., tuple[Function, str]]


def split_arguments(guide: Function | None, args: Args) -> tuple[Function | None, Args]:
    """The guide, if one is given, and the arguments of the model: what is callable is no data.

    :raises TypeError: if the guide is a class, or cannot be called.
    """
    if guide is None and args and callable(args[0]):
        guide, args = args[0], args[1:]
    if guide is not None:
        check_callable("guide", guide, "a guide of the model, such as AutoIAF(model)")
    return guide, args


def check_call(model: Function, args: Args, kwargs: Mapping[str, object]) -> None:
    """Checks that these can be the arguments of the model, as far as it says what it takes.

    :raises TypeError: if they cannot be.
    """
    try:
        # a decorated model takes what its decorator takes
        signature = inspect.signature(_called(model), follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"fit: expected the arguments that the model takes, {signature}, after the model or its "
            f"guide, got others ({error}). What is callable in second place is the guide: give a "
            "callable of the model's own by its name, or the guide as guide=..."
        ) from None


def parameter_names(model: Function) -> set[str]:
    """The names of the parameters of a model; none where it does not say."""
    try:
        return set(inspect.signature(_called(model)).parameters)
    except (TypeError, ValueError):
        return set()


def _called(model: Function) -> Function:
    return model.forward if isinstance(model, nn.Module) else model


#: set by the front door, which runs before anything of the package does
_chooser: Chooser


def choose_by(chooser: Chooser) -> None:
    """Says how a guide is chosen where none is given: fits themselves know no guides."""
    global _chooser
    _chooser = chooser


def choose(
    model: Function, args: Args, kwargs: Mapping[str, object], *, is_minibatch: bool
) -> tuple[Function, str]:
    """A new guide of a model, and why it is this one; ``is_minibatch`` if the arguments are one of many."""
    return _chooser(model, args, kwargs, is_minibatch=is_minibatch)
