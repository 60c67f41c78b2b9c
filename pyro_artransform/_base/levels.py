# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The levels of a directed acyclic graph."""

from collections.abc import Iterable, Sequence


def graph_levels(parents: Sequence[Sequence[int]], root: Iterable[int] = ()) -> list[int]:
    """The length of the longest path to each coordinate of an acyclic graph.

    :param root: coordinates of level 0; with a root, all others have level 1 at least.
    :raises ValueError: if the graph has a cycle, which the message names, or a parent is out of range.
    """
    dim, first = len(parents), set(root)
    children: list[list[int]] = [[] for _ in range(dim)]
    missing = [len(own) for own in parents]
    for i, own in enumerate(parents):
        for j in own:
            if not 0 <= j < dim:
                raise ValueError(f"parents: expected coordinates from 0 to {dim - 1}, got {j}")
            children[j].append(i)
    level = [int(bool(first) and i not in first) for i in range(dim)]
    ready = [i for i in range(dim) if not missing[i]]
    while ready:
        j = ready.pop()
        for i in children[j]:
            level[i] = max(level[i], level[j] + 1)
            missing[i] -= 1
            if not missing[i]:
                ready.append(i)
    if any(missing):  # each coordinate left has a parent among those left
        path = [next(i for i in range(dim) if missing[i])]
        while path[-1] not in path[:-1]:
            path.append(next(j for j in parents[path[-1]] if missing[j]))
        cycle = " -> ".join(map(str, path[path.index(path[-1]) :][::-1]))
        raise ValueError(
            f"expected a graph without a cycle, got one with a cycle: {cycle} (each coordinate depends on "
            "the one before it)"
        )
    return level
