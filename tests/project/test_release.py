# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Version and date of a release are the same wherever they are written."""

import re
import runpy
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


def test_addresses_are_filled_in_at_one_place() -> None:
    paths = [path for pattern in ("*.md", "*.cff", "docs/*.md") for path in ROOT.glob(pattern)]
    paths += (ROOT / "pyro_artransform").rglob("*.py")
    placeholder = re.compile(r"example\.(org|com)|\bTODO\b|filled in by a maintainer")
    assert not [path for path in paths if placeholder.search(path.read_text())]


def test_what_is_missing_before_an_upload_is_said(tmp_path: Path) -> None:
    missing = runpy.run_path(str(ROOT / "tools" / "missing.py"))["missing"]
    project, changelog = tmp_path / "pyproject.toml", tmp_path / "CHANGELOG.md"
    project.write_text(
        '[project.urls]\nIssues = "https://example.org/x"\nSecurity = "https://pyro.ai"'
    )
    changelog.write_text("# Changelog\n\n## Unreleased\n\n### Added\n\n## 0.1.0 - 2026-01-01\n")
    address, version = missing(tmp_path)
    assert "Issues" in address
    assert "CHANGELOG" in version
    project.write_text(project.read_text().replace("example.org", "pyro.ai"))
    changelog.write_text("# Changelog\n\n## Unreleased\n\n## 0.1.0 - 2026-01-01\n\n- All.\n")
    assert not missing(tmp_path)
