# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Linear layers of a structured flow: low-rank updates of a group, and links between elements of plates."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ...flows.transforms import FlowModule
from ...model.graphs.sparse_matrix import SparseMatrix
from .networks import indices


class LowRankUpdate(FlowModule):
    r"""A low-rank update of the identity on some coordinates, initially the identity.

    .. math:: y_S = x_S + U V^\top x_S, \qquad \log |\det J| = \log |\det(I + V^\top U)|

    :param coordinates: the n coordinates S of D.
    :param rank: the number r of columns of U and V.
    """

    coordinates: Tensor

    def __init__(self, coordinates: Sequence[int], rank: int) -> None:
        super().__init__()
        self.register_buffer("coordinates", indices(coordinates), persistent=False)
        like = nn.Linear(1, 1).weight.detach()  # has PyTorch's default dtype and device
        self.outer = nn.Parameter(like.new_zeros(len(coordinates), rank))
        self.inner = nn.Parameter(like.new_zeros(len(coordinates), rank))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moved = (x.index_select(-1, self.coordinates) @ self.inner) @ self.outer.T
        return x.index_add(-1, self.coordinates, moved), self._log_det().expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inner = y.index_select(-1, self.coordinates) @ self.inner
        moved = inner @ torch.linalg.inv(self._small()) @ self.outer.T
        return y.index_add(-1, self.coordinates, -moved), -self._log_det().expand(y.shape[:-1])

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            outer = score.index_select(-1, self.coordinates) @ self.outer
            moved = outer @ torch.linalg.inv(self._small().T) @ self.inner.T
            score = score.index_add(-1, self.coordinates, -moved)
        return *self.call_and_ladj(x), score

    def _small(self) -> Tensor:
        """The matrix of the matrix determinant lemma, for rows on the left, shape ``(r, r)``."""
        small = self.outer.T @ self.inner
        return small + torch.ones_like(small[0]).diag()

    def _log_det(self) -> Tensor:
        return torch.linalg.slogdet(self._small()).logabsdet

    @torch.no_grad()
    def set_(self, basis: Tensor, factor: Tensor) -> None:
        """Multiplies the components along orthonormal columns ``(n, r)`` by factors ``(r,)``."""
        self.inner.copy_(basis)
        self.outer.copy_(basis * (factor - 1))


class LinearLinks(FlowModule):
    r"""Adds linear functions of earlier coordinates to later ones, initially none.

    .. math:: y_i = x_i + \sum_{j \in \mathrm{pa}(i)} C_{ij} y_j

    The coefficients are buffers: there are as many as pairs, and training them costs more than it gains
    (benchmarks/crossed.md).

    :param parents: for each coordinate, those that it depends on, without a cycle.
    :param level: for each coordinate, a number above those of its parents.
    """

    def __init__(self, parents: Sequence[Sequence[int]], level: Sequence[int]) -> None:
        super().__init__()
        column = indices([*chain.from_iterable(map(sorted, parents))])
        row = torch.arange(len(parents), device="cpu").repeat_interleave(
            indices([*map(len, parents)])
        )
        by_level, order = indices(level)[row].sort(stable=True)
        counts: Any = by_level.unique_consecutive(return_counts=True)[1]
        parts = torch.stack([row, column], -1)[order].split(counts.tolist())
        modules = [SparseMatrix(own[:, 0], own[:, 1], len(parents)) for own in parts]
        #: the pairs of each level, those of one level independent of each other
        self.levels: Iterable[SparseMatrix] = nn.ModuleList(modules)  # type: ignore[assignment]

    def pairs(self) -> Tensor:
        """The later and the earlier coordinates of all pairs, shape ``(2, E)``."""
        return torch.cat([torch.stack([own.row, own.column]) for own in self.levels], -1)

    @torch.no_grad()
    def set_(self, weight: Tensor) -> None:
        """Sets the coefficients of all pairs, shape ``(E,)``."""
        for own, part in zip(self.levels, weight.split([len(own.row) for own in self.levels])):
            own.set_(part)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        for own in self.levels:
            y = y + own(y)
        return y, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y
        for own in self.levels:
            x = x - own(y)
        return x, y.new_zeros(y.shape[:-1])

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            moved = [own(score, is_transposed=True) for own in self.levels]
            score = score - torch.stack(moved).sum(0)
        return *self.call_and_ladj(x), score
