# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.inference.config import OptimizationConfig
from pyro_artransform.inference.optimization.selection import Score, best_of, select_parameters
from tests.inference.optimization.test_training import Bowl, run, training_of


@pytest.mark.parametrize("good", ["last", "averaged", "best"])
def test_keeps_the_best(good):
    training = run(training_of(Bowl(), 200))
    for name, value in (("_average", "averaged"), ("_best", "best")):
        target = 3.0 if value == good else 2.0
        setattr(training, name, [torch.full((4,), target), torch.ones(2)])
    training.set_parameters([torch.full((4,), 3.0 if good == "last" else 2.0), torch.ones(2)])
    assert select_parameters(training) == good
    assert torch.equal(training.objective.x, torch.full((4,), 3.0))


def test_what_is_not_finite_is_not_kept():
    training = run(training_of(Bowl(), 200))
    training.set_parameters([torch.full((4,), torch.nan), torch.ones(2)])
    assert select_parameters(training) != "last"
    assert training.objective.x.isfinite().all()


def test_common_noise():
    class Noisy(Bowl):
        def elbo_draws(self, count):
            return super().elbo_draws(count) + 100 * torch.randn(())

    for seed in range(5):
        torch.manual_seed(seed)
        training = run(training_of(Noisy(), 100))
        training._average = [torch.full((4,), 3.0), torch.ones(2)]
        assert select_parameters(training) == "averaged"


@pytest.mark.parametrize("has_weights", [True, False])
def test_of_two_as_good_the_one_with_the_lighter_tail(has_weights):
    class Tailed(Bowl):
        def elbo_draws(self, count):
            draws = 0.05 * torch.randn(count)
            if self.x[0] > 2.5:  # a little better on the average, with a few heavy weights
                draws += 0.05 * torch.rand(count) ** -0.5
                draws -= draws.mean() - 0.005
            return draws

    Tailed.has_weights = has_weights
    training = run(training_of(Tailed(), 100))
    training._average = [torch.zeros(4), torch.ones(2)]
    training._best = [torch.full((4,), 3.0), torch.ones(2)]
    training.set_parameters([torch.full((4,), 3.0), torch.ones(2)])
    assert select_parameters(training) == ("averaged" if has_weights else "last")


def test_without_a_step():
    assert select_parameters(training_of(Bowl())) == "last"


def best(**scores):
    scores = {name: Score(*score) for name, score in scores.items()}
    return best_of(scores, OptimizationConfig())


def test_a_smaller_khat_wins_among_elbos_next_to_equal():
    # as two candidates of a fit of a Gaussian process were: the nearer ELBO is noise
    assert best(a=(-1.0, 0.55), b=(-1.0004, 0.33)) == "b"
    # where weights have no variance, k-hat counts for more
    assert best(a=(-1.0, 0.9), b=(-1.01, 0.6), c=(-1.5, 0.1)) == "b"
    assert best(a=(-1.0, 0.85), b=(-1.015, 0.75)) == "b"


def test_the_larger_elbo_wins_otherwise():
    # k-hats that are both good, or differ by their noise
    assert best(a=(-1.0, 0.2), b=(-1.0004, 0.1)) == "a"
    assert best(a=(-1.0, 0.38), b=(-1.01, 0.1)) == "a"
    assert best(a=(-1.0, 0.45), b=(-1.015, 0.35)) == "a"
    # an ELBO that is clearly larger, whatever the k-hat
    assert best(a=(-1.0, 2.0), b=(-1.1, 0.0)) == "a"
