# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The papers that docstrings of the package cite, as the list of the page ``bibliography.md``.

A docstring cites by ``Title (Authors, Year)``, with an address after it where there is one: as an item
below ``**References**``, or in a sentence after ``See`` and ``and``.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_artransform"
CITATION = re.compile(
    r"(?:\b\d\. |\bSee |, and |\*\*Reference\*\*: )"
    r"(?P<title>[A-Z][^()*]+?) \((?P<authors>[^()]+?)(?:, (?P<year>\d{4}))?\)(?:, (?P<address>https://[^\s,]+))?"
)


class Paper(NamedTuple):
    """A paper, and the places that cite it, by dotted name without that of the package."""

    authors: str
    year: str
    title: str
    address: str
    places: tuple[str, ...] = ()


def docstrings() -> Iterator[tuple[str, str]]:
    """The dotted name and the text of each docstring, the latter on one line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__")
        named = [(module.rstrip("."), ast.parse(path.read_text()))]
        for name, node in named:  # grows while it is read: definitions within definitions
            yield name, " ".join((ast.get_docstring(node) or "").split())
            named += [
                (f"{name}.{child.name}", child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef)
            ]


def cited(text: str) -> list[Paper]:
    """The papers that a docstring on one line cites."""
    found = []
    for match in CITATION.finditer(text):
        part = {name: value or "" for name, value in match.groupdict().items()}
        if part["year"] or part["address"]:
            found.append(Paper(**part | {"address": part["address"].rstrip(".,")}))
    return found


def papers() -> list[Paper]:
    """All papers by first author and year, each with the longest of its titles."""
    found: dict[str, list[Paper]] = {}
    for place, text in docstrings():
        for paper in cited(text):
            found.setdefault(paper.address or paper.title, []).append(
                paper._replace(places=(place,))
            )
    merged = []
    for same in found.values():
        places = dict.fromkeys(place for paper in same for place in paper.places)
        merged.append(max(same, key=lambda p: len(p.title))._replace(places=tuple(places)))
    return sorted(merged, key=lambda paper: (paper.authors.casefold(), paper.year))


def as_markdown(paper: Paper) -> str:
    """An item of the list."""
    title = f"[{paper.title}]({paper.address})" if paper.address else f"*{paper.title}*"
    year = f" ({paper.year})" if paper.year else ""
    places = ", ".join(f"`{place}`" for place in paper.places)
    return f"- {paper.authors}{year}. {title}. In {places}."


def _append(app: Any, page: str, source: list[str]) -> None:
    """The list at the end of its page."""
    if page == "bibliography":
        source[0] += "\n" + "\n".join(map(as_markdown, papers())) + "\n"


def setup(app: Any) -> dict[str, bool]:
    """Has Sphinx ask about each page that it reads."""
    app.connect("source-read", _append)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
