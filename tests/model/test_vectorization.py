# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Many draws at once, as one at a time."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.model.vectorization import (
    STRATEGIES,
    GuideSampler,
    agree,
    choose_strategy,
    evaluate_many,
)


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
        (writes_at_a_mask, "copies", ""),
        (single_only, "loop", "RuntimeError: vmap"),
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


def test_copies_leave_the_rest_alone():
    """Integers stay what indices and loops can use, what was there before is not written to."""
    before = torch.zeros(3)

    def evaluate(draws, size):
        assert int(torch.tensor(2)) == 2
        before[0] = draws["x"]
        return {"x": draws["x"]}

    with pytest.raises(RuntimeError, match="vmap"):
        evaluate_many(evaluate, {"x": torch.ones(2)}, "copies")
    assert not before.any()
    assert torch.zeros(2).add_(1.0).tolist() == [1.0, 1.0]


def test_agree():
    x = torch.tensor([1.0, torch.nan])
    assert agree({"x": x}, {"x": x + 1e-10})
    assert not agree({"x": x}, {"x": x + 1e-5})
    assert agree({"x": x.float()}, {"x": x.float() + 1e-5})
    assert not agree({"x": x}, {"x": x[:1]})
    assert not agree({"x": x}, {"y": x})


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
