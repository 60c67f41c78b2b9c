# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from end to end, and is saved as it ran, with its pictures."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib.font_manager  # makes the list of fonts where there is none
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "tutorials"
# an absolute path of somebody's machine
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|Users|root|tmp|var|work|opt|usr)/|[A-Z]:\\\\")
MAX_BYTES = 400_000

NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
# the first that somebody reads; the others take minutes
QUICK = "svi_flow_guide.ipynb"


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode]:
    for cell in code_cells(notebook):
        yield from cell.outputs


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell put out: ``stdout``, ``image/png``, ..."""
    found = set()
    for output in cell.outputs:
        found |= {output.name} if output.output_type == "stream" else set(output.get("data", {}))
    return found


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.name == QUICK else pytest.mark.slow, id=path.name)
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortened, as ``CI`` in the environment asks; an error in any cell is an error here."""
    saved = read(path)
    monkeypatch.setenv("CI", "true")
    # What libraries say once a day or once a machine they say here; only the list of fonts is there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
    # The kernel chooses its own way to show pictures; one from outside would suppress them.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    # Run from a checkout that is not installed, the kernel has to find the package too.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    fresh = read(path)
    client = nbclient.NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(TUTORIALS)}}
    )
    client.execute()
    assert [kinds(cell) for cell in code_cells(fresh)] == [kinds(c) for c in code_cells(saved)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_saved_as_it_ran(path: Path) -> None:
    """From top to bottom, with its pictures and what it prints, without an error, a warning or a machine."""
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    draws = [cell for cell in cells if "plt.show()" in cell.source]
    assert draws
    assert all("image/png" in kinds(cell) for cell in draws)
    prints = [cell for cell in cells if re.search(r"^ *print\(", cell.source, re.MULTILINE)]
    assert prints
    assert all("stdout" in kinds(cell) for cell in prints)
    assert all(output.output_type != "error" for output in outputs(notebook))
    assert all(output.get("name") != "stderr" for output in outputs(notebook))
    assert notebook.metadata.kernelspec.name == "python3"
    assert not MACHINE_PATH.search(str(notebook))
    assert "SPDX-License-Identifier: Apache-2.0" in notebook.cells[0].source
    assert path.stat().st_size <= MAX_BYTES
