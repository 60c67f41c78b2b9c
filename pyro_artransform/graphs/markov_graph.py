# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A Markov graph with its elimination."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .coloring import Coloring, color_columns
from .elimination import Elimination, eliminate


@dataclass(frozen=True)
class MarkovGraph:
    """Which coordinates depend on each other given all others, and in which order they are drawn.

    :param neighbours: for each coordinate the others that are adjacent to it, in both directions.
    :param elimination: who is drawn given whom: the factorization of every density with this graph.
    """

    neighbours: tuple[frozenset[int], ...]
    elimination: Elimination

    @classmethod
    def from_neighbours(cls, neighbours: Sequence[Iterable[int]]) -> "MarkovGraph":
        """The graph of these neighbours, eliminated."""
        own = tuple(map(frozenset, neighbours))
        return cls(own, eliminate(own))

    @property
    def input_dim(self) -> int:
        """The number of coordinates."""
        return len(self.neighbours)

    @cached_property
    def coloring(self) -> Coloring:
        """Groups of coordinates whose second derivatives can be told apart when they move at once."""
        return color_columns([set(own) for own in self.neighbours])

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All pairs of neighbours, the smaller coordinate first."""
        found = []
        for i, own in enumerate(self.neighbours):
            found += [(i, j) for j in sorted(own) if i < j]
        return tuple(found)
