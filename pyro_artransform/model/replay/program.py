# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Programs: lists of operations on tensors, which are recorded, rewritten and run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ATEN = torch.ops.aten


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


class Writer:
    """Writes a program, in which values of the one before may be rows of a batch."""

    def __init__(self, program: Program) -> None:
        self.constants, self.calls = {**program.constants}, list[Call]()
        self._values = {value: value for value in (*program.inputs, *program.constants)}
        # batches and their sizes; batch and row of a value; stacks by their members
        self._batches, self._sizes = list[Value](), list[int]()
        self._place = dict[Value, tuple[int, int]]()
        self._stacks = dict[tuple[Value, ...], Value]()

    def append(self, call: Call) -> None:
        """Adds a call as it is."""
        self.calls.append(call._replace(inputs=mapped(self.value, call.inputs)))
        self._values.update(zip(call.outputs, call.outputs))

    def made(self, function: Any, *inputs: Any) -> Value:
        """Adds an operation on new values; returns its output."""
        self.calls.append(Call.made(function, *inputs))
        return self.calls[-1].outputs[0]

    def keep(self, value: Value, made: Value) -> None:
        """Makes a new value stand for one of the program before."""
        self._values[value] = made

    def keep_batch(self, values: Sequence[Value], batch: Value) -> None:
        """Makes the rows of a new value stand for values of the program before."""
        self._place.update({value: (len(self._batches), row) for row, value in enumerate(values)})
        self._batches.append(batch)
        self._sizes.append(len(values))

    def is_in_batch(self, value: Value) -> bool:
        return value in self._place

    def value(self, argument: Any) -> Any:
        """The new value, selected from its batch if needed; a constant is its own."""
        if not isinstance(argument, Value):
            return argument
        if argument not in self._values:
            batch, row = self._place[argument]
            self._values[argument] = self.made(_ATEN.select.int, self._batches[batch], 0, row)
        return self._values[argument]

    def stacked(self, values: Sequence[Value]) -> Value:
        """Stacks values along a new first dimension, reusing rows of batches."""
        values = tuple(values)
        if values not in self._stacks:
            if alone := [*dict.fromkeys(value for value in values if value not in self._place)]:
                self.keep_batch(
                    alone, self.made(_ATEN.stack.default, tuple(map(self.value, alone)))
                )
            sources = [*dict.fromkeys(self._place[value][0] for value in values)]
            *starts, end = accumulate((self._sizes[k] for k in sources), initial=0)
            start, parts = dict(zip(sources, starts)), tuple(self._batches[k] for k in sources)
            rows = [start[source] + row for source, row in map(self._place.__getitem__, values)]
            stack = parts[0] if len(parts) == 1 else self.made(_ATEN.cat.default, parts)
            if rows != [*range(end)]:
                index = self.index(rows, values[0].device)
                stack = self.made(_ATEN.index_select.default, stack, 0, index)
            self._stacks[values] = stack
        return self._stacks[values]

    def aligned(self, values: Sequence[Value], shape: tuple[int, ...]) -> Value:
        """Stacks values, each of which broadcasts to a shape."""
        stack, sizes = self.stacked(values), values[0].shape
        if len(shape) <= len(sizes):
            return stack
        missing = (1,) * (len(shape) - len(sizes))
        return self.made(_ATEN.reshape.default, stack, (len(values), *missing, *sizes))

    def index(self, rows: Sequence[int], device: torch.device | None) -> Value:
        """A new constant: the numbers of rows."""
        index = torch.tensor(rows, dtype=torch.long, device=device)
        value = Value.like(index)
        self.constants[value] = index
        return value
