# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Pages that docs/run_pages.py has run show what their code prints and draws."""

import re
from pathlib import Path

import pytest

from tests.shortened_code import python_blocks
from tests.test_docs import DOCS, PAGES, script_of_the_site

RUN_PAGES = script_of_the_site("run_pages")
every_page = pytest.mark.parametrize("name", RUN_PAGES.PAGES)


def words(page: str) -> list[str]:
    """The text blocks of a page, without numbers: other processors round otherwise."""
    text = "\n".join(re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    return re.sub(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?", "#", text).split()


@every_page
def test_the_pictures_of_a_page_are_those_that_its_code_draws(name: str) -> None:
    page = PAGES[f"{name}.md"]
    shown = re.findall(r"\]\(_static/(\w+\.png)\)", page)
    assert shown == re.findall(r'savefig\("(\w+\.png)"', python_blocks(page))
    assert all((DOCS / "_static" / picture).exists() for picture in shown)


@pytest.mark.slow
@every_page
def test_a_page_shows_what_its_code_prints(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGES[f"{name}.md"]
    assert words(RUN_PAGES.with_output(page)) == words(page)


def test_a_text_block_is_what_the_code_before_it_prints() -> None:
    page = "```python\nx = 2\n```\nA.\n```python\nprint(x + 1)\n```\nB.\n```text\n4\n```\n"
    assert RUN_PAGES.with_output(page) == page.replace("4", "3")
    assert words(page) == ["#"]
