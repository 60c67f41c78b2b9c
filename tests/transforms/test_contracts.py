# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Every family and every conditioner, in both directions."""

import copy

import pyro.distributions as dist
import pytest
import torch

from pyro_artransform.testing import check_transform, redraw
from pyro_artransform.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
    chain,
)
from tests.transforms.metas import CONDITIONERS, FAMILIES, make_meta

# Each family and each conditioner at D = 5, and some of both at other D. Monotone networks have a bisection
# for an inverse, which takes long.
PAIRS = [(family, "mlp", 5) for family in FAMILIES]
PAIRS += [("affine", conditioner, 5) for conditioner in CONDITIONERS if conditioner != "mlp"]
PAIRS += [("spline", "reverse", 2), ("hinged", "graph", 5), ("monotone", "masked input", 2)]
PAIRS += [("affine", "masked input", 1), ("spline", "mlp", 1), ("affine", "mlp", 64)]


@pytest.mark.parametrize(("family", "conditioner", "dim"), PAIRS)
def test_both_directions(family, conditioner, dim):
    # larger weights in 64 dimensions amplify float64's round-off beyond 1e-9: see the round trips
    gain = 2.0 if dim < 64 else 1.0
    make = lambda: AutoregressiveTransform(make_meta(family, conditioner, dim))  # noqa: E731
    check_transform(make, dim, gain=gain)
    if dim < 64:  # what the check above asks of an inverse takes long enough there
        check_transform(lambda: make().inv, dim, gain=gain)


@pytest.mark.parametrize(
    ("family", "conditioner", "context_shape"),
    [
        ("affine", "mlp", (1, 2)),
        ("affine", "graph", (2,)),
        ("spline", "masked input", (3, 2)),
        ("affine", "foreign", (3, 2)),
        ("spline", "mlp", (3, 2)),
    ],
)
def test_context(family, conditioner, context_shape):
    transform = ConditionalAutoregressiveTransform(make_meta(family, conditioner, 4, 2))
    redraw(transform, 2.0)
    context = torch.randn(context_shape).requires_grad_()
    x = torch.randn(3, 4)
    y, ladj = transform.condition(context).call_and_ladj(x)
    back, inverse_ladj = transform.condition(context).inv.call_and_ladj(y.detach())
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(inverse_ladj, -ladj, atol=1e-9)
    assert not torch.allclose(transform.condition(context + 1)(x), y)
    # T(T.inv(y)) does not depend on the context
    again = transform.condition(context).call_and_ladj(back)[0]
    (gradient,) = torch.autograd.grad((again * torch.randn(4)).sum(), context)
    assert gradient.abs().max() < 1e-9
    jacobian = torch.autograd.functional.jacobian(
        lambda v: transform.condition(context.detach().expand(3, 2)[1]).call_and_ladj(v)[0], x[1]
    )
    assert torch.allclose(torch.linalg.slogdet(jacobian)[1], ladj[1])


@pytest.mark.parametrize(
    ("conditioner", "context_shape"),
    [("mlp", (1, 2)), ("mlp", (1, 1, 2)), ("masked input", (1, 3, 2)), ("foreign", (5, 1, 2))],
)
def test_shapes_with_a_context(conditioner, context_shape):
    """A context of size 1 in a dimension that x lacks is for any x, as Pyro's suite asks."""
    conditional = redraw(ConditionalAutoregressiveTransform(make_meta("affine", conditioner, 4, 2)))
    t = conditional.condition(torch.randn(context_shape))
    for shape in ((4,), (3, 4), (1, 4), (5, 3, 4)):
        y, ladj = t.call_and_ladj(torch.randn(shape))
        assert t.forward_shape(torch.Size(shape)) == y.shape
        assert ladj.shape == y.shape[:-1]
        assert t.inv(torch.randn(shape)).shape == t.inverse_shape(torch.Size(shape)) == y.shape
        assert t.call_and_score(torch.randn(shape), torch.randn(shape))[2].shape == y.shape
    if context_shape[:-1].count(1) == len(context_shape) - 1:
        assert t.forward_shape(torch.Size([4])) == (4,)


