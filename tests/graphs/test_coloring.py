# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest

from pyro_artransform.graphs.markov_graph import color_columns
from tests.graphs.markov_graphs import GRAPHS, chain, complete, crossed, grid, plate


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("neighbours", GRAPHS.values(), ids=GRAPHS)
def test_columns_of_a_color_share_no_row_but_those_of_hubs(neighbours, seed):
    found = color_columns(neighbours, seed)
    groups = [
        [i for i, color in enumerate(found.color) if color == k] for k in range(found.num_colors)
    ]
    assert sum(map(len, groups)) == len(neighbours)
    hubs = {i for group in groups[found.num_colors - found.num_hubs :] for i in group}
    assert len(hubs) == found.num_hubs
    for group in groups:
        rows = [(neighbours[i] | {i}) - hubs for i in group]
        assert sum(map(len, rows)) == len(set().union(*rows))
        assert len(group) == 1 or not hubs & set(group)


@pytest.mark.parametrize(
    ("neighbours", "most"),
    [
        (chain(200), 5),
        (chain(200, 3), 8),
        (plate(200), 3),
        (crossed(100, 20), 21),
        (complete(30), 30),
        (grid(20, 20), 12),
    ],
    ids=["chain", "chain with globals", "plate", "crossed plates", "complete", "grid"],
)
def test_few_colors(neighbours, most):
    assert color_columns(neighbours).num_colors <= most


def test_another_seed_gives_other_groups():
    assert color_columns(chain(50), 0).color != color_columns(chain(50), 1).color
