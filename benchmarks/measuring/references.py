# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Files of reference moments: for each model what is said of it, and columns of numbers by site."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def stored(path: Path) -> Row:
    """The rows of a file by model; none if there is no file."""
    rows: Row = json.loads(path.read_text()) if path.exists() else {}
    return rows


def write(path: Path, rows: Row, order: Iterable[str]) -> None:
    """Writes the rows of models in an order."""
    lines = [_as_text(name, rows[name]) for name in order if name in rows]
    path.write_text(f"{{{','.join(lines)}\n}}\n")


def _as_text(name: str, row: Row) -> str:
    """A line for what is said of a model, and for each site."""
    said = json.dumps({key: value for key, value in row.items() if key != "sites"})
    sites = (f'\n  "{site}": {json.dumps(values)}' for site, values in row["sites"].items())
    return f'\n "{name}": {said[:-1]}, "sites": {{{",".join(sites)}}}}}'
