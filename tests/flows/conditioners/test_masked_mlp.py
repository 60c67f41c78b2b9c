# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import nn

from pyro_artransform import conditional_affine_autoregressive, hinged_marginals, spline_marginals
from pyro_artransform.flows.conditioners import MaskedLinear, MaskedMLP, TiltedSiLU, Unconditional
from pyro_artransform.flows.conditioners.masked_mlp import is_elementwise
from pyro_artransform.testing import check_conditioner, check_transform, redraw
from tests.flows.conditioners.test_masks import random_dag

CHAIN = torch.diag(torch.ones(4), -1).bool()
OPTIONS = {
    "default": {},
    "one narrow layer": {"hidden_dims": 3},
    "three layers": {"hidden_dims": [8, 16, 8]},
    "context": {"context_dim": 2},
    "context and a narrow layer": {"context_dim": 1, "hidden_dims": (2, 2)},
    "even, with skip connections": {"nonlinearity": TiltedSiLU(0.0), "skip_connections": True},
}
GRAPHS = {
    "one coordinate": torch.zeros(1, 1).bool(),
    "two": torch.tensor([[0, 0], [1, 0]]).bool(),
    "five": torch.ones(5, 5).tril(-1).bool(),
    "many": torch.ones(48, 48).tril(-1).bool(),
    "chain": CHAIN,
    "coupling": torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]).bool(),
    "sparse": random_dag(9, 0.3),
    "dense": random_dag(9, 0.8, 1),
    "elementwise": torch.zeros(3, 3).bool(),
}
# each graph with two of the options, each of which meets several graphs
CASES = [(g, o) for g, o in zip([*GRAPHS] * 2, cycle([*OPTIONS]))]


@pytest.mark.parametrize(("graph", "option"), CASES)
def test_contract(graph, option):
    adjacency, options = GRAPHS[graph], OPTIONS[option]
    dim, context_dim = len(adjacency), options.get("context_dim", 0)
    check_conditioner(
        lambda: MaskedMLP(dim, 2, adjacency=adjacency, **options),
        dim,
        context_dim=context_dim,
        adjacency=adjacency,
    )


def test_contract_with_an_order():
    order = [2, 0, 3, 1]
    conditioner = MaskedMLP(4, 2, order=order)
    check_conditioner(lambda: MaskedMLP(4, 2, order=order), 4, adjacency=conditioner.adjacency)
    check_conditioner(lambda: MaskedMLP(4, 2), 4)
    jacobian = torch.autograd.functional.jacobian(redraw(conditioner), torch.randn(4))
    assert (jacobian != 0).any(1).sum(-1).tolist() == [1, 3, 0, 2]


def test_depth_and_blocks_follow_the_buffers():
    conditioner, x = MaskedMLP(5, 2), torch.zeros(3, 5)
    assert conditioner.depth == 5
    assert conditioner.blocks(x).levels == [0, 1, 2, 3, 4, 5]
    conditioner.load_state_dict(MaskedMLP(5, 2, adjacency=CHAIN[[0] * 5]).state_dict())
    assert conditioner.depth == 1
    assert conditioner.blocks(x).levels == [0, 5]
    moved = conditioner.to("meta")
    assert moved.blocks(x.to("meta")).levels == [0, 5]


