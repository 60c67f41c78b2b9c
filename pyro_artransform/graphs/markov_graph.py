# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Markov graphs, their elimination, and their colouring.

A density whose Markov graph is G factorizes, for any order of elimination, as

.. math::

    p(z) = p(z_R) \prod_{i \notin R} p(z_i \mid z_{\mathrm{pa}(i)})

where pa(i) are the neighbours of i when it is eliminated, which are then joined. The coordinates that are
eliminated last, R, are the root block.

Columns of a symmetric matrix that share no row can be found from one product with their sum: the groups of
such columns are the colours. Columns with entries nearly everywhere, the hubs, are taken one by one, and the
entries of others in the rows of hubs are known by symmetry.

**References**

1. Modification of the Minimum-Degree Algorithm by Multiple Elimination (Liu, 1985)
2. Inference via Low-Dimensional Couplings (Spantini, Bigoni, Marzouk, 2018),
   https://arxiv.org/abs/1703.06131
3. Faithful Inversion of Generative Models for Effective Amortized Inference (Webb, Golinski, Zinkov,
   Siddharth, Rainforth, Teh, Wood, 2018), https://arxiv.org/abs/1712.00287
4. On the Estimation of Sparse Jacobian Matrices (Curtis, Powell, Reid, 1974)
5. What Color Is Your Jacobian? Graph Coloring for Computing Derivatives (Gebremedhin, Manne, Pothen,
   2005)
"""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..levels import graph_levels


@dataclass(frozen=True)
class Elimination:
    """Sorted parents of each coordinate, and the root block, which has none and is drawn jointly."""

    parents: tuple[tuple[int, ...], ...]
    root: tuple[int, ...]

    @property
    def num_edges(self) -> int:
        """The number of pairs of a coordinate and a parent."""
        return sum(map(len, self.parents))

    @cached_property
    def level(self) -> tuple[int, ...]:
        """The level of each coordinate: 0 in the root block, else one more than its last parent's."""
        return tuple(graph_levels(self.parents, self.root))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The coordinates of each level, in the order in which levels are drawn; the root is the first."""
        found: list[list[int]] = [[] for _ in range(max(self.level) + 1)]
        for i, k in enumerate(self.level):
            found[k].append(i)
        return tuple(map(tuple, found))


# by how much the degrees of coordinates that are eliminated together may differ: with 12 a grid of 32 by 32
# has 64 levels in place of 58
_MOST_MORE = 8


def eliminate(neighbours: Sequence[Iterable[int]]) -> Elimination:
    """Eliminates independent sets of coordinates of nearly the least degree until a clique is left.

    :return: the elimination. Coordinates that would come one after the other at its end are the root block.

    Example::

        >>> chain = [[1], [0, 2], [1, 3], [2]]
        >>> eliminate(chain)
        Elimination(parents=((1,), (), (), (2,)), root=(1, 2))
    """
    around = [set(own) - {i} for i, own in enumerate(neighbours)]
    parents: list[tuple[int, ...]] = [()] * len(around)
    left, rounds = set(range(len(around))), list[list[int]]()
    while left:
        least = min(len(around[i]) for i in left)
        if least == len(left) - 1:
            break
        # With strictly the least degree a chain is peeled from its ends, 501 levels in place of 10 for
        # 1,000, and with nearly the least one a chain of triples; far from the least one a grid fills up.
        # A coordinate next to one that is chosen has to wait.
        most = least + 1 + min(least, _MOST_MORE)
        candidates = sorted((len(around[i]), i) for i in left if len(around[i]) <= most)
        chosen, blocked = list[int](), set[int]()
        for _, i in candidates:
            if i not in blocked:
                chosen.append(i)
                own = around[i]
                blocked |= own
                parents[i] = tuple(sorted(own))
                for j in own:  # its neighbours become neighbours of each other
                    around[j] |= own
                    around[j] -= {i, j}
        left.difference_update(chosen)
        rounds.append(chosen)
    root = sorted(left)
    while rounds and len(rounds[-1]) == 1:
        root += rounds.pop()
    if not root:  # what was last has no parents
        root = rounds[-1][:1]
    for i in root:
        parents[i] = ()
    return Elimination(tuple(parents), tuple(sorted(root)))


@dataclass(frozen=True)
class Coloring:
    """Groups of columns: for each column its group, hubs last, each by itself."""

    color: tuple[int, ...]
    num_colors: int
    num_hubs: int

    def on(self, device: torch.device) -> Tensor:
        """The group of each column, a tensor of integers."""
        return torch.tensor(self.color, dtype=torch.long, device=device)


def color_columns(neighbours: Sequence[Set[int]], seed: int = 0) -> Coloring:
    """Few groups of columns that share no rows but those of hubs.

    :param neighbours: for each column the rows of its entries off the diagonal.
    """
    degrees = [len(own) for own in neighbours]
    # the degrees above which a column is a hub; each halving is tried
    limits = {max(degrees) >> k for k in range(max(degrees).bit_length() + 1)} | {min(degrees)}
    hubs = {frozenset(i for i, k in enumerate(degrees) if k > most) for most in (-1, *limits)}
    tried = [_with_hubs(neighbours, own, seed) for own in sorted(hubs, key=len, reverse=True)]
    return min(tried, key=lambda found: found.num_colors)


def _with_hubs(neighbours: Sequence[Set[int]], hubs: frozenset[int], seed: int) -> Coloring:
    """The greedy groups of all columns but hubs."""
    near = {i: set(own) - hubs for i, own in enumerate(neighbours) if i not in hubs}
    if sum(len(own) ** 2 for own in near.values()) > 10_000_000:  # a second of time
        return _with_hubs(neighbours, frozenset(range(len(neighbours))), seed)
    others = list(near)
    random.Random(seed).shuffle(others)
    color, count = dict[int, int](), 0
    for i in others:
        at_most_two_away = near[i].union(*(near[j] for j in near[i]))
        taken = {color.get(k) for k in at_most_two_away}
        color[i] = next(k for k in range(count + 1) if k not in taken)
        count = max(count, color[i] + 1)
    color.update((i, count + k) for k, i in enumerate(sorted(hubs)))
    colors = tuple(color[i] for i in range(len(neighbours)))
    return Coloring(colors, count + len(hubs), len(hubs))


@dataclass(frozen=True)
class MarkovGraph:
    """The neighbours of each coordinate, in both directions, and the factorization by them."""

    neighbours: tuple[frozenset[int], ...]
    elimination: Elimination

    @classmethod
    def from_neighbours(cls, neighbours: Sequence[Iterable[int]]) -> "MarkovGraph":
        """The graph of these neighbours, eliminated."""
        own = tuple(map(frozenset, neighbours))
        return cls(own, eliminate(own))

    @cached_property
    def coloring(self) -> Coloring:
        """Groups of coordinates whose second derivatives can be told apart when they move at once."""
        return color_columns(self.neighbours)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All pairs of neighbours, the smaller coordinate first."""
        return tuple((i, j) for i, own in enumerate(self.neighbours) for j in sorted(own) if i < j)


