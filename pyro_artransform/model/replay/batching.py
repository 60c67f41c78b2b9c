# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Batches the repeated operations of loops in a program.

A model that loops over time repeats a few operations at each step. All latents are known when a density is
evaluated, so most of these do not depend on other steps. Operations of one kind, on inputs of equal shapes,
become one operation on stacked inputs. :data:`BATCHED` has an entry for each kind of operation.

**References**

1. On-the-fly Operation Batching in Dynamic Computation Graphs (Neubig, Goldberg, Dyer, 2017),
   https://arxiv.org/abs/1705.07860
"""

from collections.abc import Callable, Container, Hashable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from .program import Call, Program, Value, Writer, identity, mapped
from .recurrences import RECURRENCE, join_recurrences, scanned
from .tape import ELEMENTWISE, FEWEST, SUM_OF_PARTS, SUM_OF_TERMS, Tape

_ATEN = torch.ops.aten


def _alike(call: Call) -> Hashable:
    """Of calls of one function with equal constants, and with inputs of equal kinds."""
    floats = {v.dtype for v in call.values if v.dtype is not None and v.dtype.is_floating_point}
    if len(floats) > 1 or len({value.device for value in call.values}) != 1:
        return None
    return call.function, *mapped(_kind, call.inputs)


def _kind(argument: Any) -> Hashable:
    return argument.kind if isinstance(argument, Value) else identity(argument)


def _alike_over_dims(call: Call) -> Hashable:
    return _alike(call) if call.function is _ATEN.sum.dim_IntList and call.inputs[1] else None


def _from_one_tensor(call: Call) -> Hashable:
    is_from_start = call.function is _ATEN.select.int and call.inputs[2] >= 0
    return (call.function, *call.inputs[:2]) if is_from_start else None


def _pointwise(writer: Writer, calls: Sequence[Call]) -> Value:
    first, inputs = calls[0], list[Any]()
    for members in zip(*(call.inputs for call in calls)):
        is_shared = not isinstance(members[0], Value) or len({*members}) == 1
        shape = first.outputs[0].shape
        inputs.append(writer.value(members[0]) if is_shared else writer.aligned(members, shape))
    return writer.made(first.function, *inputs)


def _view(writer: Writer, calls: Sequence[Call]) -> Value:
    sizes = len(calls), *calls[0].outputs[0].shape
    return writer.made(_ATEN.reshape.default, _first_inputs(writer, calls), sizes)


def _expand(writer: Writer, calls: Sequence[Call]) -> Value:
    shape = calls[0].outputs[0].shape
    aligned = writer.aligned([call.inputs[0] for call in calls], shape)
    return writer.made(_ATEN.expand.default, aligned, (len(calls), *shape))


def _sum(writer: Writer, calls: Sequence[Call]) -> Value:
    _, dims, *others = calls[0].inputs
    dims = tuple(d + 1 if d >= 0 else d for d in dims)
    return writer.made(calls[0].function, _first_inputs(writer, calls), dims, *others)


def _select(writer: Writer, calls: Sequence[Call]) -> Value:
    source, dim, _ = calls[0].inputs
    index = writer.index([call.inputs[2] for call in calls], source.device)
    rows = writer.made(_ATEN.index_select.default, writer.value(source), dim, index)
    return writer.made(_ATEN.movedim.int, rows, dim, 0)


def _first_inputs(writer: Writer, calls: Sequence[Call]) -> Value:
    return writer.stacked([call.inputs[0] for call in calls])


class Rule(NamedTuple):
    """How calls of one kind of operation become one.

    Calls of one batch have an equal role, which is ``None`` for a call that can be in no batch. ``batch``
    writes the batch and returns the stacked outputs.
    """

    role: Callable[[Call], Hashable]
    batch: Callable[[Writer, Sequence[Call]], Value]


#: the operations that can be batched, by name; another one needs an entry here
BATCHED = {
    **dict.fromkeys(ELEMENTWISE, Rule(_alike, _pointwise)),
    **dict.fromkeys(("_unsafe_view", "squeeze", "unsqueeze", "view"), Rule(_alike, _view)),
    "expand": Rule(_alike, _expand),
    "sum": Rule(_alike_over_dims, _sum),
    "select": Rule(_from_one_tensor, _select),
}


def _sum_of_terms(writer: Writer, call: Call) -> None:
    # cumsum adds in the order of the chain, for the same round-off
    sums = writer.made(_ATEN.cumsum.default, writer.stacked(call.inputs[0]), 0)
    writer.keep(call.outputs[0], writer.made(_ATEN.select.int, sums, 0, -1))


def _sum_of_parts(writer: Writer, call: Call) -> None:
    parts, sizes, dim, rows = call.inputs
    stack = writer.stacked(parts)
    zeros = writer.made(_ATEN.new_zeros.default, stack, sizes)
    stack = writer.made(_ATEN.movedim.int, stack, 0, dim)
    index = writer.index(rows, parts[0].device)
    writer.keep(call.outputs[0], writer.made(_ATEN.index_add.default, zeros, dim, index, stack))


def _join(writer: Writer, call: Call) -> None:
    """Joins tensors, those in batches without a selection of each."""
    values, parts, is_cat = call.inputs[0], list[Value](), call.name == "cat"
    runs = groupby(values, lambda value: value.kind if writer.is_in_batch(value) else None)
    found = [(kind is not None, [*run]) for kind, run in runs]
    if not any(in_batch and len(run) >= FEWEST for in_batch, run in found):
        writer.append(call)
        return
    dim = call.inputs[1] % len(call.outputs[0].shape)
    for in_batch, run in found:
        if in_batch:
            rows = writer.made(_ATEN.movedim.int, writer.stacked(run), 0, dim)
            flatten = _ATEN.flatten.using_ints
            parts.append(writer.made(flatten, rows, dim, dim + 1) if is_cat else rows)
        else:
            alone, unsqueeze = map(writer.value, run), _ATEN.unsqueeze.default
            parts += alone if is_cat else [writer.made(unsqueeze, value, dim) for value in alone]
    writer.keep(call.outputs[0], writer.made(_ATEN.cat.default, tuple(parts), dim))


# calls that are written in another way if they are in no batch
_ALONE: dict[str, Callable[[Writer, Call], None]] = {
    SUM_OF_TERMS: _sum_of_terms,
    SUM_OF_PARTS: _sum_of_parts,
    RECURRENCE: scanned,
    "cat": _join,
    "stack": _join,
}


def _role(call: Call) -> Hashable:
    return BATCHED[call.name].role(call) if call.name in BATCHED else None


def batched(program: Program, random: Container[Value] = ()) -> Program:
    """An equivalent program, up to round-off, with repeated operations batched.

    :param program: operations that have outputs and write into no tensor.
    :param random: outputs of random operations, which keep their order.
    """
    tape, writer = Tape(program, random), Writer(program)
    if not random:
        join_recurrences(tape)
    for calls in tape.schedule(_role):
        if len(calls) >= FEWEST:
            batch = BATCHED[calls[0].name].batch(writer, calls)
            writer.keep_batch([call.outputs[0] for call in calls], batch)
        else:
            for call in calls:
                _ALONE.get(call.name, Writer.append)(writer, call)
    results = [*map(writer.value, tape.results)]
    return Program(program.inputs, writer.constants, writer.calls, results)
