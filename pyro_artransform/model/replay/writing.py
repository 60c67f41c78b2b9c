# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Writes programs in which some values are rows of a batch."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from .program import Call, Program, Value, mapped

_ATEN = torch.ops.aten


class Writer:
    """Lists calls. A value of the program before is a value of the new one, or a row of a batch."""

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
