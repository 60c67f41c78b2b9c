# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Atomic writes of tensors and plain data to files, and reads that detect damage."""

import os
import secrets
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

FilePath = str | os.PathLike[str]


def save(path: FilePath, content: object) -> None:
    """Writes a temporary file by ``torch.save``, and renames it; a failure keeps the old file."""
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with open(beside, "xb") as file:
            torch.save(content, file)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: FilePath, kind: str, map_location: Any = None) -> dict[str, Any]:
    """Reads a mapping with the item ``format=kind`` that :func:`save` wrote.

    :raises ValueError: if it is another file, is damaged, or needs a device that is not available.
    """
    got = "another kind of file, a damaged one, or one for a device that is not available (map_location)"
    # suppress torch's errors, which advise running the code in a file
    with open(path, "rb") as file, suppress(Exception), zipfile.ZipFile(file) as archive:
        size = sum(record.file_size for record in archive.infolist())
        # torch accepts changed bytes, and unpacks more than the file holds
        if size <= os.fstat(file.fileno()).st_size and archive.testzip() is None:
            file.seek(0)
            saved: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=True)
            if (got := str(saved["format"])) == kind:
                return saved
    raise ValueError(f"{path}: expected {kind}, got {got}")
