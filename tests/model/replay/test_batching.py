# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Replays in which what a loop repeats is done at once."""

import pytest
import torch
from torch.distributions import Normal

from pyro_artransform.model.replay import recording
from pyro_artransform.model.replay.capture import Captured
from tests.model.replay.test_capture import gradient

NUM = 40


def normal(value, loc, scale):
    return Normal(loc, scale, validate_args=False).log_prob(value)


def walk(x):
    """Each step depends on the one before, all of which are known."""
    data, scale, total = DATA.to(x.dtype), x[:, 0].exp(), 0.0
    for t in range(2, NUM):
        total = total + normal(x[:, t], x[:, t - 1], scale)
        total = total + normal(data[t], x[:, t], 0.5)
    return total


def recursion(x):
    """A variance that depends on the one before, which has to be found first."""
    data, variance, total = DATA.to(x.dtype), x[:, 0].exp(), 0.0
    for t in range(1, NUM):
        variance = 0.1 + 0.2 * x[:, t].square() + 0.7 * variance
        total = total + normal(data[t], 0.0, variance.sqrt())
    return total


def autoregression(x):
    """A path of white noise, an affine function of the state before it, and so is its gradient."""
    data, state, total = DATA.to(x.dtype), x[:, 0], 0.0
    for t in range(2, NUM):
        state = 0.5 - (state * x[:, 1].tanh() + 0.1 * (x[:, t] - state)) / 1.5
        total = total + normal(data[t], state, 0.5)
    return total


def trend(x):
    """A level that grows by a slope, which is a path, too."""
    states, slope = [x[:, 0]], x[:, 1]
    for t in range(2, NUM):
        slope = slope + 0.1 * x[:, t]
        states.append(states[-1] + slope)
    return normal(DATA.to(x.dtype), torch.stack([x[:, 1], *states], -1), 0.5).sum(-1)


def with_breaks(x):
    """A walk that returns to the mean at some steps: numbers, values, and none, as slopes."""
    state, total = x[:, 0], 0.0
    for t in range(1, NUM):
        state = (x[:, 1].tanh() * state if t % 9 == 4 else state) + x[:, t]
        state = 0.5 * state if t % 11 == 7 else state
        total = total + normal(0.3, state, 0.5)
    return total


def second_order(x):
    """Each state depends on two before it, which is no recurrence of single numbers."""
    data, states, total = DATA.to(x.dtype), [x[:, 0], x[:, 1]], 0.0
    for t in range(2, NUM):
        states.append(0.6 * states[-1] - 0.3 * states[-2] + x[:, t])
        total = total + normal(data[t], states[-1], 0.5)
    return total


def vectors(x):
    """Steps of vectors, which are reshaped, broadcast and summed."""
    total = 0.0
    for t in range(NUM - 3):
        pair = torch.stack([x[:, t], x[:, t + 1]], -1)
        weight = x[:, t, None].expand(-1, 2) * torch.zeros_like(pair).add(0.5)
        total = total + (pair.unsqueeze(1) * weight.view(-1, 1, 2)).sum((1, -1))
    return total


def beside_the_loop(x):
    """The gradient has three terms beside those of the steps, which become a fourth."""
    total = x.square().sum(-1) + x.sin().sum(-1) + x.exp().sum(-1)
    for t in range(NUM):
        total = total + x[:, t].cos()
    return total


def without_a_loop(x):
    return -x.square().sum(-1)


DATA = torch.linspace(-1, 1, NUM)


def num_nodes(replay):
    return len(replay.program.calls)


def both(monkeypatch, function, *inputs):
    """The replays with batches and without."""
    found = recording.record(function, inputs, 100.0)
    with monkeypatch.context() as patch:
        patch.setattr(recording, "batched", lambda program, _: program)
        plain = recording.record(function, inputs, 100.0)
    assert found is not None
    assert plain is not None
    return found, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("density", "share"),
    [
        (walk, 0.15),
        (recursion, 0.3),
        (autoregression, 0.3),
        (trend, 0.3),
        (with_breaks, 0.7),
        (second_order, 0.8),
        (vectors, 0.25),
        (beside_the_loop, 0.5),
        (without_a_loop, 1.0),
    ],
)
def test_results_are_those_of_the_loop(monkeypatch, density, share, dtype):
    torch.manual_seed(0)
    function = gradient(density)
    found, plain = both(monkeypatch, function, torch.randn(8, NUM, dtype=dtype))
    assert num_nodes(found) <= share * num_nodes(plain)
    x = torch.randn(8, NUM, dtype=dtype)
    tolerance = 100 * torch.finfo(dtype).eps
    for actual, expected in zip(found(x), function(x)):
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


def test_other_data_are_seen(monkeypatch):
    data = torch.randn(NUM)

    def function(x):
        return (torch.stack([(x[:, t] - data[t]).square().exp() for t in range(NUM)]).sum(0),)

    x = torch.randn(4, NUM)
    found, _ = both(monkeypatch, function, x)
    data.mul_(2.0)
    torch.testing.assert_close(found(x), function(x))


