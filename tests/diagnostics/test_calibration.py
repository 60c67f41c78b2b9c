# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The recipe for simulation-based calibration on the page ``verdict.md``."""

import re
from pathlib import Path

import pyro
import pytest
from pyro import distributions as dist

from pyro_artransform import mcmc

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verdict.md"
NUM_DATA, NUM_SIMULATIONS = 3, 300


def normal(data=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", NUM_DATA):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=data)


@pytest.fixture(scope="module")
def recipe():
    section = PAGE.read_text().split("\n## Calibration\n")[1]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    return names


@pytest.mark.parametrize(
    ("width", "shift", "is_right"),
    [(1.0, 0.0, True), (0.7, 0.0, False), (1.4, 0.0, False), (1.0, -0.2, False)],
)
def test_the_recipe_rejects_wrong_posteriors(recipe, width, shift, is_right):
    """30 % too narrow, 40 % too wide, or off by 0.4 sd."""

    def draws_given(y):
        variance = 1 / (1 + NUM_DATA)
        return {
            "mean": dist.Normal(y.sum() * variance + shift, width * variance**0.5).sample((99,))
        }

    ranks = recipe["ranks_of"](normal, "mean", "y", draws_given, NUM_SIMULATIONS)
    assert ranks.shape == (NUM_SIMULATIONS,)
    assert (recipe["chi_squared"](ranks) < 21.7) == is_right


def test_the_recipe_takes_the_draws_of_chains(recipe):
    def draws_given(y):
        return mcmc(normal, y, draws=100, progress=False).draws

    ranks = recipe["ranks_of"](normal, "mean", "y", draws_given, 2)
    assert ranks.shape == (2,)
    assert 0 <= ranks.min() <= ranks.max() <= 99
