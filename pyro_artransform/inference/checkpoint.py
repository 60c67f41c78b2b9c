# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Files that a fit goes on from."""

from typing import Any

import torch

from .. import files
from ..files import FilePath

State = dict[str, Any]  #: tensors and plain data

_FORMAT = "pyro_artransform fit 5"


def write(path: FilePath, state: State) -> None:
    """Writes the state of a fit."""
    files.write(path, {"format": _FORMAT, "state": state})


def read(path: FilePath) -> State:
    """Reads what :func:`write` wrote; a ``ValueError`` if the file is something else, or damaged."""
    saved = files.read(path)
    if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: expected a checkpoint of fit, got another file, or a damaged one"
        )
    state: State = saved["state"]
    return state


def random_state() -> State:
    """The state of torch's generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: State) -> None:
    """Takes over what :func:`random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