@pytest.mark.parametrize(
    ("family", "dim"), [*((family, 5) for family in FAMILIES), ("affine", 2), ("affine", 64)]
)
def test_zero_pattern_of_the_jacobian_is_the_graph(family, dim):
    meta = make_meta(family, "graph", dim)
    transform = redraw(AutoregressiveTransform(meta), 3.0)
    depends = torch.zeros(dim, dim, dtype=torch.bool)
    for _ in range(3):
        depends |= torch.autograd.functional.jacobian(transform, torch.randn(dim)) != 0
    assert torch.equal(depends, meta.conditioner.adjacency | torch.eye(dim, dtype=torch.bool))


def worst_round_trip(transform, x):
    """Of T.inv(T(x)) - x relative to 1 + |x|, and of the residual T(T.inv(y)) - y relative to the largest of
    1 + |y| + |T.inv(y)| in a row: sums over the row carry its round-off to every coordinate."""
    with torch.no_grad():
        y = transform.call_and_ladj(x)[0]
        back = transform.inv.call_and_ladj(y)[0]
        again = transform.call_and_ladj(back)[0]
        exact = copy.deepcopy(transform).double().call_and_ladj(back.double())[0]
    scale = (1 + y.abs() + back.abs()).amax(-1)
    residual = ((again - y).abs().amax(-1) / scale).max().item()
    round_off = ((again - exact).abs().amax(-1) / scale).max().item()
    return ((back - x).abs() / (1 + x.abs())).max().item(), residual, round_off


def last_layer_redrawn(transform, gain):
    """A last layer at PyTorch's default scale, then all weights times ``gain``."""
    for module in transform.modules():
        if isinstance(module, torch.nn.Linear):
            if not module.weight.any():
                module.reset_parameters()
            module.weight.data.mul_(gain)
    return transform


@pytest.mark.parametrize(
    ("family", "conditioners", "dim", "gain"),
    [
        *((family, ["mlp"], 8, 4) for family in FAMILIES),
        *((family, ["mlp", "reverse", "mlp"], 8, 2) for family in FAMILIES),
        *((family, ["mlp"], 64, gain) for family in ("affine", "spline") for gain in (1, 4)),
        ("spline", ["mlp"], 1, 2),
    ],
)
def test_round_trip(family, conditioners, dim, gain):
    """1e-9 in float64 and 1e-4 in float32 for x up to 30; where the map amplifies round-off beyond that, the
    residual has to stay at round-off: 1e-5 is 80 of float32's units. Far out, where a solution is 1e8 times
    as large as x, T itself is evaluated less exactly than that; then 20 times its own error is allowed."""
    layers = [AutoregressiveTransform(make_meta(family, kind, dim)) for kind in conditioners]
    transform = last_layer_redrawn(chain(layers), gain)
    x = torch.cat([torch.randn(50, dim), torch.empty(50, dim).uniform_(-30, 30)])
    error, residual, _ = worst_round_trip(transform, x)
    assert error < 1e-9 or residual < 1e-13
    error, residual, round_off = worst_round_trip(transform.float(), x.float())
    assert error < 1e-4 or residual < max(1e-5, 20 * round_off)


@pytest.mark.parametrize(("family", "inverse"), [(f, k % 2) for k, f in enumerate(FAMILIES)])
def test_one_dimensional_density_integrates_to_one(family, inverse):
    transform = redraw(AutoregressiveTransform(make_meta(family, "mlp", 1)), 3.0)
    base = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
    q = dist.TransformedDistribution(base, [transform.inv if inverse else transform])
    grid = torch.linspace(-200, 200, 100_001)[:, None]
    with torch.no_grad():
        total = torch.trapezoid(q.log_prob(grid).exp(), grid[:, 0])
    assert abs(total - 1) < 1e-3
