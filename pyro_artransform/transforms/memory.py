# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The last pair of a transform, remembered so that it cannot be out of date.

Scoring a draw right after it was made needs the argument and the log-determinant that were just
computed. torch's own cache hands them out by the identity of the tensors alone, and so returns old
values after an optimiser step (pyro#2564), a graph that has been freed (pyro#2545), or a value without
the gradient that is asked for (pyro#1885). Here a pair is handed out only if recomputing would give the
same: every tensor that the transform reads is the same object with the same version *and the same
values* (a write through ``p.data`` moves no version counter), gradients are wanted now if and only if
they were then, and what carries a graph of the transform is handed out once.
"""

import functools
import types
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.constraints import Constraint

from .evaluate import values_are_readable

_KNOWN = ("torch.nn.", "pyro_artransform.")
_KNOWN_PACKAGES = ("torch", "pyro", "math", "functools", "pyro_artransform")
_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = (
    *(type(None), bool, int, float, str, type, torch.dtype, torch.device),
    *(Constraint, types.BuiltinFunctionType),
)


class Pair:
    """A source, the result that a transform made of it, and the log-determinant of that step.

    :param source: what the transform was applied to.
    :param result: what came out; only a weak reference is kept, for nobody can ask for a pair whose
        result is gone, and its graph goes with it.
    :param ladj: the log-determinant of the step from source to result.
    :param state: all tensors that the transform reads, see :func:`visible_tensors`.
    """

    def __init__(self, source: Tensor, result: Tensor, ladj: Tensor, state: list[Tensor]) -> None:
        self.source = source
        self._ladj: Tensor | None = ladj
        self._carries_graph = ladj.requires_grad or result.requires_grad
        self._result = weakref.ref(result, self._forget_ladj)
        self._evidence = [_fingerprint(tensor) for tensor in (source, result, *state)]

    def source_of(self, result: Tensor, state: list[Tensor] | None) -> Tensor | None:
        """The source, if recomputing it from ``result`` would give the same, else None."""
        if self._result() is not result or result.requires_grad != self._carries_graph:
            return None
        return self.source if self._holds(result, result, state) else None

    def ladj_of(self, source: Tensor, result: Tensor, state: list[Tensor] | None) -> Tensor | None:
        """The log-determinant, if recomputing it would give the same, else None."""
        if self._ladj is None or self._result() is not result or self.source is not source:
            return None
        if not self._holds(source, result, state):
            return None
        ladj = self._ladj
        if self._carries_graph:
            self._ladj = None
        return ladj

    def _holds(self, given: Tensor, result: Tensor, state: list[Tensor] | None) -> bool:
        if state is None or not values_are_readable(given):
            return False
        wants_graph = torch.is_grad_enabled() and any(t.requires_grad for t in (given, *state))
        if wants_graph != self._carries_graph or len(state) + 2 != len(self._evidence):
            return False
        now = (self.source, result, *state)
        return all(_unchanged(tensor, then) for tensor, then in zip(now, self._evidence))

    def _forget_ladj(self, _: object) -> None:
        self._ladj = None


def remember(
    source: Tensor, result: Tensor, ladj: Tensor, state: list[Tensor] | None
) -> Pair | None:
    """A pair, or None where nothing may be remembered."""
    if state is None or not values_are_readable(source, *state):
        return None
    return Pair(source, result, ladj, state)


def visible_tensors(owner: object) -> list[Tensor] | None:
    """All tensors that a module or transform reads, or None if it may read some that nobody sees.

    :param owner: a module, a transform, or a container of them.
    """
    found: list[Tensor] = []
    return found if _collect(owner, found, set()) else None


def _collect(owner: object, found: list[Tensor], seen: set[int]) -> bool:
    """Adds the tensors of ``owner`` to ``found``; false if it may read others."""
    if id(owner) in seen:
        return True
    if isinstance(owner, Tensor):
        found.append(owner)
        return True
    if isinstance(owner, nn.Module):
        return all(_collect_module(module, found, seen) for module in owner.modules())
    if isinstance(owner, (list, tuple, set)):
        return _collect_all(owner, found, seen)
    if isinstance(owner, dict):
        return _collect_all(owner.values(), found, seen)
    seen.add(id(owner))
    if isinstance(owner, Transform):
        return _collect_all(vars(owner).values(), found, seen)
    if isinstance(owner, types.FunctionType):
        return _collect_all(_read_by(owner), found, seen)
    if isinstance(owner, types.MethodType):
        return _collect_all((owner.__func__, owner.__self__), found, seen)
    if isinstance(owner, functools.partial):
        return _collect_all((owner.func, owner.args, owner.keywords), found, seen)
    if isinstance(owner, types.ModuleType):
        return owner.__name__.split(".")[0] in _KNOWN_PACKAGES
    return isinstance(owner, _PLAIN)


def _read_by(function: types.FunctionType) -> list[object]:
    """What a function may read besides its arguments: its closure, defaults and globals."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    names = _names_in(function.__code__)
    return cells + defaults + [v for k, v in function.__globals__.items() if k in names]


def _names_in(code: types.CodeType) -> set[str]:
    inner = (_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _collect_module(module: nn.Module, found: list[Tensor], seen: set[int]) -> bool:
    if id(module) in seen:
        return True
    seen.add(id(module))
    found.extend(p for p in module._parameters.values() if p is not None)
    found.extend(b for b in module._buffers.values() if b is not None)
    hidden = getattr(module, "hidden_state", None)
    if hidden is not None:
        return _collect(hidden, found, seen)
    if type(module).__module__.startswith(_KNOWN):
        return True
    own = [v for k, v in vars(module).items() if k not in _INTERNAL]
    return _collect_all([*own, type(module).forward], found, seen)


def _collect_all(values: Iterable[object], found: list[Tensor], seen: set[int]) -> bool:
    return all(_collect(value, found, seen) for value in values)


def _fingerprint(tensor: Tensor) -> tuple[int, int, bool, Tensor]:
    return id(tensor), tensor._version, tensor.requires_grad, tensor.detach().clone()


def _unchanged(tensor: Tensor, then: tuple[int, int, bool, Tensor]) -> bool:
    identity, version, requires_grad, value = then
    if id(tensor) != identity or tensor._version != version:
        return False
    return tensor.requires_grad == requires_grad and torch.equal(tensor.detach(), value)
