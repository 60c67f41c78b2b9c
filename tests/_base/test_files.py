# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import os
import zipfile

import pytest
import torch

from pyro_artransform._base import files


def read(path, *options):
    return files.read(path, "numbers", *options)


def write(path, content):
    files.save(path, {"format": "numbers", **content})


def refuses(path):
    with pytest.raises(
        ValueError, match="expected numbers, got another kind of file, a damaged one"
    ) as caught:
        read(path)
    text = str(caught.value)
    return str(path) in text and "weights_only" not in text


def test_the_file_is_as_any_other(tmp_path):
    """Its permissions are those of a new file, and a link goes on pointing to it."""
    path, link, other = tmp_path / "numbers.pt", tmp_path / "link.pt", tmp_path / "other"
    write(path, {"n": 1})
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    link.symlink_to(path)
    write(link, {"n": 2})
    assert link.is_symlink()
    assert read(path)["n"] == 2


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "numbers.pt"
    write(path, {"n": 1})
    with pytest.raises(Exception, match="pickle"):
        write(path, {"n": lambda: None})
    assert read(path)["n"] == 1
    assert os.listdir(tmp_path) == ["numbers.pt"]


class Runs:
    """An object whose pickle runs a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "numbers.pt"
    with pytest.raises(FileNotFoundError):
        read(path)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "numbers.pt", {})
    path.write_text("text")
    assert refuses(path)
    for content in ({"n": Runs(tmp_path / "made")}, torch.ones(2)):
        torch.save(content, path)
        assert refuses(path)
    assert not (tmp_path / "made").exists()
    write(path, {"n": torch.ones(2)})
    with pytest.raises(ValueError, match="for a device that is not available"):
        read(path, "nowhere")
    path.write_bytes(path.read_bytes()[:-50])
    assert refuses(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))  # more than the archive holds
    assert refuses(path)


def test_numbers_that_changed(tmp_path):
    """torch.load does not notice them."""
    path = tmp_path / "numbers.pt"
    write(path, {"n": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["n"], torch.arange(1000.0))
    assert refuses(path)
