# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of arguments, which return the checked value, and warnings."""

import inspect
import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

T = TypeVar("T")
_LONGEST = 80  # characters of a value in an error


def shown(value: Any) -> str:
    """A value in an error: a large array by its type and shape, another long text by its beginning."""
    text, shape = repr(value), getattr(value, "shape", None)
    if len(text) <= _LONGEST:
        return text
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    return f"{text[:_LONGEST]}..."


def check_integer(name: str, value: Any, least: int = 1) -> int:
    """Requires an integer of at least ``least``, also of NumPy, but no bool."""
    size = _as_index(value)
    if size is None or size < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name}: expected {wanted}, got {shown(value)}")
    return size


def check_positive(name: str, value: Any) -> float:
    """Requires a positive finite number, also of NumPy, but no bool."""
    # comparisons only: torch.compile may make this number a symbol
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name}: expected a positive finite number, got {shown(value)}")
    return float(value)


def check_share(name: str, value: Any) -> float:
    """Requires a number from 0 to 1, also of NumPy, but no bool."""
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}: expected a number from 0 to 1, got {shown(value)}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Requires True or False, also of NumPy, but no number or array."""
    is_of_numpy = str(getattr(value, "dtype", "")) == "bool" and value.shape == ()
    if not (isinstance(value, bool) or is_of_numpy):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def check_callable(name: str, value: T, wanted: str = "a callable") -> T:
    """Requires a callable that is not a class."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name}: expected {wanted}, got {shown(value)}")
    return value


def check_hidden_dims(hidden_dims: Any) -> list[int]:
    """Widths of hidden layers from an integer or a sequence of integers."""
    is_one = _as_index(hidden_dims) is not None or not isinstance(hidden_dims, Iterable)
    widths = [hidden_dims] if is_one else list(hidden_dims)
    if not widths:
        raise ValueError("hidden_dims: expected at least one width, got an empty sequence")
    return [check_integer("hidden_dims", width) for width in widths]


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` runs; asked as in Pyro, since later versions may lack ``torch.jit``."""
    return torch._C._get_tracing_state() is not None


def check_broadcast(names: str, *shapes: torch.Size) -> None:
    """Requires shapes that broadcast to each other."""
    # under torch.jit.trace sizes are tensors, which cannot be compared
    if is_tracing() or all(shape == shapes[0] for shape in shapes):
        return
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        got = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"{names}: expected shapes that broadcast to each other, got {got}"
        ) from None


def first_of(words: Sequence[str]) -> str:
    """Joins the first five words, and says how many more there are."""
    more = f" and {len(words) - 5} more" if len(words) > 5 else ""
    return ", ".join(words[:5]) + more


def to_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    """Converts numbers to a tensor with the dtype and device of ``like``; keeps floating-point tensors."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    try:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: expected an array of numbers, got {shown(value)}: {error}"
        ) from None


def values_can_be_read(*tensors: Tensor) -> bool:
    """Whether values may be read, which ``torch.jit``, ``torch.compile`` and ``torch.func`` forbid."""
    return not (
        is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(map(operator.attrgetter("is_meta"), tensors))
    )


@contextmanager
def asks_for_data(args: Sequence[Any], kwargs: Mapping[str, Any], words: str) -> Iterator[None]:
    """Replaces the error of a call without its arguments by this message."""
    try:
        yield
    except TypeError as error:
        if args or kwargs or " missing " not in str(error):
            raise
        raise TypeError(f"{words} ({error})") from error


def check_call(
    verb: Callable[..., Any],
    model: Callable[..., Any],
    args: tuple[object, ...] | None,
    kwargs: Mapping[str, object],
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
    options = sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    for name in sorted((names - bound) & {*options}):
        raise ValueError(
            f"the model has a parameter '{name}', which is also an option of {verb.__name__}: expected "
            f"another name, or bind it first, as in functools.partial(model, {name}=...)"
        )
    if args is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{verb.__name__}: expected the arguments that the model takes, {signature}, got {len(args)} by "
            f"position and {sorted(kwargs)} by keyword ({error}). The options of {verb.__name__} are "
            f"{', '.join(options)}"
        ) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool)


def _as_index(value: Any) -> int | None:
    """The value as an integer, or None."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def warn_user(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line outside this package, torch and Pyro."""
    level, frame = 2, sys._getframe(1)
    inside = (__name__.split(".")[0], "torch", "pyro")
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
