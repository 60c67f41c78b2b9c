# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import functools

import pytest
import torch

from pyro_artransform.flows.conditioners import masks


def random_dag(dim, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dag = (torch.rand(dim, dim, generator=generator) < density).tril(-1)
    order = torch.randperm(dim, generator=generator)
    return dag[order][:, order]


def test_order_is_that_of_the_coordinates():
    # 2 comes first, then 0, then 1
    expected = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 0, 0]]).bool()
    assert torch.equal(masks.check_graph([2, 0, 1], None, 3)[1], expected)


@pytest.mark.parametrize(
    ("adjacency", "expected"),
    [
        (torch.ones(5, 5).tril(-1), [0, 1, 2, 3, 4]),
        (torch.zeros(3, 3), [0, 0, 0]),
        (torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]), [0, 0, 1, 1]),
        (torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]), [2, 1, 0]),
    ],
)
def test_levels(adjacency, expected):
    assert masks.levels(adjacency.bool()).tolist() == expected


@pytest.mark.parametrize(
    ("edges", "cycle"),
    [
        ([(0, 0)], "0 -> 0"),
        ([(0, 1), (1, 0)], "0 -> 1 -> 0|1 -> 0 -> 1"),
        # 3 is downstream of the cycle and must not be named
        ([(0, 1), (1, 2), (2, 0), (3, 0)], "(0 -> 2 -> 1 -> 0|2 -> 1 -> 0 -> 2|1 -> 0 -> 2 -> 1)"),
    ],
)
def test_cycle_is_named(edges, cycle):
    adjacency = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in edges:
        adjacency[i, j] = True
    with pytest.raises(ValueError, match=rf"got one with a cycle: {cycle} "):
        masks.check_graph(None, adjacency, 4)


def test_bad_graphs():
    with pytest.raises(ValueError, match=r"expected shape \(3, 3\), got \(2, 3\)"):
        masks.check_graph(None, torch.zeros(2, 3), 3)
    with pytest.raises(ValueError, match="got other values"):
        masks.check_graph(None, torch.full((3, 3), 2), 3)
    for order in ([0, 1], [0, 0, 1], [0.5, 1, 2], [[0, 1, 2]]):
        with pytest.raises(ValueError, match=r"permutation of 0 \.\. 2, got"):
            masks.check_graph(order, None, 3)


@pytest.mark.parametrize("with_context", [False, True])
def test_connections_of_a_network_are_the_graph(with_context):
    adjacency = random_dag(9, 0.4)
    layers = masks.mlp_masks(adjacency, (40, 30, 50), with_context)
    assert [tuple(m.shape) for m in layers] == [(40, 9), (30, 40), (50, 30), (9, 50)]
    paths = functools.reduce(lambda x, layer: layer.double() @ x, layers, torch.eye(9))
    assert torch.equal(paths > 0, adjacency)
