# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of the page on state spaces: shown as they are, the same by a loop and at once, and run."""

import inspect
import re
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine

from pyro_artransform.inference import mcmc
from pyro_artransform.joint import LogJoint
from tests.shortened_code import python_blocks

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "state_spaces.md").read_text()


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import state_spaces_models

    yield state_spaces_models
    sys.modules.pop("state_spaces_models")


def test_the_page_shows_every_model(models):
    functions = [model for model, *_ in models.SUBJECTS.values()]
    shown = re.findall(r"^:pyobject: (\w+)$", PAGE, flags=re.MULTILINE)
    copied = re.findall(r"^def (\w+)", python_blocks(PAGE), flags=re.MULTILINE)
    assert sorted(shown + copied) == sorted(model.__name__ for model in functions)
    for name in copied:
        assert inspect.getsource(getattr(models, name)) in PAGE


def test_the_loop_and_the_path_at_once_have_the_same_density(models):
    y, path = torch.randn(2, 7)
    scales = {name: torch.rand(()) for name in ("step", "noise")}

    def density(model, latents):
        trace = poutine.trace(poutine.condition(model, scales | latents)).get_trace(y)
        return trace.log_prob_sum()

    by_loop = density(models.local_level, {f"level_{t}": z for t, z in enumerate(path)})
    torch.testing.assert_close(density(models.local_level_at_once, {"level": path}), by_loop)


def test_every_model_is_evaluated_at_many_draws_at_once(models):
    for name in models.SUBJECTS:
        model, args = models.subject(name, 10)
        assert LogJoint(model, args).strategy == "plate", name


@pytest.mark.parametrize(
    ("name", "num"), [("local level", 8), ("counts on a lattice", 3), ("Gaussian process", 12)]
)
def test_a_small_one_has_trusted_draws(models, name, num):
    model, args = models.subject(name, num)
    chains = mcmc(model, None, 100, *args, seed=0, progress=False)
    assert chains.trusted, chains.verdict
    if name == "Gaussian process":
        new = torch.linspace(-1.0, 1.0, 5)
        assert chains.predict(new)["y"].shape == (100, 5)
        pyro.clear_param_store()
