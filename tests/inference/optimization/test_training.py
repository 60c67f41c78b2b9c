# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

import pytest
import torch

from pyro_artransform.inference.config import OptimizationConfig
from pyro_artransform.inference.optimization.optimizers import Adam
from pyro_artransform.inference.optimization.schedule import Schedule
from pyro_artransform.inference.optimization.training import FitError, Trainer


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


def test_trains():
    training = run(training_of(Bowl()))
    assert training.num_steps == 200
    assert (training.objective.x - 3).abs().max() < 0.3
    assert torch.equal(training.objective.unused, torch.ones(2))
    assert training.skipped.count == 0
    assert all(p.grad is None for p in training.parameters.values())


@pytest.mark.parametrize("fault", [math.nan, math.inf, "gradient"])
@pytest.mark.parametrize("at", [1, 7, 50])
def test_a_step_that_is_not_finite_is_skipped(fault, at):
    objective = Bowl({at: fault})
    training = training_of(objective)
    for step in range(1, 60):
        before = objective.x.detach().clone()
        loss = training.step()
        assert objective.x.isfinite().all()
        assert torch.equal(before, objective.x) == (step == at)
        if step == at:
            assert math.isfinite(loss) == (fault == "gradient")
            assert math.isnan(training.losses[-1])
    assert training.skipped.count == 1
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


def test_batches_of_larger_losses_do_not_run_away():
    """The second half of each epoch of 100 has much larger losses than the first."""
    faults = {step: 1e6 for step in range(1, 401) if (step - 1) % 100 >= 50}
    training = run(training_of(Bowl(faults), 400, epoch=100))
    assert training.step_size == 0.05


def test_large_losses_of_a_few_steps_change_no_step_size():
    training = run(training_of(Bowl(dict.fromkeys(range(120, 140), 1e6)), 200))
    assert training.step_size == 0.05


def test_stops_after_many_in_a_row():
    objective = Bowl(dict.fromkeys(range(20, 2000), math.nan))
    training = training_of(objective, 1000)
    with pytest.raises(FitError, match=r"in a row, because of y\. The parameters are finite"):
        run(training)
    assert training.skipped.count == OptimizationConfig().max_skips
    assert training.num_steps < 200
    assert objective.x.isfinite().all()
    assert not torch.equal(objective.x, torch.zeros(4))


def test_goes_on_while_some_steps_are_good():
    faults = {step: math.nan for step in range(1, 2000) if step % 10}
    training = run(training_of(Bowl(faults), 1000))
    assert training.num_steps == 1000
    assert training.skipped.count == 900
    assert sum(training.skipped.sites.values()) == OptimizationConfig().max_named


def test_nothing_to_train():
    class Constant(Bowl):
        def loss(self, num_particles):
            return torch.zeros(())

    with pytest.raises(FitError, match="nothing to train"):
        training_of(Constant()).step()


def test_trains_without_gradients_around_it():
    with torch.no_grad():
        training = run(training_of(Bowl()), 50)
    assert (training.objective.x > 0.5).all()


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


def test_candidates():
    training = training_of(Bowl(), 400)
    assert set(training.candidates()) == {"last"}
    run(training)
    found = training.candidates()
    assert {"last", "averaged", "best"} <= set(found)
    for values in found.values():
        assert (values[0] - 3).abs().max() < 0.5
    training.set_parameters(found["averaged"])
    assert torch.equal(training.objective.x, found["averaged"][0])


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


def test_average_has_less_noise():
    spread = {"last": [], "averaged": []}
    for seed in range(3):
        torch.manual_seed(seed)
        training = run(training_of(Bowl(), 10_000), 1000)  # the step size is still constant
        for name, values in spread.items():
            values.append((training.candidates()[name][0] - 3).square().mean().item())
    assert sum(spread["averaged"]) < 0.7 * sum(spread["last"])


def test_best_is_kept_when_it_gets_worse():
    """Once the loss explodes, the best block before is what is remembered."""
    objective = Bowl()
    training = run(training_of(objective, 2000, step_size=0.1), 200)
    with torch.no_grad():
        objective.x.fill_(50.0)
    run(training, 40)  # within a block, after which the fit goes back
    assert (training.candidates()["best"][0] - 3).abs().max() < 0.5
    assert (training.candidates()["last"][0] - 3).abs().min() > 5


@pytest.mark.parametrize("at", [0, 1, 49, 50, 120])
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
    assert torch.equal(
        torch.tensor(whole.losses).nan_to_num(7), torch.tensor(second.losses).nan_to_num(7)
    )
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


def test_gap_to_the_evidence():
    class Weighted(Bowl):
        has_weights = True

        def elbo_draws(self, count):
            # log weights of a Gaussian: their mean is half the variance below the evidence
            return -7.0 + 0.8 * torch.randn(count)

    torch.manual_seed(0)
    # the standard error is 0.8 / sqrt(5000), and that of the evidence about as large
    assert abs(training_of(Weighted())._gap() - 0.32) < 0.06
    assert training_of(Bowl())._gap() == 0.0


def test_trainings_of_a_trainer():
    """Each begins at the present parameters; nothing to train is an error before the first step."""

    class Nothing(Bowl):
        def parameters(self):
            return {}

    with pytest.raises(ValueError, match="nothing to train"):
        training_of(Nothing())
    trainer = trainer_of(Bowl(), 10)
    first, second = trainer.new(0.05), trainer.new(0.05, replace(trainer.schedule, end=None))
    assert first.schedule.end == 10
    assert second.schedule.end is None
    assert first.parameters["x"] is second.parameters["x"]


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