def test_random_numbers_keep_their_order(monkeypatch):
    def function(x):
        total = torch.zeros_like(x)
        for _ in range(NUM):
            total = total + x * torch.randn_like(x).exp()
        return (total,)

    x = torch.randn(3)
    found, plain = both(monkeypatch, function, x)
    results = []
    for replay in (found, plain, function):
        torch.manual_seed(1)
        results.append(replay(x)[0])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_what_writes_into_tensors_is_left_as_it_is(monkeypatch):
    def function(x):
        total = torch.zeros_like(x)
        for t in range(NUM):
            total.addcmul_(x + t, x)
        return (total,)

    x = torch.randn(3)
    found, plain = both(monkeypatch, function, x)
    assert num_nodes(found) == num_nodes(plain)
    torch.testing.assert_close(found(x), function(x))


def written_alone(x):
    """As gradients of this package do: nothing else reads what is written into."""
    order = torch.arange(len(x) - 1, -1, -1)
    total = torch.empty_like(x).detach().index_copy_(0, order, x.exp())
    return (total.index_add_(0, order, x.detach().exp().mul_(2.0)),)


def read_before(x):
    """A view whose values were used before the write that changes them, and a copy of them."""
    total = x.exp()
    once = total[1:].detach().sin()
    return (total.mul_(2.0), once, once.detach())


def read_after(x):
    """A view that shows what was written later."""
    total = x.exp()
    part = total[1:]
    total.mul_(2.0)
    return total.detach().sin(), part.detach().sin()


def returned(x):
    """The same where the view is a result."""
    total = x.exp()
    part = total[1:]
    return total.mul_(2.0).sin(), part


def of_another_dtype(x):
    """What is written keeps its dtype."""
    return (x.exp().mul_(x.double()).detach(),)


@pytest.mark.parametrize(
    ("function", "is_simplified"),
    [
        (written_alone, True),
        (read_before, True),
        (read_after, False),
        (returned, False),
        (of_another_dtype, False),
    ],
)
def test_writes_are_replaced_where_nothing_reads_the_memory_later(
    monkeypatch, function, is_simplified
):
    x = torch.randn(5, dtype=torch.float32)
    found, plain = both(monkeypatch, function, x)
    assert (num_nodes(found) < num_nodes(plain)) is is_simplified
    y = torch.randn(5, dtype=torch.float32)
    for actual, expected in zip(found(y), function(y), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.dtype == expected.dtype


def test_functions_of_expanded_data_are_evaluated_once(monkeypatch):
    """Counts in a likelihood are expanded to all draws, and so are functions of them."""
    counts = torch.arange(6.0)

    def function(x):
        value, rate = torch.broadcast_tensors(counts, x.exp()[:, None])
        log_prob = value.xlogy(rate) - rate - (value + 1).lgamma()
        return log_prob.sum(-1), (value > 2) * x[:, None]

    x = torch.randn(4)
    found, _ = both(monkeypatch, function, x)
    shapes = [
        call.outputs[0].shape
        for call in found.program.calls
        if call.name in ("add", "lgamma", "exp", "gt")
    ]
    assert sorted(shapes) == [(4,), (6,), (6,), (6,)]
    counts.add_(1.0)
    y = torch.randn(4)
    for actual, expected in zip(found(y), function(y), strict=True):
        torch.testing.assert_close(actual, expected)


def test_inputs_of_two_dtypes_are_not_stacked(monkeypatch):
    """A number of double precision without dimensions leaves the dtype of others as it is."""
    weights = torch.linspace(0, 1, NUM, dtype=torch.float64)

    def function(x):
        return (torch.stack([weights[t] * x[t] for t in range(NUM)]),)

    x = torch.randn(NUM, 3, dtype=torch.float32)
    found, _ = both(monkeypatch, function, x)
    (actual,), (expected,) = found(x), function(x)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


def test_a_sum_that_cancels_may_differ_as_much_as_its_inputs_allow():
    """Terms of 1e8 that sum to about one: the order of a loop and of a batch round differently."""

    def function(x):
        states = [x[:, 0]]
        for t in range(1, NUM):
            states.append(states[-1] + 1e8 * x[:, t] + x[:, 0])
        total = torch.stack(states, -1)
        return (total[:, -1] - 1e8 * x[:, 1:].sum(1),)

    torch.manual_seed(0)
    captured = Captured(function)
    for _ in range(40):
        captured(torch.randn(4, NUM))
    assert captured.can_replay
    assert captured.num_compared >= 3


MATRIX = torch.linspace(-1.0, 1.0, 200, dtype=torch.float64).reshape(50, 4)


@pytest.mark.parametrize(
    ("product", "is_one"),
    [
        (lambda b: MATRIX @ b, True),
        (lambda b: (MATRIX @ b[:, None])[:, 0], True),
        (lambda b: b @ MATRIX.T, True),
        (lambda b: (MATRIX * b) @ b, False),  # another matrix for each draw
    ],
)
def test_products_of_all_draws_with_one_matrix_are_one_product(product, is_one):
    """The value and the gradient of a linear predictor, as torch.vmap and autograd write them."""
    function = gradient(lambda b: torch.vmap(product)(b).square().sum(-1))
    vectors = torch.randn(7, 4)
    replay = recording.record(function, [vectors], 10.0)
    assert replay is not None
    assert ("bmm" not in {call.name for call in replay.program.calls}) == is_one
    for inputs in (vectors, 2 - vectors):
        for found, expected in zip(replay(inputs), function(inputs)):
            torch.testing.assert_close(found, expected)
