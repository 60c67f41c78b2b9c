# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Version and date of a release are the same wherever they are written."""

import re
from pathlib import Path

import pyro_artransform

ROOT = Path(__file__).resolve().parents[1]


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
