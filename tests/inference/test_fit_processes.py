# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits that are shared by two processes; what they do is in ``process_cases``.

An interpreter takes seconds to begin, so that two of them go through all cases.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import distributed

from tests.inference import loaders, models, process_cases
from tests.inference.conftest import quick_fit as fit
from tests.inference.loaders import small

ROOT = Path(__file__).parents[2]
TOGETHER = [name for name in process_cases.CASES if name not in ("killed", "restarted")]
pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


def launch(folder, *names, size=2):
    """Runs cases in new processes, as torchrun does; what they returned, by process, and wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "tests.inference.process_cases", str(folder), *names]
    running = []
    for rank in range(size):
        env = {**os.environ, **place, "RANK": str(rank), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=env, **kinds))
    try:
        wrote = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    found = []
    for rank, process in enumerate(running):
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, wrote[rank][1]
            found.append(torch.load(folder / f"process {rank}.pt", weights_only=False))
    return found, wrote


class Run(NamedTuple):
    """What two processes returned, by case, and wrote; and the one that survived another."""

    folder: Path
    first: dict[str, Any]
    second: dict[str, Any]
    wrote: list[tuple[str, str]]
    survivor: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All cases, after a fit of one process, and one of two of which one was killed."""
    folder, dtype = tmp_path_factory.mktemp("processes"), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    options = {**process_cases.SOME, "num_steps": 5, "checkpoint": folder / "alone.pt"}
    fit(models.regression, small(models.regression), **options)
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    (survivor,), _ = launch(folder, "killed")
    (first, second), wrote = launch(folder, *TOGETHER)
    return Run(folder, first, second, wrote, survivor)


def same(a, b):
    """Whether two outcomes are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)  # NaN


@pytest.mark.parametrize("name", [name for name in TOGETHER if name != "no seed"])
def test_all_processes_end_alike(run, name):
    """The parameters to the bit, and all fields of the result."""
    assert run.first[name]
    assert same(run.first[name], run.second[name])


def test_the_verdict_is_that_of_one_process(run):
    found = run.first["schools"]
    assert found["trusted"], found["verdict"]
    # two equal parts, and more where k-hat is near its limit
    assert 4002 <= found["num_samples"] <= 4002 + found["num_gradients"]
    assert found["num_samples"] % 2 == 0
    assert found["num_gradients"] % 32 == 0
    pyro.clear_param_store()
    alone = process_cases.schools(Path())
    assert alone["trusted"], alone["verdict"]
    # the same posterior, by other draws: each ELBO is within a few hundredths of the log evidence
    assert abs(found["elbo"] - alone["elbo"]) < 0.05
    assert abs(found["log_evidence"] - alone["log_evidence"]) < 0.02
    assert found["stopped_because"] == alone["stopped_because"]


def test_a_hierarchy_by_a_loader(run):
    found = run.first["hierarchy"]
    _, y = loaders.rows()
    assert found["num_steps"] == 40 * 5  # 22 rows in batches of 5
    distribution = dist.MultivariateNormal(
        torch.zeros(43), 1.25 * torch.eye(43) + 9 * torch.ones(43, 43)
    )
    # a linear encoder can be exact; what is left is the noise of the batches
    assert (
        distribution.log_prob(y) - 1
        < found["elbo"]
        < distribution.log_prob(y) + 4 * found["elbo_se"]
    )
    assert "of all data" in found["verdict"]
    assert found["num_gradients"] == 200 * 2 * 8


def test_batches_of_a_list(run):
    found = run.first["list"]
    _, _, evidence = loaders.exact(*loaders.rows())
    assert found["num_steps"] == 80 * 3
    assert abs(found["elbo"] - evidence) < 0.1 + 4 * found["elbo_se"]
    # by a pass in which each process had every second batch
    assert abs(found["log_evidence"] - evidence) < 0.1
    assert found["num_samples"] == 1000


def test_a_step_that_fails_in_one_process_is_skipped_by_all(run):
    found = run.first["skipped"]
    assert found["num_skipped"] == 2
    assert found["culprits"] == {"odd": 2}
    assert [k for k, elbo in enumerate(found["history"], 1) if elbo != elbo] == [4, 6]


def test_a_callback_of_one_process_stops_all(run):
    assert run.first["stopped"]["num_steps"] == 4
    assert run.first["stopped"]["stopped_because"] == "the callback asked to stop"


def test_callbacks_of_the_search_stop_all_at_the_same_step(run):
    found = run.first["stopped when told"]
    assert found["told"] == [1, 2]
    assert found["num_steps"] == process_cases.QUICK.optimization.search_steps


@pytest.mark.parametrize("name", process_cases.LOADERS)
def test_no_step_is_lost(run, name):
    whole, part, rest = run.first["resumed"][name]
    assert part["num_steps"] == 7
    assert rest["num_steps"] == 12
    for field in ("parameters", "history", "elbo", "khat", "verdict", "end", "step_size"):
        assert same(rest[field], whole[field]), field


def test_generators_of_processes_stay_apart(run):
    first, second = run.first["no seed"], run.second["no seed"]
    assert first[:2] == second[:2]
    assert first[0] != first[1]
    assert first[2] != second[2]


def test_errors_are_those_of_all_processes(run):
    found = run.first["errors"]
    assert found["options"] == "fit: expected the same num_steps in all processes, got [5, 6]"
    assert "expected the same arguments (by checksum) in all processes" in found["data"]
    assert "finite log density" in found["start"]
    assert "expected 1 process(es), as before, got 2" in found["number"]
    assert "expected a file in a folder" in found["place"]


def test_another_number_of_processes_cannot_go_on(run):
    with pytest.raises(ValueError, match=r"expected 2 process\(es\), as before, got 1"):
        fit(
            models.regression,
            small(models.regression),
            num_steps=12,
            resume=run.folder / "none.pt",
            **process_cases.SOME,
        )


def test_a_process_that_is_killed_ends_the_others(run):
    said, is_gone = run.survivor["killed"]
    for words in ("another process has ended", "checkpoint", "process 0 of 2"):
        assert words in said
    # threads of a group that live on may ask for an interpreter that is at its end, which is an abort
    assert is_gone


def test_a_fit_goes_on_after_a_kill(run):
    rest, whole = run.first["after the kill"]
    assert rest["history"] == whole["history"]
    assert same(rest["parameters"], whole["parameters"])


def test_only_the_first_process_shows_its_progress(run):
    pytest.importorskip("tqdm")
    (_, shown), second = run.wrote
    assert "200/200" in shown
    assert second == ("", "")


@pytest.mark.slow
def test_torchrun_begins_again_by_itself(run, tmp_path):
    """From the checkpoint, in new processes that find each other by a store that remembers the old ones."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["--max-restarts=1", "-m", "tests.inference.process_cases", str(tmp_path)]
    path = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    kinds = {"capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([*torchrun, *command, "restarted"], cwd=ROOT, env=env, **kinds)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = torch.load(tmp_path / f"process {rank}.pt", weights_only=False)["restarted"]
        assert found["num_steps"] == 12
        assert found["history"] == run.first["after the kill"][1]["history"]
