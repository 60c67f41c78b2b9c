# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The graph of a guide's named latents, eliminated by :mod:`~pyro_artransform.model.graphs`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from ..._base.arguments import first_of
from ...model.elements import ElementTerms
from ...model.graphs.markov_graph import Elimination, MarkovGraph
from ...model.sites import Site
from .networks import indices

#: a site, followed by the index of a coordinate in its unconstrained value
Name = tuple[Any, ...]


@dataclass(frozen=True, repr=False)
class LatentGraph:
    """The dependencies between latents, and the order in which the guide draws them.

    Coordinates of the unconstrained space are named by site and index: ``("h", 3)``, ``("mu",)``.

    :param names: the names of all coordinates, in the order of the latent vector.
    :param markov: the dependencies of the posterior, and its exact factorization.
    """

    names: tuple[Name, ...]
    markov: MarkovGraph

    @property
    def elimination(self) -> Elimination:
        """The guide's factorization."""
        return self.markov.elimination

    @property
    def levels(self) -> tuple[tuple[Name, ...], ...]:
        """The coordinates of each level, in the order of drawing; the first level is the root block."""
        return tuple(self._named(level) for level in self.elimination.levels)

    @property
    def root(self) -> tuple[Name, ...]:
        """The coordinates that one masked network draws first, jointly."""
        return self._named(self.elimination.root)

    def parents(self, *name: Any) -> tuple[Name, ...]:
        """The parents of a coordinate, such as ``graph.parents("h", 3)``; empty in the root block."""
        return self._named(self.elimination.parents[self._index(name)])

    def neighbours(self, *name: Any) -> tuple[Name, ...]:
        """The coordinates that a coordinate depends on given all others."""
        return self._named(sorted(self.markov.neighbours[self._index(name)]))

    def _named(self, coordinates: Iterable[int]) -> tuple[Name, ...]:
        return tuple(self.names[i] for i in coordinates)

    @cached_property
    def _indices(self) -> dict[Name, int]:
        return {name: i for i, name in enumerate(self.names)}

    def _index(self, name: Name) -> int:
        if name not in self._indices:
            raise ValueError(
                f"expected a site and an index in its unconstrained value, such as "
                f"{self.names[-1]}, got {name}"
            )
        return self._indices[name]

    def __repr__(self) -> str:
        counts = [len(own) for own in self.elimination.parents if own] or [0]
        lines = [
            f"{len(self.names):,} latents, {len(self.markov.edges):,} dependencies",
            f"levels: {len(self.elimination.levels)}",
            f"root block: {len(self.root)} ({first_of([*map(describe, self.root)])})",
            f"parents of the others: at most {max(counts)}, {sum(counts) / len(counts):.1f} on average",
        ]
        return "LatentGraph(\n  " + "\n  ".join(lines) + "\n)"

    @classmethod
    def of_elements(cls, terms: ElementTerms, sites: Sequence[Site]) -> "LatentGraph":
        """The graph of elements of plates, drawn given shared latents and linked earlier elements."""
        groups, names = terms.groups, coordinate_names(sites)
        shared, dim = groups.shared.sort().values.to("cpu"), len(names)
        links = [link.coordinates(groups).flatten(1).to("cpu") for link in terms.links]
        linear = torch.cat([indices([[], []]), *links], -1)
        rest = torch.cat([shared[:0], *(own.flatten().to("cpu") for own in groups.members)])
        within = []  # pairs of a later and an earlier coordinate of an element
        for own in groups.members:
            size = own.shape[1]
            pairs = torch.tril_indices(size, size, -1, device=own.device).T
            within += [own[:, pair].T.to("cpu") for pair in pairs]
        pairs = torch.cat([torch.cartesian_prod(rest, shared).T, *within, linear], -1)
        among = torch.cartesian_prod(shared, shared).T
        both = torch.cat([pairs, pairs.flip(0), among[:, among[0] != among[1]]], -1)
        earlier = {link.earlier for link in terms.links}
        elimination = Elimination(
            _by_row(pairs, dim),
            tuple(shared.tolist()),
            _by_row(linear, dim),
            tuple(tuple(groups.members[k].flatten().tolist()) for k in sorted(earlier)),
        )
        return cls(names, MarkovGraph(tuple(map(frozenset, _by_row(both, dim))), elimination))


def _by_row(pairs: Tensor, dim: int) -> tuple[tuple[int, ...], ...]:
    """The sorted second coordinates of different pairs ``(2, E)``, for each of ``dim`` first ones."""
    key = (pairs[0] * dim + pairs[1]).unique()
    columns, counts = (key % dim).tolist(), (key // dim).bincount(minlength=dim).tolist()
    left = iter(columns)
    return tuple(tuple(islice(left, count)) for count in counts)


def coordinate_names(sites: Iterable[Site]) -> tuple[Name, ...]:
    """Names of all coordinates of the latent vector."""
    return tuple(
        (site.name, *index)
        for site in sites
        for index in product(*map(range, site.unconstrained_shape))
    )


def describe(name: Name) -> str:
    """Formats a name, such as ``h[3]``."""
    site, *index = name
    return f"{site}[{', '.join(map(str, index))}]" if index else str(site)


def regressions(
    parents: Sequence[Sequence[int]], covariance: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Regression coefficients of coordinates on parents, and conditional sds, from a dense covariance."""
    coefficients, variance = [], covariance.diagonal().clone()
    for i, own in enumerate(map(list, parents)):
        across = covariance[i, own]
        found = torch.linalg.solve(covariance[own][:, own], across) if own else across
        coefficients.append(found)
        variance[i] = variance[i] - found @ across
    return coefficients, variance.sqrt()
