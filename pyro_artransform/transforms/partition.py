# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A transform for each part of the coordinates."""

from collections.abc import Callable, Sequence
from itertools import chain as concatenated

import torch
from torch import Tensor, nn

from .flow_module import FlowModule


class PartitionTransform(FlowModule):
    r"""Transforms disjoint sets of coordinates, each by a transform of its own.

    .. math::

        y_{S_k} = T_k(x_{S_k})

    :param parts: for each set its coordinates and the transform of vectors of their number.
    :param cache_size: as for :class:`FlowModule`.
    :raises TypeError: if a transform is none of this package.
    :raises ValueError: if the sets are not a partition of 0 .. D-1.

    Example::

        >>> import torch
        >>> from pyro_artransform import affine_autoregressive
        >>> t = PartitionTransform([([0, 2], affine_autoregressive(2)), ([1], affine_autoregressive(1))])
        >>> t(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    order: Tensor  # the coordinates of all parts, one after the other
    inverse_order: Tensor

    def __init__(
        self, parts: Sequence[tuple[Sequence[int], FlowModule]], *, cache_size: int = 1
    ) -> None:
        super().__init__(cache_size=cache_size)
        sets = [list(coordinates) for coordinates, _ in parts]
        order = list(concatenated.from_iterable(sets))
        if not order or sorted(order) != list(range(len(order))):
            raise ValueError(f"parts: expected a partition of 0 .. D-1, got {sets}")
        self.transforms = nn.ModuleList()
        for _, transform in parts:
            if not isinstance(transform, FlowModule):
                raise TypeError(
                    f"parts: expected transforms of this package, got {type(transform).__name__}"
                )
            self.transforms.append(transform)
        self._sizes = [len(coordinates) for coordinates in sets]
        index = torch.tensor(order, dtype=torch.long, device="cpu")
        self.register_buffer("order", index, persistent=False)
        self.register_buffer("inverse_order", index.argsort(), persistent=False)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self._each(lambda t, x: t.call_and_ladj(x), x)
        return y, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._each(lambda t, y: t.inverse_and_ladj(y), y)
        return x, ladj

    def inverse_at(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        back, ladj = self._each(lambda t, x, y: t.inverse_at(x, y), x, y)
        return back, ladj

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj, score = self._each(lambda t, x, s: t.call_and_score(x, s), x, score)
        return y, ladj, score

    def _each(self, run: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
        """Runs each transform on its coordinates; log-determinants, the second output, are added."""
        split = [x.index_select(-1, self.order).split(self._sizes, -1) for x in inputs]
        outputs = [run(t, *parts) for t, *parts in zip(self.transforms, *split)]
        joined = []
        for k, parts in enumerate(zip(*outputs)):
            if k == 1:
                joined.append(sum(parts[1:], parts[0]))
            else:
                joined.append(torch.cat(parts, -1).index_select(-1, self.inverse_order))
        return joined
