# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

from functools import partial

import pyro.optim
import pytest
import torch

from pyro_artransform.inference.optimization.optimizers import Adam, users_optimizer


def parameters():
    return [torch.ones(3, requires_grad=True), torch.zeros((), requires_grad=True)]


def step(optimizer, trained):
    for parameter in trained:
        parameter.grad = 2 * (parameter.detach() - 3)
    optimizer.step()


def exponential():
    return pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    )


def own(trained, scales=None):
    return Adam(trained, 0.1, scales)


def wrapped(optim):
    return lambda trained: users_optimizer(optim(), trained)


#: functions of a list of parameters that return an optimizer
OPTIMIZERS = {
    "ours": own,
    "ClippedAdam": wrapped(lambda: pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9})),
    "SGD with momentum": wrapped(lambda: pyro.optim.SGD({"lr": 0.1, "momentum": 0.9})),
    "clipped": wrapped(lambda: pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})),
    "a scheduler": wrapped(exponential),
    "AdamW of PyTorch": wrapped(lambda: partial(torch.optim.AdamW, lr=0.1)),
    "a class": wrapped(lambda: torch.optim.RMSprop),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("count", [0, 5])
def test_goes_on_as_if_nothing_had_been(name, count):
    make, whole, halves = OPTIMIZERS[name], parameters(), parameters()
    optimizer, first = make(whole), make(halves)
    for _ in range(count):
        step(optimizer, whole)
        step(first, halves)
    second = make(halves)
    before = [parameter.detach().clone() for parameter in halves]
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, halves))
    for _ in range(5):
        step(optimizer, whole)
        step(second, halves)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves))
    assert all(not torch.equal(a, b) for a, b in zip(whole, parameters()))


def test_own_step_size_has_a_factor():
    moved = []
    for factor in (1.0, 0.5):
        trained = parameters()
        optimizer = own(trained)
        optimizer.factor = factor
        step(optimizer, trained)
        moved.append(trained[0].detach() - 1)
    torch.testing.assert_close(moved[0], 2 * moved[1])


def test_scheduler_goes_on_after_each_step():
    trained = parameters()
    optimizer = users_optimizer(exponential(), trained)
    sizes = []
    for _ in range(3):
        before = trained[0].detach().clone()
        step(optimizer, trained)
        sizes.append((trained[0] - before).abs().max().item())
    assert sizes[1] < 0.6 * sizes[0]
    assert sizes[2] < 0.6 * sizes[1]


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


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ("adam", r"optim: expected an optimizer of pyro\.optim, or"),
        (lambda parameters: None, r"optim: expected an optimizer of pyro\.optim, or"),
        (
            pyro.optim.ReduceLROnPlateau({"optimizer": torch.optim.Adam, "optim_args": {}}),
            "needs no loss, got ReduceLROnPlateau",
        ),
        (torch.optim.LBFGS, "needs no closure, got LBFGS"),
    ],
)
def test_what_is_not_an_optimizer(optim, words):
    with pytest.raises(TypeError, match=words):
        users_optimizer(optim, [torch.nn.Parameter(torch.zeros(2))])


def test_an_optimizer_of_something_else():
    others = parameters()
    with pytest.raises(ValueError, match=r"optim: expected .* for the parameters that it is given"):
        users_optimizer(lambda trained: torch.optim.Adam(others), parameters())
    # a part of them, and what is trained elsewhere, are the user's choice
    trained = parameters()
    users_optimizer(lambda found: torch.optim.Adam([found[0], *others]), trained)


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
