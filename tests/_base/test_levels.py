# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest

from pyro_artransform._base.levels import graph_levels


def test_levels_are_longest_paths():
    assert graph_levels([[], [0], [0, 1], [], [3]]) == [0, 1, 2, 0, 1]
    assert graph_levels([[], [0], [], []], root=[0]) == [0, 1, 1, 1]
    for parents, message in (([[1], [0]], "without a cycle"), ([[2], []], "from 0 to 1, got 2")):
        with pytest.raises(ValueError, match=message):
            graph_levels(parents)
