# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Pages whose table a benchmark writes, and whose words people do."""

from pathlib import Path

BEGIN, END = "<!-- table -->", "<!-- end of the table -->"


def write(text: str, path: Path) -> None:
    """Puts the table between its marks."""
    head, _, rest = path.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
