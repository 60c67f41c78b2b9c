# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Finds affine recurrences in a tape, so that a scan can evaluate all their steps at once.

In a loop over time a state is often an affine function of the one before it,

.. math::

    x_t = a_t x_{t-1} + b_t

as in a random walk, an autoregression, the variance of a GARCH model and exponential smoothing, and in their
gradients, which run backwards. If no :math:`a_t` or :math:`b_t` depends on a state, all are evaluated first,
as a batch. Since the composition of affine maps is associative, the states are then a prefix scan, in as many
rounds as the logarithm of the number of steps.

**References**

1. Data Parallel Algorithms (Hillis, Steele, 1986), https://doi.org/10.1145/7902.7903
2. Parallelizing Linear Recurrent Neural Nets Over Sequence Length (Martin, Cundy, 2018),
   https://arxiv.org/abs/1709.04057
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .program import Call, Value, Writer, identity
from .tape import FEWEST, Tape, broadcast

_ATEN = torch.ops.aten
#: the name of calls that are recurrences
RECURRENCE = "recurrence"

_AFFINE = {"add", "sub", "mul", "div", "neg"}

Term = Value | float


class _NotAffine(Exception):
    """A state is not a known affine function of the one before it."""


class _Map(NamedTuple):
    """The map ``slope * state + offset``."""

    slope: Term
    offset: Term


def join_recurrences(tape: Tape) -> None:
    """Replaces affine recurrences of a tape by one call each.

    Its inputs are the state before the first step, the slopes and the offsets; its outputs are the states.
    """
    made_by = {value: call for call in tape.calls for value in call.outputs}
    groups = defaultdict[int, list[Call]](list)
    for role, call in zip(_roles(tape), tape.calls):
        if call.name in _AFFINE:
            groups[role].append(call)
    replaced = dict[Value, list[Call]]()
    for group in groups.values():
        for chain in _chains(group, made_by) if len(group) > FEWEST else ():
            try:
                new = _Recurrence(tape, made_by, chain[0].outputs[0]).solved(chain[1:])
            except _NotAffine:
                continue
            replaced.update(new)
            made_by.update(dict.fromkeys(new, new[chain[-1].outputs[0]][-1]))
    if replaced:
        tape.keep_needed(
            [new for call in tape.calls for new in replaced.get(call.outputs[0], [call])]
        )


def _roles(tape: Tape) -> list[int]:
    """The role of each call: calls of one role have equal origins for some steps back, but for constants."""
    made_by = {value: i for i, call in enumerate(tape.calls) for value in call.outputs}
    roles = [0] * len(tape.calls)
    for _ in range(5):  # steps back over which origins are compared
        before = {value: (value.kind, roles[i]) for value, i in made_by.items()}
        numbers = dict[Any, int]()
        roles = [
            numbers.setdefault((c.name, *(before.get(v, v) for v in c.values)), len(numbers))
            for c in tape.calls
        ]
    return roles


def _chains(group: Sequence[Call], made_by: dict[Value, Call]) -> Iterator[list[Call]]:
    """Long sequences of calls of one role, each of which has the one before it among its origins."""
    members = {call.outputs[0] for call in group}
    chains = dict[Value | None, list[Call]]()  # by the output of the last member
    for call in group:
        chain = chains.pop(_before(call, members, made_by), [])
        chains[call.outputs[0]] = [*chain, call]
    return (chain for chain in chains.values() if len(chain) > FEWEST)


def _before(call: Call, members: set[Value], made_by: dict[Value, Call]) -> Value | None:
    """The nearest member of a group among the origins of a call through affine operations."""
    values = call.values
    for value in values:
        if value in members:
            return value
        if len(values) < 32 and value in made_by and made_by[value].name in _AFFINE:
            values += made_by[value].values
    return None


