# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import os

import pytest
import torch

from pyro_artransform import files
from pyro_artransform.files import checksum


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


def test_a_checksum_is_that_of_the_content(tmp_path):
    """Of tensors with their dtypes and shapes, and of plain data with their types."""
    content = {"a": [torch.arange(4.0), None, 1, 0.1], "b": (True, "x"), "c": {"d": torch.ones(0)}}
    files.write(tmp_path / "content", content)
    assert checksum(files.read(tmp_path / "content")) == checksum(content)
    others = [
        {**content, "b": (1, "x")},
        {**content, "b": (True, "y")},
        {**content, "b": (True,), "e": "x"},
        {**content, "a": [torch.arange(4), None, 1, 0.1]},
        {**content, "a": [torch.arange(4.0).reshape(2, 2), None, 1, 0.1]},
        {**content, "a": [torch.tensor([0.0, 1.0, 2.0, 3.0000002]), None, 1, 0.1]},
        {**content, "a": [torch.arange(4.0).flip(0).flip(0).neg(), None, 1, 0.1]},
    ]
    assert len({checksum(other) for other in [content, *others]}) == 1 + len(others)
    # of no more than is stored
    assert checksum(torch.ones(1).expand(2**40)) != checksum(torch.ones(1))
