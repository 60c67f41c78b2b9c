# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Branches on values: many draws at once, path by path, as one at a time."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.model import LogJoint
from pyro_artransform.model.paths import ManyPathsError, evaluate_by_path
from pyro_artransform.model.vectorization import evaluate_many


def latent(size=3):
    return pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def observe(mean):
    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.3))


def asserted():
    z = latent()
    assert (z < 100).all()
    observe(z.exp().sum())


def branch():
    z = latent()
    observe(z[0] if z[1] > 0 else z[2] ** 2)


def branch_on_a_number():
    z = latent()
    observe(z[0] if z.relu().sum() else z[2] ** 2)


def whole_number():
    z = latent()
    observe(torch.arange(5.0)[int(z[0].clamp(-2, 2)) + 2] * z[1])


def count():
    z = latent()
    observe(z[0] * (z > 0).sum().item())


def greatest():
    z = latent()
    observe(max(z[0], z[1], z[2]))


def ladder():
    """A step of any size, halved until the error is small."""
    z = latent()
    value, t, step = z[0], 0.0, 0.5
    while t < 1.0:
        slope = -z[1].exp() * value
        error = step**2 * (slope * z[1].exp()).abs()
        if error > 0.3:
            step /= 2
        else:
            value, t = value + step * slope, t + step
    observe(value)


def written():
    """Into a tensor of its own, where a branch says so."""
    z, filled = latent(), torch.zeros(3)
    for i in range(3):
        filled[i] = z[i] if z[i] > -1.5 else 0.0
    observe(filled.prod())


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        *((m, "vmap") for m in (asserted, branch, branch_on_a_number, whole_number, count)),
        *((greatest, "vmap"), (ladder, "vmap"), (written, "copies")),
    ],
)
def test_paths_as_single_draws(model, strategy):
    log_joint = LogJoint(model)
    assert log_joint.strategy == strategy
    z = torch.randn(50, 3, requires_grad=True)
    found = log_joint(z)
    (slopes,) = torch.autograd.grad(found.sum(), z)
    log_joint.strategy = "loop"
    expected = log_joint(z)
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes, wanted, rtol=1e-12, atol=1e-12)


def test_few_runs_for_few_paths():
    runs = []

    def evaluate(draws, size):
        runs.append(size)
        return {"x": draws["x"] if draws["x"] > 0 else -2 * draws["x"]}

    x = torch.linspace(-1.0, 1.0, 100)
    torch.testing.assert_close(
        evaluate_by_path(evaluate, {"x": x})["x"], torch.where(x > 0, x, -2 * x)
    )
    assert len(runs) == 3  # the first one ends at the branch


def test_as_many_paths_as_draws_are_a_loop():
    runs = []

    def evaluate(draws, size):
        runs.append(size)
        return {"x": draws["x"] * int(1000 * draws["x"])}

    x = torch.linspace(0.0, 1.0, 40)
    with pytest.raises(ManyPathsError, match="40 draws into more than 9 paths"):
        evaluate_by_path(evaluate, {"x": x})
    assert len(runs) == 10
    runs.clear()
    found = evaluate_many(evaluate, {"x": x}, "vmap")["x"]
    torch.testing.assert_close(found, x * (1000 * x).trunc())
    assert len(runs) == 50


def test_random_numbers_are_the_same_for_all_paths():
    def evaluate(draws, size):
        noise = torch.randn(())
        return {"noise": noise * (1 if draws["x"] > 0 else 2), "after": torch.rand(())}

    found = evaluate_by_path(evaluate, {"x": torch.tensor([1.0, -1.0, 2.0, -3.0])})
    assert len(found["after"].unique()) == 1
    torch.testing.assert_close(found["noise"][1::2], 2 * found["noise"][::2])


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


def test_no_whole_number_of_a_draw():
    """As for single draws, that one has no density."""

    def model():
        z = latent(1)
        observe(z[0] * int((z[0] + 2).sqrt()))

    log_joint = LogJoint(model)
    log_joint.strategy = "vmap"
    found = log_joint(torch.tensor([[4.0], [-3.0], [2.0]]))
    assert found.isnan().tolist() == [False, True, False]


def test_a_model_does_not_catch_its_branches():
    def model():
        z = latent(1)
        try:
            scale = 1.0 if z > 0 else 2.0
        except Exception:
            scale = 5.0
        pyro.sample("y", dist.Normal(z[0], scale), obs=torch.tensor(0.3))

    log_joint, z = LogJoint(model), torch.tensor([[1.0], [-1.0]])
    expected = dist.Normal(z[:, 0], torch.tensor([1.0, 2.0])).log_prob(torch.tensor(0.3))
    expected = expected + dist.Normal(0.0, 1.0).log_prob(z[:, 0])
    for log_joint.strategy in ("vmap", "loop"):
        torch.testing.assert_close(log_joint(z), expected)


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
    found = log_joint(z)
    log_joint.strategy = "loop"
    torch.testing.assert_close(found, log_joint(z))


def test_a_branch_inside_of_a_users_own_vmap_is_not_taken_for_one_of_draws():
    def model():
        z = latent()
        observe(torch.vmap(lambda row: row if row > 0 else -row)(torch.tensor([1.0, -1.0])) @ z[:2])

    with pytest.raises(RuntimeError, match="data-dependent"):
        LogJoint(model)
