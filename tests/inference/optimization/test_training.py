# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform._base.time_limit import TimeLimit
from pyro_artransform.inference.optimization import training as trainings
from pyro_artransform.inference.optimization.objective import Objective
from pyro_artransform.inference.optimization.schedule import Schedule
from pyro_artransform.inference.optimization.training import Adam, Training, copies


class Bowl(Objective):
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

    def parameters(self):
        return {"x": self.x, "unused": self.unused}

    def elbo_draws(self, count):
        return -0.5 * ((self.x - 3) ** 2).sum() + torch.zeros(count)

    def is_guide_alone(self):
        return True

    def nonfinite_sites(self):
        return [] if self.faults.get(self.calls) == "gradient" else ["y"]


@pytest.fixture(autouse=True)
def step_size(monkeypatch):
    def set_to(size):
        monkeypatch.setattr(trainings, "_STEP_SIZE", size)

    set_to(0.05)
    return set_to


def training_of(objective, num_steps=200, **options):
    return Training(objective, Schedule(**options).of_length(num_steps), 8)


def run(training, count=None):
    while not training.is_over() and count != 0:
        training.step()
        count = None if count is None else count - 1
    return training


@pytest.mark.parametrize(
    ("size", "num_steps", "faults"),
    [(5.0, 2000, {}), (0.05, 400, dict.fromkeys(range(120, 151), 1e6))],
    ids=["a hundred times too large a step size", "large losses of some steps"],
)
def test_the_decay_makes_up_for_noise(step_size, size, num_steps, faults):
    step_size(size)
    training = run(training_of(Bowl(faults), num_steps))
    training.finish()
    assert (training.objective.x - 3).abs().max() < 0.3


def test_gradients_are_clipped_against_their_running_median():
    """A gradient a million times the others moves no more than a few of them together."""

    class Plain(Adam):
        def step(self):
            self.seen = [p.grad.norm().item() for p in trained if p.grad is not None]
            super().step()

    objective = Bowl({30: "steep"})
    trained = list(objective.parameters().values())
    training, norms = training_of(objective), []
    training.optimizer = optimizer = Plain(trained, 0.0)
    for _ in range(40):
        training.step()
        norms.append(max(optimizer.seen))
    usual = sorted(norms)[20]
    assert max(norms) == norms[29]
    assert 2 * usual < norms[29] < 10 * usual


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
    assert whole.num_skipped == second.num_skipped == 2
    assert whole.culprits == second.culprits
    assert torch.equal(whole.objective.x, second.objective.x)
    assert all(map(torch.equal, whole._average, second._average))


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


def test_the_last_steps_go_on_from_the_average():
    training = run(training_of(Bowl(), 200), 120)
    assert training.schedule.decay_start == 120
    before = copies(training.trained)
    assert all(map(torch.equal, before, training._average))
    run(training)
    last = training.objective.x.detach().clone()
    training.finish()
    assert torch.equal(training.objective.x, last)
    assert not torch.equal(last, before[0])


def test_a_fit_that_is_cut_short_ends_with_the_average():
    training = training_of(Bowl())
    run(training, 60)
    training.schedule = training.schedule.ending_at(60, "now")
    assert not torch.equal(training.objective.x, training._average[0])
    training.finish()
    assert torch.equal(training.objective.x, training._average[0])


@pytest.mark.parametrize("is_late", [False, True])
def test_a_comparison_with_the_start_ends_with_the_time(is_late):
    """Draws of a million rows take minutes, and few of them show nothing of a step that gained nothing."""
    objective, counts = Bowl(), list[int]()
    training = run(training_of(objective), 1)
    training._initial = [value + 0 for value in training._average]
    objective.elbo_draws = lambda count: counts.append(count) or torch.randn(count)
    few, most = training.schedule.num_few, training.schedule.num_compared
    with TimeLimit(1e-6 if is_late else 100.0) as limit:
        limit.enter_phase(1.0)
        training.finish()
    assert counts == ([few, few] if is_late else [few, few, most, most])


def test_parameters_of_a_model_take_smaller_steps(monkeypatch):
    """The networks of an autoencoder run away at the larger one."""
    sizes = list[float]()
    for is_alone in (True, False):
        monkeypatch.setattr(Bowl, "is_guide_alone", lambda self, answer=is_alone: answer)
        objective = Bowl()
        run(training_of(objective, 100), 20)
        before = objective.x.detach().clone()
        run(training_of(objective, 100), 1)
        sizes.append((objective.x - before).abs().max().item())
    assert sizes[1] < sizes[0] / 5


# The optimizer


def parameters():
    return [torch.ones(3, requires_grad=True), torch.zeros((), requires_grad=True)]


def step(optimizer, trained):
    for parameter in trained:
        parameter.grad = 2 * (parameter.detach() - 3)
    optimizer.step()


def own(trained, scales=None):
    return Adam(trained, 0.1, scales)


def test_own_adam_scales_steps():
    trained = parameters()
    unknown = torch.ones(2, requires_grad=True)
    scales = {trained[0]: torch.tensor([1.0, 1e4, 1e-4]), unknown: torch.ones(2)}
    step(own(trained, lambda: scales), trained)
    moved = (trained[0] - 1).detach()
    assert torch.allclose(moved / moved[0], torch.tensor([1.0, 1e4, 1e-4]))
    plain = parameters()
    step(own(plain), plain)
    assert torch.allclose(moved[0], plain[0][0] - 1)
    assert torch.equal(trained[1], plain[1])


def test_own_adam_is_pytorchs():
    ours, theirs = parameters(), parameters()
    optimizer, other = own(ours), torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.99))
    for _ in range(5):
        step(optimizer, ours)
        step(other, theirs)
    for one, another in zip(ours, theirs):
        torch.testing.assert_close(one, another)


def test_own_adam_of_complex_numbers():
    real = torch.ones(2, requires_grad=True)
    trained = torch.ones(1, dtype=torch.complex128, requires_grad=True)
    gradient = torch.tensor([2.0, -3.0])
    real.grad, trained.grad = gradient, torch.view_as_complex(gradient)[None]
    own([real]).step()
    own([trained]).step()
    moved = torch.view_as_real(trained.detach() - 1)[0]
    torch.testing.assert_close(moved, (real.detach() - 1).to(moved.dtype))
