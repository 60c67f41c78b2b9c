# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that must not be believed are not: R-hat, a search for modes, tails or a sentence says so.

A guide that is a point is an error, see ``test_mcmc``.
"""

import re

import pytest

from pyro_artransform import AutoIAF, fit
from pyro_artransform.inference import mcmc
from tests.inference import doubtful
from tests.inference.doubtful import DOUBTFUL

SLOW = {name for name, target in DOUBTFUL.items() if target.is_slow}


def cases(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


# the fits below have quick cases of two modes and of labels
@pytest.mark.parametrize(
    "name", cases(DOUBTFUL, SLOW | {"two modes of 1", "two modes of 5", "labels"})
)
def test_draws_of_chains(name):
    model, make_guide, words, _ = DOUBTFUL[name]
    chains = mcmc(model, make_guide(), 400, seed=0, progress=False, max_seconds=20)
    assert not chains.trusted, chains
    # of two modes some chains may jump, and then they do not agree
    assert any(each in chains.verdict for each in words)


@pytest.mark.parametrize(
    "name",
    cases(sorted(DOUBTFUL.keys() - {"Cauchy", "wall"}), SLOW | {"two modes of 5", "two scales"}),
)
def test_draws_of_a_fit(name):
    """Of the guide that is chosen, trained as far as it pays."""
    result = fit(DOUBTFUL[name].model, draws=400, seed=0, progress=False, max_seconds=20)
    assert not result.trusted, result
    assert not result.chains.trusted, result
    assert result.verdict.startswith("Draws not trusted: ")


@pytest.mark.slow
def test_a_fit_to_a_density_with_a_wall_says_so():
    found = fit(doubtful.wall, draws=400, seed=0, progress=False, max_seconds=60)
    assert not found.chains.trusted
    assert not found.trusted
    assert "wall" in found.culprits


def test_two_scales_in_coordinates_of_the_model():
    """Half of the mass is at a scale of 0.01, where some of the chains from a Gaussian at 1 get, and stay."""
    guide = doubtful.at(doubtful.two_scales, 0.3, log_scale=0.0)()
    chains = mcmc(doubtful.two_scales, guide, 400, seed=0, progress=False)
    assert re.search(
        r"R-hat is .* for log_scale.* They move, but not to each other", chains.verdict
    )


def test_a_funnel_from_a_guide_in_coordinates_of_the_model():
    """From one that was not trained, whose trajectories alone leave out the neck: chains leave them."""
    guide = AutoIAF(doubtful.funnel, coordinates={"x": 1.0}, hidden_dims=8)
    found = mcmc(doubtful.funnel, guide, 400, seed=0, progress=False)
    v = found.by_chain["v"].double()
    assert found.trusted
    # an sd of 400 effective draws has an error of 3.5 %
    assert float(v.std()) == pytest.approx(3.0, rel=0.12)
    assert float(v.quantile(0.01)) < -5.5


@pytest.mark.slow
def test_a_funnel_in_coordinates_of_the_model_after_a_fit():
    """The upper quantile of 99 % of v is 6.98, that of the draws 5.4 to 6.0, with a good R-hat."""
    guide = AutoIAF(doubtful.funnel, coordinates="model")
    found = fit(doubtful.funnel, guide, draws=400, seed=0, progress=False, max_seconds=60).chains
    assert found.max_rhat <= 1.02
    assert "chains miss a tail of v" in found.verdict
