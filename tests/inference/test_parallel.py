# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What processes do for each other, in a group of one; ``test_fit_parallel`` has two processes."""

import math
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed

from pyro_artransform.inference import parallel as module
from pyro_artransform.inference.parallel import Parallel, open_parallel
from tests.inference import models
from tests.inference.conftest import quick_fit
from tests.inference.test_fit_parallel import free_port

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def parallel(tmp_path):
    """The only process of a group."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("needs gloo")
    place = {"rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", **place)
    yield Parallel()
    distributed.destroy_process_group()


# One process alone


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "2"}, dict.fromkeys(VARIABLES, "1")])
def test_one_process_alone(monkeypatch, given):
    """Without the variables of torchrun, and with those of a single process, no group is made."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with open_parallel() as found:
        assert found is None
        assert not distributed.is_initialized()


def test_a_group_of_one_is_one_process(parallel):
    with open_parallel() as found:
        assert found is None
    assert distributed.is_initialized()


# No hang in silence


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stale_environment_is_named(monkeypatch, caplog, rank):
    """Nobody else is there: a fit says so soon, and ends."""
    place = {"RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {"WORLD_SIZE": "2", **place}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    monkeypatch.setattr(module, "_FIRST_MEETING", timedelta(seconds=1))
    words = rf"RANK={rank}, WORLD_SIZE=2, .*Unset WORLD_SIZE if this process is to fit alone"
    with pytest.raises(RuntimeError, match=f"other processes of this fit.*in vain.*{words}"):
        quick_fit(models.location, models.small(models.location), progress=False)
    assert "fit has waited 0 s for the other processes of this fit" in caplog.text
    assert "Unset WORLD_SIZE" in caplog.text
    assert module._PATIENCE < 5


def test_a_process_that_waits_says_for_what(monkeypatch, caplog):
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    with module._waiting("the other"):
        time.sleep(0.5)
    said = [record.getMessage() for record in caplog.records]
    assert 2 <= len(said) <= 4  # after 0.05, 0.1, 0.2 and 0.4 s
    assert all("waited 0 s for the other. Another process is late" in words for words in said)
    vain = pytest.raises(RuntimeError, match=r"expected the other, and waited in vain.*by peer")
    with vain, module._waiting("the other"):
        raise RuntimeError("Connection closed by peer")


# What is averaged and gathered


def test_mean(parallel):
    """Gradients of other shapes and dtypes, one that is missing, and a loss that is not finite."""
    parameters = [torch.zeros(2, 3), torch.zeros(4, dtype=torch.float32), torch.zeros(())]
    gradients = [torch.randn(3, 2).T, None, torch.tensor(2.0)]
    loss, found = parallel.mean(1.5, gradients, parameters)
    assert loss == 1.5
    assert found[1] is None
    for expected, got in zip(gradients[::2], found[::2]):
        assert torch.equal(expected, got)
        assert got.dtype == expected.dtype
    loss, found = parallel.mean(math.nan, None, [torch.zeros(2)])
    assert not math.isfinite(loss)
    assert found is None


def test_what_the_first_process_has(parallel):
    x = torch.randn(2, 3).T
    before = x.clone()
    parallel.copy_first([x])
    assert torch.equal(x, before)
    content = {"a": [torch.ones(2), "b", None]}
    assert parallel.first("it", lambda: content)["a"][1:] == ["b", None]
    with pytest.raises(ZeroDivisionError):
        parallel.first("it", lambda: 1 / 0)
    assert parallel.seed(3) == 3
    assert parallel.seed() != parallel.seed()
    assert parallel.any(True, False) == (True, False)
