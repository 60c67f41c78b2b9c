# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from functools import partial

import pytest
import torch

from pyro_artransform.inference.optimization import schedule as schedules
from pyro_artransform.inference.optimization.objective import Objective
from pyro_artransform.inference.optimization.schedule import (
    _AVERAGED_PARTS,
    _DECAY_FACTOR,
    _DECAY_OF_TAILS,
    _KHAT_AT_END,
    _WINDOW,
    LIMIT,
    LITTLE_TO_WIN,
    NOTHING_TO_WIN,
    NUM_COMPARED,
    PLATEAU,
    Schedule,
    remaining_gap,
)


@pytest.fixture(autouse=True)
def max_constant(monkeypatch):
    """Sets the longest phase of constant step size; no test here reaches the one it begins with."""

    def set_to(count):
        monkeypatch.setattr(schedules, "_MAX_CONSTANT", count)

    set_to(100_000)
    return set_to


def schedule(num_steps=None, **options):
    return Schedule(**options).of_length(num_steps)


def noise(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).tolist()


def steps(plan, losses):
    """Shows losses to a schedule one by one; returns it at its end, and how many that took."""
    for step in range(1, len(losses) + 1):
        if plan.is_over(step - 1):
            return plan, step - 1
        plan = plan.observe(losses[:step])
    return plan, len(losses)


