# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that must not be believed are not: superchains that disagree, or modes, say so."""

import pytest

from pyro_artransform import fit
from pyro_artransform.inference import mcmc
from tests.inference import doubtful
from tests.inference.doubtful import DOUBTFUL, MODES

CASES = [
    pytest.param(name, marks=pytest.mark.slow) if target.is_slow else name
    for name, target in DOUBTFUL.items()
]


@pytest.mark.parametrize("name", CASES)
def test_draws_of_chains(name):
    model, words, _ = DOUBTFUL[name]
    chains = mcmc(model, draws=400, seed=0, progress=False, max_seconds=20)
    assert not chains.trusted, chains
    assert any(each in chains.verdict for each in words)


def test_draws_of_a_fit():
    """Of the guide that is chosen, at moments of draws that are in two modes."""
    result = fit(doubtful.labels, draws=400, seed=0, progress=False)
    assert not result.trusted, result
    assert not result.chains.trusted, result
    assert result.verdict.startswith("Draws not trusted: ")
    assert MODES in result.verdict


@pytest.mark.slow
def test_a_fit_to_a_density_with_a_wall_says_so():
    found = fit(doubtful.wall, draws=400, seed=0, progress=False, max_seconds=60)
    assert not found.chains.trusted
    assert not found.trusted
