# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

import pytest
import torch

from pyro_artransform.inference.config import OptimizationConfig
from pyro_artransform.inference.optimization.schedule import (
    LIMIT,
    LITTLE_TO_WIN,
    NOTHING_TO_WIN,
    PLATEAU,
    Schedule,
    Score,
    is_good,
    new_schedule,
    quick_score,
    score_of,
)
from pyro_artransform.inference.optimization.training import _END

CONFIG = OptimizationConfig()


def schedule(num_steps=None, max_constant=100_000, **options):
    options = {"min_decay": CONFIG.min_decay, **options}
    return Schedule(CONFIG, max_constant, **options).of_length(num_steps)


def noise(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).tolist()


def steps(plan, losses):
    """Shows losses to a schedule one by one; returns it at its end, and how many that took."""
    for step in range(1, len(losses) + 1):
        if plan.is_over(step - 1):
            return plan, step - 1
        plan = plan.observe(losses[:step], float)  # no gap
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


def test_a_fit_that_has_nothing_to_do_and_one_that_ends_now():
    none = schedule().without_steps("why")
    assert (none.is_over(0), none.reason, none.expected_end(0)) == (True, "why", 0)
    ended = schedule(500, tail_steps=50).ending_at(120, "now")
    assert [ended.is_over(step) for step in (119, 120)] == [False, True]
    assert (ended.reason, ended.is_for_tails(119)) == ("now", False)


def test_steps_for_the_tails():
    plan, plain = schedule(100, tail_steps=100), schedule(100)
    assert [step for step in range(100) if plan.is_for_tails(step)] == [
        *range(plan.tail_start, 100)
    ]
    assert not any(plain.is_for_tails(step) for step in range(100))
    assert plan.is_over(100)
    assert not plan.is_over(99)
    factors = [plan.factor(step) for step in range(100)]
    assert factors[plan.tail_start - 1] < 0.01
    assert 0 < max(factors[plan.tail_start :]) < 0.5
    by_itself, taken = steps(schedule(tail_steps=100), noise(20_000))
    assert by_itself.decay_start < by_itself.tail_start < by_itself.end == taken


def test_ends_where_nothing_moves():
    plan, taken = steps(schedule(), noise(20_000))
    assert plan.reason == PLATEAU
    assert taken == plan.end < 20_000
    assert plan.factor(plan.decay_start) == 1.0
    assert plan.factor(plan.end - 1) < 0.01


@pytest.mark.parametrize("gap", [0.01, 0.5])
def test_a_guide_far_from_the_evidence_gets_more_small_steps(gap):
    asked = []

    def ask():
        asked.append(gap)
        return gap

    plan, losses = schedule(), noise(1200)
    for step in range(1, len(losses)):
        plan = plan.observe(losses[:step], ask)
    assert (plan.end - plan.decay_start == CONFIG.max_decay) == (gap == 0.5)
    # it costs draws: once in a fit
    assert asked == [gap]


def test_limit():
    falling = [x - 0.01 * step for step, x in enumerate(noise(3000))]
    plan, _ = steps(schedule(max_constant=1000), falling)
    assert plan.reason == LIMIT
    assert 1000 <= plan.decay_start <= 1000 + CONFIG.window


