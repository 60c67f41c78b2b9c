# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits of a process that is alone, and of two; what these do is in ``parallel_cases``."""

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pyro
import pytest
import torch
from torch import distributed

from pyro_artransform._base import processes as module
from pyro_artransform._base.processes import open_processes
from tests.inference import loaders, models, parallel_cases
from tests.inference.conftest import quick_fit

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(folder, *names):
    """Runs cases in two new processes, as torchrun does; their exit codes, and what they wrote."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "tests.inference.parallel_cases", str(folder), *names]
    running = []
    for rank in range(2):
        env = {**os.environ, **place, "RANK": str(rank), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=env, **kinds))
    try:
        wrote = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], wrote


def outcomes(folder, codes, wrote):
    assert codes == [0, 0], wrote
    return [torch.load(folder / f"process {rank}.pt") for rank in range(2)]


def same(a, b):
    """Whether two outcomes are equal to the bit; NaN is itself."""
    return repr(a) == repr(b)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two processes")
    codes, wrote = launch(folder, "smoke", "shares")
    return outcomes(folder, codes, wrote), wrote


def test_two_processes_share_a_fit_and_say_what_they_wait_for(quick_run):
    found, wrote = quick_run
    first, second = (by_case["smoke"] for by_case in found)
    assert same(first, second)
    assert first["told"] == [1, 2, 3, 4, 5]
    assert first["stopped_because"] == "the callback asked to stop"
    assert first["num_gradients"] % 32 == 0  # 31 draws are 16 for each
    assert first["is_closed"]
    waited = "fit has waited 0 s for the end of a step in all processes. Another process is late"
    assert waited in wrote[0]
    assert "5 steps" in wrote[0]
    assert "5 steps" not in wrote[1]  # only the first process shows its progress


def test_two_processes_share_the_density_of_all_data(quick_run):
    """Values, gradients and the Gaussian of the start are those of one process, also after an error."""
    first, second = (by_case["shares"] for by_case in quick_run[0])
    assert same(first["by two"], second["by two"])
    assert same(first["by one"], second["by one"])
    assert same(first["by two"], first["again"])
    for one, two in zip(first["by one"], first["by two"]):
        assert torch.allclose(torch.tensor(one), torch.tensor(two), rtol=1e-9, atol=1e-8)
    assert sum(map(sum, first["rows"])) == parallel_cases.ROWS
    assert [sum(rows) for rows in first["rows"]] == [220, 180]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return outcomes(folder, *launch(folder, *parallel_cases.MORE))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(parallel_cases.MORE.keys() - {"errors"}))
def test_all_processes_end_alike(run, name):
    assert same(run[0][name], run[1][name])


@pytest.mark.slow
def test_a_hierarchy_by_a_loader(run):
    found, (_, y) = run[0]["hierarchy"], loaders.rows()
    assert found["num_steps"] == 40 * 5
    assert found["num_gradients"] == 200 * 2 * 8
    evidence = loaders.groups_evidence(y)
    # a linear encoder can be exact; what is left is the noise of the batches
    assert evidence - 1 < found["elbo"] < evidence + 4 * found["elbo_se"]
    assert found["trusted"], found["verdict"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crossed", "chains"])
def test_a_fit_with_a_share_of_all_data_for_each_process(run, name):
    """The numbers are those of one process but for the noise of draws."""
    found = run[0][name]
    pyro.clear_param_store()
    torch.manual_seed(0)
    alone = parallel_cases.CASES[name]()
    assert abs(found["elbo"] - alone["elbo"]) < 1e-6 + 5 * found["elbo_se"]
    assert found["khat"] < 0.5
    assert found["start"] == alone["start"]


@pytest.mark.slow
def test_a_step_that_fails_in_one_process_is_skipped_by_all(run):
    found = run[0]["skipped"]
    assert found["num_skipped"] == 2
    assert found["culprits"] == {"odd": 2}
    assert [k for k, elbo in enumerate(found["history"], 1) if elbo != elbo] == [4, 6]


@pytest.mark.slow
def test_errors_are_those_of_all_processes(run):
    first, second = (found["errors"] for found in run)
    expected = "ValueError: fit: expected the same num_steps in all processes, got [5, 6]"
    assert first["options"] == second["options"] == expected
    for name in ("data", "order"):
        assert "expected the same data (sums) in all processes" in first[name]


@pytest.mark.slow
def test_a_process_that_ends_does_not_leave_the_other_waiting(tmp_path):
    codes, wrote = launch(tmp_path, "fails")
    assert codes == [1, 1]
    assert "ZeroDivisionError: of the second process" in wrote[1]
    assert "got none in time. Another process is late, hangs or has ended" in wrote[0]


@pytest.mark.slow
def test_the_tutorial_runs_by_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(ROOT / "tutorials" / "many_processes.py")
    command = [*torchrun, script]
    env = {**os.environ, "CI": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^processes +(\d+)$", done.stdout, re.MULTILINE) == ["2"]
    assert re.findall(r"^steps +(\d+) in", done.stdout, re.MULTILINE) == ["40"]
    numbers = r"ELBO +(-[\d.]+) ± ([\d.]+) \(log evidence (-[\d.]+)\)"
    elbo, error, log_evidence = map(float, re.search(numbers, done.stdout).groups())
    assert log_evidence - 40 < elbo < log_evidence + 4 * error


VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "2"}, dict.fromkeys(VARIABLES, "1")])
def test_one_process_alone(monkeypatch, given):
    """Without the variables of torchrun, and with those of a single process, no group is made."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with open_processes() as found:
        assert (found.rank, found.size) == (0, 1)
        assert not distributed.is_initialized()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stale_environment_is_named(monkeypatch, caplog, rank):
    """Nobody else is there: a fit says so soon, and ends."""
    place = {"RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {"WORLD_SIZE": "2", **place}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    monkeypatch.setattr(module, "_FIRST_MEETING", timedelta(seconds=1))
    words = rf"RANK={rank}, WORLD_SIZE=2, .*Unset WORLD_SIZE if this process is to fit alone"
    with pytest.raises(RuntimeError, match=f"other processes of this fit.*in time.*{words}"):
        quick_fit(models.location, models.small(models.location), progress=False)
    assert "fit has waited 0 s for the other processes of this fit" in caplog.text
    assert "Unset WORLD_SIZE" in caplog.text
    assert module._PATIENCE < 5
