# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Lists the operations of a graph, decides which can be batched, and schedules them.

Operations of one role have the same kind, input shapes, dtypes and constants. They wait until the inputs of
all of them are ready. If no role is complete, the operation with the longest chain of dependents goes first,
with those of its role that are ready, as in a recursion over time.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import Any, NamedTuple

import torch

#: elementwise functions of tensors that broadcast
POINTWISE = {
    *("abs", "add", "bitwise_and", "bitwise_not", "clamp", "clamp_max", "clamp_min", "cos"),
    *("digamma", "div", "eq", "erf", "erfc", "erfinv", "exp", "expm1", "ge", "gt", "isfinite"),
    *("isinf", "isnan", "le", "lgamma", "log", "log1p", "logical_and", "logical_not", "logical_or"),
    *("lt", "masked_fill", "maximum", "minimum", "mul", "ne", "neg", "pow", "reciprocal", "rsqrt"),
    *("rsub", "sgn", "sigmoid", "sigmoid_backward", "sign", "sin", "softplus"),
    *("softplus_backward", "special_erfcx", "special_log_ndtr", "special_ndtri", "sqrt", "square"),
    *("sub", "tanh", "tanh_backward", "where", "xlogy", "_to_copy"),
}
#: operations that only reshape, and functions of one tensor
VIEWS = {"_unsafe_view", "squeeze", "unsqueeze", "view"}
OF_ONE = {*VIEWS, "expand", "sum"}
# operations that ignore the values of their first input
_VALUELESS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
# identities where there are no gradients
_SAME = {"detach", "lift_fresh"}
#: minimum number of operations in a batch, and of terms in a sum
FEWEST = 8


