# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Many draws at once, as one at a time."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.model import LogJoint


def latent(size=3):
    return pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def observe(mean):
    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.3))


def asserted(z):
    assert (z < 100).all()
    return z.exp().sum()


def written(z):
    """Into a tensor of its own, where a branch says so."""
    filled = torch.zeros(3)
    for i in range(3):
        filled[i] = z[i] if z[i] > -1.5 else 0.0
    return filled.prod()


BRANCHES = {
    "assertion": asserted,
    "branch": lambda z: z[0] if z[1] > 0 else z[2] ** 2,
    "branch on a number": lambda z: z[0] if z.relu().sum() else z[2] ** 2,
    "whole number": lambda z: torch.arange(5.0)[int(z[0].clamp(-2, 2)) + 2] * z[1],
    "count": lambda z: z[0] * (z > 0).sum().item(),
    "greatest": lambda z: max(z[0], z[1], z[2]),
    "written": written,
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_on_latents_are_looped_over(name):
    log_joint = LogJoint(lambda: observe(BRANCHES[name](latent())))
    assert log_joint.strategy == "loop"
    assert "At test_vectorization.py, line" in log_joint.reason


def test_numbers_in_lists_keep_their_gradient():
    """Which ``torch.tensor`` cuts, where one draw is evaluated by itself."""

    def model():
        z = latent(2)
        weights = torch.tensor([[z[0], 0.1], [2, z[1]]])
        observe((weights @ torch.tensor([1.0, 2.0])).sum())

    log_joint = LogJoint(model)
    assert log_joint.strategy == "vmap"
    z = torch.randn(4, 2, requires_grad=True)
    found = log_joint(z)
    mean = z[:, 0] + 0.2 + 2.0 + 2 * z[:, 1]
    expected = dist.Normal(mean, 1.0).log_prob(torch.tensor(0.3))
    expected = expected + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(found, expected)
    (slopes,) = torch.autograd.grad(found.sum(), z)
    torch.testing.assert_close(slopes, torch.autograd.grad(expected.sum(), z)[0])


def test_kalman_filter_of_pyro():
    """It reads ``data`` of its tensors."""

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        eye, zero = torch.eye(2), torch.zeros(2)
        noise = dist.MultivariateNormal(zero, scale_tril=scale * eye)
        emitted = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
        start = dist.MultivariateNormal(zero, eye)
        hmm = dist.GaussianHMM(start, eye, noise, torch.ones(2, 1), emitted, duration=6)
        pyro.sample("y", hmm, obs=torch.linspace(0.0, 1.0, 6)[:, None])

    log_joint = LogJoint(model)
    assert log_joint.strategy == "vmap"
    z = torch.randn(5, 1)
    torch.testing.assert_close(log_joint(z), log_joint.by_strategy("loop")(z))


def test_a_branch_inside_of_a_users_own_vmap_is_not_taken_for_one_of_draws():
    def model():
        z = latent()
        observe(torch.vmap(lambda row: row if row > 0 else -row)(torch.tensor([1.0, -1.0])) @ z[:2])

    with pytest.raises(RuntimeError, match="data-dependent"):
        LogJoint(model)


def test_draws_in_a_plate_whose_distribution_writes_into_a_tensor():
    """vmap takes no such write, which is no branch: single runs are compared, and the plate stays."""

    def model(rating):
        cuts = pyro.sample("cuts", dist.Normal(torch.arange(3.0), 0.1).to_event(1))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4):
            rated = dist.OrderedLogistic(slope * torch.linspace(-1.0, 1.0, 4), cuts)
            pyro.sample("rating", rated, obs=rating)

    log_joint = LogJoint(model, (torch.arange(4),))
    assert log_joint.strategy == "plate"
    z = log_joint.start + 0.1 * torch.randn(50, 4)
    assert log_joint.checked(z, torch.zeros(50))[1].strategy == "plate"
