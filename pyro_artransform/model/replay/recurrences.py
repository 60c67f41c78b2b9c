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
from itertools import zip_longest
from typing import Any, NamedTuple

from .tape import FEWEST, Call, Kind, Tape

# steps back over which origins are compared
_ROUNDS = 5
_AFFINE = {"add", "sub", "mul", "div", "neg"}
# operations that are searched for the state before
_MOST_SEARCHED = 32

Term = str | float  #: the name of a value, or a number


class _NotAffine(Exception):
    """A state is not a known affine function of the one before it."""


class _Map(NamedTuple):
    """The map ``slope * state + offset``."""

    slope: Term
    offset: Term


def join_recurrences(tape: Tape) -> None:
    """Replaces affine recurrences of a tape by one call each, of kind "recurrence".

    Its inputs are the state before the first step, the slopes and the offsets; its outputs are the states.
    """
    made_by = {name: call for call in tape.calls for name in call.outputs}
    groups = defaultdict[int, list[Call]](list)
    for role, call in zip(_roles(tape), tape.calls):
        if call.kind in _AFFINE:
            groups[role].append(call)
    replaced = dict[str, list[Call]]()
    for group in groups.values():
        for chain in _chains(group, made_by) if len(group) > FEWEST else ():
            try:
                new = _Recurrence(tape, made_by, chain[0].outputs[0]).solved(chain[1:])
            except _NotAffine:
                continue
            replaced.update(new)
            made_by.update(
                {n: call for some in new.values() for call in some for n in call.outputs}
            )
    if replaced:
        calls = [new for call in tape.calls for new in replaced.get(call.outputs[0], [call])]
        tape.keep_needed(calls)


def _roles(tape: Tape) -> list[int]:
    """The role of each call: calls of one role have equal origins for some steps back."""
    made_by = {name: i for i, call in enumerate(tape.calls) for name in call.outputs}
    roles = [0] * len(tape.calls)
    for _ in range(_ROUNDS):
        before = {name: (tape.kinds.get(name), roles[i]) for name, i in made_by.items()}
        numbers = dict[Any, int]()
        roles = [
            numbers.setdefault((c.kind, *(before.get(n, n) for n in c.inputs)), len(numbers))
            for c in tape.calls
        ]
    return roles


def _chains(group: Sequence[Call], made_by: dict[str, Call]) -> Iterator[list[Call]]:
    """Long sequences of calls of one role, each of which has the one before it among its origins."""
    by_name = {call.outputs[0]: call for call in group}
    chains = dict[str, list[Call]]()  # by the name of the last member
    for call in group:
        before = _before(call, by_name, made_by)
        chain = chains.pop(before, [])
        chains[call.outputs[0]] = [*chain, call]
    return (chain for chain in chains.values() if len(chain) > FEWEST)


def _before(call: Call, members: dict[str, Call], made_by: dict[str, Call]) -> str:
    """The nearest member of a group among the origins of a call through affine operations, or ""."""
    names = [*call.inputs]
    for name in names:
        if name in members:
            return name
        if len(names) < _MOST_SEARCHED and name in made_by and made_by[name].kind in _AFFINE:
            names += made_by[name].inputs
    return ""


