# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Batches the repeated operations of loops in a graph.

A model that loops over time repeats a few operations at each step. All latents are known when a density is
evaluated, so most of these do not depend on other steps. Operations of one kind, on inputs of equal shapes,
become one operation on stacked inputs; :mod:`~pyro_artransform.model.replay.tape` selects them.

**References**

1. On-the-fly Operation Batching in Dynamic Computation Graphs (Neubig, Goldberg, Dyer, 2017),
   https://arxiv.org/abs/1705.07860
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch

from .recurrences import join_recurrences
from .tape import FEWEST, OF_ONE, POINTWISE, VIEWS, Call, Kind, Tape

_TENSOR = torch._C.TensorType.get()
_TENSORS = torch._C.ListType(_TENSOR)


class _Writer:
    """Writes a graph from a tape."""

    def __init__(self, tape: Tape, graph: Any) -> None:
        self._tape = tape
        self._graph: Any = torch._C.Graph()
        self._values = {value.debugName(): self._graph.addInput() for value in graph.inputs()}
        # batches and their sizes; batch and row of a value; stacks by their members
        self._batches, self._sizes = list[Any](), list[int]()
        self._place = dict[str, tuple[int, int]]()
        self._stacks = dict[tuple[str, ...], Any]()
        self._lists = dict[str, Call]()  # lists of tensors, written where they are needed

    def written(self, order: Iterable[Sequence[int]]) -> Any:
        for some in order:
            calls = [self._tape.calls[i] for i in some]
            if len(calls) < FEWEST:
                for call in calls:
                    self._write(call)
            else:
                stack = self._selected if calls[0].kind == "select" else self._batch
                self._keep([call.outputs[0] for call in calls], stack(calls))
        for name in self._tape.results:
            self._graph.registerOutput(self._value(name))
        return self._graph

    def _write(self, call: Call) -> None:
        if call.kind == "recurrence":
            self._keep(call.outputs, self._scanned(call))
            return
        if call.kind == "prim::ListConstruct":
            self._lists[call.outputs[0]] = call
            return
        if call.kind in ("cat", "stack") and self._join(call):
            return
        if call.node is None:
            is_sum = call.kind in ("sum of parts", "sum of terms")
            self._values[call.outputs[0]] = self._sum(call) if is_sum else self._single(call)
            return
        self._clone(call)

    def _single(self, call: Call) -> Any:
        return self._made(call.kind, *map(self._value, call.inputs))

    def _join(self, call: Call) -> bool:
        """Joins tensors, those in batches without a selection of each; returns whether it did."""
        kinds, parts = self._tape.kinds, list[Any]()
        names = self._lists[call.inputs[0]].inputs
        runs = groupby(names, lambda name: kinds[name] if name in self._place else None)
        found = [(kind is not None, tuple(run)) for kind, run in runs]
        if not any(in_batch and len(run) >= FEWEST for in_batch, run in found):
            return False
        dim = self._tape.constants[call.inputs[1]] % len(kinds[call.outputs[0]].shape)
        is_cat = call.kind == "cat"
        for in_batch, run in found:
            if in_batch:
                rows = self._made("movedim", self._stacked(run), 0, dim)
                parts.append(self._made("flatten", rows, dim, dim + 1) if is_cat else rows)
            else:
                alone = map(self._value, run)
                parts += alone if is_cat else [self._made("unsqueeze", v, dim) for v in alone]
        self._values[call.outputs[0]] = self._made("cat", self._listed(parts), dim)
        return True

    def _clone(self, call: Call) -> None:
        values = iter([self._value(name) for name in call.inputs])
        node = self._graph.createClone(call.node, lambda _: next(values))
        self._graph.appendNode(node)
        self._values.update(zip(call.outputs, node.outputs()))

    def _sum(self, call: Call) -> Any:
        stack = self._stacked(call.inputs)
        if call.part is None:
            # cumsum adds in the order of the chain, for the same round-off
            return self._made("select", self._made("cumsum", stack, 0, None), 0, -1)
        sizes, dim, rows = call.part
        zeros = self._made("new_zeros", stack, sizes, None, None, None, None)
        parts = self._made("movedim", stack, 0, dim)
        return self._made("index_add", zeros, dim, self._index(rows, call.inputs[0]), parts, 1)

    def _scanned(self, call: Call) -> Any:
        """The stacked states of an affine recurrence."""
        count, shape = len(call.outputs), self._tape.kinds[call.outputs[0]].shape
        start = self._made("unsqueeze", self._value(call.inputs[0]), 0)
        slopes, offsets = call.inputs[1 : count + 1], call.inputs[count + 1 :]
        offset = self._steps(offsets, start, shape)
        if all(self._tape.constants.get(name) == 1 for name in slopes):
            # cumsum adds in the order of the loop, for the same round-off
            both = self._made("cat", self._listed([start, offset]), 0)
            return self._rest(self._made("cumsum", both, 0, None), 1)
        slope = self._steps(slopes, start, shape)
        # a scan of maps from the state before the first step
        done = 1
        while done < count:
            earlier = self._made("slice", offset, 0, 0, count - done, 1)
            later = self._made("mul", self._rest(slope, done), earlier)
            later = self._made("add", self._rest(offset, done), later, 1)
            offset = self._replaced(offset, done, later)
            earlier = self._made("slice", slope, 0, 0, count - done, 1)
            slope = self._replaced(slope, done, self._made("mul", self._rest(slope, done), earlier))
            done *= 2
        return self._made("add", offset, self._made("mul", slope, start), 1)

    def _steps(self, names: tuple[str, ...], start: Any, shape: tuple[int, ...]) -> Any:
        """Values of all steps, stacked, with the shape of a state each."""
        constants = self._tape.constants
        if any(name in constants for name in names):
            one = self._made("ones_like", start, None, None, None, None, None)
            factors = (constants.get(name) or self._value(name) for name in names)
            parts = [self._made("mul", one, factor) for factor in factors]
            return self._made("cat", self._listed(parts), 0)
        return self._made("expand", self._aligned(names, shape), [len(names), *shape], False)

    def _aligned(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Any:
        """Stacked values, each of which broadcasts to a shape."""
        sizes = self._tape.kinds[names[0]].shape
        missing = len(shape) - len(sizes)
        value = self._stacked(names)
        if missing <= 0:
            return value
        return self._made("reshape", value, [len(names), *[1] * missing, *sizes])

    def _rest(self, value: Any, start: int) -> Any:
        return self._made("slice", value, 0, start, None, 1)

    def _replaced(self, value: Any, start: int, rest: Any) -> Any:
        head = self._made("slice", value, 0, 0, start, 1)
        return self._made("cat", self._listed([head, rest]), 0)

    def _batch(self, calls: Sequence[Call]) -> Any:
        """The stacked outputs of operations of one role."""
        first, kinds, inputs = calls[0], self._tape.kinds, list[Any]()
        shape = kinds[first.outputs[0]].shape
        for names in zip(*(call.inputs for call in calls)):
            is_shared = first.kind in POINTWISE and len({*names}) == 1
            if names[0] not in kinds or is_shared:
                inputs.append(self._value(names[0]))
                continue
            is_view = first.kind in VIEWS
            inputs.append(self._stacked(names) if is_view else self._aligned(names, shape))
        if first.kind not in OF_ONE:
            return self._made(first.kind, *inputs)
        if first.kind in VIEWS:
            return self._made("reshape", inputs[0], [len(calls), *shape])
        if first.kind == "expand":
            return self._made("expand", inputs[0], [len(calls), *shape], *inputs[2:])
        dims = [d + 1 if d >= 0 else d for d in self._tape.constants[first.inputs[1]]]
        return self._made("sum", inputs[0], dims, *inputs[2:])

    def _selected(self, calls: Sequence[Call]) -> Any:
        """The stacked outputs of selections from one tensor."""
        source, dim = calls[0].inputs[0], self._tape.constants[calls[0].inputs[1]]
        rows = [self._tape.constants[call.inputs[2]] for call in calls]
        return self._made("movedim", self._rows(self._value(source), dim, rows, source), dim, 0)

    def _rows(self, value: Any, dim: int, rows: Sequence[int], like: str) -> Any:
        return self._made("index_select", value, dim, self._index(rows, like))

    def _index(self, rows: Sequence[int], like: str) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self._tape.kinds[like].device)

    def _keep(self, names: Sequence[str], batch: Any) -> None:
        self._place.update({name: (len(self._batches), row) for row, name in enumerate(names)})
        self._batches.append(batch)
        self._sizes.append(len(names))

    def _value(self, name: str) -> Any:
        """A single value, selected from its batch if needed."""
        if name in self._values:
            return self._values[name]
        if name in self._lists:
            self._clone(self._lists[name])
        elif name in self._tape.constants:
            self._values[name] = self._graph.insertConstant(self._tape.constants[name])
        else:
            batch, row = self._place[name]
            self._values[name] = self._made("select", self._batches[batch], 0, row)
        return self._values[name]

    def _stacked(self, names: tuple[str, ...]) -> Any:
        """Stacks values along a new first dimension, reusing rows of batches."""
        if names not in self._stacks:
            if alone := [*dict.fromkeys(name for name in names if name not in self._place)]:
                self._keep(alone, self._made("stack", self._listed(map(self._value, alone)), 0))
            sources = [*dict.fromkeys(self._place[name][0] for name in names)]
            *starts, end = accumulate((self._sizes[k] for k in sources), initial=0)
            start, parts = dict(zip(sources, starts)), [self._batches[k] for k in sources]
            rows = [start[source] + row for source, row in map(self._place.__getitem__, names)]
            value = parts[0] if len(parts) == 1 else self._made("cat", self._listed(parts), 0)
            if rows != [*range(end)]:
                value = self._rows(value, 0, rows, names[0])
            self._stacks[names] = value
        return self._stacks[names]

    def _listed(self, values: Iterable[Any]) -> Any:
        return self._node("prim::ListConstruct", [*values], _TENSORS)

    def _made(self, kind: str, *inputs: Any) -> Any:
        """Adds an operation on graph values and constants; returns its tensor."""
        known = [
            v if isinstance(v, torch._C.Value) else self._graph.insertConstant(v) for v in inputs
        ]
        return self._node(f"aten::{kind}", known, _TENSOR)

    def _node(self, kind: str, inputs: Sequence[Any], type_: Any) -> Any:
        node = self._graph.create(kind, inputs, 1)
        self._graph.appendNode(node)
        node.output().setType(type_)
        return node.output()


def batched(graph: Any, kinds: Mapping[str, Kind], random: Container[str]) -> Any:
    """An equivalent graph, up to round-off, with repeated operations batched.

    :param graph: a graph of operations that have outputs and write into no tensor.
    :param kinds: shape, dtype and device of its tensors, by name.
    :param random: names of outputs of random operations, which keep their order.
    """
    tape = Tape(graph, kinds, random)
    if not random:
        join_recurrences(tape)
    return _Writer(tape, graph).written(tape.schedule())
