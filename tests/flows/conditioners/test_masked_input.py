# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from pyro_artransform.flows.conditioners import MaskedInput
from pyro_artransform.testing import check_conditioner
from tests.flows.conditioners.test_masks import random_dag
from tests.flows.transforms.metas import Dense, DenseTransform


@pytest.mark.parametrize(("input_dim", "context_dim"), [(1, 2), (2, 0), (5, 2)])
def test_contract(input_dim, context_dim):
    check_conditioner(
        lambda: MaskedInput(Dense(input_dim, 2, context_dim)), input_dim, context_dim=context_dim
    )


def test_contract_with_a_graph():
    graph = random_dag(6, 0.4)
    check_conditioner(lambda: MaskedInput(Dense(6, 2), adjacency=graph), 6, adjacency=graph)
    order = [2, 0, 1]
    assert MaskedInput(Dense(3, 2), order=order).adjacency.sum(-1).tolist() == [1, 2, 0]


def test_masked_infinity_does_no_harm():
    conditioner = MaskedInput(Dense(3, 2))
    x = torch.tensor([0.5, torch.inf, torch.nan])
    assert torch.isfinite(conditioner(x)[:2]).all()


def test_network_that_returns_a_transform():
    net = DenseTransform(3, 2)
    nn.init.normal_(net.last.weight)
    transform, x = MaskedInput(net)(x := torch.randn(4, 3)), x
    y = transform(x)
    for i in range(3):
        copy = torch.cat([x[:, :i], torch.zeros(4, 3 - i)], -1)
        assert torch.allclose(y[:, i], net(copy)(x)[:, i])
    assert torch.allclose(transform.inv(y), x)
    assert transform.log_abs_det_jacobian(x, y).shape == (4, 3)
    assert transform.sign == 1


def test_bad_arguments_and_networks():
    with pytest.raises(TypeError, match="net: expected a callable, got 3"):
        MaskedInput(3)
    with pytest.raises(ValueError, match="cycle"):
        MaskedInput(Dense(2, 2), adjacency=torch.ones(2, 2))
    with pytest.raises(TypeError, match="expected a tensor or a Transform, got list"):
        MaskedInput(lambda x: [x])(torch.zeros(2))
    with pytest.raises(ValueError, match=r"parameters of shape \(\*, 3, P\)"):
        MaskedInput(lambda x: x[..., :2])(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="elementwise transform"):
        vector = torch.distributions.StickBreakingTransform()
        MaskedInput(lambda x: vector)(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"expected shape \(\*, 2\), got \(5, 3\)"):
        MaskedInput(Dense(2, 2), order=[0, 1])(torch.zeros(5, 3))
