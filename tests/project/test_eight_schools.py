# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The demo runs from end to end, and in full its flow guide is as good as the README says."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure

import pyro_artransform
from tests.inference.conftest import quick_fit

SCRIPT = Path(__file__).resolve().parents[2] / "tutorials" / "eight_schools.py"
LOG_EVIDENCE = -31.3113


def run(*options: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def demo() -> ModuleType:
    """The script of a full run as a module."""
    spec = importlib.util.spec_from_file_location("eight_schools", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        spec.loader.exec_module(script)
    return script


def elbos(printed: str) -> dict[str, tuple[float, float]]:
    rows = re.findall(r"^(Auto\w+) +(-[\d.]+) +([\d.]+) +[\d,]+$", printed, flags=re.MULTILINE)
    return {name: (float(mean), float(error)) for name, mean, error in rows}


def verdicts(printed: str) -> dict[str, str]:
    """Whether each guide is trusted: the words that follow those about the draws."""
    joined = re.sub(r"(?<!\n)\n(?!\n)", " ", printed)
    found = r"^(Auto\w+): Draws [^\n]*About the guide alone: (Trusted|Not trusted): "
    return dict(re.findall(found, joined, flags=re.MULTILINE))


def test_demo_in_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves the picture of the full run as it is, and says where its own is."""
    picture = SCRIPT.with_suffix(".png").read_bytes()
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pyro_artransform, "fit", quick_fit)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    sites = re.findall(r"^([a-z]+(?:\[\d\])?)(?: +-?\d+\.\d\d){10}$", printed, flags=re.MULTILINE)
    assert sites == ["mu", "tau", *(f"theta[{j}]" for j in range(8))]
    assert list(elbos(printed)) == ["AutoNormal", "AutoMultivariateNormal", "AutoIAF"]
    assert list(verdicts(printed)) == list(elbos(printed))
    assert SCRIPT.with_suffix(".png").read_bytes() == picture
    (path,) = tmp_path.rglob("*.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"Picture: {path}." in printed


@pytest.mark.parametrize(
    ("steps", "label"), [(2_000, "ELBO, mean of 100 steps"), (20, "ELBO, mean of 2 steps")]
)
def test_the_picture_says_over_how_many_steps_it_averages(steps: int, label: str) -> None:
    script = demo()
    panel = Figure().subplots()
    script.draw_elbos(panel, {name: torch.zeros(steps) for name in script.GUIDES})
    assert panel.get_ylabel() == label


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_in_full(tmp_path: Path, seed: int) -> None:
    """Four standard errors, since no ELBO is above the evidence but by chance.

    A fit ends where the weights of 5,000 draws show at most 0.02 nats to gain, with an error of 0.005.
    """
    out = str(tmp_path / "eight_schools.png")
    printed = run("--out", out, "--seed", str(seed))
    found = elbos(printed)
    assert all(mean <= LOG_EVIDENCE + 4 * error for mean, error in found.values())
    assert found["AutoIAF"][0] >= LOG_EVIDENCE - 0.03
    assert found["AutoIAF"][0] > max(found["AutoNormal"][0], found["AutoMultivariateNormal"][0]) + 1
    trusted = verdicts(printed)
    assert trusted["AutoNormal"] == trusted["AutoMultivariateNormal"] == "Not trusted"
    assert trusted["AutoIAF"] == "Trusted"
