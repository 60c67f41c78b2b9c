# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides that share their tensors with Pyro's param store.

Pyro's store looks up parameters by name, and a second guide of a class has the same names as the first. In
Pyro such a guide is never trained (pyro#3094), nor is a guide created after loading the store (pyro#1204).
Here a guide adopts entries of its name that belong to no living guide, or takes the next free number.
"""

import itertools
import re
import warnings
import weakref
from typing import Any, cast

import pyro
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.weak import WeakTensorKeyDictionary

#: weak reference to the guide that stored each parameter
_OWNERS: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()
_WITHOUT_COORDINATES = (
    "the guide '{name}' takes parameters that were loaded into the param store, which does not hold the "
    "coordinates in which they were trained, and finds these anew: with others this is another "
    "distribution. Use guide.save and load"
)


def register(guide: Any) -> None:
    """Makes a guide and the store's entries of its name share tensors.

    :raises ValueError: if entries of its name that were loaded into the store do not fit.
    """
    own = _parameters(guide)
    if pyro.settings.get("module_local_params"):
        for parameter in own.values():
            # SVI reads this attribute, which otherwise the store sets
            parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]  # Pyro's
        guide._ownership, guide._entries = "carried", {}
        return
    name, is_adopted = _find_name(guide, own)
    if (in_call := bool(guide._pyro_context.active)) or is_adopted:
        guide._pyro_name = name
        guide._entries = {f"{name}.{short}": p for short, p in _parameters(guide).items()}
        store = pyro.get_param_store()
        for key, parameter in guide._entries.items():
            # store[key] would apply transforms, and make a frozen parameter require gradients
            if store._params.get(key) is not parameter:
                store.set_state(
                    {"params": {key: parameter}, "constraints": {key: constraints.real}}
                )
            _OWNERS[parameter] = weakref.ref(guide)
    if in_call or guide._ownership != "carried":
        guide._ownership = "settled"


def _find_name(guide: Any, own: dict[str, nn.Parameter]) -> tuple[str, bool]:
    """A name under which guide and store can share tensors, and whether the guide adopted entries."""
    numbered = (f"{guide.first_name}_{number}" for number in itertools.count(1))
    for name in itertools.chain([guide._pyro_name, guide.first_name], numbered):
        prefix, stored = f"{name}.", pyro.get_param_store().named_parameters()
        entries = {k.removeprefix(prefix): t for k, t in stored if k.startswith(prefix)}
        foreign = [tensor for short, tensor in entries.items() if own.get(short) is not tensor]
        if not foreign:
            break
        owners = {_OWNERS[tensor]() for tensor in foreign if tensor in _OWNERS} - {guide}
        adoptable = {None} if guide._ownership == "new" else set[Any]()
        # a guide that was called before adopts what was loaded, not what another guide has left
        if guide._ownership == "carried" or owners - adoptable:
            continue
        if not (misfit := _misfit(name, entries, own)):
            if not owners and guide._ownership == "new" and guide.prior_coordinates:
                warnings.warn(_WITHOUT_COORDINATES.format(name=name), stacklevel=2)
            _adopt(guide, entries, own)
            return name, True
        if not owners:
            raise ValueError(misfit)
    return name, False


def drop_orphans(guide: Any) -> None:
    """Before a guide's first call, deletes entries of dead guides of its name from the store."""
    if guide.prototype_trace is None:
        pattern = re.compile(rf"{re.escape(guide.first_name)}(_\d+)?\.")
        for key, tensor in [*pyro.get_param_store().named_parameters()]:
            if pattern.match(key) and tensor in _OWNERS and _OWNERS[tensor]() is None:
                del pyro.get_param_store()[key]


def _parameters(guide: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters, frozen ones too, by their names in the store without the guide's prefix."""
    # without attribute access, which is a param statement
    return {
        param_with_module_name(part, name): p
        for part, module in guide._modules.items()
        for name, p in cast(nn.Module, module).named_parameters()
    }


def _misfit(name: str, entries: dict[str, Tensor], own: dict[str, nn.Parameter]) -> str:
    """Why a guide cannot adopt the entries; empty if it can."""
    expected, got = (
        {short: (tuple(t.shape), t.dtype, str(t.device)) for short, t in tensors.items()}
        for tensors in (own, entries)
    )
    for short in sorted(entries.keys() | own.keys()):
        if expected.get(short) != got.get(short):
            return (
                f"the param store's '{short}' of the guide '{name}' does not match: expected "
                f"{expected.get(short)}, got {got.get(short)}. pyro.clear_param_store() starts afresh"
            )
    return ""


def _adopt(guide: nn.Module, entries: dict[str, Tensor], own: dict[str, nn.Parameter]) -> None:
    """Replaces the guide's parameters by the store's entries."""
    new: dict[Any, nn.Parameter] = {
        own[short]: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
        for short, tensor in entries.items()
    }
    for part in guide.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and parameter in new:
                new[parameter].requires_grad_(parameter.requires_grad)
                part._parameters[key] = new[parameter]
