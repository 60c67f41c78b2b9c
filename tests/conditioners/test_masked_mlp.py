# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from pyro_artransform.conditioners import MaskedMLP
from pyro_artransform.testing import check_conditioner, redraw

from .test_masks import random_dag

CHAIN = torch.diag(torch.ones(4), -1).bool()
COUPLING = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]).bool()
OPTIONS = {
    "default": {},
    "one narrow layer": {"hidden_dims": 3},
    "three layers": {"hidden_dims": [8, 16, 8]},
    "context": {"context_dim": 2},
    "context and a narrow layer": {"context_dim": 1, "hidden_dims": (2, 2)},
    "tanh": {"nonlinearity": torch.tanh},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("input_dim", [1, 2, 5, 64])
def test_contract(input_dim, options):
    check_conditioner(
        lambda: MaskedMLP(input_dim, 3, **options),
        input_dim,
        context_dim=options.get("context_dim", 0),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    "adjacency",
    [CHAIN, COUPLING, random_dag(9, 0.3), random_dag(9, 0.8, 1), torch.zeros(3, 3).bool()],
    ids=["chain", "coupling", "sparse", "dense", "elementwise"],
)
def test_contract_with_a_graph(adjacency, options):
    dim = len(adjacency)
    check_conditioner(
        lambda: MaskedMLP(dim, 2, adjacency=adjacency, **options),
        dim,
        context_dim=options.get("context_dim", 0),
        adjacency=adjacency,
    )


def test_contract_with_an_order():
    order = [2, 0, 3, 1]
    conditioner = MaskedMLP(4, 2, order=order)
    check_conditioner(lambda: MaskedMLP(4, 2, order=order), 4, adjacency=conditioner.adjacency)
    jacobian = torch.autograd.functional.jacobian(redraw(conditioner), torch.randn(4))
    assert (jacobian != 0).any(1).sum(-1).tolist() == [1, 3, 0, 2]


def test_masks_and_order_are_in_the_state_dict_and_deterministic():
    first, second = MaskedMLP(5, 2).state_dict(), MaskedMLP(5, 2).state_dict()
    fixed = [name for name in first if "mask" in name or name in ("order", "adjacency")]
    assert len(fixed) == 5
    assert all(torch.equal(first[name], second[name]) for name in fixed)


def test_depth_follows_the_buffers():
    conditioner = MaskedMLP(5, 2)
    assert conditioner.depth == 5
    conditioner.load_state_dict(MaskedMLP(5, 2, adjacency=CHAIN[[0] * 5]).state_dict())
    assert conditioner.depth == 1


def test_all_parameters_move_within_two_steps():
    conditioner = MaskedMLP(4, 2, hidden_dims=[16, 16], context_dim=3)
    before = {name: p.detach().clone() for name, p in conditioner.named_parameters()}
    optim = torch.optim.Adam(conditioner.parameters(), lr=1e-2)
    for _ in range(2):
        optim.zero_grad()
        (conditioner(torch.randn(8, 4), torch.randn(8, 3)) - 1).square().sum().backward()
        optim.step()
    for name, p in conditioner.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 0}, "input_dim: expected an integer of at least 1, got 0"),
        ({"input_dim": 2.0}, "input_dim"),
        ({"num_params": True}, "num_params"),
        ({"context_dim": -1}, "context_dim"),
        ({"hidden_dims": ()}, "hidden_dims: expected at least one width, got an empty sequence"),
        ({"hidden_dims": [8, 0]}, "hidden_dims: expected an integer of at least 1, got 0"),
        ({"order": [0, 1, 1]}, "permutation"),
        (
            {"order": [0, 1, 2], "adjacency": torch.zeros(3, 3)},
            "an order or an adjacency, got both",
        ),
        ({"adjacency": torch.eye(3)}, "cycle 0 -> 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedMLP(**{"input_dim": 3, "num_params": 2, **options})


def test_bad_input():
    plain, conditional = MaskedMLP(3, 2), MaskedMLP(3, 2, context_dim=2)
    x = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 3\), got \(5, 4\)"):
        plain(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 3\), got \(\)"):
        plain(torch.zeros(()))
    with pytest.raises(ValueError, match=r"context: expected none, got one of shape \(5, 2\)"):
        plain(x, torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"expected a context of shape \(\*, 2\), got none"):
        conditional(x)
    with pytest.raises(ValueError, match=r"context: expected shape \(\*, 2\), got \(5, 3\)"):
        conditional(x, torch.zeros(5, 3))


def test_representation_gives_the_sizes():
    assert "input_dim=3, num_params=2, hidden_dims=(8,)" in repr(MaskedMLP(3, 2, 8))
    assert isinstance(MaskedMLP(3, 2).nonlinearity, nn.ELU)
