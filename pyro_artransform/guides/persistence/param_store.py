# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which guide owns which entries of Pyro's param store.

Pyro's store finds parameters by name, and a second guide of a class has the names of the first: in
Pyro it never trains (pyro#3094), nor does a guide that meets a store that was loaded (pyro#1204). Here
a guide and the store hold the same tensors: the guide takes those of the store, or another name.
"""

import itertools
from typing import Literal

import pyro
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

#: for each parameter that a guide has put into a store, a weak reference to that guide
OWNERS: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


#: Whose values count where the store has others under a guide's name: those of the store; those of a guide
#: that was copied, unpickled or loaded; those that were loaded into the store since it was registered
Ownership = Literal["new", "carried", "settled"]


def resolve_conflicts(
    guide: nn.Module, own: dict[str, nn.Parameter], names: list[str], ownership: Ownership
) -> tuple[str, bool]:
    """Finds the name under which a guide and the store can hold the same tensors.

    The guide adopts entries of a name unless they belong to another living guide. It is an error if
    those of its name that were loaded into the store do not fit it.

    :param names: its present name, and the one before any suffix.
    :return: the name, and whether entries were adopted.
    """
    with_suffix = (f"{names[-1]}_{number}" for number in itertools.count(1))
    stored, misfit = dict(pyro.get_param_store().named_parameters()), None
    candidates = itertools.chain(dict.fromkeys(names), with_suffix)
    while True:
        name = next(candidates)
        prefix = f"{name}."
        entries = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
        foreign = [tensor for short, tensor in entries.items() if own.get(short) is not tensor]
        if not foreign:
            if misfit is not None:
                raise ValueError(misfit)
            return name, False
        owners = [OWNERS[tensor]() for tensor in foreign if tensor in OWNERS]
        were_loaded = all(owner is guide for owner in owners)
        are_free = ownership == "new" and all(owner in (None, guide) for owner in owners)
        if are_free or (were_loaded and ownership == "settled"):
            problem = _misfit(name, entries, own)
            if not problem:
                _adopt(guide, entries, own)
                return name, True
            misfit = misfit or (problem if were_loaded else None)
        if ownership == "settled":  # from here on it takes no name but a free one
            ownership = "carried"


def _misfit(name: str, entries: dict[str, Tensor], own: dict[str, nn.Parameter]) -> str:
    """What keeps a guide from adopting the entries, in words."""
    advice = "Build the guide as it was saved, or call pyro.clear_param_store() to start anew"
    for short in sorted(entries.keys() ^ own.keys()):
        where = "no" if short in own else "a"
        return f"the param store has {where} parameter '{short}' of the guide '{name}'. {advice}"
    for short, tensor in entries.items():
        expected, got = ((tuple(t.shape), t.dtype, str(t.device)) for t in (own[short], tensor))
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
