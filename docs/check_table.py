# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Writes the table of failed checks in the page ``verdict.md`` from the list of checks of the package."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from pyro_artransform.diagnostics.checks import Check  # noqa: E402

HEAD = ["| the verdict says | it means | do this |", "|---|---|---|"]
#: in place of a remedy that depends on the fit, or has no short form
ELSEWHERE = "[see below](#more-on-remedies)"


def with_dots(template: str) -> str:
    """A text with dots in the place of its fields."""
    return re.sub(r"\{[^{}]*\}", "…", template)


def row(check: Check) -> str:
    """The row of a check."""
    sentence, remedy, meaning, _ = check.value
    do = ELSEWHERE if not remedy or "{" in remedy else remedy[0].upper() + remedy[1:]
    return f"| “{with_dots(sentence)}” | {meaning} | {do} |"


def renewed(page: str) -> str:
    """The page with a new table between its marks."""
    table = "\n".join([*HEAD, *(row(check) for check in Check if check.value.meaning)])
    start, end = "<!-- checks -->\n", "\n<!-- end -->"
    before, rest = page.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    path = DOCS / "verdict.md"
    path.write_text(renewed(path.read_text()))
