# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides that hold the same tensors as Pyro's param store.

Pyro's store finds parameters by name, and a second guide of a class has the names of the first: in
Pyro it never trains (pyro#3094), nor does a guide that meets a store that was loaded (pyro#1204). Here
a guide takes the tensors of the store, or another name.
"""

import itertools
import re
import weakref
from typing import Any, Literal, cast

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

#: for each parameter that a guide has put into a store, a weak reference to that guide
_OWNERS: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


class RegisteredGuide(AutoGuide):
    """A guide whose parameters are those of its modules, and under its name in Pyro's store."""

    #: Whose values count where the store has others under the guide's name: those of the store; the guide's,
    #: where it was copied, unpickled or loaded; those that were loaded into the store since the last call
    _ownership: Literal["new", "carried", "settled"] = "new"

    def __init__(self, model: Any) -> None:
        # not that of AutoContinuous, which would wrap the model once more
        AutoGuide.__init__(self, model)
        self.first_name: str = self._pyro_name  #: the name before any suffix

    def _register(self) -> None:
        """Makes the guide's parameters and those of its name in the store the same tensors.

        :raises ValueError: if entries of its name that were loaded into the store do not fit it.
        """
        own = self._trainable()
        if pyro.settings.get("module_local_params"):
            for parameter in own.values():
                # SVI asks each parameter for this, which otherwise the store sets
                parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]  # Pyro's
            self._ownership = "carried"
            return
        store = pyro.get_param_store()
        stored = store._params  # as Pyro's modules read it: store[key] would transform each
        is_stored = all(stored.get(f"{self._pyro_name}.{k}") is p for k, p in own.items())
        if is_stored and self._ownership == "settled":  # it was not cleared, or loaded
            return
        name, is_adopted = self._find_name(own)
        if (in_call := bool(self._pyro_context.active)) or is_adopted:
            for short, parameter in self._trainable().items():
                if stored.get(key := f"{name}.{short}") is not parameter:
                    store[key] = parameter
                _OWNERS[parameter] = weakref.ref(self)
            self._pyro_name = name
        if in_call or self._ownership != "carried":
            self._ownership = "settled"

    def _find_name(self, own: dict[str, nn.Parameter]) -> tuple[str, bool]:
        """The name under which guide and store can hold the same tensors, and whether the guide took these.

        It takes entries of a name unless they belong to another living guide.
        """
        ownership, misfit = self._ownership, ""
        with_suffix = (f"{self.first_name}_{number}" for number in itertools.count(1))
        for name in itertools.chain(dict.fromkeys([self._pyro_name, self.first_name]), with_suffix):
            prefix, stored = f"{name}.", pyro.get_param_store().named_parameters()
            entries = {k.removeprefix(prefix): t for k, t in stored if k.startswith(prefix)}
            foreign = [tensor for short, tensor in entries.items() if own.get(short) is not tensor]
            if not foreign:
                break
            owners = {_OWNERS[tensor]() for tensor in foreign if tensor in _OWNERS}
            were_loaded = owners <= {self}
            are_free = owners <= {self, None} if ownership == "new" else were_loaded
            if are_free and ownership != "carried":
                if not (problem := _misfit(name, entries, own)):
                    _adopt(self, entries, own)
                    return name, True
                misfit = misfit or (problem if were_loaded else "")
            if ownership == "settled":  # from here on it takes no name but a free one
                ownership = "carried"
        if misfit:
            raise ValueError(misfit)
        return name, False

    def drop_orphans(self) -> None:
        """Before the first call: deletes what guides of its name that are gone have left in the store."""
        if self.prototype_trace is None:
            pattern = re.compile(rf"{re.escape(self.first_name)}(_\d+)?\.")
            for key, tensor in [*pyro.get_param_store().named_parameters()]:
                if pattern.match(key) and tensor in _OWNERS and _OWNERS[tensor]() is None:
                    del pyro.get_param_store()[key]

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by their names in the param store, without that of the guide."""
        # not by attributes, whose reading is a param statement
        return {
            param_with_module_name(part, name): p
            for part, module in self._modules.items()
            for name, p in cast(nn.Module, module).named_parameters()
            if p.requires_grad
        }

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(name, context)
        self.first_name = name


def _misfit(name: str, entries: dict[str, Tensor], own: dict[str, nn.Parameter]) -> str:
    """What keeps a guide from adopting the entries, in words."""
    advice = "Build the guide as it was saved, or call pyro.clear_param_store() to start anew"
    for short in sorted(entries.keys() | own.keys()):
        pair = own.get(short), entries.get(short)
        expected, got = (
            None if t is None else (tuple(t.shape), t.dtype, str(t.device)) for t in pair
        )
        if expected != got:
            where = f"the param store's '{short}' of the guide '{name}'"
            return f"{where} does not fit: expected {expected}, got {got}. {advice}"
    return ""


def _adopt(guide: nn.Module, entries: dict[str, Tensor], own: dict[str, nn.Parameter]) -> None:
    """Makes the store's entries the guide's parameters."""
    for short, tensor in entries.items():
        new = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
        new.requires_grad_()
        for part in guide.modules():
            for key, parameter in part._parameters.items():
                if parameter is own[short]:
                    part._parameters[key] = new
