# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform.inference.config import OptimizationConfig
from pyro_artransform.inference.optimization.optimizers import Adam
from pyro_artransform.inference.optimization.schedule import Schedule, Score
from pyro_artransform.inference.optimization.training import (
    FitError,
    Trainer,
    begin,
    best_of,
    select_parameters,
)


class Bowl:
    """The loss ``|x - 3|^2 / 2`` with noise, and faults at given steps."""

    def __init__(self, faults=None):
        self.x = torch.zeros(4, requires_grad=True)
        self.unused = torch.ones(2, requires_grad=True)
        self.faults = faults or {}
        self.calls = 0

    def loss(self, num_particles):
        self.calls += 1
        fault = self.faults.get(self.calls)
        noise = 0.1 * torch.randn_like(self.x)
        loss = 0.5 * ((self.x - 3 + noise) ** 2).sum()
        if fault == "gradient":
            return loss + 0 * (self.x - self.x.detach()).abs().sqrt().sum()
        if fault == "steep":
            return loss * 1e6
        return loss if fault is None else loss * fault

    has_weights = False

    def tail_loss(self, num_particles):
        self.tail_calls = getattr(self, "tail_calls", 0) + 1
        return self.loss(num_particles)

    def parameters(self):
        return {"x": self.x, "unused": self.unused}

    def elbo_draws(self, count):
        return -0.5 * ((self.x - 3) ** 2).sum() + torch.zeros(count)

    def is_guide_alone(self):
        return True

    def nonfinite_sites(self):
        return [] if self.faults.get(self.calls) == "gradient" else ["y"]


def trainer_of(objective, num_steps=200, config=None, **options):
    """Trainings of so many steps, without steps for the tails."""
    config = config or OptimizationConfig()
    schedule = Schedule(config, max_constant=1000, min_decay=400, **options)
    return Trainer(objective, schedule.of_length(num_steps), 8)


def training_of(objective, num_steps=200, step_size=0.05, **options):
    return trainer_of(objective, num_steps, **options).new(step_size)


def run(training, count=None):
    while not training.is_over() and count != 0:
        training.step()
        count = None if count is None else count - 1
    return training


@pytest.mark.parametrize(("fault", "at"), [(math.nan, 1), (math.inf, 7), ("gradient", 50)])
def test_a_step_that_is_not_finite_is_skipped(fault, at):
    objective = Bowl({at: fault})
    training = training_of(objective)
    for step in range(1, 60):
        before = objective.x.detach().clone()
        loss = training.step()
        assert torch.equal(before, objective.x) == (step == at)
        if step == at:
            assert math.isfinite(loss) == (fault == "gradient")
            assert math.isnan(training.losses[-1])
    assert dict(training.skipped.sites) == {"the gradient" if fault == "gradient" else "y": 1}
    run(training)
    assert all(v.isfinite().all() for values in training.candidates().values() for v in values)
    assert (objective.x - 3).abs().max() < 0.3


def test_a_loss_that_runs_away_goes_back_with_a_smaller_step():
    objective = Bowl(dict.fromkeys(range(120, 151), 1e6))
    training = run(training_of(objective, 400), 100)
    best = objective.x.detach().clone()
    run(training, 50)
    assert training.step_size == 0.05 / 4
    assert torch.equal(objective.x, best)
    run(training, 1)
    assert (objective.x - best).abs().max() <= 0.05 / 4
    run(training)
    assert (objective.x - 3).abs().max() < 0.3


@pytest.mark.parametrize("epoch", [1, 100])
def test_large_losses_of_some_steps_or_batches_change_no_step_size(epoch):
    """Of a few steps, or of the second half of each epoch."""
    faults = {step: 1e6 for step in range(1, 401) if (step - 1) % 100 >= 50}
    if epoch == 1:
        faults = dict.fromkeys(range(120, 140), 1e6)
    assert run(training_of(Bowl(faults), 400, epoch=epoch)).step_size == 0.05


