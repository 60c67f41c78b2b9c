# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What the README says works: its code runs, its commands and links exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_artransform
from pyro_artransform import transforms
from tests.test_eight_schools import demo, elbos, run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
LOG_EVIDENCE = float(re.findall(r"log\s+evidence, (-[\d.]+)\.", README)[0])
ROWS = re.findall(
    r"^\| (?:Pyro's )?`(Auto\w+)` \| (-[\d.]+) \| ([\d.]+) \| [\d,]+ \|$", README, re.M
)
TABLE = {name: (float(mean), float(error)) for name, mean, error in ROWS}
COMMANDS = "\n".join(code for language, code in BLOCKS if language == "sh")


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training is shortened."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    short_fit = r"= fit(\1, num_steps=5, progress=False, seed=0)"
    shortened, num_epochs = re.subn(r"epochs=\d+, ", "", code)
    shortened, num_fits = re.subn(r"= fit\((.*?)\)", short_fit, shortened)
    assert (num_fits, num_epochs) == (4, 1)
    names: dict[str, Any] = {}
    exec(compile(shortened, "README.md", "exec"), names)
    assert names["result"].num_steps == 5
    for draws, expected in (
        ("posterior", {"mu": (1000,), "tau": (1000,), "theta": (1000, 8)}),
        ("local_posterior", {"mean": (100,), "z": (100, 1000)}),
    ):
        posterior = names[draws]
        assert {site: tuple(value.shape) for site, value in posterior.items()} == expected
        assert all(torch.isfinite(value).all() for value in posterior.values())


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:inference|diagnostics)\.\w+)", README)))
)
def test_the_functions_are_there(name: str) -> None:
    part, function = name.split(".")
    assert function in getattr(pyro_artransform, part).__all__


def test_the_plots_are_there() -> None:
    (row,) = re.findall(r"`plots\.(plot_\w+(?:, plot_\w+)*)`", README)
    assert set(row.split(", ")) == set(pyro_artransform.plots.__all__)


def test_the_eight_schools_are_fitted_as_described() -> None:
    script = demo()
    assert script.LOG_EVIDENCE == LOG_EVIDENCE
    assert list(TABLE) == list(script.GUIDES)


@pytest.mark.slow
def test_the_eight_schools_come_out_as_in_the_table(tmp_path: Path) -> None:
    """To a few hundredths: other versions and processors round otherwise, and training amplifies it."""
    found = elbos(run(tmp_path, "--out", str(tmp_path / "picture.png"), smoke_test=False))
    assert list(found) == list(TABLE)
    for name, (mean, error) in TABLE.items():
        assert found[name] == pytest.approx((mean, error), abs=0.05)


def test_the_names_of_zuko_are_there() -> None:
    (sentence,) = re.findall(r"five names of Zuko's transforms \((.*?)\)", README, re.DOTALL)
    names = re.findall(r"`(\w+)`", sentence)
    assert len(names) == 5
    assert set(names) <= set(transforms.__all__)


@pytest.mark.parametrize("path", re.findall(r"^    ([\w./]+/?)  ", README, re.MULTILINE))
def test_the_folders_are_there(path: str) -> None:
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


@pytest.mark.parametrize("name", ["FAMILIES", "CONDITIONERS", "GUIDES"])
def test_the_dicts_of_named_constructors_are_there(name: str) -> None:
    (places,) = re.findall(rf"`{name}` in\s+((?:`[^`]+`(?: and )?)+)", README)
    for path in re.findall("`([^`]+)`", places):
        assert re.search(rf"^{name} = {{", (ROOT / path).read_text(), flags=re.MULTILINE)


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