class _Recurrence:
    """An affine recurrence of states of a tape.

    :param made_by: the calls of the tape by their outputs.
    :param start: the state before the first step.
    """

    def __init__(self, tape: Tape, made_by: dict[Value, Call], start: Value) -> None:
        self._made_by, self._start = made_by, start
        self._dependent = {start}  # values that depend on the start, as all states do
        for call in tape.calls:
            if not self._dependent.isdisjoint(call.values):
                self._dependent.update(call.outputs)
        # values as functions of the last state; None for earlier states
        self._maps = dict[Value, _Map | None]()
        self._outputs, self._new = dict[Any, Value](), list[Call]()

    def solved(self, chain: Sequence[Call]) -> dict[Value, list[Call]]:
        """Calls that replace those of the states, by state.

        :raises _NotAffine: if a step is not affine, or depends on an earlier state in another way.
        """
        found, maps, before = dict[Value, list[Call]](), list[_Map](), self._start
        states = [call.outputs[0] for call in chain]
        for state in states:
            self._maps = {**dict.fromkeys(found), self._start: None, before: _Map(1.0, 0.0)}
            maps.append(self._map(state))
            found[state], self._new, before = self._new, [], state
        inputs = self._start, *zip(*maps)
        found[states[-1]] += [*self._new, Call(RECURRENCE, inputs, tuple(states))]
        return found

    def _map(self, argument: Any) -> _Map:
        """A number, or a value as a function of the last state."""
        if isinstance(argument, (int, float)):
            return _Map(0.0, float(argument))
        if not isinstance(argument, Value):
            raise _NotAffine
        if argument not in self._maps:
            self._maps[argument] = self._new_map(argument)
        if (known := self._maps[argument]) is None:  # an earlier state
            raise _NotAffine
        return known

    def _new_map(self, value: Value) -> _Map:
        if value not in self._dependent:
            return _Map(0.0, value)
        call = self._made_by[value]
        name, (first, *others) = call.name, call.inputs
        if name not in _AFFINE or value.kind != self._start.kind:
            raise _NotAffine
        x = self._map(first)
        if name == "neg":
            return _Map(*(self._product(term, -1.0) for term in x))
        y = self._map(others[0])
        if name in ("add", "sub"):
            if others[1] != 1:
                raise _NotAffine
            sign = 1.0 if name == "add" else -1.0
            return _Map(*(self._sum(a, self._product(b, sign)) for a, b in zip(x, y)))
        if x.slope == 0 and name == "mul":
            x, y = y, x
        if y.slope != 0 or len(others) > 1:  # a division that rounds
            raise _NotAffine
        factor = y.offset if name == "mul" else self._reciprocal(y.offset)
        return _Map(*(self._product(term, factor) for term in x))

    def _sum(self, x: Term, y: Term) -> Term:
        if isinstance(x, float):
            x, y = y, x
        if isinstance(x, float) and isinstance(y, float):
            return x + y
        return x if y == 0 else self._call(_ATEN.add.Tensor, x, y)

    def _product(self, x: Term, y: Term) -> Term:
        if isinstance(x, float):
            x, y = y, x
        if isinstance(x, float) and isinstance(y, float):
            return x * y
        if y in (0.0, 1.0):
            return x if y == 1 else 0.0
        return self._call(_ATEN.neg.default, x) if y == -1 else self._call(_ATEN.mul.Tensor, x, y)

    def _reciprocal(self, x: Term) -> Term:
        if isinstance(x, Value):
            return self._call(_ATEN.reciprocal.default, x)
        if x == 0:
            raise _NotAffine
        return 1 / x

    def _call(self, function: Any, *inputs: Term) -> Value:
        """Adds a call; returns its output."""
        key = function, *map(identity, inputs)
        if key not in self._outputs:
            call, (_, dtype, device) = Call.made(function, *inputs), self._start.kind
            if any((value.dtype, value.device) != (dtype, device) for value in call.values):
                raise _NotAffine
            shape = broadcast(call.values)
            self._outputs[key] = Value(shape, dtype, device)
            self._new.append(call._replace(outputs=(self._outputs[key],)))
        return self._outputs[key]


def scanned(writer: Writer, call: Call) -> None:
    """Writes a recurrence as a scan."""
    made, (start, slopes, offsets) = writer.made, call.inputs
    count, shape = len(call.outputs), call.outputs[0].shape
    start = made(_ATEN.unsqueeze.default, writer.value(start), 0)
    offset = _steps(writer, offsets, start, shape)
    if all(slope == 1 for slope in slopes):
        # cumsum adds in the order of the loop, for the same round-off
        both = made(_ATEN.cat.default, (start, offset))
        sums = made(_ATEN.cumsum.default, both, 0)
        writer.keep_batch(call.outputs, made(_ATEN.slice.Tensor, sums, 0, 1))
        return
    slope = _steps(writer, slopes, start, shape)
    # maps from the state before the first step
    done = 1
    while done < count:
        heads = [made(_ATEN.slice.Tensor, each, 0, 0, done) for each in (slope, offset)]
        earlier = [made(_ATEN.slice.Tensor, each, 0, 0, count - done) for each in (slope, offset)]
        later = [made(_ATEN.slice.Tensor, each, 0, done) for each in (slope, offset)]
        slopes = [made(_ATEN.mul.Tensor, later[0], each) for each in earlier]
        rests = slopes[0], made(_ATEN.add.Tensor, later[1], slopes[1])
        slope, offset = (made(_ATEN.cat.default, both) for both in zip(heads, rests))
        done *= 2
    states = made(_ATEN.add.Tensor, offset, made(_ATEN.mul.Tensor, slope, start))
    writer.keep_batch(call.outputs, states)


def _steps(writer: Writer, terms: Sequence[Term], start: Value, shape: tuple[int, ...]) -> Value:
    """Values of all steps, stacked, with the shape of a state each."""
    values = [term for term in terms if isinstance(term, Value)]
    if len(values) == len(terms):
        aligned = writer.aligned(values, shape)
        return writer.made(_ATEN.expand.default, aligned, (len(terms), *shape))
    one = writer.made(_ATEN.ones_like.default, start)
    parts = (writer.made(_ATEN.mul.Tensor, one, writer.value(term)) for term in terms)
    return writer.made(_ATEN.cat.default, tuple(parts))
