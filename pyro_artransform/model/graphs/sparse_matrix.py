# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Constant sparse matrices, whose products with vectors have gradients."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SparseMatrix(nn.Module):
    """A constant sparse matrix ``(dim, dim)``, initially zero, whose products have gradients by vectors.

    Its entries are kept by row and by column, since a product with compressed columns takes forty times as
    long as with compressed rows.

    :param row: the rows of the entries, sorted, shape ``(E,)``.
    :param column: their columns, shape ``(E,)``.
    :param like: a tensor of the dtype of the entries; by default they have PyTorch's default dtype.
    """

    row: Tensor
    column: Tensor
    order: Tensor
    row_by_column: Tensor
    starts: Tensor
    starts_of_columns: Tensor
    weight: Tensor
    weight_by_column: Tensor

    def __init__(self, row: Tensor, column: Tensor, dim: int, like: Tensor | None = None) -> None:
        super().__init__()
        self._dim, order = dim, column.argsort(stable=True)
        starts = [
            torch.cat([index.new_zeros(1), index.bincount(minlength=dim).cumsum(0)])
            for index in (row, column)
        ]
        buffers = {"row": row, "column": column, "order": order, "row_by_column": row[order]}
        buffers |= {"starts": starts[0], "starts_of_columns": starts[1]}
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.contiguous(), persistent=False)
        if like is None:
            like = nn.Linear(1, 1).weight.detach()  # has PyTorch's default dtype and device
        for name in ("weight", "weight_by_column"):
            self.register_buffer(name, like.new_zeros(len(row)))
        with warnings.catch_warnings():  # PyTorch says once that compressed rows are in beta state
            warnings.simplefilter("ignore", UserWarning)
            self._matrices()

    @classmethod
    def of(cls, row: Tensor, column: Tensor, weight: Tensor, dim: int) -> "SparseMatrix":
        """The matrix with different entries, in any order."""
        order = (row * dim + column).argsort()
        found = cls(row[order], column[order], dim, weight)
        found.set_(weight[order])
        return found

    def set_(self, weight: Tensor) -> None:
        """Sets the entries ``(E,)``."""
        self.weight.copy_(weight)
        self.weight_by_column.copy_(weight[self.order])

    def forward(self, x: Tensor, is_transposed: bool = False) -> Tensor:
        """The matrix, or its transpose, times vectors ``(*, dim)``."""
        matrix, transposed = self._matrices()
        pair = (transposed, matrix) if is_transposed else (matrix, transposed)
        return _Product.apply(x, *pair)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        by_row = self.starts, self.column, self.weight
        by_column = self.starts_of_columns, self.row_by_column, self.weight_by_column
        options: Any = {"size": (self._dim, self._dim), "check_invariants": False}
        one, other = (torch.sparse_csr_tensor(*rows, **options) for rows in (by_row, by_column))
        return one, other


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
