# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What the README says works: its code runs, its commands and links exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = "\n".join(code for language, code in BLOCKS if language == "sh")


def test_the_guide_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    shortened, count = re.subn(r"range\(\d[\d_]+\)", "range(5)", code)
    assert count == 1
    names: dict[str, object] = {}
    exec(compile(shortened, "README.md", "exec"), names)
    posterior = names["posterior"]
    shapes = {site: tuple(value.shape) for site, value in posterior.items()}
    assert shapes == {"mu": (1000,), "tau": (1000,), "theta": (1000, 8)}
    assert all(torch.isfinite(value).all() for value in posterior.values())


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make (\w+)", README, re.M))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_commands_install_what_the_project_declares() -> None:
    extras = set(re.findall(r"\.\[(\w+)\]", COMMANDS))
    declared = (ROOT / "pyproject.toml").read_text()
    assert extras
    assert all(re.search(rf"^{extra} = \[", declared, flags=re.MULTILINE) for extra in extras)
