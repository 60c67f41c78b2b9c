# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A network evaluated block by block has the parameters that it has all at once."""

from itertools import pairwise

import pytest
import torch

from pyro_artransform.flows.conditioners import MaskedMLP
from pyro_artransform.testing import redraw
from tests.flows.conditioners.test_masks import random_dag

DIM = 9
BATCH = 4
NETWORKS = {
    "full": {"hidden_dims": [32, 24]},
    "one layer": {"hidden_dims": 40, "nonlinearity": torch.tanh},
    "three layers": {"hidden_dims": [16, 32, 16]},
    "narrow with a context": {"hidden_dims": (2, 2), "context_dim": 2},
    "order": {"hidden_dims": [32, 24], "order": [4, 0, 8, 2, 6, 1, 3, 5, 7]},
    "sparse": {"adjacency": random_dag(DIM, 0.3)},
    "dense": {"adjacency": random_dag(DIM, 0.8, 1), "hidden_dims": [5, 5], "context_dim": 2},
    "coupling": {"adjacency": (torch.arange(DIM)[:, None] > 4) & (torch.arange(DIM) <= 4)},
    "elementwise": {"adjacency": torch.zeros(DIM, DIM).bool()},
}
every_network = pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS.keys())


@pytest.fixture
def case(options):
    """A network and an argument, a context, the sorted argument, and the sorted parameters at it."""
    network = redraw(MaskedMLP(DIM, 3, **options), 2.0)
    x = torch.randn(BATCH, DIM)
    context = torch.randn(BATCH, 2) if network.context_dim else None
    order = network.order
    return network, x, context, x[:, order], network(x, context)[:, order].detach()


@every_network
def test_values_of_blocks_of_any_size_and_garbage_spoils_only_what_comes_after_it(case):
    """With parts of a block closed, and whole ones; single levels, and all in one block."""
    network, x, context, rows, expected = case
    sizes = [(size, keep) for size in range(1, network.depth + 1) for keep in range(1, size + 1)]
    for size, keep in sizes:
        with torch.no_grad():
            blocks = network.blocks(x, context, in_place=(size + keep) % 2 == 0)
            start = 0
            while start < network.depth:
                stop = min(start + size, network.depth)
                exact = min(start + keep, stop)
                first, known, last = (blocks.levels[k] for k in (start, exact, stop))
                guess = torch.cat([rows[:, first:known], torch.randn(BATCH, last - known)], -1)
                blocks.open(start, stop)
                given = blocks.params(guess if stop > start + 1 else None)
                # the level after the exact ones reads only exact ones
                right = blocks.levels[min(exact + 1, stop)]
                error = given[:, : right - first] - expected[:, first:right]
                assert error.abs().max() <= 1e-12
                blocks.close(rows[:, first:known], exact)
                start = exact


@every_network
def test_gradients_agree_with_those_of_the_network(case):
    network, x, context, rows, _ = case
    weight = torch.randn(BATCH, DIM, 3)
    blocks = network.blocks(x, context)
    parts = []
    for start, stop in pairwise([*range(0, network.depth, 2), network.depth]):
        own = slice(blocks.levels[start], blocks.levels[stop])
        blocks.open(start, stop)
        parts.append(blocks.params(None if stop == start + 1 else rows[:, own]))
        blocks.close(rows[:, own], stop)
    value = (torch.cat(parts, 1) * weight[:, network.order]).sum()
    values = value, (network(x, context) * weight).sum()
    options = {"allow_unused": True, "materialize_grads": True}
    pairs = zip(*(torch.autograd.grad(v, list(network.parameters()), **options) for v in values))
    assert all((a - b).abs().max() <= 1e-10 for a, b in pairs)


@every_network
def test_levels_follow_the_graph(case):
    network, x, context, rows, _ = case
    blocks = network.blocks(x, context)
    assert (blocks.levels[0], blocks.levels[-1]) == (0, DIM)
    assert len(blocks.levels) == network.depth + 1
    assert torch.equal(rows, x if blocks.order is None else x[:, blocks.order])
    # a coordinate reads coordinates of earlier levels alone
    sizes = torch.tensor(blocks.levels).diff()
    level = torch.arange(network.depth).repeat_interleave(sizes)[network.order.argsort()]
    child, parent = network.adjacency.nonzero(as_tuple=True)
    assert (level[child] > level[parent]).all()
