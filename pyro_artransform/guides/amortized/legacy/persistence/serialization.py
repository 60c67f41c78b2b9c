# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides as tensors and plain data: what a file holds, and how it is read."""

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn

from ..sites.records import latent_site, latent_sites

FORMAT = 2

_KEYS = {"format", "class", "arguments", "state", "observed"}

_FUNCTIONS = {"torch": torch, "torch.nn.functional": nn.functional}

_SUPPORTS = (
    *("real", "independent", "greater_than", "greater_than_eq", "less_than"),
    *("interval", "half_open_interval", "simplex", "corr_cholesky", "corr_matrix"),
    *("ordered_vector", "positive_ordered_vector", "softplus_positive"),
)


def _class_of(constraint: Any) -> type:
    return constraint if isinstance(constraint, type) else type(constraint)


_NAME_TO_CLASS = {
    name: _class_of(getattr(constraints, name)) for name in _SUPPORTS if hasattr(constraints, name)
}
_CLASS_TO_NAME = {kind: name for name, kind in _NAME_TO_CLASS.items()}


def sites_to_plain(trace: poutine.Trace) -> list[dict[str, Any]]:
    """The latent sites of a prototype trace as plain data.

    :param trace: a trace of :func:`~pyro_artransform.guides.sites.records.latent_site` entries.
    :return: one dict for each site: name, shape, event_dim, dtype, support, plates.
    :raises ValueError: if a support cannot be written; the message names the site.
    """
    return [
        {
            "name": name,
            "shape": list(site["value"].shape),
            "event_dim": site["fn"].event_dim,
            "dtype": str(site["value"].dtype).removeprefix("torch."),
            "support": _support_to_plain(name, site["fn"].support),
            "plates": [list(frame) for frame in site["cond_indep_stack"]],
        }
        for name, site in latent_sites(trace).items()
    ]


def sites_from_plain(plain: list[dict[str, Any]], like: Tensor) -> poutine.Trace:
    """The prototype trace from what :func:`sites_to_plain` made of it.

    :param plain: plain data.
    :param like: a tensor on the device wanted.
    """
    trace = poutine.Trace()
    for site in plain:
        value = like.new_zeros(site["shape"], dtype=getattr(torch, site["dtype"]))
        support = _from_plain(site["support"], like)
        stack = tuple(CondIndepStackFrame(*frame) for frame in site["plates"])
        name = site["name"]
        trace.add_node(name, **latent_site(name, value, site["event_dim"], support, stack))
    return trace


def _support_to_plain(name: str, support: constraints.Constraint) -> dict[str, Any]:
    kind = _CLASS_TO_NAME.get(type(support))
    if kind is None:
        raise ValueError(
            f"the support of site '{name}' cannot be written to a file: expected one of "
            f"{', '.join(_NAME_TO_CLASS)}, got {type(support).__name__.lstrip('_')}"
        )
    bounds = {key: _bound_to_plain(name, value) for key, value in vars(support).items()}
    return {"support": kind, "bounds": bounds}


def _bound_to_plain(name: str, value: Any) -> Any:
    if isinstance(value, constraints.Constraint):
        return _support_to_plain(name, value)
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _from_plain(plain: Any, like: Tensor) -> Any:
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        dtype = getattr(torch, plain["dtype"])
        return torch.tensor(plain["tensor"], dtype=dtype, device=like.device)
    bounds = {key: _from_plain(value, like) for key, value in plain["bounds"].items()}
    return _NAME_TO_CLASS[plain["support"]](**bounds)


def plain_to_tensor(plain: Any) -> Tensor:
    """Plain data as a tensor of bytes, for a state dict, whose values are tensors."""
    return torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)


def tensor_to_plain(text: Tensor) -> Any:
    """The plain data from what :func:`plain_to_tensor` made of it."""
    return json.loads(bytes(text.tolist()))


def nonlinearity_to_plain(nonlinearity: Callable[[Tensor], Tensor] | None) -> Any:
    """An activation as plain data: its name in PyTorch, and its constants.

    :param nonlinearity: None, a module of ``torch.nn``, or a function of ``torch`` or of
        ``torch.nn.functional``.
    :raises ValueError: if it is none of these.
    """
    if nonlinearity is None:
        return None
    name = getattr(nonlinearity, "__name__", type(nonlinearity).__name__)
    for owner, functions in _FUNCTIONS.items():
        if nonlinearity is getattr(functions, name, None):
            return {"function": name, "owner": owner}
    if type(nonlinearity) is getattr(nn, name, None):
        names = getattr(nonlinearity, "__constants__", ())
        plain = {"module": name, "constants": {key: getattr(nonlinearity, key) for key in names}}
        # a container of modules is no module of a name and constants
        if repr(nonlinearity_from_plain(plain)) == repr(nonlinearity):
            return plain
    raise ValueError(
        "nonlinearity: expected a module of torch.nn or a function of torch, which can be written "
        f"to a file by its name, got {nonlinearity!r}; save the guide's state_dict() instead"
    )


def nonlinearity_from_plain(plain: Any) -> Callable[[Tensor], Tensor] | None:
    """The activation from what :func:`nonlinearity_to_plain` made of it."""
    if plain is None:
        return None
    if "function" in plain:
        return getattr(_FUNCTIONS[plain["owner"]], plain["function"])
    return getattr(nn, plain["module"])(**plain["constants"])


def write(
    path: str | os.PathLike[str],
    class_name: str,
    arguments: dict[str, Any],
    state: dict[str, Any],
    observed: list[str] | None,
) -> None:
    """Writes a guide's file.

    :param path: where to.
    :param class_name: the class of the guide.
    :param arguments: the arguments of its constructor, as plain data.
    :param state: its state dict.
    :param observed: the names of the model's sites that had data, if they are known.
    """
    saved = {"format": FORMAT, "class": class_name, "arguments": arguments, "state": dict(state)}
    torch.save({**saved, "observed": observed}, path)


def read(path: str | os.PathLike[str], class_name: str, map_location: Any) -> dict[str, Any]:
    """Reads a guide's file.

    :param path: where from.
    :param class_name: the class that is wanted.
    :param map_location: as for ``torch.load``.
    :raises ValueError: if the file is of another format or class, or holds NaN.
    """
    saved = _load(path, map_location)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or not saved.keys() >= _KEYS:
        raise _no_such_file(path)
    if saved["class"] != class_name:
        raise ValueError(f"{path}: expected a guide of class {class_name}, got {saved['class']}")
    check_finite(saved["state"])
    return saved


def _load(path: str | os.PathLike[str], map_location: Any) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception:
        if _holds_plain_data(path):
            # what was wrong is map_location
            raise
        # torch advises to load such a file with weights_only=False, which runs whatever is in it
        raise _no_such_file(path) from None


def _holds_plain_data(path: str | os.PathLike[str]) -> bool:
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def _no_such_file(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"{path}: expected a guide's file of format {FORMAT}, as the guide's save writes it, got "
        "another file"
    )


def check_finite(state: dict[str, Tensor]) -> None:
    """Refuses a state dict with NaN or infinite entries.

    :raises ValueError: if there is one; the message names it.
    """
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"parameter '{name}': expected finite numbers, got {bad} of {value.numel()} "
                "that are not"
            )
