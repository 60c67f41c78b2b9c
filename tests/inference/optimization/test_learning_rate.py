# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.inference.config import OptimizationConfig
from pyro_artransform.inference.optimization.selection import choose_step_size
from pyro_artransform.inference.optimization.training import Trainer
from tests.inference.optimization.test_training import Bowl, trainer_of

STEP_SIZES, NUM_STEPS = OptimizationConfig().step_sizes, OptimizationConfig().search_steps


class Watched(Trainer):
    """Notes the step sizes that were tried."""

    def new(self, step_size, schedule=None):
        sizes.append(step_size)
        return super().new(step_size, schedule)


sizes = []


def choose(objective, num_steps=1000, config=None):
    sizes.clear()
    trainer = trainer_of(objective, num_steps, config)
    return *choose_step_size(Watched(**vars(trainer))), list(sizes)


def test_far_away_large_steps_win():
    objective = Bowl()
    best, count, sizes = choose(objective)
    assert best == max(STEP_SIZES)
    assert sorted(sizes) == sorted(STEP_SIZES)
    assert count == objective.calls == NUM_STEPS * len(STEP_SIZES)
    assert torch.equal(objective.x, torch.zeros(4))


def test_the_search_is_no_longer_than_the_fit():
    objective = Bowl()
    _, count, sizes = choose(objective, 5)
    assert count == objective.calls == 5 * len(sizes)


def test_where_large_steps_harm_small_ones_win():
    class Narrow(Bowl):
        def loss(self, num_particles):
            return 1e6 * super().loss(num_particles)

        def elbo_draws(self, count):
            return 1e6 * super().elbo_draws(count)

    objective = Narrow()
    with torch.no_grad():
        objective.x.fill_(3.0)
    best, _, _ = choose(objective)
    assert best == min(STEP_SIZES)
    assert torch.equal(objective.x, torch.full((4,), 3.0))


class Weighed(Bowl):
    """Log weights that are so far from the evidence, with or without a tail."""

    has_weights = True
    gap, tail = 0.0, 0.0

    def elbo_draws(self, count):
        noise = torch.randn(count)
        noise = (2 * self.gap) ** 0.5 * (noise - noise.mean()) / noise.std()
        noise = noise + self.tail * torch.rand(count).log().neg()
        return super().elbo_draws(count).detach() + noise


@pytest.mark.parametrize(
    ("gap", "tail", "count"),
    [(0.5, 0.0, 1), (1.6, 0.0, len(STEP_SIZES)), (0.1, 1.0, len(STEP_SIZES))],
)
def test_near_the_evidence_no_smaller_step_could_be_clearly_better(gap, tail, count):
    objective = Weighed()
    objective.gap, objective.tail = gap, tail
    best, total, sizes = choose(objective)
    assert best == max(STEP_SIZES)
    assert sizes == list(STEP_SIZES[:count])
    assert total == objective.calls == NUM_STEPS * count


def test_common_noise():
    class Seen(Bowl):
        def loss(self, num_particles):
            self.draws.append(torch.rand(()).item())
            return super().loss(num_particles)

    objective = Seen()
    objective.draws = []
    choose(objective)
    assert len(set(objective.draws)) == NUM_STEPS


def test_a_step_size_that_fails_is_not_chosen():

    class Fragile(Bowl):
        def loss(self, num_particles):
            # whoever has gone further than the smallest steps can
            return super().loss(num_particles) + torch.where(self.x.max() > 0.05, torch.nan, 0.0)

    best, _, _ = choose(Fragile(), config=OptimizationConfig(max_skips=5))
    assert best == min(STEP_SIZES)


def test_all_fail():
    faults = dict.fromkeys(range(1, 10_000), float("nan"))
    objective = Bowl(faults)
    best, _, _ = choose(objective)
    assert best in STEP_SIZES
    assert torch.equal(objective.x, torch.zeros(4))


def test_a_little_better_is_no_reason_for_a_small_step_size():
    """The search is short, and the fit is long."""

    class Shaky(Bowl):
        def elbo_draws(self, count):
            # the smaller the steps, the better by a little
            return torch.full((8,), -0.1 * float(self.x.detach().abs().max()))

    best, _, _ = choose(Shaky())
    assert best == max(STEP_SIZES)
