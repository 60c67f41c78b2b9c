# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.inference.optimization import schedule
from pyro_artransform.inference.optimization.schedule import LIMIT, PLATEAU, Schedule


def noise(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).tolist()


def no_gap():
    return 0.0


def steps(plan, losses):
    """Shows losses to a schedule one by one, until it is over; returns how many that took."""
    for step in range(1, len(losses) + 1):
        if plan.is_over(step - 1):
            return step - 1
        plan.observe(losses[:step], no_gap)
    return len(losses)


def test_a_given_number_of_steps():
    plan = Schedule(50, max_constant=1000)
    assert [plan.is_over(step) for step in (0, 49, 50)] == [False, False, True]
    factors = [plan.factor(step) for step in range(50)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[0] < factors[15]
    assert factors[25] > factors[35] > factors[49]
    assert factors[49] < 0.02
    assert "50" in plan.reason
    # losses change nothing
    before = plan.state()
    steps(plan, [1.0] * 5000)
    assert plan.state() == before


def test_steps_for_the_tails():
    plan, plain = Schedule(100, 1000, has_tail_steps=True), Schedule(100, 1000)
    assert [step for step in range(100) if plan.is_for_tails(step)] == [
        *range(plan.tail_start, 100)
    ]
    assert not any(plain.is_for_tails(step) for step in range(100))
    assert plan.is_over(100)
    assert not plan.is_over(99)
    factors = [plan.factor(step) for step in range(100)]
    assert factors[plan.tail_start - 1] < 0.01
    assert 0 < max(factors[plan.tail_start :]) < 0.5
    by_itself = Schedule(None, 100_000, has_tail_steps=True)
    taken = steps(by_itself, noise(20_000))
    assert by_itself.decay_start < by_itself.tail_start < by_itself.end == taken


def test_one_step():
    plan = Schedule(1, max_constant=1000)
    assert plan.factor(0) > 0
    assert plan.is_over(1)


def test_ends_where_nothing_moves():
    plan = Schedule(None, max_constant=100_000)
    taken = steps(plan, noise(20_000))
    assert plan.reason == PLATEAU
    assert taken == plan.end < 20_000
    assert plan.factor(plan.decay_start) == 1.0
    assert plan.factor(plan.end - 1) < 0.01


def test_a_guide_far_from_the_evidence_gets_more_small_steps():
    asked = []

    def ends(gap):
        def look():
            asked.append(gap)
            return gap

        plan = Schedule(None, max_constant=100_000)
        losses = noise(20_000)
        for step in range(1, len(losses)):
            plan.observe(losses[:step], look)
        return plan.decay_start, plan.end

    (start, near), (same, far) = ends(0.01), ends(0.5)
    assert start == same
    assert far - same >= 5 * (near - start)
    # the look costs draws: one for each fit
    assert asked == [0.01, 0.5]


def test_goes_on_while_it_improves():
    falling = [x - 0.01 * step for step, x in enumerate(noise(5000))]
    plan = Schedule(None, max_constant=100_000)
    assert steps(plan, falling) == 5000
    assert plan.end is None
    assert plan.factor(4999) == 1.0


def test_limit():
    falling = [x - 0.01 * step for step, x in enumerate(noise(20_000))]
    plan = Schedule(None, max_constant=1000)
    steps(plan, falling)
    assert plan.reason == LIMIT
    assert 1000 <= plan.decay_start <= 1000 + schedule._WINDOW


def test_skipped_steps_are_left_out():
    holes = [math.nan if step % 7 == 0 else x for step, x in enumerate(noise(20_000))]
    plan = Schedule(None, max_constant=100_000)
    steps(plan, holes)
    assert plan.reason == PLATEAU


@pytest.mark.parametrize("losses", [[math.nan] * 5000, [math.nan, 1.0] + [math.nan] * 4998])
def test_nothing_but_skipped_steps(losses):
    plan = Schedule(None, max_constant=3000)
    steps(plan, losses)
    assert plan.end is not None


def test_state():
    losses = noise(20_000)
    whole, first = Schedule(None, max_constant=900), Schedule(None, max_constant=900)
    taken = steps(whole, losses)
    for step in range(1, taken // 2):
        first.observe(losses[:step], no_gap)
    second = Schedule(None, max_constant=900)
    second.restore(first.state())
    for step in range(taken // 2, taken + 1):
        second.observe(losses[:step], no_gap)
    assert second.state() == whole.state()
    assert [second.factor(k) for k in range(taken)] == [whole.factor(k) for k in range(taken)]


def test_tails_that_need_nothing_are_skipped_unless_steps_were_asked_for():
    by_itself = Schedule(None, 100, has_tail_steps=True)
    losses = []
    while by_itself.end is None:
        losses.append(0.0)
        by_itself.observe(losses, no_gap)
    assert by_itself.tail_start < by_itself.end
    by_itself.skip_tails()
    assert by_itself.is_over(by_itself.tail_start)
    asked = Schedule(100, 100, has_tail_steps=True)
    asked.skip_tails()
    assert asked.end == 100


def test_whole_epochs():
    for epoch in (7, 250):
        plan = Schedule(None, 100_000, epoch=epoch)
        taken = steps(plan, noise(40_000))
        assert taken == plan.end
        assert not plan.decay_start % epoch
        assert not plan.end % epoch
        assert plan.decay_start >= 6 * epoch


def test_differences_between_batches_are_no_noise():
    """A slow improvement, under batches that differ by much more."""
    batches = [100.0 * value for value in noise(50)]
    losses = [batches[step % 50] - 0.01 * step for step in range(6000)]
    plan = Schedule(None, 4000, epoch=50)
    steps(plan, losses)
    assert plan.reason == LIMIT
    blind = Schedule(None, 4000)
    steps(blind, losses)
    assert blind.reason == PLATEAU
