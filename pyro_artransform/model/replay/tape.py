# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Simplifies the calls of a program, and schedules them in batches.

Calls of one role wait until the inputs of all of them are ready. If no role is complete, the call with the
longest chain of dependents goes first, with those of its role that are ready, as in a recursion over time.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise, zip_longest
from typing import Any

import torch

from .program import Call, Program, Value, identity, mapped

_ATEN = torch.ops.aten
# operations that ignore the values of their first input
_VALUELESS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
# identities where there are no gradients
_SAME = {"detach", "lift_fresh"}
#: elementwise functions of tensors that broadcast
ELEMENTWISE = {
    *("abs", "add", "bitwise_and", "bitwise_not", "clamp", "clamp_max", "clamp_min", "cos"),
    *("digamma", "div", "eq", "erf", "erfc", "erfinv", "exp", "expm1", "ge", "gt", "isfinite"),
    *("isinf", "isnan", "le", "lgamma", "log", "log1p", "logical_and", "logical_not", "logical_or"),
    *("lt", "masked_fill", "maximum", "minimum", "mul", "ne", "neg", "pow", "reciprocal", "rsqrt"),
    *("rsub", "sgn", "sigmoid", "sigmoid_backward", "sign", "sin", "softplus"),
    *("softplus_backward", "special_erfcx", "special_log_ndtr", "special_ndtri", "sqrt", "square"),
    *("sub", "tanh", "tanh_backward", "where", "xlogy", "_to_copy"),
}
#: minimum number of operations in a batch, and of terms in a sum
FEWEST = 8
#: calls of several operations: the sum of terms, and the sum of parts of a tensor that is zero elsewhere
SUM_OF_TERMS, SUM_OF_PARTS = "sum of terms", "sum of parts"


