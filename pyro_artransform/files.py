# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Files of tensors and plain data: an interruption leaves the old one, and damage is noticed."""

import os
import secrets
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

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
    """Reads a file that :func:`write` wrote; None if it is another one, or damaged."""
    with open(path, "rb") as file:
        if not _is_whole(file):
            return None
        file.seek(0)
        try:
            return torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:
            # torch's advice about another file would be to run the code in it
            is_about_devices = map_location is not None or "map_location" in str(error)
            if is_about_devices and map_location != "cpu" and read(path, "cpu") is not None:
                raise
            return None


def _is_whole(file: BinaryIO) -> bool:
    """Whether a file is an archive as torch writes it: nothing is compressed, and checksums are right.

    ``torch.load`` does not compare checksums, and unpacks as much as an archive declares.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                size -= record.file_size
                # torch would leave the memory for a folder as it finds it
                is_folder = record.external_attr & 0x10
                if record.compress_type != zipfile.ZIP_STORED or is_folder or size < 0:
                    return False
            return archive.testzip() is None
    except Exception:  # a damaged archive raises errors of any kind
        return False
