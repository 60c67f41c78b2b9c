# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Linear layers of a structured flow: low-rank updates of a group, and links between elements of plates."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

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

    The coefficients are buffers: there are as many as pairs, and training them costs more than it gains
    (benchmarks/crossed.md).

    :param parents: for each coordinate, those that it depends on, without a cycle.
    :param level: for each coordinate, a number above those of its parents.
    """

    weight: Tensor

    def __init__(self, parents: Sequence[Sequence[int]], level: Sequence[int]) -> None:
        super().__init__()
        pairs = sorted((level[i], i, j) for i, own in enumerate(parents) for j in own)
        index = torch.tensor(pairs, dtype=torch.long, device="cpu").reshape(-1, 3)
        counts: Any = torch.unique_consecutive(index[:, 0], return_counts=True)[1]
        self._sizes = counts.tolist()
        parts = index[:, 1:].split(self._sizes)
        #: the pairs of each level, those of one level independent of each other
        self.levels = nn.ModuleList([SparsePairs(*part.T, len(parents)) for part in parts])
        like = nn.Linear(1, 1).weight.detach()  # has PyTorch's default dtype and device
        self.register_buffer("weight", like.new_zeros(len(pairs)))

    @property
    def child(self) -> Tensor:
        """The later coordinates of the pairs, in the order of the coefficients."""
        return torch.cat([cast(SparsePairs, pairs).child for pairs in self.levels])

    @property
    def parent(self) -> Tensor:
        """The earlier coordinates of the pairs."""
        return torch.cat([cast(SparsePairs, pairs).parent for pairs in self.levels])

    def _added(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """For each level, the function of all coordinates that is added."""
        for pairs, weight in zip(self.levels, self.weight.split(self._sizes)):
            yield partial(pairs, weight)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        for added in self._added():
            y = y + added(y)
        return y, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y
        for added in self._added():
            x = x - added(y)
        return x, y.new_zeros(y.shape[:-1])

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            moved = [added(score, is_transposed=True) for added in self._added()]
            score = score - torch.stack(moved).sum(0)
        return *self.call_and_ladj(x), score


class SparsePairs(nn.Module):
    """The places of a sparse matrix ``(dim, dim)``, whose product with vectors has a gradient by these.

    :param child: the rows, sorted, shape ``(E,)``.
    :param parent: the columns, shape ``(E,)``.
    """

    child: Tensor
    parent: Tensor
    order: Tensor
    starts: Tensor
    starts_of_parents: Tensor

    def __init__(self, child: Tensor, parent: Tensor, dim: int) -> None:
        super().__init__()
        self._dim, order = dim, parent.argsort(stable=True)
        starts = [
            torch.cat([index.new_zeros(1), index.bincount(minlength=dim).cumsum(0)])
            for index in (child, parent)
        ]
        buffers = {"child": child, "parent": parent, "order": order, "starts": starts[0]}
        for name, buffer in {**buffers, "starts_of_parents": starts[1]}.items():
            self.register_buffer(name, buffer.contiguous(), persistent=False)
        with warnings.catch_warnings():  # PyTorch says once that compressed rows are in beta state
            warnings.simplefilter("ignore", UserWarning)
            self._matrix(torch.zeros_like(child), is_transposed=False)

    def forward(self, weight: Tensor, x: Tensor, is_transposed: bool = False) -> Tensor:
        """The matrix with these entries ``(E,)``, or its transpose, times vectors ``(*, dim)``."""
        matrix, other = (self._matrix(weight, flag) for flag in (is_transposed, not is_transposed))
        return _Product.apply(x, matrix, other)

    def _matrix(self, weight: Tensor, is_transposed: bool) -> Tensor:
        rows = self.starts, self.parent, weight
        if is_transposed:
            rows = self.starts_of_parents, self.child[self.order], weight[self.order]
        size = (self._dim, self._dim)
        return torch.sparse_csr_tensor(*rows, size, check_invariants=False)


class _Product(torch.autograd.Function):
    """A sparse matrix times vectors ``(*, D)``; the gradient uses the transposed matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return _times(matrix, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _times(ctx.transposed, gradient), None, None


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.reshape(-1, x.shape[-1]).T.contiguous()).T.reshape(x.shape)
