# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""A masked multilayer perceptron, evaluated block by block.

Coordinates are sorted by the level of the graph and hidden units by the step at which all that they
read is known, so that the inputs, the units and the outputs of a range of levels are contiguous slices of
the weights. Opening a block computes, once, what the known coordinates contribute to it; evaluating it
then costs the small square of the block alone; closing it makes its coordinates known. All blocks
together touch each weight about once: the price of one forward pass.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class BlockLayout(NamedTuple):
    """Where each level begins, among the sorted coordinates and among the units of each layer.

    :param natural: whether the coordinates are in the order of their levels.
    :param levels: ``levels[k]`` coordinates come before level k; ``depth + 1`` entries.
    :param units: for each hidden layer, ``units[k]`` of its units are known once the coordinates
        before level k are; ``depth`` entries.
    """

    natural: bool
    levels: list[int]
    units: list[list[int]]


def block_layout(level: Sequence[int], unit_levels: Sequence[Sequence[int]]) -> BlockLayout:
    """The layout of a network; plain integers, so that it can be made while tensors are traced.

    :param level: the level of each coordinate.
    :param unit_levels: for each hidden layer, the level before which all that a unit reads is known.
    """
    depth = max(level) + 1
    sizes = [[0] * depth for _ in (level, *unit_levels)]
    for counts, members in zip(sizes, (level, *unit_levels)):
        for k in members:
            counts[k] += 1
    levels, *units = [list(accumulate(counts)) for counts in sizes]
    return BlockLayout(list(level) == sorted(level), [0, *levels], units)


class Weights(NamedTuple):
    """Masked weights in sorted order, and the bias of each layer; the first may hold a context.

    :param inner: of the hidden layers, shape ``(H, D)`` for the first, ``(H', H)`` for those after it.
    :param last: shape ``(P, D, H)``.
    :param skip: from the inputs to the outputs, shape ``(P, D, D)``, or None.
    :param biases: of the hidden layers, each of shape ``(H,)`` or ``(B, H)``.
    :param last_bias: shape ``(P, D)``.
    """

    inner: list[Tensor]
    last: Tensor
    skip: Tensor | None
    biases: list[Tensor]
    last_bias: Tensor

    def sorted(self, order: Tensor) -> "Weights":
        """The same with the coordinates in another order, shape ``(D,)``."""
        return self._replace(
            inner=[self.inner[0][:, order], *self.inner[1:]],
            last=self.last[:, order],
            skip=None if self.skip is None else self.skip[:, order][..., order],
            last_bias=self.last_bias[:, order],
        )


class KnownColumns:
    """Columns that become known from left to right.

    :param like: a tensor of shape ``(B, *)``, whose dtype and device are used.
    :param width: the number of columns in the end.
    :param in_place: whether to write them into one tensor, which autograd and ``torch.func`` cannot follow.
    """

    def __init__(self, like: Tensor, width: int, in_place: bool) -> None:
        self.count = 0
        self._columns = like.new_empty((like.shape[0], width)) if in_place else like[:, :0]
        self._in_place = in_place

    def append(self, columns: Tensor, count: int) -> None:
        """Adds the first ``count`` of some columns."""
        columns = columns[:, :count]
        if self._in_place:
            self._columns[:, self.count : self.count + count] = columns
        else:
            self._columns = torch.cat([self._columns, columns], -1)
        self.count += count

    def get(self) -> Tensor:
        """What is known, shape ``(B, count)``."""
        return self._columns[:, : self.count]


