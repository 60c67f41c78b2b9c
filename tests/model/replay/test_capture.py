# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Captured operations: what a replay gives is what a call gives, or the function is called."""

import contextlib
import itertools
import random
import resource
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_artransform import AutoIAF, AutoStructuredFlow, fit
from pyro_artransform.model.replay import capture
from pyro_artransform.model.replay.capture import Captured, CapturedLoss, ReplayError

_MANY = 36


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *inputs):
        self.count += 1
        return self.function(*inputs)


def gradient(function):
    def evaluate(x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            (found,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), found

    return evaluate


def check_replays(function, shape=(7, 3)):
    """Compares calls at fresh inputs with the function's own."""
    counted = Counted(function)
    captured = Captured(counted)
    for _ in range(_MANY):
        x = torch.randn(shape)
        for found, expected in zip(captured(x), function(x), strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)
    assert captured.can_replay
    assert counted.count < _MANY
    return captured


def test_parameters_are_seen_as_they_are():
    layer = nn.Linear(3, 2)

    def evaluate(x):
        return (layer(x).detach(),)

    captured = check_replays(evaluate)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    layer.bias.data = layer.bias.data + 1.0
    x = torch.randn(7, 3)
    assert torch.equal(captured(x)[0], evaluate(x)[0])


def test_random_numbers_are_those_of_calls():
    def draw() -> tuple[Tensor, ...]:
        return (torch.randn(4) + torch.rand(4),)

    torch.manual_seed(0)
    expected = [draw()[0] for _ in range(_MANY)]
    torch.manual_seed(0)
    captured = Captured(draw)
    assert all(torch.equal(captured()[0], each) for each in expected)
    assert captured.can_replay


COUNTER, GENERATOR = itertools.count(), torch.Generator()
#: by name, what a function multiplies its input by
CHANGING = {
    "a counter": lambda: next(COUNTER),
    "random": lambda: 2.0 if random.random() < 0.1 else 1.0,
    "NumPy": lambda: 2.0 if np.random.rand() < 0.1 else 1.0,
    "a generator": lambda: torch.randn((), generator=GENERATOR),
    "a clock": time.perf_counter,
}


@pytest.mark.parametrize("name", CHANGING)
def test_state_that_changes_in_python_is_refused(name):
    captured = Captured(lambda x: (x * CHANGING[name](),))
    for _ in range(_MANY):
        captured(torch.randn(5, 3))
    assert not captured.can_replay


@pytest.mark.parametrize(
    "read", [float, Tensor.tolist, lambda b: b.item(), lambda b: 2 if b > 1 else 1]
)
def test_a_number_that_python_read_has_to_stay(read):
    """As the temperature of a fit, which a callback changes."""
    temperature = torch.tensor(1.0)

    def evaluate(x):
        return (x * read(temperature),)

    captured = Captured(evaluate)
    for number in range(2 * _MANY):
        if number == _MANY + 3:
            temperature.fill_(3.0)
        x = torch.randn(3)
        assert torch.equal(captured(x)[0], evaluate(x)[0])


def test_a_failure_of_linear_algebra_is_the_functions_own():
    def evaluate(x):
        return (torch.linalg.cholesky(x @ x.mT + torch.eye(3)),)

    captured = check_replays(evaluate, shape=(7, 3, 3))
    with pytest.raises(torch.linalg.LinAlgError):
        captured(torch.full((7, 3, 3), torch.nan))
    x = torch.randn(7, 3, 3)
    assert torch.equal(captured(x)[0], evaluate(x)[0])


def test_each_shape_is_captured_by_itself():
    captured = Captured(lambda x: (x.sum(0) / len(x),))
    for _ in range(_MANY):
        for size in (2, 5):
            x = torch.randn(size, 3)
            assert torch.equal(captured(x)[0], x.sum(0) / size)
    assert captured.can_replay


def test_what_is_captured_is_freed():
    def evaluate(x):
        for _ in range(400):
            x = x.tanh()
        return (x,)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        check_replays(evaluate)
    # kilobytes on Linux: 20 times 400 operations were 60 MB while they were held
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_a_function_that_changes_is_found_out():
    calls = []

    def evaluate(x):
        calls.append(1)
        return (x * (1.0 if len(calls) < 5 else 2.0),)

    captured = Captured(evaluate)
    with pytest.raises(ReplayError):
        for _ in range(_MANY):
            captured(torch.ones(3))
    assert captured(torch.ones(3))[0][0] == 2.0
    assert not captured.can_replay


def test_what_was_replayed_last_can_be_confirmed():
    calls = []

    def evaluate(x):
        calls.append(1)
        return (x * (1.0 if len(calls) < 24 else 2.0),)

    captured = Captured(evaluate)
    while len(calls) < 22 or captured._last is None:
        captured(torch.ones(3))
    captured.confirm()
    captured(torch.ones(3))
    captured(torch.ones(3))
    with pytest.raises(ReplayError):
        captured.confirm()
    captured.confirm()


def test_a_failure_of_the_captured_call_is_not_replayed():
    """One row has no solution then, and is NaN; others have one later."""

    def evaluate(matrix):
        rows = []
        for row in matrix:
            try:
                rows.append(torch.linalg.solve(row, torch.ones(2)).sum())
            except RuntimeError:
                rows.append(torch.tensor(torch.nan))
        return (torch.stack(rows),)

    captured = Captured(evaluate)
    for number in range(2 * _MANY):
        matrix = torch.eye(2).expand(3, 2, 2) * (1 + torch.rand(3, 1, 1))
        if number == capture._PATIENCE - 1:
            matrix = matrix * torch.tensor([0.0, 1.0, 1.0])[:, None, None]
        found, expected = captured(matrix)[0], evaluate(matrix)[0]
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_parameter_that_comes_later_has_its_gradient(is_frozen):
    """It is used, or unfrozen, from some step on."""
    old, new = (nn.Parameter(torch.ones(size), requires_grad=size > 2) for size in (3, 2))
    calls = []

    def evaluate():
        calls.append(1)
        # in steps without a replay
        is_used = is_frozen or len(calls) > 4
        return old.square().sum() + (new.exp().sum() if is_used else 0.0)

    new.requires_grad_(not is_frozen)
    loss, found = CapturedLoss(evaluate), None
    for number in range(100):
        if number == 40:
            new.requires_grad_()
        with contextlib.suppress(ReplayError):
            found = torch.autograd.grad(loss(), [old, new][: 1 + (number > 90)])
    torch.testing.assert_close(found[0], 2 * old.detach())
    torch.testing.assert_close(found[1], new.detach().exp())


def test_a_loss_has_its_gradients():
    used, unused = (nn.Parameter(torch.randn(3)) for _ in range(2))
    loss = CapturedLoss(lambda: (used.exp() * torch.randn(5, 3)).sum())
    for seed in range(_MANY):
        torch.manual_seed(seed)
        found = torch.autograd.grad(2 * loss(), [used, unused], allow_unused=True)
        torch.manual_seed(seed)
        expected = 2 * torch.randn(5, 3).sum(0) * used.detach().exp()
        torch.testing.assert_close(found[0], expected)
        assert found[1] is None


def hierarchy():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.5, -1.0, 2.0, 0.1]))


