# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Permutations of the coordinates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .flow_module import FlowModule


class PermutationTransform(FlowModule):
    r"""Reorders the coordinates.

    .. math::

        y_k = x_{\mathrm{order}_k}

    :param order: a permutation of 0 .. D-1, shape ``(D,)``; it becomes a buffer, saved with parameters.
    :param cache_size: as for :class:`FlowModule`.
    :raises ValueError: if it is no permutation.

    Example::

        >>> import torch
        >>> PermutationTransform(torch.tensor([2, 0, 1]))(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 1., 2.])
    """

    order: Tensor

    def __init__(self, order: Tensor | Sequence[int], *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        order = torch.as_tensor(order)
        if order.dim() != 1 or sorted(order.tolist()) != list(range(len(order))):
            raise ValueError(f"order: expected a permutation of 0 .. D-1, got {order.tolist()}")
        self.register_buffer("order", order.long())

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._pick(x, self.order)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._pick(y, self.order.argsort())

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.call_and_ladj(x), score[..., self.order]

    def _pick(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1:] != index.shape:
            raise ValueError(f"x: expected shape (*, {len(index)}), got {tuple(x.shape)}")
        return x[..., index], x.new_zeros(x.shape[:-1])
