# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Programs: lists of operations on tensors, which are recorded, rewritten and run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of a program, known by its identity.

    Values of one kind have the same shape, dtype and device. Those that rewriting adds need not have a kind.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @classmethod
    def like(cls, tensor: Tensor) -> "Value":
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    @property
    def kind(self) -> tuple[tuple[int, ...], torch.dtype | None, torch.device | None]:
        return self.shape, self.dtype, self.device


class Call(NamedTuple):
    """An operation.

    Its inputs are in the order of its schema, without keywords: values, constants of Python, and tuples of
    these. Its outputs are values, also those of an operation that returns a list of tensors.
    """

    function: Any  #: an overload of an operation; until it is rewritten, maybe the name of several at once
    inputs: tuple[Any, ...]
    outputs: tuple[Value, ...]

    @property
    def name(self) -> str:
        """The name of the operation, without that of the overload: ``"add"``."""
        is_name = isinstance(self.function, str)
        return self.function if is_name else self.function._overloadpacket.__name__

    @property
    def values(self) -> list[Value]:
        """All values among the inputs."""
        return [each for each in _flat(self.inputs) if isinstance(each, Value)]

    @classmethod
    def made(cls, function: Any, *inputs: Any) -> "Call":
        """An operation with one new output; inputs that are not given have their defaults."""
        rest = function._schema.arguments[len(inputs) :]
        return cls(function, (*inputs, *(each.default_value for each in rest)), (Value(),))


class Program(NamedTuple):
    """Operations in the order in which they run, and the values that they begin and end with."""

    inputs: list[Value]
    constants: dict[Value, Tensor]
    calls: list[Call]
    results: list[Value]


def mapped(function: Callable[[Any], Any], argument: Any) -> Any:
    """Applies a function to an argument, or to all members of a tuple."""
    if isinstance(argument, tuple):
        return tuple(
            [mapped(function, e) if isinstance(e, tuple) else function(e) for e in argument]
        )
    return function(argument)


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for each in arguments:
        if isinstance(each, tuple):
            yield from _flat(each)
        else:
            yield each


def identity(argument: Any) -> Any:
    """A key that equal arguments share: a value itself, and the type and digits of a constant."""
    return argument if isinstance(argument, Value) else (type(argument), repr(argument))