def with_a_parameter():
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1), scale), obs=torch.tensor(0.3))


@pytest.mark.parametrize(
    ("model", "guide"), [(with_a_parameter, AutoIAF), (hierarchy, AutoStructuredFlow)]
)
def test_a_fit_is_the_same_with_and_without(model, guide, monkeypatch):
    found = []
    for _ in range(2):
        pyro.clear_param_store()
        found.append(fit(model, guide(model), seed=0, num_steps=30, progress=False))
        monkeypatch.setattr(capture, "record", lambda *_: None)
    one, other = found
    # sums of gradients in another order
    assert one.history == pytest.approx(other.history, rel=1e-4, abs=1e-4)
    assert one.elbo == pytest.approx(other.elbo, rel=1e-4)


def test_steps_that_were_wrong_are_taken_again():
    """A callback changes the model between two comparisons: the fit goes back to the last one."""
    shift, steps = [0.0], list[int]()

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1) + shift[0], 0.5), obs=torch.tensor(1.0))

    def callback(step, elbo):
        steps.append(step)
        shift[0] = 3.0 if len(steps) > 30 else 0.0

    result = fit(model, AutoIAF(model), seed=0, num_steps=200, callback=callback, progress=False)
    back = [step for before, step in itertools.pairwise(steps) if step <= before]
    assert len(back) == 1
    assert result.num_steps == len(result.history) == 200 < len(steps)
    # after the comparison before, the 16th call since the capture
    assert back[0] <= capture._PATIENCE + 18
