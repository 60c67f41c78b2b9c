# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""All that a transform reads, as far as it can be seen.

Parameters and buffers, attributes, and what functions read through their closures, defaults and
globals. Where something of unknown content may be read, the answer is that not all can be seen.
"""

import functools
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.constraints import Constraint


class State(NamedTuple):
    """What an object reads.

    :param tensors: tensors.
    :param training: whether its modules train.
    """

    tensors: list[Tensor]
    training: list[bool]


#: Numbers are taken for constants: those that change, as a rule, count calls.
_CONSTANT = (
    *(type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size),
    *(type, Constraint, types.BuiltinFunctionType),
)
#: Functions and modules of these read no tensors but their arguments.
_KNOWN_PACKAGES = ("torch", "pyro", "math", "functools", "typing", "pyro_artransform")
#: What every module has, besides its hooks.
_INTERNAL = frozenset(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}
#: The memory itself, and what only leads back to the object.
_SKIPPED = _INTERNAL | {
    *("_pair", "_pair_is_inverse", "_inverse_ref", "_inv", "_cached_x_y"),
    *("structure", "_layout"),  # what has been checked, and what follows from a buffer
}


def visible_state(owner: object) -> State | None:
    """All that a module or transform reads, or None if it may read something that cannot be seen.

    :param owner: a module, a transform, or a container of them.
    """
    state = State([], [])
    return state if _collect(owner, state, set()) else None


def _collect(owner: object, state: State, seen: set[int]) -> bool:
    """Adds what ``owner`` reads to the state; false if there may be more."""
    if isinstance(owner, Tensor):
        state.tensors.append(owner)
        return True
    if id(owner) in seen or isinstance(owner, _CONSTANT):
        return True
    seen.add(id(owner))
    if isinstance(owner, nn.Module):
        state.training.append(owner.training)
    parts = _parts(owner)
    return parts is not None and all(_collect(part, state, seen) for part in parts)


def _parts(owner: object) -> Iterable[object] | None:
    """What an object consists of; None if that is not known."""
    if isinstance(owner, (list, tuple, set)):
        return owner
    if isinstance(owner, dict):
        return owner.values()
    if isinstance(owner, nn.Module):
        inside = [*owner._parameters.values(), *owner._buffers.values(), *owner._modules.values()]
        return inside + _attributes(owner)
    if isinstance(owner, Transform):
        return _attributes(owner)
    if isinstance(owner, types.FunctionType):
        return _read_by(owner)
    if isinstance(owner, types.MethodType):
        return owner.__func__, owner.__self__
    if isinstance(owner, functools.partial):
        return owner.func, owner.args, owner.keywords
    if isinstance(owner, types.ModuleType):
        return () if _is_known(owner.__name__) else None
    return None


def _attributes(owner: object) -> list[object]:
    """The attributes of an object, and the functions of its class where they are not known."""
    found = [value for name, value in vars(owner).items() if name not in _SKIPPED]
    cls: Any = type(owner)
    return found + _functions_of(cls)


@functools.lru_cache(maxsize=256)
def _functions_of(cls: Any) -> list[object]:
    """The functions of a class and its bases, without those of known packages."""
    foreign = [c for c in cls.__mro__ if c is not object and not _is_known(c.__module__)]
    members = (_function(member) for c in foreign for member in vars(c).values())
    return [function for function in members if function is not None]


def _function(member: object) -> object:
    """The function behind a member of a class, None if it is none."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    return member if isinstance(member, types.FunctionType) else None


def _read_by(function: types.FunctionType) -> list[object]:
    """What a function may read besides its arguments: its closure, defaults and globals."""
    if _is_known(function.__module__ or ""):
        return [cell.cell_contents for cell in function.__closure__ or ()]
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    names = _names_in(function.__code__)
    return cells + defaults + [v for k, v in function.__globals__.items() if k in names]


def _names_in(code: types.CodeType) -> set[str]:
    inner = (_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_known(module_name: str) -> bool:
    return module_name.split(".")[0] in _KNOWN_PACKAGES
