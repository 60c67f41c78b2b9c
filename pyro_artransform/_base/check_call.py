# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks that the arguments of a call of ``fit`` or ``mcmc`` fit the model."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, TypeVar, cast

from pyro.infer.autoguide import AutoGuide
from torch import nn
from torch.utils.data import DataLoader

from .arguments import first_of

Function = Callable[..., Any]
Constructor = TypeVar("Constructor", bound=Function)

_STEP_SIZE = ". fit chooses the step size itself; to set it, train the guide with pyro.infer.SVI"
_CHAINS = ". For the number of effective draws, use draws=; fit chooses the number and length of its chains"
_CALLABLE = (
    ". A callable as the second argument is taken for the guide: pass a callable argument of the model by "
    "keyword, or the guide as guide="
)
# hints for the option names of other packages
_OF_OTHERS = {
    **dict.fromkeys(("lr", "learning_rate", "step_size"), _STEP_SIZE),
    **dict.fromkeys(("num_samples", "num_warmup", "num_chains"), _CHAINS),
    "num_epochs": ". Did you mean epochs=, an option of fit with a loader?",
    "verbose": ". To hide the progress bar, use progress=False",
}


def check_call(
    verb: Function, model: Function, args: tuple[object, ...] | None, kwargs: Mapping[str, object]
) -> None:
    """Checks that a model accepts its arguments (``None`` with a loader), and none has an option's name.

    :param verb: ``fit`` or ``mcmc``, whose keyword-only arguments are options.
    """
    if isinstance(model, AutoGuide):
        raise TypeError(
            f"{verb.__name__}(model, ...): the first argument is the model, got the guide "
            f"{type(model).__name__}. To fit a guide, use fit(model, guide, *args)"
        )
    called = model.forward if isinstance(model, nn.Module) else model
    try:
        # the wrapper of a decorated model decides which arguments it accepts
        signature = inspect.signature(called, follow_wrapped=False)
        names = inspect.signature(called).parameters.keys()
    except (TypeError, ValueError):
        return
    bound = model.keywords.keys() if isinstance(model, partial) else set()
    parameters = inspect.signature(verb).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in sorted((names - bound) & {*options}):
        raise ValueError(
            f"the model has a parameter '{name}', which is also an option of {verb.__name__}: expected "
            f"another name, or bind it first, as in functools.partial(model, {name}=...)"
        )
    if args is None:
        return
    if any(isinstance(value, DataLoader) for value in args):
        raise TypeError(
            f"{verb.__name__}: expected the model's arguments, got a DataLoader: pass it to fit, as loader="
        )
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        hint = _CALLABLE if args and "guide" in options and "missing" in str(error) else ""
        for name in sorted(kwargs.keys() - names):
            hint = _OF_OTHERS.get(name, _near(name, options, verb.__name__))
        raise TypeError(
            f"{verb.__name__}: expected the arguments that the model takes, {signature}, got {len(args)} by "
            f"position and {sorted(kwargs)} by keyword ({error}){hint}"
        ) from None


def explains_options(constructor: Constructor) -> Constructor:
    """Decorates a constructor, to list its options in the error of arguments that it does not take."""
    signature = inspect.signature(constructor)
    options = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]

    @wraps(constructor)
    def checked(self: object, *args: object, **kwargs: object) -> None:
        kind = type(self).__name__
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError as error:
            hint = "".join(_near(name, options, kind) for name in kwargs.keys() - {*options})
            words = f"{kind}: {error}; its options are {', '.join(options)}{hint}"
            raise TypeError(words) from None
        constructor(self, *args, **kwargs)

    return cast(Constructor, checked)


def _near(name: str, options: Sequence[str], of: str) -> str:
    """A question whether an option of a similar name was meant; empty if there is none."""
    near = "".join(get_close_matches(name, options, 1))
    return near and f". Did you mean {near}=, an option of {of}?"


@contextmanager
def explains_data(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Iterator[None]:
    """Replaces errors of a model with data of pandas, or without rows, by ones that say what to do.

    A model that converts its data itself raises none.

    :raises TypeError: if arguments are objects of pandas, which it names.
    :raises ValueError: if a plate has no elements.
    """
    try:
        yield
    except ZeroDivisionError as error:
        if "size cannot be zero" not in str(error):  # the message of pyro.plate
            raise
        words = "expected at least one row of data, got none: a plate of the model has size 0"
        raise ValueError(words) from error
    except (TypeError, AttributeError) as error:
        named = {**{f"argument {i + 1}": arg for i, arg in enumerate(args)}, **kwargs}
        found = [
            f"a {type(value).__name__} of pandas as {name}"
            for name, value in named.items()
            if type(value).__module__.partition(".")[0] == "pandas"
        ]
        if not found:
            raise
        raise TypeError(
            f"expected tensors, got {first_of(found)}: pass torch.tensor(data.to_numpy()), or convert it in "
            f"the model ({error})"
        ) from error
