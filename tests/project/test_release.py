# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Version and date of a release are the same wherever they are written."""

import re
from pathlib import Path
from types import ModuleType

import pytest

import pyro_artransform
from tests.project.test_docs import resolve

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = (ROOT / "docs" / "versions.md").read_text()
# "`a`, `b` of `module`" in the first column of the notes on upgrading
REPLACED = re.findall(r"^\| [^|]*?((?:`\w+`(?:, )?)+) of `([\w.]+)`[^|]*\|", VERSIONS, re.M)


def test_the_version_is_the_one_of_changelog_and_citation() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.findall(r"^## (\d\S+) - (\S+)$", changelog, re.M)[0]
    citation = (ROOT / "CITATION.cff").read_text()
    assert pyro_artransform.__version__ == version
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation


def test_the_changelog_begins_with_what_is_not_released() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"


@pytest.mark.parametrize(("names", "place"), REPLACED)
def test_what_the_notes_on_upgrading_replace_is_gone(names: str, place: str) -> None:
    try:
        there = resolve(f"pyro_artransform.{place}")
    except ModuleNotFoundError:  # which is gone as well
        assert f"`{place.split('.')[0]}`" in (ROOT / "docs" / "versions.md").read_text()
        return
    for name in re.findall(r"\w+", names):
        found = getattr(there, name, None)
        assert found is None or isinstance(found, ModuleType)
        assert name not in getattr(there, "__dataclass_fields__", {})


def test_the_notes_on_upgrading_have_such_rows() -> None:
    assert len(REPLACED) > 10
