# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The tutorial of many processes runs by torchrun, and goes on from its checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tutorials" / "many_processes.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NUMBERS = r"ELBO +(-[\d.]+) ± ([\d.]+) \(log evidence (-[\d.]+)\)"


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
def test_the_tutorial_runs_by_torchrun(tmp_path: Path) -> None:
    env = {**os.environ, "CI": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(SCRIPT), "--checkpoint", str(tmp_path / "fit.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    # the first process prints, and no other
    assert re.findall(r"^processes +(\d+)$", done.stdout, re.MULTILINE) == ["2"]
    assert re.findall(r"^steps +(\d+) in", done.stdout, re.MULTILINE) == ["40"]
    (numbers,) = re.findall(NUMBERS, done.stdout)
    elbo, error, log_evidence = map(float, numbers)
    # of 200 groups after 40 steps: near it, and no higher than it but for its noise
    assert log_evidence - 40 < elbo < log_evidence + 4 * error
    assert (tmp_path / "fit.pt").exists()
