# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Markov graphs, their elimination, and their colouring.

A density with Markov graph G factorizes, for any elimination order, as

.. math::

    p(z) = p(z_R) \prod_{i \notin R} p(z_i \mid z_{\mathrm{pa}(i)})

where pa(i) are the neighbours of i when it is eliminated, which are then connected. The coordinates R that
are eliminated last are the root block.

Columns of a symmetric matrix without common rows can be recovered from one product with the sum of their unit
vectors; groups of such columns are colours. Hubs, columns with entries nearly everywhere, are groups of their
own, and entries of other columns in the rows of hubs follow by symmetry.

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

from ..._base.levels import graph_levels


@dataclass(frozen=True)
class Elimination:
    """The sorted parents of each coordinate, and the root block, which has none and is drawn jointly.

    :param linear: the parents whose influence is linear, for each coordinate; none by default.
    :param updated: groups of coordinates that are dependent given their parents, approximately.
    """

    parents: tuple[tuple[int, ...], ...]
    root: tuple[int, ...]
    linear: tuple[tuple[int, ...], ...] = ()
    updated: tuple[tuple[int, ...], ...] = ()

    @property
    def others(self) -> tuple[tuple[int, ...], ...]:
        """The parents of each coordinate without the linear ones."""
        if not self.linear:
            return self.parents
        pairs = zip(self.parents, map(frozenset, self.linear))
        return tuple(tuple(j for j in own if j not in linear) for own, linear in pairs)

    @property
    def num_edges(self) -> int:
        """The number of edges from parents to coordinates."""
        return sum(map(len, self.parents))

    @cached_property
    def level(self) -> tuple[int, ...]:
        """The level of each coordinate: 0 in the root block, else one above its highest parent's."""
        return tuple(graph_levels(self.parents, self.root))

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The coordinates of each level, in the order of drawing; the first level is the root block."""
        found: list[list[int]] = [[] for _ in range(max(self.level) + 1)]
        for i, k in enumerate(self.level):
            found[k].append(i)
        return tuple(map(tuple, found))


def eliminate(neighbours: Sequence[Iterable[int]]) -> Elimination:
    """Eliminates independent sets of coordinates of nearly minimum degree until a clique is left.

    :return: the elimination. Coordinates that would be eliminated singly at the end join the root block.

    Example::

        >>> chain = [[1], [0, 2], [1, 3], [2]]
        >>> found = eliminate(chain)
        >>> found.parents, found.root
        (((1,), (), (), (2,)), (1, 2))
    """
    around = [set(own) - {i} for i, own in enumerate(neighbours)]
    parents: list[tuple[int, ...]] = [()] * len(around)
    left, rounds = set(range(len(around))), list[list[int]]()
    while left:
        least = min(len(around[i]) for i in left)
        if least == len(left) - 1:
            break
        # With strictly minimum degree, a chain of 1,000 is peeled from its ends, in 501 levels instead of 10,
        # and with nearly minimum degree so is a chain of triples; with larger ones a grid fills in.
        # Neighbours of a chosen coordinate must wait.
        most = least + 1 + min(least, 8)
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
    if not root:  # the last coordinates have no parents
        root = rounds[-1][:1]
    for i in root:
        parents[i] = ()
    return Elimination(tuple(parents), tuple(sorted(root)))


@dataclass(frozen=True)
class Coloring:
    """Groups of columns: the group of each column; hubs come last, each in a group of its own."""

    color: tuple[int, ...]
    num_colors: int
    num_hubs: int

    def on(self, device: torch.device) -> Tensor:
        """The group of each column, as a tensor of integers."""
        return torch.tensor(self.color, dtype=torch.long, device=device)


def color_columns(neighbours: Sequence[Set[int]], seed: int = 0) -> Coloring:
    """Divides columns into few groups whose members share no rows, except rows of hubs.

    :param neighbours: for each column, the rows of its off-diagonal entries.
    """
    degrees = [len(own) for own in neighbours]
    # candidates for the degree above which a column is a hub
    limits = {max(degrees) >> k for k in range(max(degrees).bit_length() + 1)} | {min(degrees)}
    hubs = {frozenset(i for i, k in enumerate(degrees) if k > most) for most in (-1, *limits)}
    tried = [_with_hubs(neighbours, own, seed) for own in sorted(hubs, key=len, reverse=True)]
    return min(tried, key=lambda found: found.num_colors)


def _with_hubs(neighbours: Sequence[Set[int]], hubs: frozenset[int], seed: int) -> Coloring:
    """Groups all columns but hubs greedily."""
    near = {i: set(own) - hubs for i, own in enumerate(neighbours) if i not in hubs}
    if sum(len(own) ** 2 for own in near.values()) > 10_000_000:  # it would take more than a second
        return _with_hubs(neighbours, frozenset(range(len(neighbours))), seed)
    others = list(near)
    random.Random(seed).shuffle(others)
    color, count = dict[int, int](), 0
    around = {i: set[int]() for i in near}  # the colors of each column and its neighbours
    for i in others:
        taken = set[int]().union(*(around[j] for j in near[i]))
        color[i] = next(k for k in range(count + 1) if k not in taken)
        count = max(count, color[i] + 1)
        for j in (i, *near[i]):
            around[j].add(color[i])
    color.update((i, count + k) for k, i in enumerate(sorted(hubs)))
    colors = tuple(color[i] for i in range(len(neighbours)))
    return Coloring(colors, count + len(hubs), len(hubs))


@dataclass(frozen=True)
class MarkovGraph:
    """The neighbours of each coordinate, symmetric, and the factorization along them."""

    neighbours: tuple[frozenset[int], ...]
    elimination: Elimination

    @classmethod
    def from_neighbours(cls, neighbours: Sequence[Iterable[int]]) -> "MarkovGraph":
        """The graph with these neighbours, and its elimination."""
        own = tuple(map(frozenset, neighbours))
        return cls(own, eliminate(own))

    @cached_property
    def coloring(self) -> Coloring:
        """Groups of coordinates whose second derivatives can be separated when they move together."""
        return color_columns(self.neighbours)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All pairs of neighbours, the smaller coordinate first."""
        return tuple((i, j) for i, own in enumerate(self.neighbours) for j in sorted(own) if i < j)


@dataclass(frozen=True)
class PaddedGroup:
    """Coordinates with at most k parents each.

    :param coordinates: the m coordinates, sorted by level.
    :param slices: the rows of each level in the group, by level.
    :param parents: shape ``(m, k)``, padded with the number D of coordinates.
    :param is_parent: shape ``(m, k)``, false for padding.
    """

    coordinates: tuple[int, ...]
    slices: dict[int, slice]
    parents: Tensor
    is_parent: Tensor


def padded_groups(parents: Sequence[Sequence[int]], level: Sequence[int]) -> list[PaddedGroup]:
    """Divides the coordinates with parents into few groups with similar numbers of parents."""
    by_level: dict[int, list[int]] = {}
    for i, own in enumerate(parents):
        if own:
            by_level.setdefault(level[i], []).append(i)
    members: dict[int, list[tuple[int, int]]] = {}
    for k, coordinates in by_level.items():
        counts = [len(parents[i]) for i in coordinates]
        widest = max(counts)
        # merge if at most half is padding, or if that costs less than another group
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
    """Rounds up to the sequence 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power
