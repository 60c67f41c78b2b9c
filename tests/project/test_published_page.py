# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark on published targets: models are evaluated, moments are right, and crossings are found."""

import importlib
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_artransform.model import LogJoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("models.published")
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("models", "measuring", "published"):
            sys.modules.pop(name)


def test_every_model_is_evaluated_at_many_draws_at_once(models):
    index, y = torch.arange(7), torch.ones(7)
    lib = importlib.import_module("models.library").PYRO
    data = {
        models.gaussian: (torch.eye(3),),
        models.banana: (),
        models.rosenbrock: (),
        models.brownian: (index, y),
        models.volatility: (y,),
        models.item_responses: (index, index, y),
    }
    for model, args in data.items():
        log_joint = LogJoint(partial(model, lib), args)
        assert log_joint.strategy == "plate", model.__name__
        assert log_joint(torch.zeros(2, log_joint.latents.latent_dim)).isfinite().all()


@pytest.mark.parametrize("name", ["banana", "Rosenbrock"])
def test_moments_are_those_of_the_density(models, name):
    """Exact draws have them, and the log density of these is that of the normals that they are made of."""
    model, args, truth = models.TARGETS[name]()
    lib = importlib.import_module("models.library").PYRO
    log_joint = LogJoint(partial(model, lib), args)
    torch.manual_seed(0)
    normal = torch.randn(50_000, log_joint.latents.latent_dim, dtype=torch.float64)
    if name == "banana":
        x = 10 * normal[:, :1]
        draws = torch.cat([x, 0.03 * (x**2 - 100) + normal[:, 1:]], 1)
    else:
        x = 1 + normal[:, :18]
        draws = torch.cat([x, x**2 + 0.1**0.5 * normal[:, 18:]], 1)
    assert (log_joint(draws) + 0.5 * (normal**2).sum(1)).std() < 1e-3
    squares = (draws**2).reshape(len(draws), len(truth), -1).numpy()
    for i, (mean, variance) in enumerate(truth.values()):
        np.testing.assert_allclose(squares[:, i].mean(0), mean + 0 * squares[0, i], rtol=0.06)
        np.testing.assert_allclose(squares[:, i].var(0).mean(), np.mean(variance), rtol=0.06)


def test_an_error_that_grows_again_is_not_low(models):
    published = importlib.import_module("published")
    errors = np.array([1.0, -1.0, 3.0, -3.0, 0.0])[None, :, None]
    row = published.crossings(errors, [10, 20, 30, 40, 50], 0.0)
    assert row["max"] == row["mean"] == 40
    assert published.crossings(errors, [10, 20, 30, 40, 50], 1 / 3)["max"] is None
