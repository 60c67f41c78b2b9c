# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_artransform.inference.optimization.pace import Pace, pace_of


def averaged(pace, values):
    """The running average of a series, and the weight that each value has in it."""
    weights = torch.zeros(len(values))
    for step in range(1, len(values) + 1):
        weight = pace.average_weight(step)
        weights *= 1 - weight
        weights[step - 1] += weight
    return (weights * values).sum(), weights


def test_without_noise_the_average_is_of_a_hundred_steps():
    pace = pace_of(True, None, False)
    assert pace.average_weight(5000) == 0.01
    assert pace.average_weight(3) == 0.25
    assert pace.has_tail_steps
    assert pace.epoch == 1


def test_with_noise_it_is_of_a_third_of_the_steps():
    for pace in (pace_of(True, 10, True), pace_of(False, None, True)):
        _, weights = averaged(pace, torch.zeros(9000))
        # the last third has 1 - (2 / 3)^3 of the weight
        assert abs(weights[6000:].sum() - 0.70) < 0.01
        assert weights.max() < 1 / 2900


def test_and_of_epochs():
    pace = pace_of(True, 1000, True)
    assert pace.average_weight(3000) == 1 / 2000
    assert pace.average_weight(9000) == 1 / 3000
    assert pace.max_constant >= 20_000
    assert not pace.has_tail_steps


def test_noise_that_cancels_in_an_epoch_is_averaged_away():
    noise = torch.randn(100)
    noise -= noise.mean()
    epochs = torch.cat([noise[torch.randperm(100)] for _ in range(20)])
    found, _ = averaged(pace_of(True, 100, True), epochs)
    before, _ = averaged(Pace(1000), epochs)
    assert abs(found) < 0.05
    assert abs(found) < abs(before)


def test_noise_has_time_to_average_out():
    calm = pace_of(True, None, False).min_decay
    assert min(pace_of(True, 10, True).min_decay, pace_of(False, None, True).min_decay) > 2 * calm
