# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Figures that the README and the pages take from a benchmark are those of its page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = re.compile(r"\]\((?:\.\./)?(benchmarks(?:/\w+)?\.md)")
FIGURE = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def figures(text: str) -> set[str]:
    """Numbers in a text, without code, links to elsewhere and the commas of thousands."""
    words = re.sub(r"`[^`]*`|\[[^]]*\]\(https?:[^)]*\)|\]\([^)]*\)", " ", text)
    return {number.replace(",", "") for number in FIGURE.findall(words)}


def claims(page: str) -> list[tuple[str, set[str]]]:
    """Paragraphs, items and rows of tables, each with the benchmarks that it names.

    A row that names none is of those that the paragraph before its table names.
    """
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    found, above = [], set[str]()
    for block in re.split(r"\n\s*\n|\n(?=- |\|)", prose):
        named = set(NAMED.findall(block))
        if not block.startswith("|"):
            above = named
        found.append((block, named or above))
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_figures_are_those_of_the_benchmark_that_is_named(path: Path) -> None:
    # the table of the benchmarks says what they are about
    for block, named in claims(path.read_text()) if path.name != "benchmarks.md" else []:
        if named:
            pages = (ROOT / ("" if "/" in name else "docs") / name for name in named)
            there = set().union(*(figures(page.read_text()) for page in pages))
            missing = figures(block) - there
            assert not missing, f"{sorted(named)} lack {sorted(missing)} of: {block}"


def test_the_comparison_finds_a_wrong_figure() -> None:
    page = "Faster ([all](benchmarks/inverse.md), `seed=0`):\n\n| a | 1,200.5 |\n|---|---|\n\nOf 7 rows.\n"
    paragraph, row, _, other = claims(page)
    assert paragraph[1] == row[1] == {"benchmarks/inverse.md"}
    assert not figures(paragraph[0])
    assert figures(row[0]) == {"1200.5"}
    assert not other[1]
