# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A guide's share of Pyro's param store: parameters that train, and are no other guide's.

Pyro's store finds parameters by name, and a second guide of a class has the names of the first. In
Pyro it is handed the first one's parameters while it draws from its own, and never trains
(pyro#3094); neither does a guide that meets a store that was loaded (pyro#1204). Here a guide
and the store always hold the same tensors: the guide takes those of the store, or another name.
"""

import enum
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

_ById = weakref.WeakValueDictionary[int, Tensor]

# what a guide of this process has had in a store, and what each living one has
_parameters: _ById = weakref.WeakValueDictionary()
_of_guide: "weakref.WeakKeyDictionary[AutoGuide, _ById]" = weakref.WeakKeyDictionary()


class Standing(enum.Enum):
    """What a guide's own values count for when the store has others under its name."""

    #: Just set up: whatever the store has, counts more.
    NEW = enum.auto()
    #: Copied, unpickled or loaded with values of its own: they count more than any.
    CARRIED = enum.auto()
    #: In the store already: what was loaded into the store since then counts more.
    SETTLED = enum.auto()


def claim(guide: AutoGuide, standing: Standing, register: bool) -> Standing:
    """Makes the guide's parameters and those of its name in the store the same tensors.

    The guide adopts entries of its name unless they belong to another living guide; then it takes
    the next free name, with a suffix.

    :param guide: a guide that has been set up, with its flow in ``guide.transform``.
    :param standing: its standing.
    :param register: whether to put parameters into the store that it does not have.
    :return: the standing from now on.
    :raises ValueError: if the store was loaded with parameters of its name that do not fit it.
    """
    own = _trainable(guide)
    _of_guide.setdefault(guide, weakref.WeakValueDictionary())
    if pyro.settings.get("module_local_params"):
        _unconstrain(own.values())
        return Standing.CARRIED
    stored = dict(pyro.get_param_store().named_parameters())
    keys = _full_names(guide._pyro_name, own)
    if any(stored.get(key) is not own[short] for key, short in keys.items()):
        _settle(guide, own, stored, standing, register)
    return standing if standing is Standing.CARRIED and not register else Standing.SETTLED


def _settle(
    guide: AutoGuide,
    own: dict[str, nn.Parameter],
    stored: dict[str, Tensor],
    standing: Standing,
    register: bool,
) -> None:
    misfit = None
    for name in _names(guide):
        entries = _entries(name, stored)
        if all(own.get(short) is tensor for short, tensor in entries.items()):
            if misfit is not None:
                raise ValueError(misfit)
            if register:
                _put(guide, name, own)
            return
        if _may_adopt(guide, entries, own, standing):
            problem = _misfit(name, entries, own)
            if problem is None:
                _adopt(guide, name, entries, own)
                return
            if not _were_anothers(entries, guide):
                misfit = misfit or problem
        # from here on only a name that is free will do for a guide with values of its own
        standing = Standing.NEW if standing is Standing.NEW else Standing.CARRIED


def _may_adopt(
    guide: AutoGuide,
    entries: dict[str, Tensor],
    own: dict[str, nn.Parameter],
    standing: Standing,
) -> bool:
    if standing is Standing.CARRIED:
        return False
    others = {short: t for short, t in entries.items() if own.get(short) is not t}
    if standing is Standing.SETTLED:
        return not _were_anothers(others, guide)
    if _belong_to_another(others, guide):
        # a guide that nobody can reach any more may wait for the collector in a cycle
        gc.collect()
    return not _belong_to_another(others, guide)


def _were_anothers(entries: Mapping[str, Tensor], guide: AutoGuide) -> bool:
    strangers = [t for t in entries.values() if _of_guide[guide].get(id(t)) is not t]
    return any(_parameters.get(id(tensor)) is tensor for tensor in strangers)


def _belong_to_another(entries: Mapping[str, Tensor], guide: AutoGuide) -> bool:
    others = {id(p) for other in _of_guide if other is not guide for p in other.parameters()}
    return any(id(tensor) in others for tensor in entries.values())


def _misfit(name: str, entries: dict[str, Tensor], own: dict[str, nn.Parameter]) -> str | None:
    """What keeps a guide from adopting the entries, in words."""
    advice = (
        "Build the guide as the one that was saved, or call pyro.clear_param_store() to start anew"
    )
    for short in sorted(entries.keys() ^ own.keys()):
        where = "no" if short in own else "a"
        return f"the param store has {where} parameter '{short}' of the guide '{name}'. {advice}"
    for short, tensor in entries.items():
        expected, got = ((tuple(t.shape), t.dtype, str(t.device)) for t in (own[short], tensor))
        if expected != got:
            return (
                f"the param store's '{short}' of the guide '{name}' does not fit: expected "
                f"{expected}, got {got}. {advice}"
            )
    return None


def _adopt(
    guide: AutoGuide, name: str, entries: dict[str, Tensor], own: dict[str, nn.Parameter]
) -> None:
    for short, tensor in entries.items():
        new = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
        new.requires_grad_()
        _replace(_flow(guide), own[short], new)
    _put(guide, name, _trainable(guide))


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is old:
                part._parameters[key] = new


def _put(guide: AutoGuide, name: str, own: Mapping[str, nn.Parameter]) -> None:
    store = pyro.get_param_store()
    stored = dict(store.named_parameters())
    for key, short in _full_names(name, own).items():
        parameter = own[short]
        if key in stored and stored[key] is not parameter:
            del store[key]
        if stored.get(key) is not parameter:
            store[key] = parameter
        _parameters[id(parameter)] = _of_guide[guide][id(parameter)] = parameter
    guide._pyro_name = name


def _unconstrain(parameters: Iterable[nn.Parameter]) -> None:
    # SVI asks each parameter for this, and the store, which sets it, has no part here
    for parameter in parameters:
        parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]


def _names(guide: AutoGuide) -> Iterator[str]:
    """The guide's present name, then its first one with no suffix, then with 1, 2, ..."""
    present, first = guide._pyro_name, guide.first_name
    yield present
    if present != first:
        yield first
    number = 0
    while True:
        number += 1
        if f"{first}_{number}" != present:
            yield f"{first}_{number}"


def _entries(name: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = param_with_module_name(f"{name}.transform", "")
    return {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}


def _full_names(name: str, own: Mapping[str, nn.Parameter]) -> dict[str, str]:
    return {param_with_module_name(f"{name}.transform", short): short for short in own}


def _trainable(guide: AutoGuide) -> dict[str, nn.Parameter]:
    return {name: p for name, p in _flow(guide).named_parameters() if p.requires_grad}


def _flow(guide: AutoGuide) -> nn.Module:
    # not by the attribute, whose reading is a param statement
    return guide._modules["transform"]  # type: ignore[return-value]
