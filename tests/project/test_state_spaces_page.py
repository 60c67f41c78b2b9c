# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of the page on state spaces: shown as they are, the same by a loop and at once, and run."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from pyro import poutine

from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import mcmc
from tests.project.conftest import python_blocks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "state_spaces.md").read_text()


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("models.state_spaces")
    for name in ("models", "models.state_spaces"):
        sys.modules.pop(name)


def test_the_page_shows_every_model(models):
    functions = [model for model, *_ in models.SUBJECTS.values()]
    shown = re.findall(r"^:pyobject: (\w+)$", PAGE, flags=re.MULTILINE)
    copied = re.findall(r"^def (\w+)", python_blocks(PAGE), flags=re.MULTILINE)
    assert sorted(shown + copied) == sorted(f.__name__ for f in [*functions, models.free])
    for name in copied:
        assert inspect.getsource(getattr(models, name)) in PAGE


@pytest.mark.parametrize("name", ["local_level", "local_linear_trend"])
def test_the_loop_and_the_path_at_once_have_the_same_density(models, name):
    y, *paths = torch.randn(3, 7)
    paths = dict(zip(("level", "slope"), paths))
    latents = {name: torch.rand(()) for name in ("step", "level_sd", "slope_sd", "noise")}
    latents |= paths | {f"{site}_{t}": z for site in paths for t, z in enumerate(paths[site])}

    def density(model):
        trace = poutine.trace(poutine.condition(model, latents)).get_trace(y)
        return trace.log_prob_sum()

    by_loop = getattr(models, name)
    torch.testing.assert_close(density(getattr(models, f"{name}_at_once")), density(by_loop))


def test_every_model_is_evaluated_at_many_draws_at_once(models):
    for name in models.SUBJECTS:
        model, args = models.subject(name, 20)
        assert LogJoint(model, args).strategy == "plate", name


@pytest.mark.parametrize(
    ("name", "num"), [("local level", 8), ("counts on a lattice", 3), ("Gaussian process", 12)]
)
def test_a_small_one_has_trusted_draws(models, name, num):
    model, args = models.subject(name, num)
    chains = mcmc(model, *args, draws=100, seed=0, progress=False)
    assert chains.trusted, chains.verdict
    if name == "Gaussian process":
        new = torch.linspace(-1.0, 1.0, 5)
        assert chains.predict(new)["y"].shape == (len(next(iter(chains.draws.values()))), 5)
