# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import os
import zipfile

import pytest
import torch

from pyro_artransform import files


def test_round_trip(tmp_path):
    path = tmp_path / "numbers.pt"
    files.write(path, [1, torch.ones(2)])
    files.write(str(path), [2, torch.zeros(2)])
    number, tensor = files.read(path)
    assert number == 2
    assert torch.equal(tensor, torch.zeros(2))
    assert os.listdir(tmp_path) == ["numbers.pt"]


def test_the_file_is_as_any_other(tmp_path):
    """Its permissions are those of a new file, and a link goes on pointing to it."""
    path, link, other = tmp_path / "numbers.pt", tmp_path / "link.pt", tmp_path / "other"
    files.write(path, 1)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    link.symlink_to(path)
    files.write(link, 2)
    assert link.is_symlink()
    assert files.read(path) == 2


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "numbers.pt"
    files.write(path, 1)
    with pytest.raises(Exception, match="pickle"):
        files.write(path, lambda: None)
    assert files.read(path) == 1
    assert os.listdir(tmp_path) == ["numbers.pt"]


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "numbers.pt"
    with pytest.raises(FileNotFoundError):
        files.read(path)
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "missing" / "numbers.pt", 1)
    path.write_text("text")
    assert files.read(path) is None
    files.write(path, torch.ones(2))
    with pytest.raises(RuntimeError, match="nowhere"):
        files.read(path, "nowhere")
    path.write_bytes(path.read_bytes()[:-50])
    assert files.read(path, "nowhere") is None


def test_numbers_that_changed(tmp_path):
    """torch.load does not notice them."""
    path = tmp_path / "numbers.pt"
    files.write(path, torch.arange(1000.0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path), torch.arange(1000.0))
    assert files.read(path) is None


def test_an_archive_that_declares_more_than_it_holds(tmp_path):
    path = tmp_path / "numbers.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    assert files.read(path) is None


def test_a_record_that_is_marked_as_a_folder(tmp_path):
    """torch would leave its tensor as it finds the memory."""
    path = tmp_path / "numbers.pt"
    files.write(path, torch.arange(1000.0))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        directory, records = archive.start_dir, archive.infolist()
    for record in records:
        if record.filename.endswith("data/0"):
            content[directory + 38] = 0x10
        directory += 46 + len(record.filename) + len(record.extra)
    path.write_bytes(content)
    assert files.read(path) is None
