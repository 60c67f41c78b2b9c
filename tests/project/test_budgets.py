# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""``make lint`` fails on a room that grows beyond its budget."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package, the script and its budgets, in a folder of their own."""
    for name in ("pyro_artransform", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "tools" / "budgets.py"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_large_file_is_above_the_budget_of_its_room_and_of_the_package(copy: Path) -> None:
    assert _check(copy).returncode == 0
    (copy / "pyro_artransform" / "flows" / "large.py").write_text("pass\n" * 10_000)
    checked = _check(copy)
    above = [line.split()[0] for line in checked.stdout.splitlines() if "above" in line]
    assert above == ["flows", "package"]
    assert checked.returncode == 1


def test_a_new_room_needs_a_budget(copy: Path) -> None:
    (copy / "pyro_artransform" / "new_room").mkdir()
    (copy / "pyro_artransform" / "new_room" / "file.py").write_text("\n")
    assert "new_room" in next(line for line in _check(copy).stdout.splitlines() if "above" in line)
