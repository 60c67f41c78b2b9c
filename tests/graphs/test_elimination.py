# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import time

import pytest

from pyro_artransform.graphs.markov_graph import eliminate, graph_levels
from tests.graphs.markov_graphs import GRAPHS, chain, complete, crossed, grid, plate

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
def test_all_edges_are_kept_and_parents_are_joined(neighbours):
    found = eliminate(neighbours)
    around = filled(found)
    assert all(own <= around[i] for i, own in enumerate(neighbours))
    for own in found.parents:
        assert all(b in around[a] for a in own for b in own if a != b)


@every_graph
def test_levels_come_after_those_of_parents(neighbours):
    found = eliminate(neighbours)
    assert sorted(i for level in found.levels for i in level) == list(range(len(neighbours)))
    assert found.levels[0] == found.root
    for i, own in enumerate(found.parents):
        assert all(found.level[j] < found.level[i] for j in own)
    # a level is drawn at once: none of it depends on another
    for level in found.levels[1:]:
        assert not any(set(neighbours[i]) & set(level) for i in level)


@pytest.mark.parametrize(
    ("neighbours", "levels", "root", "parents"),
    [
        (chain(1000), 10, 1, 2),
        (chain(1000, 3), 13, 5, 5),
        (plate(1000), 3, 2, 2),
        (crossed(200, 50), 2, 50, 50),
        (complete(50), 1, 50, 0),
        # one node after the other would be 184
        (grid(32, 32), 60, 110, 60),
    ],
    ids=["chain", "chain with globals", "plate", "crossed plates", "complete", "grid"],
)
def test_depth(neighbours, levels, root, parents):
    found = eliminate(neighbours)
    assert len(found.levels) <= levels
    assert len(found.root) <= root
    assert max(map(len, found.parents)) <= parents


def test_ten_thousand_coordinates_take_seconds():
    start = time.process_time()
    assert len(eliminate(chain(10_000, 3)).levels) <= 14
    # 0.1 s on one core of a laptop
    assert time.process_time() - start < 5


def test_coordinates_that_depend_on_nothing():
    found = eliminate(GRAPHS["nothing"])
    assert not any(found.parents)
    assert len(found.root) == 1


@pytest.mark.parametrize(
    ("parents", "message"),
    [([[1], [0]], "without a cycle"), ([[2], []], "from 0 to 1, got 2"), ([[-1]], "got -1")],
)
def test_levels_of_what_is_no_acyclic_graph(parents, message):
    with pytest.raises(ValueError, match=message):
        graph_levels(parents)


def test_levels_are_longest_paths():
    assert graph_levels([[], [0], [0, 1], [], [3]]) == [0, 1, 2, 0, 1]
    assert graph_levels([[], [0], [], []], root=[0]) == [0, 1, 1, 1]
