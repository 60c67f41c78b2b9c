# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides as tensors and plain data: what a file holds, and how it is read."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ... import files
from ...files import FilePath

Plain = dict[str, Any]

FORMAT = 4
_KEYS = {"format", "class", "spec", "state", "checksum"}
_MAX_ACTIVATION_SIZE = 2**16
_FUNCTIONS = {"torch": torch, "torch.nn.functional": nn.functional}
_SUPPORTS = (
    *("real", "independent", "greater_than", "greater_than_eq", "less_than"),
    *("interval", "half_open_interval", "simplex", "corr_cholesky", "corr_matrix"),
    *("ordered_vector", "positive_ordered_vector", "softplus_positive"),
)
_NAME_TO_CLASS: dict[str, type] = {}
for _name in _SUPPORTS:
    _support = getattr(constraints, _name)
    _NAME_TO_CLASS[_name] = _support if isinstance(_support, type) else type(_support)
_CLASS_TO_NAME = {kind: name for name, kind in _NAME_TO_CLASS.items()}


def support_to_plain(name: str, support: constraints.Constraint) -> Plain:
    """The support of a site as plain data; the error for one that cannot be written names the site."""
    kind = _CLASS_TO_NAME.get(type(support))
    if kind is None:
        raise ValueError(
            f"the support of site '{name}' cannot be written to a file: expected one of "
            f"{', '.join(_NAME_TO_CLASS)}, got {type(support).__name__.lstrip('_')}"
        )
    bounds: Plain = {}
    for key, value in vars(support).items():
        if isinstance(value, constraints.Constraint):
            bounds[key] = support_to_plain(name, value)
        elif isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            bounds[key] = {"tensor": value.tolist(), "dtype": dtype}
        else:
            bounds[key] = value
    return {"support": kind, "bounds": bounds}


def support_from_plain(plain: Any, device: torch.device) -> Any:
    """The support from what :func:`support_to_plain` made of it, with bounds on a device."""
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        dtype = getattr(torch, plain["dtype"])
        return torch.tensor(plain["tensor"], dtype=dtype, device=device)
    bounds = {key: support_from_plain(value, device) for key, value in plain["bounds"].items()}
    return _NAME_TO_CLASS[plain["support"]](**bounds)


def plain_to_tensor(plain: object) -> Tensor:
    """Plain data as a tensor of bytes, for a state dict, whose values are tensors."""
    return torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)


def tensor_to_plain(text: Tensor) -> Any:
    """The plain data from what :func:`plain_to_tensor` made of it."""
    return json.loads(bytes(text.tolist()))


def argument_to_plain(name: str, value: Any) -> Any:
    """An argument of a guide as plain data; an activation is its name in PyTorch and its constants."""
    if not callable(value):
        return value
    kind = getattr(value, "__name__", type(value).__name__)
    for owner, functions in _FUNCTIONS.items():
        if value is getattr(functions, kind, None):
            return {"function": kind, "owner": owner}
    if type(value) is getattr(nn, kind, None):
        names = getattr(value, "__constants__", ())
        plain = {"module": kind, "constants": {key: getattr(value, key) for key in names}}
        # a container of modules is more than a name and constants
        if repr(argument_from_plain(plain)) == repr(value):
            return plain
    raise ValueError(
        f"{name}: expected a module of torch.nn or a function of torch, which can be written "
        f"to a file by its name, got {value!r}; save the guide's state_dict() instead"
    )


def argument_from_plain(plain: Any) -> Any:
    """The argument from what :func:`argument_to_plain` made of it."""
    if isinstance(plain, dict) and "function" in plain:
        return getattr(_FUNCTIONS[plain["owner"]], plain["function"])
    if isinstance(plain, dict) and "module" in plain:
        make, constants = getattr(nn, plain["module"]), plain["constants"]
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in make(**constants).parameters())
        if size > _MAX_ACTIVATION_SIZE:
            raise ValueError(f"expected an activation, got {plain['module']} of {size} parameters")
        return make(**constants)
    return plain


def write(path: FilePath, class_name: str, spec: Plain, state: Mapping[str, Tensor]) -> None:
    """Writes a guide's file: its class, its spec as plain data, its state dict, and their checksum."""
    check_finite(state)
    # an expanded tensor would declare more numbers than the file holds
    state = {name: value.detach().contiguous() for name, value in state.items()}
    content = {"format": FORMAT, "class": class_name, "spec": spec, "state": state}
    files.write(path, {**content, "checksum": checksum(content)})


def read(path: FilePath, class_name: str, map_location: Any) -> Plain:
    """Reads the file of a guide of a class: what :func:`write` wrote, as a dict."""
    saved = files.read(path, map_location)
    if not is_intact(saved):
        raise ValueError(
            f"{path}: expected a guide's file of format {FORMAT}, as the guide's save writes it, got "
            "another file, or a damaged one"
        )
    if saved["class"] != class_name:
        raise ValueError(f"{path}: expected a guide of class {class_name}, got {saved['class']}")
    check_finite(saved["state"])
    return saved


def is_intact(saved: Any) -> bool:
    """Whether something that was read is what :func:`write` wrote."""
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or not saved.keys() >= _KEYS:
        return False
    if not isinstance(saved["state"], dict):
        return False
    for value in saved["state"].values():
        is_tensor = isinstance(value, Tensor) and value.layout is torch.strided
        # before anything is computed of it
        if not is_tensor or value.nbytes > value.untyped_storage().nbytes():
            return False
    return checksum(saved) == saved["checksum"]


def checksum(content: Plain) -> str:
    """A checksum of the class, the spec and the tensors of a guide's file."""
    digest = hashlib.sha256(json.dumps([content["class"], content["spec"]], default=repr).encode())
    for name, value in content["state"].items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        numbers = value.to("cpu").contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(numbers.numpy()))
    return digest.hexdigest()


def check_size(state: Mapping[str, Tensor], least: int) -> None:
    """Refuses tensors of fewer numbers than a guide has, before that guide is built."""
    # by storage: a view is no more than what is stored
    storages = [value.untyped_storage() for value in state.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if stored < least:
        raise ValueError(
            f"the file or state dict is damaged: expected at least {least} numbers, as many as a guide "
            f"of its sites and arguments has, got {stored} bytes"
        )


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuses a state dict with NaN or infinite entries."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"parameter '{name}': expected finite numbers, got {bad} of {value.numel()} "
                "that are not"
            )
