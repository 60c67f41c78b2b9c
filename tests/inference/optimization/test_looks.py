# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.inference.config import OptimizationConfig
from pyro_artransform.inference.optimization.schedule import Score, is_good, look, score_of

CONFIG = OptimizationConfig()


class Weights:
    """An objective whose log weights are Gaussian, of a given standard deviation."""

    has_weights = True

    def __init__(self, sd, has_weights=True):
        self.sd, self.has_weights, self.num_draws = sd, has_weights, 0
        torch.manual_seed(0)

    def elbo_draws(self, count):
        self.num_draws += count
        return -7.0 + self.sd * torch.randn(count)


def test_the_gap_of_gaussian_weights_is_half_their_variance():
    score = score_of(Weights(0.2), 5000)
    # the standard errors of both means are 0.2 / sqrt(5000) = 0.003, and nearly cancel
    assert abs(score.gap - 0.02) < 0.002
    assert abs(score.elbo + 7.0) < 0.01


def test_weights_with_a_heavy_tail_know_no_gap():
    score = score_of(Weights(4.0), 5000)
    assert score.khat > 0.7
    assert score.gap == math.inf


def test_draws_without_weights_know_no_gap():
    assert score_of(Weights(0.2, has_weights=False), 100).gap == math.inf


def test_a_look_from_afar_takes_few_draws():
    far, near = Weights(1.0), Weights(0.03)
    assert look(far, CONFIG) == Score()
    assert far.num_draws == CONFIG.look_draws
    assert is_good(look(near, CONFIG), CONFIG)


@pytest.mark.parametrize("sd", [math.nan, math.inf])
def test_what_is_not_finite_is_not_good(sd):
    assert not is_good(look(Weights(sd), CONFIG), CONFIG)


def test_good_is_little_gap_and_a_light_tail():
    assert is_good(Score(-1.0, 0.2, 0.0005), CONFIG)
    assert not is_good(Score(-1.0, 0.2, 0.002), CONFIG)
    assert not is_good(Score(-1.0, 0.5, 0.0005), CONFIG)
