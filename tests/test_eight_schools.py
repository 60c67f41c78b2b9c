# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The demo runs from end to end, and in full its flow guide is as good as the README says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tutorials" / "eight_schools.py"
LOG_EVIDENCE = -31.315


def run(out: Path, *options: str, smoke_test: bool) -> str:
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    env |= {"MPLBACKEND": "Agg"} | ({"CI": "true"} if smoke_test else {})
    command = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def elbos(printed: str) -> dict[str, tuple[float, float]]:
    rows = re.findall(r"^(Auto\w+) +(-[\d.]+) +([\d.]+)$", printed, flags=re.MULTILINE)
    return {name: (float(mean), float(error)) for name, mean, error in rows}


def test_demo_in_short(tmp_path: Path) -> None:
    out = tmp_path / "eight_schools.png"
    printed = run(out, smoke_test=True)
    sites = re.findall(r"^([a-z]+(?:\[\d\])?)(?: +-?\d+\.\d\d){10}$", printed, flags=re.MULTILINE)
    assert sites == ["mu", "tau", *(f"theta[{j}]" for j in range(8))]
    assert list(elbos(printed)) == ["AutoNormal", "AutoMultivariateNormal", "AutoIAF"]
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_in_full(tmp_path: Path, seed: int) -> None:
    """Four standard errors, since no ELBO is above the evidence but by chance."""
    printed = run(tmp_path / "eight_schools.png", "--seed", str(seed), smoke_test=False)
    found = elbos(printed)
    assert all(mean <= LOG_EVIDENCE + 4 * error for mean, error in found.values())
    assert found["AutoIAF"][0] >= -31.6
    assert found["AutoIAF"][0] > max(found["AutoNormal"][0], found["AutoMultivariateNormal"][0]) + 1