def test_skip_connections_add_a_linear_function_that_starts_at_zero():
    plain = redraw(MaskedMLP(4, 2, 8))
    conditioner = MaskedMLP(4, 2, 8, skip_connections=True)
    assert not conditioner.skip.weight.any()
    conditioner.load_state_dict(plain.state_dict(), strict=False)
    conditioner.skip.weight.data.normal_()
    x = torch.randn(3, 4)
    added = (conditioner(x) - plain(x)).mT.reshape(3, -1)
    masked = conditioner.skip.weight * conditioner.adjacency.repeat(2, 1)
    assert torch.allclose(added, x @ masked.T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 0}, "input_dim: expected a positive integer, got 0"),
        ({"context_dim": "2"}, "context_dim: expected an integer of at least 0, got '2'"),
        ({"hidden_dims": ()}, "hidden_dims: expected at least one width, got an empty sequence"),
        ({"hidden_dims": [8, 2.0]}, r"hidden_dims: expected a positive integer, got 2\.0"),
        ({"hidden_dims": "64"}, "hidden_dims: expected a positive integer, got '6'"),
        ({"skip_connections": "no"}, "skip_connections: expected True or False, got 'no'"),
        ({"skip_connections": 1.0}, r"skip_connections: expected True or False, got 1\.0"),
        ({"order": [0, 1, 1]}, "permutation"),
        ({"order": [0, 1, 2], "adjacency": torch.zeros(3, 3)}, "or an adjacency, got both"),
        ({"adjacency": torch.eye(3)}, "cycle: 0 -> 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedMLP(**{"input_dim": 3, "num_params": 2, **options})
    with pytest.raises(TypeError, match=r"a function or a module such as torch\.nn\.ELU\(\), got"):
        MaskedMLP(3, 2, 8, nonlinearity=nn.ELU)


def test_a_nonlinearity_is_not_evaluated_before_its_time():
    def refuse(h):
        raise AssertionError("evaluated")

    assert MaskedMLP(3, 2, 8, nonlinearity=refuse).nonlinearity is refuse
    with torch.device("meta"):
        conditioner = MaskedMLP(3, 2, 8, nonlinearity=refuse)
    assert conditioner.adjacency.is_meta
    assert conditioner.depth == 3


def test_bad_input():
    plain, conditional = MaskedMLP(3, 2), MaskedMLP(3, 2, context_dim=2)
    x = torch.zeros(5, 3)
    cases = [
        (r"x: expected shape \(\*, 3\), got \(5, 4\)", plain, torch.zeros(5, 4)),
        (r"x: expected shape \(\*, 3\), got \(\)", plain, torch.zeros(())),
        (r"x: expected torch\.float64, the dtype of the network", plain, x.float()),
        (r"context: expected none, got \(5, 2\)", plain, x, torch.zeros(5, 2)),
        (r"context: expected shape \(\*, 2\), got none", conditional, x),
        (r"context: expected shape \(\*, 2\), got \(5, 3\)", conditional, x, torch.zeros(5, 3)),
    ]
    for message, network, *inputs in cases:
        for function in (network, network.blocks, network.linearize):
            with pytest.raises(ValueError, match=message):
                function(*inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool], ids=str)
def test_a_context_of_another_dtype(dtype):
    """The network's own dtype counts, in both directions."""
    t = redraw(conditional_affine_autoregressive(3, 2)).to(torch.float32)
    context, x = torch.tensor([[1, 0], [0, 1]]).to(dtype), torch.randn(2, 3).to(torch.float32)
    given, expected = t.condition(context), t.condition(context.to(torch.float32))
    assert torch.equal(given(x), expected(x))
    assert torch.equal(given.inv(x), expected.inv(x))


def test_masked_connections_stay_cut_whatever_the_weight():
    mask = [[1, 0, 0], [1, 1, 0]]
    layer = MaskedLinear(3, 2, mask)
    layer.weight.data.fill_(7.0)
    layer.bias.data.zero_()
    assert torch.equal(layer(torch.ones(3)), torch.tensor([7.0, 14.0]))
    layer(torch.ones(3)).sum().backward()
    assert layer.weight.grad.tolist() == mask
    assert "mask" in layer.state_dict()
    assert layer.float().mask.dtype == torch.float32
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\).*got \(3, 2\)"):
        MaskedLinear(3, 2, torch.ones(3, 2))


def test_unconditional_parameters_are_the_same_for_every_x():
    conditioner = redraw(Unconditional(3, 2))
    params = conditioner(torch.randn(4, 5, 3))
    assert params.shape == (4, 5, 3, 2)
    assert torch.equal(params, conditioner.params.expand_as(params))
    check_transform(lambda: hinged_marginals(3), 3)
    check_transform(lambda: spline_marginals(3), 3)
    jacobian = torch.autograd.functional.jacobian(redraw(hinged_marginals(4)), torch.randn(4))
    assert (jacobian.diagonal() > 0).all()
    assert not (jacobian - jacobian.diagonal().diag()).any()
    with pytest.raises(ValueError, match="num_params"):
        Unconditional(3, 0)
    with pytest.raises(ValueError, match=r"expected shape \(\*, 3\), got \(2,\)"):
        conditioner(torch.zeros(2))


@pytest.mark.parametrize("slope", [0.0, np.float64(0.6), 1])
def test_tilted_silu(slope):
    x, activation = torch.linspace(-30, 30, 101), TiltedSiLU(slope)
    assert torch.allclose(activation(x), x * (slope + torch.tanh(x / 2)), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(activation, torch.randn(5, requires_grad=True))
    assert repr(activation) == f"TiltedSiLU(slope={float(slope)})"
    with pytest.raises(ValueError, match="slope: expected a number from 0 to 1, got"):
        TiltedSiLU(1.5)


@pytest.mark.parametrize("cls", [TiltedSiLU, torch.nn.ELU])
def test_a_subclass_may_not_be_elementwise(cls):
    assert is_elementwise(cls())
    assert not is_elementwise(type("Other", (cls,), {})())
    assert not is_elementwise(torch.nn.Softmax(-1))