def test_stops_after_many_in_a_row():
    objective = Bowl(dict.fromkeys(range(20, 2000), math.nan))
    training = training_of(objective, 1000)
    with pytest.raises(FitError, match=r"in a row, because of y\. The parameters are finite"):
        run(training)
    assert training.skipped.count == OptimizationConfig().max_skips
    assert training.num_steps < 200
    assert objective.x.isfinite().all()
    assert not torch.equal(objective.x, torch.zeros(4))


def test_nothing_to_train():
    class Constant(Bowl):
        def loss(self, num_particles):
            return torch.zeros(())

    class Nothing(Bowl):
        def parameters(self):
            return {}

    with pytest.raises(FitError, match="nothing to train"):
        training_of(Constant()).step()
    with pytest.raises(ValueError, match="nothing to train"):
        training_of(Nothing())


def test_gradients_are_clipped_against_their_running_median():
    """A gradient a million times the others moves no more than a few of them together."""

    class Plain(Adam):
        def step(self, factor):
            self.seen = [p.grad.norm().item() for p in trained if p.grad is not None]
            super().step(factor)

    objective = Bowl({30: "steep"})
    trained = list(objective.parameters().values())
    training, norms = training_of(objective), []
    training.optimizer = optimizer = Plain(trained, 0.0, (0.9, 0.99))
    for _ in range(40):
        training.step()
        norms.append(max(optimizer.seen))
    usual = sorted(norms)[20]
    assert max(norms) == norms[29]
    assert 2 * usual < norms[29] < 10 * usual


def test_steps_for_the_tails():
    """The last steps are theirs, and the parameters before them stay a candidate."""
    objective = Bowl()
    training = training_of(objective, 100, tail_steps=100)
    start = training.schedule.tail_start
    assert 50 < start < 100
    run(training, start)
    before = objective.x.detach().clone()
    assert not hasattr(objective, "tail_calls")
    run(training)
    assert objective.tail_calls == 100 - start
    assert torch.equal(training.candidates()["last before the tails"][0], before)
    assert not torch.equal(objective.x, before)
    assert training.num_gradients > 100 * 8


@pytest.mark.parametrize("at", [0, 49, 120])
def test_state(at):
    faults = {30: math.nan, 130: math.nan}
    torch.manual_seed(1)
    whole = run(training_of(Bowl(faults)))
    torch.manual_seed(1)
    first = run(training_of(Bowl(faults)), at)
    second = training_of(Bowl(faults))
    second.objective.calls = first.objective.calls
    second.restore(first.state())
    run(second)
    assert torch.allclose(*map(torch.tensor, (whole.losses, second.losses)), 0, 0, equal_nan=True)
    assert whole.skipped.count == second.skipped.count == 2
    assert whole.skipped.sites == second.skipped.sites
    for name, values in whole.candidates().items():
        assert all(torch.equal(a, b) for a, b in zip(values, second.candidates()[name])), name


def test_state_of_other_parameters():
    class Other(Bowl):
        def parameters(self):
            return {"x": self.x}

    with pytest.raises(ValueError, match="checkpoint: expected the parameters"):
        training_of(Bowl()).restore(training_of(Other()).state())


class Transposed(Bowl):
    """A matrix whose gradient comes in the layout of its transpose, from a broadcast product."""

    target = torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 5.0]])

    def __init__(self):
        super().__init__()
        self.x = torch.zeros(2, 3, requires_grad=True)

    def loss(self, num_particles):
        columns = self.x.mT.unbind(-2)
        return 0.5 * sum(((c - t) ** 2).sum() for c, t in zip(columns, self.target.mT))


def test_gradients_are_in_the_layout_of_their_parameters():
    """PyTorch's fused Adam would move each element by the gradient of another."""
    objective = Transposed()
    training = training_of(objective, num_steps=2)
    training.step()
    # the first step of Adam goes by the sign of the gradient, which is 0 where the target is
    moved = objective.x.detach() != 0
    torch.testing.assert_close(moved, objective.target != 0)


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
