# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Files of guides: their class, spec and tensors, and how damaged or altered ones are found."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import files
from ...files import FilePath
from .spec import Plain

FORMAT = 8
_KEYS = {"format", "class", "spec", "state", "checksum"}


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
        got, written = "another file", saved.get("format") if isinstance(saved, dict) else None
        if isinstance(written, int) and written != FORMAT:
            got = f"one of format {written}, which another version of the package reads"
        raise ValueError(
            f"{path}: expected a guide's file of format {FORMAT}, as the guide's save writes it, got "
            f"{got}, or a damaged one"
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
    return files.checksum([content[name] for name in ("class", "spec", "state")])


def check_size(state: Mapping[str, Tensor], least: int) -> None:
    """Refuses tensors of fewer numbers than a guide has, before that guide is built."""
    # by storage: a view is no more than what is stored
    storages = [value.untyped_storage() for value in state.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if stored < least:
        raise ValueError(
            f"the file or state dict is damaged: expected at least {least} bytes for a guide of its "
            f"sites and arguments, got {stored}"
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
