# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_artransform.inference.optimization.training import Adam


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
