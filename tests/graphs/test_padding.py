# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest

from pyro_artransform.graphs.markov_graph import eliminate
from pyro_artransform.graphs.padding import padded_groups
from tests.graphs.markov_graphs import GRAPHS


@pytest.mark.parametrize("neighbours", GRAPHS.values(), ids=GRAPHS)
def test_groups_hold_all_parents(neighbours):
    found = eliminate(neighbours)
    seen = []
    for group in padded_groups(found.parents, found.level):
        for i, row, mask in zip(group.coordinates, group.parents, group.is_parent):
            assert row[mask].tolist() == list(found.parents[i])
            assert (row[~mask] == len(neighbours)).all()
        levels = [found.level[i] for i in group.coordinates]
        assert levels == sorted(levels)
        for level, rows in group.slices.items():
            assert set(levels[rows]) == {level}
        seen += group.coordinates
    assert sorted(seen) == [i for i, own in enumerate(found.parents) if own]


def test_a_thousand_with_few_parents_are_not_padded_to_one_with_many():
    parents = [[] for _ in range(60)] + [[0, 1, 2]] * 1000 + [list(range(60))]
    level = [0] * 60 + [1] * 1001
    groups = padded_groups(parents, level)
    entries = sum(group.parents.numel() for group in groups)
    assert entries < 1.2 * (3 * 1000 + 60)


def test_a_small_level_is_one_group():
    parents = [[], [], [], [0], [0, 1], [0, 1, 2]]
    (group,) = padded_groups(parents, [0, 0, 0, 1, 1, 1])
    assert group.width == 3
