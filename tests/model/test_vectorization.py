# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Many draws at once, as one at a time."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.model import LogJoint
from pyro_artransform.model.draw_plate import GuideSampler
from pyro_artransform.model.vectorization import STRATEGIES, choose_strategy, evaluate_many


def everywhere(draws, size):
    return {"square": draws["x"] ** 2, "sum": draws["x"].sum(-1)}


def single_only(draws, size):
    if float(draws["x"][..., 0].sum()) > 1e6:
        raise ValueError("one draw only")
    return {"square": draws["x"] ** 2, "sum": draws["x"].sum()}


def writes_at_a_mask(draws, size):
    square = draws["x"] ** 2
    square[draws["x"] < 0] = 7.0
    rows = torch.ones(3, 3)
    rows[torch.tensor([True, False, False])] = 0.0
    square = rows @ square
    return {"square": torch.ones(2, 3) @ square}


@pytest.mark.parametrize(
    ("evaluate", "strategy", "reason"),
    [
        (everywhere, "plate", ""),
        (writes_at_a_mask, "loop", "RuntimeError: vmap"),
        (single_only, "loop", "A Python number is made of the values"),
    ],
)
def test_strategies(evaluate, strategy, reason):
    draws = {"x": torch.randn(5, 3)}
    found, why, *_ = choose_strategy(evaluate, draws)
    assert found == strategy
    assert why.startswith(reason)
    terms = evaluate_many(evaluate, draws, found)
    chunked = evaluate_many(evaluate, draws, found, chunk_size=2)
    for name, value in evaluate_many(evaluate, draws, "loop").items():
        assert torch.allclose(terms[name], value)
        assert torch.allclose(chunked[name], value)


@pytest.mark.parametrize("strategy", ["plate", "loop"])
def test_a_draw_that_fails_does_not_cost_the_others(strategy):
    def refuses(draws, size):
        if (draws["x"] > 1).any():
            raise ValueError("too large")
        return {"x": draws["x"].sum(-1)}

    x = torch.zeros(70, 3)
    x[40] = 2.0
    with pytest.raises(ValueError, match="too large"):
        evaluate_many(refuses, {"x": x}, strategy)
    at_failure = {"x": torch.tensor(torch.nan)}
    found = evaluate_many(refuses, {"x": x}, strategy, lambda _: at_failure)["x"]
    assert found.isnan().nonzero().flatten().tolist() == [40]


def test_random_numbers_are_the_same_for_all_draws():
    def noisy(draws, size):
        return {"x": draws["x"] + torch.randn(())}

    for strategy in STRATEGIES:
        found = evaluate_many(noisy, {"x": torch.zeros(4)}, strategy)["x"]
        assert (found == found[0]).all()
    assert choose_strategy(noisy, {"x": torch.zeros(4)})[0] == "plate"


def local_guide():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("z", dist.Normal(0.0, scale))


def sums_over_draws():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), 1.0))


@pytest.mark.parametrize(
    ("guide", "is_vectorized"),
    [(local_guide, True), (sums_over_draws, False)],
)
def test_guide_draws(guide, is_vectorized):
    draws = GuideSampler(guide, num_plates=2)
    assert draws.is_vectorized is is_vectorized
    values, log_q = draws(6)
    assert log_q.shape == (6,)
    assert {name: value.shape[1:] for name, value in values.items()} == draws.shapes
    for i in range(6):
        row = {name: value[i] for name, value in values.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(guide, row)).get_trace()
        assert torch.allclose(log_q[i], trace.log_prob_sum())


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
