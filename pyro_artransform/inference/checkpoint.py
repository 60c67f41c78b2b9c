# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Files from which a fit goes on as if it had not been interrupted."""

import os
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from .initialization.gaussians import Gaussians, Modes

_FORMAT = "pyro_artransform fit 1"


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes the state of a fit: to another file first, so that no kill leaves half of one.

    :param path: where to.
    :param state: tensors and plain data.
    """
    target = Path(path)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": _FORMAT, **state}, file)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`write` wrote.

    :param path: where from.
    :raises ValueError: if the file is something else.
    """
    try:
        state = torch.load(path, weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError):
        state = None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of fit, got another file")
    return state


def random_state() -> dict[str, Any]:
    """The state of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Takes over what :func:`random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def pack_modes(modes: Modes | None) -> list[Tensor] | None:
    """Modes as tensors."""
    return None if modes is None else [*modes.gaussians, modes.value, modes.converged]


def unpack_modes(tensors: list[Tensor] | None) -> Modes | None:
    """The modes that :func:`pack_modes` packed."""
    if tensors is None:
        return None
    loc, scale_tril, value, converged = tensors
    return Modes(Gaussians(loc, scale_tril), value, converged)


def check_same(state: dict[str, Any], **options: object) -> None:
    """Checks that a fit goes on with the options of its checkpoint.

    :raises ValueError: if it does not.
    """
    for name, value in options.items():
        if value != state[name] and value is not None:
            raise ValueError(f"resume: expected {name}={state[name]!r}, as before, got {value!r}")


def load_guide(guide: object, state: dict[str, Any]) -> None:
    """Loads the state dict of a guide.

    :raises ValueError: if it is of another one.
    """
    if not isinstance(guide, nn.Module):
        raise ValueError("resume: expected a checkpoint of this guide, got one of a module")
    try:
        guide.load_state_dict(state)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"resume: expected a checkpoint of this guide, got: {error}") from error
