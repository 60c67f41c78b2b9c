# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Files of tensors and plain data, which no interruption leaves half written."""

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FilePath = str | os.PathLike[str]


def write(path: FilePath, content: object) -> None:
    """Writes a file beside the target and renames it: where that fails, the old file stays."""
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with open(beside, "xb") as file:
            torch.save(content, file)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: FilePath, map_location: Any = None) -> Any:
    """Reads a file that :func:`write` wrote; None if it is another one, or damaged.

    :param map_location: as for ``torch.load``, whose errors about it are raised.
    :raises OSError: if there is no such file, or it may not be read.
    """
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:
            # a damaged file raises any error; torch's advice would be to run the code in it
            is_about_devices = map_location is not None or "map_location" in str(error)
            if is_about_devices and map_location != "cpu" and read(path, "cpu") is not None:
                raise
            return None


def checksum(content: object) -> str:
    """A checksum of tensors and plain data: an archive does not notice changed bytes of its tensors.

    It reads what is stored, and so no more than a file holds, whatever shape a tensor declares.
    """
    digest = hashlib.sha256()
    for part in _parts(content):
        digest.update(part)
    return digest.hexdigest()


def _parts(content: object) -> Iterator[Any]:
    """Content as bytes, such that equal bytes are equal content."""
    if isinstance(content, Tensor):
        place = content.dtype, tuple(content.shape), content.stride(), content.storage_offset()
        yield repr(place).encode()
        stored = content.detach().untyped_storage()
        numbers = torch.empty(0, dtype=torch.uint8, device=stored.device).set_(stored)
        yield numbers.to("cpu").numpy().data
    elif isinstance(content, Mapping):
        yield f"mapping of {len(content)}".encode()
        for item in content.items():
            yield from _parts(item)
    elif isinstance(content, (list, tuple)):
        yield f"sequence of {len(content)}".encode()
        for item in content:
            yield from _parts(item)
    else:
        yield f"{type(content).__name__} {content!r};".encode()
