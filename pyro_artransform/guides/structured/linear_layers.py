# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Linear layers of a structured flow: low-rank updates of a group, and links between elements of plates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...flows.transforms import FlowModule


class LowRankUpdate(FlowModule):
    r"""A low-rank update of the identity on some coordinates, initially the identity.

    .. math:: y_S = x_S + U V^\top x_S, \qquad \log |\det J| = \log |\det(I + V^\top U)|

    :param coordinates: the n coordinates S of D.
    :param rank: the number r of columns of U and V.
    """

    coordinates: Tensor

    def __init__(self, coordinates: Sequence[int], rank: int) -> None:
        super().__init__()
        index = torch.tensor(coordinates, dtype=torch.long, device="cpu")
        self.register_buffer("coordinates", index, persistent=False)
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

    :param parents: for each coordinate, those that it depends on, without a cycle.
    """

    child: Tensor
    parent: Tensor

    def __init__(self, parents: Sequence[Sequence[int]], level: Sequence[int]) -> None:
        super().__init__()
        pairs = [(level[i], i, j) for i, own in enumerate(parents) for j in own]
        pairs.sort()
        index = torch.tensor(pairs, dtype=torch.long, device="cpu").reshape(-1, 3)
        self.register_buffer("child", index[:, 1].contiguous(), persistent=False)
        self.register_buffer("parent", index[:, 2].contiguous(), persistent=False)
        counts: Any = torch.unique_consecutive(index[:, 0], return_counts=True)[1]
        self._sizes = counts.tolist()
        like = nn.Linear(1, 1).weight.detach()
        self.weight = nn.Parameter(like.new_zeros(len(pairs)))

    def _added(self, known: Tensor, rows: Sequence[Tensor]) -> Tensor:
        child, parent, weight = rows
        return _LinearMap.apply(weight, known, child, parent)

    def _levels(self) -> list[tuple[Tensor, ...]]:
        parts = (v.split(self._sizes) for v in (self.child, self.parent, self.weight))
        return [*zip(*parts)]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        for rows in self._levels():
            y = y + self._added(y, rows)
        return y, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        for_all = self.child, self.parent, self.weight
        return y - self._added(y, for_all), y.new_zeros(y.shape[:-1])

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            moved = _matrix(self.weight, self.parent, self.child, score.shape[-1])
            score = score - _times(moved, score)
        return *self.call_and_ladj(x), score


class _LinearMap(torch.autograd.Function):
    """A sparse matrix times vectors ``(*, D)``, with gradients by its entries and by the vectors."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, child: Tensor, parent: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x, child, parent)
        return _times(_matrix(weight, child, parent, x.shape[-1]), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, child, parent = ctx.saved_tensors
        rows, known = gradient.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1])
        by_weight = (rows.T.index_select(0, child) * known.T.index_select(0, parent)).sum(-1)
        by_x = _times(_matrix(weight, parent, child, x.shape[-1]), gradient)
        return by_weight, by_x, None, None


def _matrix(weight: Tensor, child: Tensor, parent: Tensor, dim: int) -> Tensor:
    index = torch.stack([child, parent])
    return torch.sparse_coo_tensor(index, weight, (dim, dim), check_invariants=False)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return torch.sparse.mm(matrix, flat.T).T.reshape(x.shape)