@dataclass(frozen=True)
class PaddedGroup:
    """Coordinates with at most k parents each.

    :param coordinates: the m coordinates, sorted by level.
    :param slices: the rows of each level that is in the group, by level.
    :param parents: shape ``(m, k)``, padded with the number of all coordinates.
    :param is_parent: shape ``(m, k)``, false for padding.
    """

    coordinates: tuple[int, ...]
    slices: dict[int, slice]
    parents: Tensor
    is_parent: Tensor


def padded_groups(parents: Sequence[Sequence[int]], level: Sequence[int]) -> list[PaddedGroup]:
    """All coordinates that have parents, in few groups of similar numbers of parents."""
    by_level: dict[int, list[int]] = {}
    for i, own in enumerate(parents):
        if own:
            by_level.setdefault(level[i], []).append(i)
    members: dict[int, list[tuple[int, int]]] = {}
    for k, coordinates in by_level.items():
        counts = [len(parents[i]) for i in coordinates]
        widest = max(counts)
        # one rectangle if half of it is not padding, or it costs less than another rectangle
        as_one = len(counts) * widest <= max(2 * sum(counts), 256)
        for i, count in zip(coordinates, counts):
            members.setdefault(_rounded(widest if as_one else count), []).append((k, i))
    groups, padding = [], len(parents)
    for width, pairs in sorted(members.items()):
        levels, inside = zip(*sorted(pairs))
        slices = {k: slice(bisect_left(levels, k), bisect_right(levels, k)) for k in levels}
        rows = [[*parents[i], *[padding] * (width - len(parents[i]))] for i in inside]
        index = torch.tensor(rows, dtype=torch.long, device="cpu")
        groups.append(PaddedGroup(inside, slices, index, index < padding))
    return groups


def _rounded(count: int) -> int:
    """The next number of the sequence 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power