class Kind(NamedTuple):
    """The shape, dtype and device of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Call(NamedTuple):
    """An operation, with the names of its inputs and outputs.

    Some calls have no node: elementwise functions, sums of their inputs, and recurrences. With ``part``,
    sizes, dimension and indices, a sum adds each input to its place in a tensor of zeros.
    """

    node: Any
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    part: tuple[list[int], int, list[int]] | None = None


class Tape:
    """The operations of a graph, without duplicates, and with chains of additions joined into sums."""

    def __init__(self, graph: Any, kinds: Mapping[str, Kind], random: Container[str]) -> None:
        self.kinds, self._random = dict(kinds), random
        self.constants, self._same = dict[str, Any](), dict[str, str]()
        self.calls = list[Call]()
        seen = dict[Any, Call]()
        for node in graph.nodes():
            call = Call(
                node,
                node.kind().removeprefix("aten::"),
                tuple(map(self._name, node.inputs())),
                tuple(value.debugName() for value in node.outputs()),
            )
            key = self._key(call)
            if self._is_identity(call):
                self._same[call.outputs[0]] = call.inputs[0]
            elif key is not None and key in seen:
                self._same.update(zip(call.outputs, seen[key].outputs))
            else:
                self.calls.append(call)
                seen[key] = call
        self.results = [*map(self._name, graph.outputs())]
        self._join_sums()

    def _name(self, value: Any) -> str:
        name = value.debugName()
        return self._same.get(name, name)

    def _key(self, call: Call) -> Any:
        """A key that operations with equal results share; ``None`` if there is no such key."""
        if call.kind == "prim::Constant":
            value = self.constants[call.outputs[0]] = call.node.output().toIValue()
            return None if isinstance(value, torch.Tensor) else (type(value), repr(value))
        if call.kind == "prim::ListConstruct" and not call.inputs:
            self.constants[call.outputs[0]] = []
        if call.kind in _VALUELESS and call.inputs[0] in self.kinds:
            return call.kind, self.kinds[call.inputs[0]], *call.inputs[1:]
        return None if self.is_random(call) else (call.kind, *call.inputs)

    def is_random(self, call: Call) -> bool:
        return any(name in self._random for name in call.outputs)

    def _is_identity(self, call: Call) -> bool:
        if call.kind in ("expand", "view"):
            return self.kinds.get(call.inputs[0]) == self.kinds[call.outputs[0]]
        return call.kind in _SAME

    def _join_sums(self) -> None:
        """Replaces long chains of additions by sums of all their terms."""
        uses = Counter(name for call in self.calls for name in call.inputs)
        uses.update(self.results)
        chains = dict[str, tuple[list[str], list[int]]]()
        for index, call in enumerate(self.calls):
            names = {*call.inputs[:2], *call.outputs}
            of_one_kind = len({self.kinds.get(name) for name in names}) == 1
            if call.kind == "add" and of_one_kind and self.constants.get(call.inputs[-1]) == 1:
                terms, members = list[str](), [index]
                for name in call.inputs[:2]:
                    is_part = name in chains and uses[name] == 1
                    more, others = chains.pop(name) if is_part else ([name], [])
                    terms, members = terms + more, others + members
                chains[call.outputs[0]] = terms, members
        joined, parts = dict[int, list[Call]](), self._parts(uses)
        for name, (terms, members) in chains.items():
            if len(terms) >= FEWEST:
                joined.update({index: [] for index in members})
                joined[members[-1]] = self._sums(name, terms, parts)
        self.keep_needed(
            [new for i, call in enumerate(self.calls) for new in joined.get(i, [call])]
        )

    def keep_needed(self, calls: Sequence[Call]) -> None:
        """Takes the calls, in any order, on which results or random numbers depend."""
        made_by = {name: i for i, call in enumerate(calls) for name in call.outputs}
        names = [name for call in calls if self.is_random(call) for name in call.outputs]
        needed, names = set[int](), [*names, *self.results]
        for name in names:
            index = made_by.get(name, -1)
            if index >= 0 and index not in needed:
                needed.add(index)
                names += calls[index].inputs
        self.calls = [calls[i] for i in sorted(needed)]

    def _parts(self, uses: Mapping[str, int]) -> dict[str, Call]:
        """Gradients of selections, which are zero elsewhere, by output name."""
        return {
            call.outputs[0]: call
            for call in self.calls
            if call.kind == "select_backward"
            and uses[call.outputs[0]] == 1
            and all(name in self.constants for name in call.inputs[1:])
        }

    def _sums(self, name: str, terms: Sequence[str], parts: Mapping[str, Call]) -> list[Call]:
        """The sum of terms; terms that are parts of one tensor are placed in it together."""
        found, rest = list[Call](), [term for term in terms if term not in parts]
        by_place = defaultdict[tuple[str, ...], list[Call]](list)
        for call in (parts[term] for term in terms if term in parts):
            by_place[(*call.inputs[1:3], str(self.kinds[call.inputs[0]]))].append(call)
        for k, calls in enumerate(by_place.values()):
            sizes, dim = (self.constants[name] for name in calls[0].inputs[1:3])
            part = sizes, dim, [self.constants[call.inputs[3]] for call in calls]
            of_part = f"{name}.{k}" if rest or len(by_place) > 1 else name
            self.kinds[of_part] = self.kinds[name]
            inputs = tuple(call.inputs[0] for call in calls)
            found.append(Call(None, "sum of parts", inputs, (of_part,), part))
            rest += [of_part] if of_part != name else []
        return [*found, Call(None, "sum of terms", tuple(rest), (name,))] if rest else found

    def _role(self, index: int) -> Any:
        """What operations of one batch share: kind, shapes and constants, but for a selection's index."""
        call = self.calls[index]
        if not self._can_be_batched(call):
            return index
        if call.kind == "select":  # from one tensor
            return call.kind, *call.inputs[:2]
        return call.kind, *(self.kinds.get(name, name) for name in call.inputs)

    def _can_be_batched(self, call: Call) -> bool:
        """Whether the operation can be batched: a known kind, with inputs of one dtype and device."""
        tensors = [self.kinds[name] for name in call.inputs if name in self.kinds]
        others = [name for name in call.inputs if name not in self.kinds]
        floats = {each.dtype for each in tensors if each.dtype.is_floating_point}
        is_known = call.kind in POINTWISE or call.kind in OF_ONE or call.kind == "select"
        is_alike = len(floats) <= 1 and len({each.device for each in tensors}) == 1
        if not (is_known and is_alike and all(name in self.constants for name in others)):
            return False
        if call.kind == "sum":  # over explicit dimensions
            return len(call.inputs) == 4 and bool(self.constants[call.inputs[1]])
        return call.kind != "select" or self.constants[call.inputs[2]] >= 0

    def schedule(self) -> list[list[int]]:
        """Batches of operations, in an order that respects dependencies."""
        made_by = {name: i for i, call in enumerate(self.calls) for name in call.outputs}
        needs = [{made_by[n] for n in call.inputs if n in made_by} for call in self.calls]
        random = [i for i, call in enumerate(self.calls) if self.is_random(call)]
        for before, after in pairwise(random):
            needs[after].add(before)  # random operations keep their order
        users, height = defaultdict[int, list[int]](list), [1] * len(needs)
        in_order = TopologicalSorter(dict(enumerate(needs))).static_order()
        for i in reversed([*in_order]):
            height[i] += max((height[j] for j in users[i]), default=0)
            for j in needs[i]:
                users[j].append(i)
        roles, waiting = [*map(self._role, range(len(needs)))], [len(needed) for needed in needs]
        left, ready = Counter(roles), defaultdict[Any, list[int]](list)
        queue, order = list[tuple[float, int]](), list[list[int]]()
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
            role = roles[queue[0][1]]
            order.append(sorted(ready.pop(role)))
            left[role] -= len(order[-1])
            new = []
            for i in order[-1]:
                waiting[i] = -1
                for j in users[i]:
                    waiting[j] -= 1
                    if not waiting[j]:
                        new.append(j)
