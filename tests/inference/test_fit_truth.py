# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The verdict tells the truth: targets of log evidence 0, where the gap is minus the ELBO."""

from dataclasses import replace

import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_median

from pyro_artransform import fit
from pyro_artransform.diagnostics import importance
from pyro_artransform.inference.config import FitConfig, OptimizationConfig
from tests.inference import models
from tests.inference.conftest import QUICK
from tests.inference.models import small

#: A gap above this, in nats, is none to trust.
WRONG = 0.2


#: Fewer starts and a shorter learning-rate search; the verdict itself as it is.
SHORT_START = FitConfig(
    initialization=replace(QUICK.initialization, max_newton_steps=40),
    optimization=OptimizationConfig(search_steps=4, search_draws=64),
)


def started(site):
    """A starting value for a flat prior too."""
    try:
        return init_to_median(site)
    except NotImplementedError:
        return torch.randn(site["fn"].shape())


def fitted(model, kind, seed=0, num_steps=150):
    guide = kind(model, init_loc_fn=started)
    options = {"num_steps": num_steps, "num_particles": 16, "progress": False}
    result = fit(model, guide, seed=seed, config=SHORT_START, **options)
    return result, -importance(model, guide, 20_000).elbo


def tells_the_truth(result, gap):
    assert not (result.trusted and gap > WRONG), f"a gap of {gap:.2f}: {result}"
    if gap > WRONG:
        assert result.verdict.startswith("Not trusted: ")


def test_a_correlated_gaussian_is_trusted():
    result, gap = fitted(models.gaussian, small)
    assert result.trusted, result
    assert gap < 0.01


def test_a_correlated_gaussian_under_independent_ones_is_not():
    result, gap = fitted(models.gaussian, AutoNormal)
    assert gap > WRONG
    tells_the_truth(result, gap)


@pytest.mark.parametrize(
    ("apart", "weight", "dim", "kind"),
    [
        (4.0, 0.5, 1, small),
        (4.0, 0.5, 2, AutoNormal),
        (20.0, 0.7, 2, small),
        (20.0, 0.7, 1, AutoNormal),
    ],
)
def test_two_modes(apart, weight, dim, kind):
    result, gap = fitted(models.two_modes(dim, apart, weight), kind)
    if kind is AutoNormal or apart == 20:
        assert gap > WRONG
    tells_the_truth(result, gap)


@pytest.mark.parametrize(
    "kind", [pytest.param(AutoNormal, marks=pytest.mark.slow), AutoMultivariateNormal]
)
def test_funnel(kind):
    result, gap = fitted(models.funnel, kind, num_steps=100)
    assert gap > WRONG
    tells_the_truth(result, gap)


def test_heavy_tails():
    """Not so wide that its own draws show the tails, and trained until the gap is least."""
    result, gap = fitted(models.student, AutoNormal, num_steps=400)
    assert gap > WRONG
    tells_the_truth(result, gap)
