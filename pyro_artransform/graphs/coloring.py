# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Columns of a sparse symmetric matrix that can be found from one product.

Columns that share no row are summed, and each entry of the sum is an entry of one of them. A row or
column with entries everywhere would forbid every sum: such columns, the hubs, are taken one by one, and
what the others have in the rows of hubs is known by symmetry.

**References**

1. On the Estimation of Sparse Jacobian Matrices (Curtis, Powell, Reid, 1974)
2. What Color Is Your Jacobian? Graph Coloring for Computing Derivatives (Gebremedhin, Manne, Pothen,
   2005)
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

# pairs of neighbours of a common coordinate that a colouring may look at: a second of time
_MOST_PAIRS = 10_000_000


@dataclass(frozen=True)
class Coloring:
    """Groups of columns.

    :param color: for each column its group, hubs last, each by itself.
    :param num_colors: the number of groups.
    :param num_hubs: how many of them are hubs.
    """

    color: tuple[int, ...]
    num_colors: int
    num_hubs: int

    def is_hub(self, column: int) -> bool:
        """Whether a column is in a group by itself since it has entries nearly everywhere."""
        return self.color[column] >= self.num_colors - self.num_hubs

    def groups(self) -> list[list[int]]:
        """The columns of each group."""
        found: list[list[int]] = [[] for _ in range(self.num_colors)]
        for column, k in enumerate(self.color):
            found[k].append(column)
        return found


def color_columns(neighbours: Sequence[set[int]], seed: int = 0) -> Coloring:
    """Few groups of columns that share no rows but those of hubs.

    :param neighbours: for each column the rows of its entries off the diagonal.
    :param seed: of the order in which columns are considered; another one gives other groups.
    """
    degrees = sorted({len(own) for own in neighbours}, reverse=True)
    best = _with_hubs(neighbours, -1, seed)
    # the degrees above which a column is a hub; each halving is tried
    for most in {degrees[0] >> k for k in range(degrees[0].bit_length() + 1)} | {degrees[-1]}:
        found = _with_hubs(neighbours, most, seed)
        if found.num_colors < best.num_colors:
            best = found
    return best


def _with_hubs(neighbours: Sequence[set[int]], most: int, seed: int) -> Coloring:
    """The greedy groups where columns with more than so many entries are hubs."""
    hubs = {i for i, own in enumerate(neighbours) if len(own) > most}
    others = [i for i in range(len(neighbours)) if i not in hubs]
    near = {i: neighbours[i] - hubs for i in others}
    if sum(len(own) ** 2 for own in near.values()) > _MOST_PAIRS:
        return _with_hubs(neighbours, -1, seed)
    random.Random(seed).shuffle(others)
    color = [0] * len(neighbours)
    count, done = 0, set[int]()
    for i in others:
        taken = {color[j] for j in near[i] if j in done}
        for j in near[i]:
            taken.update(color[k] for k in near[j] if k in done)
        color[i] = next(k for k in range(count + 1) if k not in taken)
        count = max(count, color[i] + 1)
        done.add(i)
    for k, i in enumerate(sorted(hubs)):
        color[i] = count + k
    return Coloring(tuple(color), count + len(hubs), len(hubs))