class MLPBlocks:
    """The :class:`~.base.Blocks` of one network at one batch.

    :param layout: the sorted layout.
    :param order: the coordinates sorted by level, or None if they are in that order already.
    :param weights: the sorted weights.
    :param nonlinearity: the elementwise activation.
    :param like: a tensor of shape ``(B, D)``, whose dtype and device are used.
    :param in_place: see :class:`KnownColumns`.
    """

    def __init__(
        self,
        layout: BlockLayout,
        order: Tensor | None,
        weights: Weights,
        nonlinearity: Callable[[Tensor], Tensor],
        like: Tensor,
        in_place: bool,
    ) -> None:
        self.order, self.levels = order, layout.levels
        self.work = sum(w.numel() for w in (*weights.inner, weights.last))
        self._units, self._weights = layout.units, weights
        self._act = nonlinearity
        self._batch = like.shape[0]
        # the inputs, then the units of each hidden layer
        widths = [layout.levels[-1], *(units[-1] for units in layout.units)]
        self._known = [KnownColumns(like, width, in_place) for width in widths]

    def open(self, start: int, stop: int) -> None:
        """See :class:`~.base.Blocks`."""
        first, last = self.levels[start], self.levels[stop]
        self._first, self._width = first, last - first
        self._complete(start)
        moving = range(len(self._units)) if stop > start + 1 else ()
        self._base = [self._affine(i, self._rows(i, start, stop)) for i in moving]
        self._square = [self._inside(i, start, stop) for i in moving]
        self._moved: list[Tensor] = []
        self._open_outputs(first, last, self._rows(-1, start, stop))

    def _open_outputs(self, first: int, last: int, moving: slice) -> None:
        """What is known contributes to the block's parameters, and the weights of what is not."""
        weights, hidden = self._weights, self._known[-1]
        rows = weights.last[:, first:last]
        bias = weights.last_bias[:, first:last].reshape(-1)
        known = rows[..., : hidden.count].flatten(0, 1).T
        self._out_base = _add_product(bias, hidden, known)
        self._out = rows[..., moving].flatten(0, 1).T
        self._skip = None
        if weights.skip is not None:
            skip = weights.skip[:, first:last]
            known = skip[..., :first].flatten(0, 1).T
            self._out_base = _add_product(self._out_base, self._known[0], known)
            self._skip = skip[..., first:last].flatten(0, 1).T

    def params(self, x: Tensor | None) -> Tensor:
        """See :class:`~.base.Blocks`."""
        out = self._out_base
        if x is not None:
            hidden, self._moved = x, []
            for base, weight in zip(self._base, self._square):
                hidden = self._act(torch.addmm(base, hidden, weight))
                self._moved.append(hidden)
            out = torch.addmm(out, hidden, self._out)
            if self._skip is not None:
                out = torch.addmm(out, x, self._skip)
        else:
            out = out.expand(self._batch, out.shape[-1])
        count = out.shape[-1] // self._width
        return out.reshape(self._batch, count, self._width).transpose(1, 2)

    def close(self, x: Tensor, levels: int) -> None:
        """See :class:`~.base.Blocks`; the units are those of the last evaluation."""
        inputs, *layers = self._known
        inputs.append(x, self.levels[levels] - inputs.count)
        for hidden, moved, units in zip(layers, self._moved, self._units):
            hidden.append(moved, units[levels - 1] - hidden.count)

    def _complete(self, start: int) -> None:
        """Computes the units that can be known now and are not yet."""
        for i, (hidden, units) in enumerate(zip(self._known[1:], self._units)):
            count = units[start] - hidden.count
            if count:
                new = self._act(self._affine(i, slice(hidden.count, units[start])))
                hidden.append(new.expand(self._batch, count), count)

    def _affine(self, i: int, rows: slice) -> Tensor:
        """What is known contributes to some units of a layer, shape ``(B, number of units)``."""
        bias = self._weights.biases[i][..., rows]
        weight = self._weights.inner[i][rows, : self._known[i].count]
        return _add_product(bias, self._known[i], weight.T)

    def _rows(self, i: int, start: int, stop: int) -> slice:
        """The units of a layer that depend on the block's coordinates."""
        return slice(self._units[i][start], self._units[i][stop - 1])

    def _inside(self, i: int, start: int, stop: int) -> Tensor:
        """The weights from the block's own part of one layer to its part of the next, transposed."""
        own = slice(self._first, self._first + self._width)
        columns = self._rows(i - 1, start, stop) if i else own
        return self._weights.inner[i][self._rows(i, start, stop), columns].T


def _add_product(bias: Tensor, known: KnownColumns, weight: Tensor) -> Tensor:
    """``bias + known @ weight``; the bias alone, which broadcasts, while nothing is known."""
    return torch.addmm(bias, known.get(), weight) if known.count else bias