class _Recurrence:
    """An affine recurrence of states of a tape.

    :param made_by: the calls of the tape by the names of their outputs.
    :param start: the state before the first step.
    """

    def __init__(self, tape: Tape, made_by: dict[str, Call], start: str) -> None:
        self._tape, self._made_by, self._start = tape, made_by, start
        self._depends = {start: True}  # which values depend on the start
        # values as functions of the last state; None for earlier states
        self._maps = dict[str, _Map | None]()
        self._outputs, self._new = dict[tuple[str, ...], str](), list[Call]()

    def solved(self, chain: Sequence[Call]) -> dict[str, list[Call]]:
        """Calls that replace those of the states, by the names of the states.

        :raises _NotAffine: if a step is not affine, or depends on an earlier state in another way.
        """
        found, maps, before = dict[str, list[Call]](), list[_Map](), self._start
        states = [call.outputs[0] for call in chain]
        for state in states:
            self._maps = {**dict.fromkeys(found), self._start: None, before: _Map(1.0, 0.0)}
            maps.append(self._map(state))
            found[state], self._new, before = self._new, [], state
        slopes, offsets = ([*map(self._name, terms)] for terms in zip(*maps))
        inputs = (self._start, *slopes, *offsets)
        found[states[-1]] += [*self._new, Call(None, "recurrence", inputs, tuple(states))]
        return found

    def _map(self, name: str) -> _Map:
        """The value as a function of the last state."""
        if name not in self._maps:
            self._maps[name] = self._new_map(name)
        if (known := self._maps[name]) is None:  # an earlier state
            raise _NotAffine
        return known

    def _new_map(self, name: str) -> _Map:
        constants, kinds = self._tape.constants, self._tape.kinds
        if name in constants:
            if not isinstance(constants[name], (int, float)):
                raise _NotAffine
            return _Map(0.0, float(constants[name]))
        if not self._depends_on_start(name):
            return _Map(0.0, name)
        call = self._made_by[name]
        if call.kind not in _AFFINE or kinds[name] != kinds[self._start]:
            raise _NotAffine
        x, *others = map(self._map, call.inputs[:2])
        if call.kind == "neg":
            return _Map(self._product(x.slope, -1.0), self._product(x.offset, -1.0))
        (y,) = others
        if call.kind in ("add", "sub"):
            if constants.get(call.inputs[2]) != 1:
                raise _NotAffine
            sign = 1.0 if call.kind == "add" else -1.0
            return _Map(*(self._sum(a, self._product(b, sign)) for a, b in zip(x, y)))
        if x.slope == 0 and call.kind == "mul":
            x, y = y, x
        if y.slope != 0:
            raise _NotAffine
        factor = y.offset if call.kind == "mul" else self._reciprocal(y.offset)
        return _Map(*(self._product(term, factor) for term in x))

    def _depends_on_start(self, name: str) -> bool:
        """Whether a value depends on the start, and so on any state."""
        known, names = self._depends, [name]
        while names:
            inputs = self._made_by[names[-1]].inputs if names[-1] in self._made_by else ()
            if unknown := [each for each in inputs if each not in known]:
                names += unknown
            else:
                last = names.pop()
                known.setdefault(last, any(known[each] for each in inputs))
        return known[name]

    def _sum(self, x: Term, y: Term) -> Term:
        if isinstance(x, float):
            x, y = y, x
        if isinstance(x, float) and isinstance(y, float):
            return x + y
        return x if y == 0 else self._call("add", x, y, 1.0)

    def _product(self, x: Term, y: Term) -> Term:
        if isinstance(x, float):
            x, y = y, x
        if isinstance(x, float) and isinstance(y, float):
            return x * y
        if y in (0.0, 1.0):
            return x if y == 1 else 0.0
        return self._call("neg", x) if y == -1 else self._call("mul", x, y)

    def _reciprocal(self, x: Term) -> Term:
        if isinstance(x, str):
            return self._call("reciprocal", x)
        if x == 0:
            raise _NotAffine
        return 1 / x

    def _call(self, kind: str, *inputs: Term) -> str:
        """Adds a call; returns the name of its output."""
        kinds, names = self._tape.kinds, tuple(map(self._name, inputs))
        like = kinds[self._start]
        shapes = [kinds[name].shape for name in names if name in kinds]
        if any(kinds[name][1:] != like[1:] for name in names if name in kinds):
            raise _NotAffine
        key = kind, *names
        if key not in self._outputs:
            output = self._outputs[key] = f"{self._start}.{len(kinds)}"
            kinds[output] = Kind(_broadcast(shapes), like.dtype, like.device)
            self._new.append(Call(None, kind, names, (output,)))
        return self._outputs[key]

    def _name(self, term: Term) -> str:
        """The name of a value; of a constant, if it is a number."""
        if isinstance(term, str):
            return term
        name = f"number {term}"
        self._tape.constants[name] = term
        return name


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The common shape; ``torch.broadcast_shapes`` imports for seconds."""
    sizes = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)
    return tuple(max(each) for each in sizes)[::-1]