def test_a_given_number_of_steps():
    plan = schedule(50)
    assert [plan.is_over(step) for step in (0, 49, 50)] == [False, False, True]
    factors = [plan.factor(step) for step in range(50)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[0] < factors[15]
    assert factors[25] > factors[35] > factors[49]
    assert factors[49] < 0.02
    assert "50" in plan.reason
    # losses change nothing
    assert steps(plan, [1.0] * 5000) == (plan, 50)
    assert schedule(1).factor(0) > 0
    assert schedule(1).is_over(1)


def test_ends_where_nothing_moves():
    plan, taken = steps(schedule(), noise(20_000))
    assert plan.reason == PLATEAU
    assert taken == plan.end < 20_000
    assert plan.factor(plan.decay_start) == _DECAY_FACTOR
    assert plan.factor(plan.end - 1) < 0.01


def test_limit(max_constant):
    max_constant(1000)
    falling = [x - 0.01 * step for step, x in enumerate(noise(3000))]
    plan, _ = steps(schedule(), falling)
    assert plan.reason == LIMIT
    assert 1000 <= plan.decay_start <= 1000 + _WINDOW


@pytest.mark.parametrize("epoch", [7, 250])
def test_whole_epochs(epoch):
    plan, taken = steps(schedule(epoch=epoch), noise(40_000))
    assert taken == plan.end
    assert not plan.decay_start % epoch
    assert not plan.end % epoch
    assert plan.decay_start >= 6 * epoch


def test_differences_between_batches_are_no_noise(max_constant):
    """A slow improvement, under batches that differ by much more."""
    max_constant(4000)
    batches = [100.0 * value for value in noise(50)]
    losses = [batches[step % 50] - 0.01 * step for step in range(6000)]
    plan, _ = steps(schedule(epoch=50), losses)
    assert plan.reason == LIMIT
    blind, _ = steps(schedule(), losses)
    assert blind.reason == PLATEAU


def test_the_average_reaches_back_a_share_of_the_steps():
    plan, values = schedule(), torch.randn(9000, 100)
    found = values[0]
    for step, value in enumerate(values[1:], 1):
        found = found + plan.average_weight(step) * (value - found)
    # an average of n values has a variance of 1 / n, one with exponential weights of 1 / (2 n)
    assert found.std() < 2 * (2 * 9000 / _AVERAGED_PARTS) ** -0.5


# Checks of what is left to win


class Weights(Objective):
    """An objective whose log weights are Gaussian, of a given standard deviation."""

    def __init__(self, sd):
        self.sd = sd
        torch.manual_seed(0)

    def elbo_draws(self, count):
        return -7.0 + self.sd * torch.randn(count)


@pytest.mark.parametrize(
    ("sd", "gap"), [(0.2, 0.02), *((sd, math.inf) for sd in (4.0, math.nan, math.inf))]
)
def test_the_gap_of_gaussian_weights_is_half_their_variance(sd, gap):
    """None is known with a heavy tail."""
    # the standard errors of both means are 0.2 / sqrt(5000) = 0.003, and nearly cancel
    assert remaining_gap(Weights(sd).elbo_draws(5000)) == pytest.approx(gap, abs=0.002)


def test_a_guide_is_taken_as_it_is_where_its_weights_have_a_variance():
    """Weights exp(a x) of exponential x have the index a: no variance from 0.5 on, and no mean from 1 on."""
    draws = torch.randn(1000) * 0.01
    assert remaining_gap(draws, _KHAT_AT_END) < 0.001
    heavy = -0.65 * torch.linspace(1e-4, 1 - 1e-4, 5000).log()
    assert math.isfinite(remaining_gap(heavy))
    assert remaining_gap(heavy, _KHAT_AT_END) == math.inf


def near(count):
    return Weights(0.05).elbo_draws(count)


def with_a_tail(count):
    """A thousand draws do not see the tail, whose index is 0.65."""
    exponential = -torch.linspace(0.5 / count, 1 - 0.5 / count, count).log()
    return near(count) if count == NUM_COMPARED else 0.65 * (exponential - 3.2).clamp(min=0.0)


@pytest.mark.parametrize("step", [0, 100])
def test_a_fit_ends_where_nothing_is_left_to_win(step):
    ended = schedule().after_check(step, near)
    assert (ended.is_over(step), ended.reason) == (True, NOTHING_TO_WIN)


def test_a_fit_with_little_left_to_win_goes_to_its_end():
    plan = schedule().after_check(300, with_a_tail)
    assert (plan.decay_start, plan.end, plan.reason) == (300, 300 + _DECAY_OF_TAILS, LITTLE_TO_WIN)
    assert not plan.is_for_check(350)
    # one that is far off goes on, and is checked again
    for step, log_weights in ((0, with_a_tail), (100, Weights(1.0).elbo_draws)):
        after = schedule().after_check(step, log_weights)
        assert after == schedule(gap=after.gap)
    assert [step for step in range(120) if schedule().is_for_check(step)] == [50, 75, 100]


def test_a_further_nat_costs_more_steps():
    """A gap of 0.03 nats is small after 200 steps, and one of 0.06 is not."""
    for sd, step, is_small in ((0.245, 100, False), (0.245, 200, True), (0.35, 1000, False)):
        assert schedule().after_check(step, Weights(sd).elbo_draws).is_over(step) == is_small


def test_steps_are_no_longer_than_the_distance_from_the_optimum():
    """Log weights of sd 0.5 have a gap of 0.125 nats, of 1,000 latents 0.016 sds each."""
    near, many = Weights(0.5).elbo_draws, schedule(dim=1000)
    assert many.step_size(0.02) == 0.02  # before the first check
    assert many.after_check(0, near).step_size(0.02) == pytest.approx(0.008, rel=0.1)
    assert schedule(dim=10).after_check(0, near).step_size(0.02) == 0.02


def test_the_decay_trains_tails_if_k_hat_is_not_small():
    heavy = partial(with_a_tail, NUM_COMPARED + 1)
    for log_weights, is_for_tails in ((near, False), (lambda _: heavy(), True)):
        for gap, most in ((0.05, _DECAY_OF_TAILS), (0.2, 0)):  # no tail is worth training far off
            plan = schedule(gap=gap).ending_at(300, PLATEAU).with_loss_of_decay(log_weights)
            assert plan.is_for_tails == is_for_tails
            assert plan.end == 300 + most * is_for_tails


def test_a_plateau_is_relative_to_the_gap():
    """A loss that falls by 0.02 nats in 100 steps is still where 0.3 are left, and is not where 0.05 are."""
    losses = [0.1 * x - 0.0002 * step for step, x in enumerate(noise(400))]
    for gap, is_still in ((0.05, False), (0.3, True), (math.inf, False)):
        assert schedule(gap=gap).is_still(losses) == is_still


def test_a_few_losses_do_not_tell_whether_they_fall():
    """Those before the step size falls, of a number of steps that was asked for, as of any other."""
    plan, still = schedule(2000), noise(700)
    assert plan.is_still(still)
    assert not plan.is_still([x - 0.02 * step for step, x in enumerate(still)])
    assert not plan.is_still(still[: 2 * _WINDOW - 1])