def test_state():
    losses = noise(20_000)
    whole, taken = steps(schedule(max_constant=900), losses)
    first, _ = steps(schedule(max_constant=900), losses[: taken // 2])
    second = replace(schedule(max_constant=900), **{name: getattr(first, name) for name in _END})
    for step in range(taken // 2, taken + 1):
        second = second.observe(losses[:step], float)
    assert second == whole


@pytest.mark.parametrize("epoch", [7, 250])
def test_whole_epochs(epoch):
    plan, taken = steps(schedule(epoch=epoch), noise(40_000))
    assert taken == plan.end
    assert not plan.decay_start % epoch
    assert not plan.end % epoch
    assert plan.decay_start >= 6 * epoch


def test_differences_between_batches_are_no_noise():
    """A slow improvement, under batches that differ by much more."""
    batches = [100.0 * value for value in noise(50)]
    losses = [batches[step % 50] - 0.01 * step for step in range(6000)]
    plan, _ = steps(schedule(max_constant=4000, epoch=50), losses)
    assert plan.reason == LIMIT
    blind, _ = steps(schedule(max_constant=4000), losses)
    assert blind.reason == PLATEAU


# What the noise of the steps asks for


def average(plan, values):
    """The running average of a series."""
    found = values[0]
    for step, value in enumerate(values[1:], 1):
        found = found + plan.average_weight(step) * (value - found)
    return found


def of(by_path=True, num_batches=None, is_random=False):
    return new_schedule(CONFIG, by_path, num_batches, is_random)


@pytest.mark.parametrize("plan", [of(num_batches=10), of(is_random=True)])
def test_noise_is_averaged_over_more_steps(plan):
    values = torch.randn(100, 9000)
    noisy, quiet = average(plan, values.T), average(of(), values.T)
    # an average of n values has a variance of 1 / n, one with exponential weights of 1 / (2 n)
    assert noisy.std() < 0.3 * quiet.std()


# Checks of what is left to win


class Weights:
    """An objective whose log weights are Gaussian, of a given standard deviation."""

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
    assert score_of(Weights(0.2, has_weights=False), 100).gap == math.inf


def test_weights_with_a_heavy_tail_know_no_gap():
    score = score_of(Weights(4.0), 5000)
    assert score.khat > 0.7
    assert score.gap == math.inf


def test_a_guide_that_is_far_off_costs_few_draws():
    far = Weights(1.0)
    assert quick_score(far, CONFIG) == Score()
    assert far.num_draws == CONFIG.check_draws


def test_good_is_little_gap_and_a_light_tail():
    assert is_good(quick_score(Weights(0.03), CONFIG), CONFIG)
    assert not is_good(quick_score(Weights(math.nan), CONFIG), CONFIG)
    assert not is_good(quick_score(Weights(math.inf), CONFIG), CONFIG)
    assert is_good(Score(-1.0, 0.2, 0.0005), CONFIG)
    assert not is_good(Score(-1.0, 0.2, 0.002), CONFIG)
    assert not is_good(Score(-1.0, 0.5, 0.0005), CONFIG)


GOOD, NEAR, FAR = Score(0.0, 0.2, 0.0005), Score(0.0, 0.6, 0.003), Score(0.0, 0.2, 0.5)


def test_a_fit_ends_where_nothing_is_left_to_win():
    for plan in (schedule(tail_steps=100), schedule(tail_steps=100).after_check(100, NEAR)):
        ended = plan.after_check(150, GOOD)
        assert (ended.is_over(150), ended.reason) == (True, NOTHING_TO_WIN)


def test_a_fit_with_little_left_to_win_goes_to_its_end():
    plan = schedule(tail_steps=100).after_check(300, NEAR)
    assert (plan.decay_start, plan.tail_start, plan.end) == (300, 480, 580)
    assert plan.reason == LITTLE_TO_WIN
    # it is on its way, and another check of the kind does not put it off
    assert plan.after_check(350, NEAR) == plan
    assert schedule().after_check(100, NEAR).tail_start == 100 + CONFIG.min_good_decay
    # one that is far off goes on
    assert schedule().after_check(100, FAR) == schedule().after_check(100, Score()) == schedule()


def test_the_expected_end():
    plan = schedule(tail_steps=100)
    # two windows, the shortest decay, the tails
    assert plan.expected_end(1) == plan.expected_end(600) == 600 + 400 + 100
    assert plan.expected_end(1000) == 1000 + 600 + 100
    assert plan.after_check(300, NEAR).expected_end(350) == 580
    assert schedule(50).expected_end(10) == 50


def test_nats_are_in_proportion_to_many_latents():
    few, many = CONFIG.for_latents(50), CONFIG.for_latents(1000)
    assert few == CONFIG
    assert many.min_improvement == 10 * CONFIG.min_improvement
    assert many.good_gap == 10 * CONFIG.good_gap
    assert many.selection_draws == CONFIG.selection_draws_of_many
    assert replace(CONFIG, selection_draws=10).for_latents(1000).selection_draws == 10
