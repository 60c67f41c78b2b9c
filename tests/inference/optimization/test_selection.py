# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.inference.config import OptimizationConfig
from pyro_artransform.inference.optimization.selection import (
    Score,
    begin,
    best_of,
    select_parameters,
)
from pyro_artransform.inference.optimization.training import Trainer
from tests.inference.optimization.test_training import Bowl, run, trainer_of, training_of

# Parameters


@pytest.mark.parametrize("good", ["last", "averaged", "best"])
def test_keeps_the_best(good):
    training = run(training_of(Bowl(), 200))
    values = dict.fromkeys(("last", "averaged", "best"), torch.full((4,), 2.0))
    values[good] = torch.full((4,), 3.0)
    training._average = [values["averaged"], torch.ones(2)]
    training._best = [values["best"], torch.ones(2)]
    training.set_parameters([values["last"], torch.ones(2)])
    assert select_parameters(training) == good
    assert torch.equal(training.objective.x, values[good])


def test_what_is_not_finite_is_not_kept():
    assert select_parameters(training_of(Bowl())) == "last"
    training = run(training_of(Bowl(), 200))
    training.set_parameters([torch.full((4,), torch.nan), torch.ones(2)])
    assert select_parameters(training) != "last"
    assert training.objective.x.isfinite().all()


def test_common_noise():
    class Noisy(Bowl):
        def elbo_draws(self, count):
            return super().elbo_draws(count) + 100 * torch.randn(())

    for _ in range(5):
        training = run(training_of(Noisy(), 100))
        training._average = [torch.full((4,), 3.0), torch.ones(2)]
        assert select_parameters(training) == "averaged"


@pytest.mark.parametrize(
    ("expected", "scores"),
    [
        # as two candidates of a fit of a Gaussian process were: the nearer ELBO is noise
        ("b", {"a": (-1.0, 0.55), "b": (-1.0004, 0.33)}),
        # where weights have no variance, k-hat counts for more
        ("b", {"a": (-1.0, 0.9), "b": (-1.01, 0.6), "c": (-1.5, 0.1)}),
        ("b", {"a": (-1.0, 0.85), "b": (-1.015, 0.75)}),
        # k-hats that are both good, or differ by their noise
        ("a", {"a": (-1.0, 0.2), "b": (-1.0004, 0.1)}),
        ("a", {"a": (-1.0, 0.38), "b": (-1.01, 0.1)}),
        ("a", {"a": (-1.0, 0.45), "b": (-1.015, 0.35)}),
        # an ELBO that is clearly larger, whatever the k-hat
        ("a", {"a": (-1.0, 2.0), "b": (-1.1, 0.0)}),
    ],
)
def test_a_smaller_khat_wins_among_elbos_next_to_equal(expected, scores):
    scores = {name: Score(*score) for name, score in scores.items()}
    assert best_of(scores, OptimizationConfig()) == expected


# Step sizes

STEP_SIZES, NUM_STEPS = OptimizationConfig().step_sizes, OptimizationConfig().search_steps


def choose(objective, num_steps=1000, config=None):
    """The step size that is chosen, the steps that it took, and the step sizes that were tried."""
    sizes, trainer = list[float](), trainer_of(objective, num_steps, config)

    class Watched(Trainer):
        def new(self, step_size, schedule=None):
            sizes.append(step_size)
            return super().new(step_size, schedule)

    training, count = begin(Watched(**vars(trainer)))
    return training.step_size, count, list(dict.fromkeys(sizes))


def test_far_away_large_steps_win():
    objective = Bowl()
    best, count, sizes = choose(objective)
    assert best == max(STEP_SIZES)
    assert sorted(sizes) == sorted(STEP_SIZES)
    assert count == objective.calls == NUM_STEPS * len(STEP_SIZES)
    assert torch.equal(objective.x, torch.zeros(4))


def test_parameters_of_a_model_take_smaller_steps(monkeypatch):
    """The networks of an autoencoder run away at the largest."""
    monkeypatch.setattr(Bowl, "is_guide_alone", lambda self: False)
    best, _, sizes = choose(Bowl())
    assert best == STEP_SIZES[1]
    assert sorted(sizes) == sorted(STEP_SIZES[1:])
    config = OptimizationConfig(step_sizes=(1e-3,))
    assert choose(Bowl(), config=config)[0] == 1e-3


@pytest.mark.parametrize("best", [0, 2])
def test_a_fit_that_finds_its_end_goes_on_from_the_steps_of_the_search(best):
    """With the parameters, the state of Adam and the average that they left."""

    class Fit(Bowl):
        def elbo_draws(self, count):
            # large for one trial alone, whose steps have gone so far
            reached = float(self.x.detach().abs().max())
            return torch.full((8,), 5.0 if abs(reached - goal) < 1e-9 else 0.0)

    goal = math.nan

    def reached(step_size):
        torch.manual_seed(0)
        objective = Fit()
        training = trainer_of(objective, None).new(step_size)
        for _ in range(NUM_STEPS):
            training.step()
        return training, float(objective.x.detach().abs().max())

    expected, goal = reached(STEP_SIZES[best])
    torch.manual_seed(0)
    training, count = begin(trainer_of(Fit(), None))
    assert training.step_size == STEP_SIZES[best]
    assert training.num_steps == NUM_STEPS
    assert count == NUM_STEPS * (len(STEP_SIZES) - 1)
    for run_on in (expected, training):
        torch.manual_seed(1)
        run_on.step()
    for one, other in zip(training.candidates().values(), expected.candidates().values()):
        assert torch.equal(one[0], other[0])


def test_a_search_ends_where_the_schedule_does():
    config = OptimizationConfig(search_steps=170)
    training, count = begin(trainer_of(Weighed(1e-6), None, config))
    assert training.num_steps == 100
    assert training.is_over()
    assert count == 0


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
    """Log weights that are at some distance from the evidence, with or without a tail."""

    has_weights = True

    def __init__(self, gap, tail=0.0):
        super().__init__()
        self.gap, self.tail = gap, tail

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
    objective = Weighed(gap, tail)
    best, total, sizes = choose(objective)
    assert best == max(STEP_SIZES)
    assert sizes == list(STEP_SIZES[:count])
    assert total == objective.calls == NUM_STEPS * count


def test_a_step_size_that_fails_is_not_chosen():

    class Fragile(Bowl):
        def loss(self, num_particles):
            # whoever has gone further than the smallest steps can
            return super().loss(num_particles) + torch.where(self.x.max() > 0.05, torch.nan, 0.0)

    best, _, _ = choose(Fragile(), config=OptimizationConfig(max_skips=5))
    assert best == min(STEP_SIZES)
    # and where all fail the parameters stay
    objective = Bowl(dict.fromkeys(range(1, 10_000), torch.nan))
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
