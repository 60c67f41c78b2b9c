# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Runs the code of pages: what it prints replaces their text blocks, and pictures go to ``_static``.

python docs/run_pages.py case_studies
"""

import io
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGES = ("case_studies",)
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def with_output(page: str) -> str:
    """A page whose text blocks are what the Python blocks before them print; pictures go to the folder."""
    names: dict[str, Any] = {}
    printed = ""

    def run(block: re.Match[str]) -> str:
        nonlocal printed
        kind, code = block.groups()
        if kind == "text":
            return f"```text\n{printed}```"
        with redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        printed = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
        return block[0]

    return BLOCK.sub(run, page)


if __name__ == "__main__":
    os.chdir(DOCS / "_static")
    for name in sys.argv[1:] or PAGES:
        path = DOCS / f"{name}.md"
        path.write_text(with_output(path.read_text()))
