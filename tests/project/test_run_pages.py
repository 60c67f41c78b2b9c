# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Pages that docs/run_pages.py has run show what their code prints and draws."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

from tests.project.test_docs import DOCS, PAGES, ROOT, script_of_the_site
from tests.shortened_code import python_blocks, shortened

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


def test_a_guide_by_hand_vectorizes_and_loads(tmp_path: Path) -> None:
    """A latent in a plate has the loss of single particles; a loaded flow is the trained one."""
    blocks = re.findall(r"```python\n(.*?)```", PAGES["guide_by_hand.md"], re.DOTALL)
    names: dict[str, Any] = {}
    exec(blocks[0] + next(block for block in blocks if "def groups_guide" in block), names)
    store, y = pyro.get_param_store(), torch.randn(8)

    def loss(**options: Any) -> float:
        elbo = pyro.infer.Trace_ELBO(1000, max_plate_nesting=1, **options)
        return float(elbo.loss(names["groups"], names["groups_guide"], y))

    by_particle = loss()
    assert loss(vectorize_particles=True) == pytest.approx(by_particle, abs=0.5)
    with torch.no_grad():
        names["of_groups"].transforms[1].loc += 1
    trained = loss(vectorize_particles=True)
    store.save(tmp_path / "store.pt")
    with torch.no_grad():
        names["of_groups"].transforms[1].loc -= 1
    names["of_groups"] = copy.deepcopy(names["of_groups"])
    store.clear()
    store.load(tmp_path / "store.pt")
    assert abs(trained - by_particle) > 2
    assert loss(vectorize_particles=True) == pytest.approx(trained, abs=0.5)


DENSITY = """
def density():
    z, u = torch.tensor([4.0, 1.0]), torch.linspace(-5.0, 20.0, 8)[:, None]
    at = pyro.condition(schools_guide, data={"z": z, "u": u})
    return pyro.poutine.trace(at).get_trace(errors, effects).log_prob_sum().item()
"""
IN_A_NEW_PROCESS = """
new = density()
pyro.clear_param_store()
pyro.get_param_store().load(path)
print(new, density())
"""


def test_a_guide_with_a_conditional_flow_vectorizes_and_loads_in_a_new_process(
    tmp_path: Path,
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGES["guide_by_hand.md"], re.DOTALL)
    recipe = next(block for block in blocks if "def schools_guide" in block)
    definitions = blocks[0] + recipe.split("loss = ")[0] + DENSITY
    names: dict[str, Any] = {}
    exec(definitions + shortened(recipe[recipe.index("loss = ") :]), names)
    losses = [
        pyro.infer.Trace_ELBO(1000, max_plate_nesting=1, vectorize_particles=vectorized).loss(
            names["schools"], names["schools_guide"], names["errors"], names["effects"]
        )
        for vectorized in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.3)  # shapes that broadcast: times 1,000
    path = tmp_path / "store.pt"
    pyro.get_param_store().save(path)
    script = definitions + f"path = {str(path)!r}" + IN_A_NEW_PROCESS
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True
    )
    new, loaded = map(float, done.stdout.split())
    trained = names["density"]()
    assert abs(new - trained) > 0.1
    assert loaded == pytest.approx(trained, rel=1e-12)


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
