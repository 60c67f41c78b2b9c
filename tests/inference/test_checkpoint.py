# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import os

import pytest
import torch

from pyro_artransform.inference.checkpoint import random_state, read, set_random_state, write


def test_round_trip(tmp_path):
    path = tmp_path / "fit.pt"
    state = {"tensors": [torch.randn(3)], "plain": {"a": None, "b": [1, 2.5, "c"]}}
    write(path, state)
    found = read(path)
    assert torch.equal(found["tensors"][0], state["tensors"][0])
    assert found["plain"] == state["plain"]
    write(str(path), {"plain": 1})
    assert read(path)["plain"] == 1
    assert os.listdir(tmp_path) == ["fit.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    write(path, {"number": 1})

    def half(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        write(path, {"number": 2})
    assert read(path)["number"] == 1
    assert os.listdir(tmp_path) == ["fit.pt"]


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, [1, 2], {"format": "other 1"}], ids=str)
def test_another_file(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"other\.pt: expected a checkpoint of fit, got another"):
        read(path)
    path.write_text("not a file of tensors")
    with pytest.raises(ValueError, match=r"other\.pt: expected a checkpoint of fit, got another"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.pt")


def test_random_state():
    state = random_state()
    expected = torch.rand(3)
    torch.rand(5)
    set_random_state(state)
    assert torch.equal(torch.rand(3), expected)
