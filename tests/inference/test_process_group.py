# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""When there is a process group; groups of two are in ``test_fit_processes``."""

import pytest
from torch import distributed

from pyro_artransform.inference.parallel import ALONE
from pyro_artransform.inference.process_group import open_processes

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "2"}, dict.fromkeys(VARIABLES, "1")])
def test_one_process_alone(monkeypatch, given):
    """Without the variables of torchrun, and with those of a single process, no group is made."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with open_processes() as processes:
        assert processes is ALONE
        assert not distributed.is_initialized()


def test_a_group_of_one_is_one_process(group):
    with open_processes() as processes:
        assert processes is ALONE
    assert distributed.is_initialized()


def test_pytorch_without_distributed(monkeypatch):
    monkeypatch.setattr(distributed, "is_available", lambda: False)
    with open_processes() as processes:
        assert processes is ALONE
