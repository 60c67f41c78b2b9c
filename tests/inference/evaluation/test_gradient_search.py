# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.inference.evaluation import mode_search
from pyro_artransform.inference.initialization.initial_guide import GaussianSearch
from tests.inference import models
from tests.inference.evaluation.searches import DEFAULTS, STARTS, half_lost, missed, one_mode

DIM = 250


def opposite(scales, num_flipped=DIM):
    """Two Gaussians of equal mass at 1 and, in the first coordinates, -1; of log evidence 0."""
    locs = torch.ones(2, DIM)
    locs[1, :num_flipped] = -1
    scales = torch.tensor(scales)[:, None]

    def model():
        flat = dist.constraints.real_vector
        a = pyro.sample("a", dist.ImproperUniform(flat, (), (100,)))
        b = pyro.sample("b", dist.ImproperUniform(flat, (), (DIM - 100,)))
        z = torch.cat([a, b], -1)
        parts = dist.Normal(locs, scales).to_event(1).log_prob(z.unsqueeze(-2))
        pyro.factor("target", parts.logsumexp(-1) - math.log(2))

    return model


@pytest.mark.parametrize(
    ("scales", "num_flipped"),
    [((0.1, 0.1), DIM), ((0.1, 0.1), 100), ((0.1, 0.1), 1), ((0.2, 0.1), DIM), ((0.1, 0.2), 100)],
    ids=str,
)
def test_a_lost_half_in_many_dimensions(scales, num_flipped):
    """Half of the mass is at -1, all of it, that of a site, or of one coordinate."""
    draws = 1 + scales[0] * torch.randn(5000, DIM)
    found = missed(opposite(scales, num_flipped), draws, -math.log(2))
    assert found.look == "gradients"
    assert found.num_lost == 1
    # of another scale than the guide, a mean-field fit bounds it from below
    assert (0.4 if scales[0] == scales[1] else 0.1) < found.lost_mass < 0.6


@pytest.mark.parametrize("apart", [5.0, 8.0])
def test_a_mode_that_is_far_in_one_of_many_coordinates(apart):
    found = half_lost(DIM, apart)
    assert (found.num_lost, found.look) == (1, "gradients")
    assert abs(found.lost_mass - 0.5) < 0.1


def test_gradients_find_what_curvatures_find():
    config = replace(DEFAULTS, max_hessian_dim=0)
    found = missed(models.two_modes(2, 20.0, 0.7), one_mode(2), math.log(0.7), config=config)
    assert (found.num_lost, found.look) == (1, "gradients")
    assert abs(found.lost_mass - 0.3) < 0.05


def test_nothing_is_lost_where_both_halves_have_draws():
    draws = 1 + 0.1 * torch.randn(5000, DIM)
    draws[::2] -= 2
    assert missed(opposite((0.1, 0.1)), draws).num_lost == 0


def test_a_correlated_gaussian_of_many_dimensions():
    scale_tril = torch.eye(DIM) + 0.9 * torch.ones(DIM, DIM).tril(-1) / DIM**0.5
    scale_tril = torch.logspace(-3, 3, DIM)[:, None] * scale_tril

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.ones(DIM), scale_tril=scale_tril))

    found = missed(model, 1 + torch.randn(5000, DIM) @ scale_tril.T)
    assert (found.num_lost, found.look) == (0, "gradients")


def test_a_funnel_of_many_dimensions():
    """Its density is largest in a neck without mass, far from all draws."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(DIM), (v[..., None] / 2).exp()).to_event(1))

    v = torch.randn(5000, 1)
    draws = torch.cat([v, (v / 2).exp() * torch.randn(5000, DIM)], -1)
    assert missed(model, draws).num_lost == 0


def test_settings_of_starts_reach_the_search(monkeypatch):
    seen = []

    def fit_independent(density, points, config):
        seen.append(config)
        return points, torch.ones_like(points)

    monkeypatch.setattr(mode_search, "fit_independent", fit_independent)
    monkeypatch.setattr(
        GaussianSearch, "points", lambda self, at: seen.append(self.config) or at[None]
    )
    config, starts = replace(DEFAULTS, max_hessian_dim=0), replace(STARTS, mean_field_steps=7)
    missed(models.two_modes(2, 20.0, 0.7), one_mode(2), math.log(0.7), config=config, starts=starts)
    assert seen == [starts, starts]
