# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Pages whose tables a benchmark writes, and whose words people do."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table -->", "<!-- end of the table -->"


def table(heads: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join([row(heads), "|" + "---|" * len(heads), *map(row, rows)])


def row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def spread(values: Iterable[float], digits: int = 0) -> str:
    """The least and the largest of the numbers, or one where they print alike."""
    found = sorted(value for value in values if value == value)  # leaves out nan
    # a zero that was rounded up has no sign
    ends = dict.fromkeys(
        f"{round(value, digits) + 0.0:,.{digits}f}" for value in found[:1] + found[-1:]
    )
    return " to ".join(ends) or "-"


def write(text: str, path: Path) -> None:
    """Puts the tables between their marks."""
    head, _, rest = path.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