class Tape:
    """The calls of a program, without duplicates, and with chains of additions joined into sums.

    Elementwise functions of expanded tensors are evaluated before the expansion.
    """

    def __init__(self, program: Program, random: Container[Value]) -> None:
        self._random, self._same = random, dict[Value, Value]()
        self.calls = list[Call]()
        self._seen, self._expanded = dict[Any, Call](), dict[Value, Value]()
        for call in program.calls:
            self._append(call._replace(inputs=mapped(self._known, call.inputs)))
        self.results: list[Value] = [*map(self._known, program.results)]
        self._join_sums()

    def _append(self, call: Call) -> None:
        call = self._before_expansion(call)
        key = self._key(call)
        if self._is_identity(call):
            self._same[call.outputs[0]] = call.inputs[0]
        elif key in self._seen:
            self._same.update(zip(call.outputs, self._seen[key].outputs))
        else:
            self.calls.append(call)
            self._seen[key] = call
            if call.name == "expand":
                self._expanded[call.outputs[0]] = call.inputs[0]

    def _before_expansion(self, call: Call) -> Call:
        """An elementwise function of expanded tensors as the expansion of one of smaller tensors."""
        values = call.values
        is_elementwise = call.name in ELEMENTWISE and len({value.dtype for value in values}) == 1
        if not is_elementwise or self._expanded.keys().isdisjoint(values):
            return call
        sources, result = {v: self._expanded.get(v, v) for v in values}, call.outputs[0]
        shape = broadcast(sources.values())
        if math.prod(shape) >= math.prod(result.shape):
            return call
        small = Value(shape, result.dtype, result.device)
        inputs = mapped(lambda x: sources.get(x, x) if isinstance(x, Value) else x, call.inputs)
        self._append(Call(call.function, inputs, (small,)))
        expansion = self._known(small), result.shape, False
        return Call(_ATEN.expand.default, expansion, call.outputs)

    def _known(self, argument: Any) -> Any:
        return self._same.get(argument, argument) if isinstance(argument, Value) else argument

    def _key(self, call: Call) -> Hashable:
        """A key that operations with equal results share."""
        if self.is_random(call):
            return call.outputs
        inputs = mapped(identity, call.inputs)
        if call.name in _VALUELESS:
            return call.function, call.inputs[0].kind, *inputs[1:]
        return call.function, *inputs

    def is_random(self, call: Call) -> bool:
        return any(value in self._random for value in call.outputs)

    def _is_identity(self, call: Call) -> bool:
        if call.name in ("expand", "view"):
            return bool(call.inputs[0].kind == call.outputs[0].kind)
        return call.name in _SAME

    def _join_sums(self) -> None:
        """Replaces long chains of additions by sums of all their terms."""
        uses = Counter(value for call in self.calls for value in call.values)
        uses.update(self.results)
        chains = dict[Value, tuple[list[Value], list[int]]]()
        for index, call in enumerate(self.calls):
            values = {*call.values, *call.outputs}
            is_sum = call.function is _ATEN.add.Tensor and call.inputs[2] == 1
            if is_sum and len(call.values) == 2 and len({value.kind for value in values}) == 1:
                terms, members = list[Value](), [index]
                for value in call.values:
                    is_part = value in chains and uses[value] == 1
                    more, others = chains.pop(value) if is_part else ([value], [])
                    terms, members = terms + more, others + members
                chains[call.outputs[0]] = terms, members
        # gradients of selections are zero elsewhere
        selections = [call for call in self.calls if call.name == "select_backward"]
        parts = {c.outputs[0]: c for c in selections if uses[c.outputs[0]] == 1}
        joined = dict[int, list[Call]]()
        for value, (terms, members) in chains.items():
            if len(terms) >= FEWEST:
                joined.update({index: [] for index in members})
                joined[members[-1]] = _sums(value, terms, parts)
        self.keep_needed(
            [new for i, call in enumerate(self.calls) for new in joined.get(i, [call])]
        )

    def keep_needed(self, calls: Sequence[Call]) -> None:
        """Takes the calls, in any order, on which results or random numbers depend."""
        made_by = {value: i for i, call in enumerate(calls) for value in call.outputs}
        values = [value for call in calls if self.is_random(call) for value in call.outputs]
        needed, values = set[int](), [*values, *self.results]
        for value in values:
            index = made_by.get(value, -1)
            if index >= 0 and index not in needed:
                needed.add(index)
                values += calls[index].values
        self.calls = [calls[i] for i in sorted(needed)]

    def schedule(self, role: Callable[[Call], Hashable]) -> list[list[Call]]:
        """Batches of calls of one role each, in an order that respects dependencies.

        :param role: gives what the calls of a batch share; ``None`` for calls that are alone.
        """
        made_by = {value: i for i, call in enumerate(self.calls) for value in call.outputs}
        needs = [{made_by[v] for v in call.values if v in made_by} for call in self.calls]
        random = [i for i, call in enumerate(self.calls) if self.is_random(call)]
        for before, after in pairwise(random):
            needs[after].add(before)  # random operations keep their order
        users, height = defaultdict[int, list[int]](list), [1] * len(needs)
        in_order = TopologicalSorter(dict(enumerate(needs))).static_order()
        for i in reversed([*in_order]):
            height[i] += max((height[j] for j in users[i]), default=0)
            for j in needs[i]:
                users[j].append(i)
        roles = [i if (r := role(call)) is None else r for i, call in enumerate(self.calls)]
        waiting = [len(needed) for needed in needs]
        left, ready = Counter(roles), defaultdict[Any, list[int]](list)
        queue, order = list[tuple[float, int]](), list[list[Call]]()
        new = [i for i, number in enumerate(waiting) if not number]
        while True:
            for i in new:
                ready[roles[i]].append(i)
                is_complete = len(ready[roles[i]]) == left[roles[i]]
                heapq.heappush(queue, (-math.inf if is_complete else -height[i], i))
            while queue and waiting[queue[0][1]] < 0:
                heapq.heappop(queue)
            if not queue:
                return order
            members = sorted(ready.pop(roles[queue[0][1]]))
            left[roles[members[0]]] -= len(members)
            order.append([self.calls[i] for i in members])
            new = []
            for i in members:
                waiting[i] = -1
                for j in users[i]:
                    waiting[j] -= 1
                    if not waiting[j]:
                        new.append(j)


def broadcast(values: Iterable[Value]) -> tuple[int, ...]:
    """The common shape; ``torch.broadcast_shapes`` imports for seconds."""
    sizes = zip_longest(*(value.shape[::-1] for value in values), fillvalue=1)
    return tuple(map(max, sizes))[::-1]


def _sums(value: Value, terms: Sequence[Value], parts: Mapping[Value, Call]) -> list[Call]:
    """The sum of terms; terms that are parts of one tensor are placed in it together."""
    found, rest = list[Call](), [term for term in terms if term not in parts]
    by_place = defaultdict[Any, list[Call]](list)
    for call in (parts[term] for term in terms if term in parts):
        by_place[(*call.inputs[1:3], call.inputs[0].kind)].append(call)
    for calls in by_place.values():
        is_all = not rest and len(by_place) == 1
        of_part = value if is_all else Value(*value.kind)
        sizes, dim = calls[0].inputs[1:3]
        rows = tuple(call.inputs[3] for call in calls)
        inputs = tuple(call.inputs[0] for call in calls), sizes, dim, rows
        found.append(Call(SUM_OF_PARTS, inputs, (of_part,)))
        rest += [] if is_all else [of_part]
    return [*found, Call(SUM_OF_TERMS, (tuple(rest),), (value,))] if rest else found
