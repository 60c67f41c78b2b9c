# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest

from pyro_artransform.model.graphs.markov_graph import (
    MarkovGraph,
    color_columns,
    eliminate,
    padded_groups,
)
from tests.model.graphs.markov_graphs import GRAPHS, chain, complete, crossed, grid, plate

every_graph = pytest.mark.parametrize("neighbours", GRAPHS.values(), ids=GRAPHS)


def filled(elimination):
    """The neighbours in the graph with its fill-in, the root block a clique."""
    around = [set(own) for own in elimination.parents]
    for i, own in enumerate(elimination.parents):
        for j in own:
            around[j].add(i)
    for i in elimination.root:
        around[i] |= set(elimination.root) - {i}
    return around


@every_graph
def test_all_edges_are_kept_parents_are_joined_and_levels_come_after_them(neighbours):
    found = eliminate(neighbours)
    around = filled(found)
    assert all(own <= around[i] for i, own in enumerate(neighbours))
    for own in found.parents:
        assert all(b in around[a] for a in own for b in own if a != b)
    assert sorted(i for level in found.levels for i in level) == list(range(len(neighbours)))
    assert found.levels[0] == found.root
    for i, own in enumerate(found.parents):
        assert all(found.level[j] < found.level[i] for j in own)
    # a level is drawn at once: its coordinates do not depend on each other
    for level in found.levels[1:]:
        assert not any(set(neighbours[i]) & set(level) for i in level)


def band(size, width):
    return [[j for j in range(size) if 0 < abs(i - j) <= width] for i in range(size)]


def blocks(number, size):
    """A chain of vectors."""
    count = number * size
    return [
        [j for j in range(count) if j != i and abs(j // size - i // size) <= 1]
        for i in range(count)
    ]


SIZES = {
    # levels, root block, most parents and colors
    "chain": (chain(1000), 10, 1, 2, 5),
    "chain with globals": (chain(1000, 3), 13, 5, 5, 8),
    "two steps back": (band(300, 2), 15, 5, 8, 8),
    "chain of triples": (blocks(60, 3), 17, 8, 14, 12),
    "plate": (plate(1000), 3, 2, 2, 3),
    "crossed plates": (crossed(200, 50), 2, 50, 50, 51),
    "complete": (complete(50), 1, 50, 0, 50),
    # one node after the other would be 184 levels
    "grid": (grid(32, 32), 60, 110, 60, 12),
}


@pytest.mark.parametrize(
    ("neighbours", "levels", "root", "parents", "colors"), SIZES.values(), ids=SIZES
)
def test_few_levels_and_few_colors(neighbours, levels, root, parents, colors):
    found = eliminate(neighbours)
    assert len(found.levels) <= levels
    assert len(found.root) <= root
    assert max(map(len, found.parents)) <= parents
    assert color_columns(neighbours).num_colors <= colors


@every_graph
def test_columns_of_a_color_share_no_row_but_those_of_hubs(neighbours):
    for found in (color_columns(neighbours, 0), color_columns(neighbours, 1)):
        groups = [[] for _ in range(found.num_colors)]
        for i, color in enumerate(found.color):
            groups[color].append(i)
        hubs = {i for group in groups[found.num_colors - found.num_hubs :] for i in group}
        assert len(hubs) == found.num_hubs
        for group in groups:
            rows = [(neighbours[i] | {i}) - hubs for i in group]
            assert sum(map(len, rows)) == len(set().union(*rows))
            assert len(group) == 1 or not hubs & set(group)


def test_a_markov_graph_knows_its_edges_and_colors():
    assert color_columns(chain(50), 0).color != color_columns(chain(50), 1).color
    graph = MarkovGraph.from_neighbours(chain(4))
    assert graph.edges == ((0, 1), (1, 2), (2, 3))
    assert graph.coloring.num_colors == 3


def test_padding_is_little_in_a_large_level_and_one_group_in_a_small_one():
    parents = [[] for _ in range(60)] + [[0, 1, 2]] * 1000 + [list(range(60))]
    groups = padded_groups(parents, [0] * 60 + [1] * 1001)
    assert sum(group.parents.numel() for group in groups) < 1.2 * (3 * 1000 + 60)
    (group,) = padded_groups([[], [], [], [0], [0, 1], [0, 1, 2]], [0, 0, 0, 1, 1, 1])
    assert group.parents.shape[1] == 3
