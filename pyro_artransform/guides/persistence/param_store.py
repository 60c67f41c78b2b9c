# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides that share their tensors with Pyro's param store.

Pyro's store looks up parameters by name, and a second guide of a class has the same names as the first. In
Pyro such a guide is never trained (pyro#3094), nor is a guide created after loading the store (pyro#1204).
Here a guide adopts the tensors of the store, or takes another name.
"""

import itertools
import re
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Literal, cast

import pyro
from pyro.infer.autoguide import AutoGuide
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


class RegisteredGuide(AutoGuide):
    """A guide whose module parameters are also in Pyro's store, under its name."""

    #: which values take precedence if the store has others under the guide's name: "new", the store's;
    #: "carried" (a copied, unpickled or loaded guide), its own; "settled", the store's if loaded since then
    _ownership: Literal["new", "carried", "settled"] = "new"
    _entries: Mapping[str, nn.Parameter] = {}  #: its entries in the store
    prior_coordinates: Any = None  #: those that the store does not hold

    def __init__(self, model: Any) -> None:
        # not AutoContinuous.__init__, which would wrap the model again
        AutoGuide.__init__(self, model)
        self.first_name: str = self._pyro_name  #: the name before any suffix

    def _register(self) -> None:
        """Makes the guide and the store's entries of its name share tensors.

        :raises ValueError: if entries of its name that were loaded into the store do not fit.
        """
        if pyro.settings.get("module_local_params"):
            for parameter in self._own().values():
                # SVI reads this attribute, which otherwise the store sets
                parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]  # Pyro's
            self._ownership, self._entries = "carried", {}
            return
        name, is_adopted = self._find_name(self._own())
        if (in_call := bool(self._pyro_context.active)) or is_adopted:
            self._entries = {f"{name}.{short}": p for short, p in self._own().items()}
            store = pyro.get_param_store()
            for key, parameter in self._entries.items():
                # store[key] would apply transforms, and make a frozen parameter require gradients
                if store._params.get(key) is not parameter:
                    store.set_state(
                        {"params": {key: parameter}, "constraints": {key: constraints.real}}
                    )
                _OWNERS[parameter] = weakref.ref(self)
            self._pyro_name = name
        if in_call or self._ownership != "carried":
            self._ownership = "settled"

    def _find_name(self, own: dict[str, nn.Parameter]) -> tuple[str, bool]:
        """A name under which guide and store can share tensors, and whether the guide adopted entries.

        Entries are adopted unless they belong to another living guide.
        """
        misfit = ""
        takes_from: Any = {"new": {self, None}, "settled": {self}}.get(self._ownership)
        with_suffix = (f"{self.first_name}_{number}" for number in itertools.count(1))
        for name in itertools.chain(dict.fromkeys([self._pyro_name, self.first_name]), with_suffix):
            prefix, stored = f"{name}.", pyro.get_param_store().named_parameters()
            entries = {k.removeprefix(prefix): t for k, t in stored if k.startswith(prefix)}
            foreign = [tensor for short, tensor in entries.items() if own.get(short) is not tensor]
            if not foreign:
                break
            owners = {_OWNERS[tensor]() for tensor in foreign if tensor in _OWNERS}
            if takes_from is not None and owners <= takes_from:
                if not (problem := _misfit(name, entries, own)):
                    if self._ownership == "new" and not owners and self.prior_coordinates:
                        warnings.warn(_WITHOUT_COORDINATES.format(name=name), stacklevel=2)
                    _adopt(self, entries, own)
                    return name, True
                if owners <= {self}:  # loaded entries
                    misfit = misfit or problem
            if self._ownership == "settled":  # from here on only a free name will do
                takes_from = None
        if misfit:
            raise ValueError(misfit)
        return name, False

    def drop_orphans(self) -> None:
        """Before the first call, deletes entries of dead guides of its name from the store."""
        if self.prototype_trace is None:
            pattern = re.compile(rf"{re.escape(self.first_name)}(_\d+)?\.")
            for key, tensor in [*pyro.get_param_store().named_parameters()]:
                if pattern.match(key) and tensor in _OWNERS and _OWNERS[tensor]() is None:
                    del pyro.get_param_store()[key]

    def _own(self) -> dict[str, nn.Parameter]:
        """The parameters, frozen ones too, by their names in the store without the guide's prefix."""
        # without attribute access, which is a param statement
        return {
            param_with_module_name(part, name): p
            for part, module in self._modules.items()
            for name, p in cast(nn.Module, module).named_parameters()
        }

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(name, context)
        self.first_name = name


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
                f"{expected.get(short)}, got {got.get(short)}. Build the guide as it was saved, or call "
                "pyro.clear_param_store() to start afresh"
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
