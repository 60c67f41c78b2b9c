# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Says what is missing before the first upload, a line each, and fails if something is.

``make release`` runs it. All addresses are in one place, ``[project.urls]`` of ``pyproject.toml``.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def missing(root: Path) -> list[str]:
    """What a maintainer still has to fill in."""
    project, changelog = ((root / name).read_text() for name in ("pyproject.toml", "CHANGELOG.md"))
    urls = re.findall(r'^(\w+) = "https://example\.org', project, re.MULTILINE)
    found = [f"pyproject.toml: the address of {name} in [project.urls]" for name in urls]
    if re.search(r"^## Unreleased\s+(?!## )\S", changelog, re.MULTILINE):
        found.append("CHANGELOG.md: a version and a date for what is below Unreleased")
    return found


if __name__ == "__main__":
    lines = missing(ROOT)
    print("\n".join(["Missing before an upload:", *lines] if lines else ["Nothing is missing."]))
    sys.exit(bool(lines))
