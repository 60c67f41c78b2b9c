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
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The sorted layout of a network.

    :param order: the coordinates sorted by level, or None if they are in that order already.
    :param levels: ``levels[k]`` coordinates come before level k; ``depth + 1`` entries.
    :param units: for each hidden layer, ``units[k]`` of its units are known once the coordinates
        before level k are; ``depth`` entries.
    """

    order: Tensor | None
    levels: list[int]
    units: list[list[int]]


def layout(level: Tensor, steps: Sequence[Tensor]) -> Layout:
    """The layout of a network.

    :param level: the level of each coordinate, shape ``(D,)``.
    :param steps: for each hidden layer, the step at which each unit is known, sorted.
    """
    order = level.argsort(stable=True)
    natural = torch.equal(order, torch.arange(len(order), device=order.device))
    depth = int(level.max()) + 1
    counts = [int((level < k).sum()) for k in range(depth + 1)]
    units = [[int((step <= k).sum()) for k in range(depth)] for step in steps]
    return Layout(None if natural else order, counts, units)


class Weights(NamedTuple):
    """Masked weights in sorted order, and the bias of each layer; the first may hold a context.

    :param first: shape ``(H, D)``.
    :param hidden: between hidden layers, each of shape ``(H', H)``.
    :param last: shape ``(P, D, H)``.
    :param skip: from the inputs to the outputs, shape ``(P, D, D)``, or None.
    :param biases: of the hidden layers, each of shape ``(H,)`` or ``(B, H)``.
    :param last_bias: shape ``(P, D)``.
    """

    first: Tensor
    hidden: list[Tensor]
    last: Tensor
    skip: Tensor | None
    biases: list[Tensor]
    last_bias: Tensor

    def sorted(self, order: Tensor) -> "Weights":
        """The same with the coordinates in another order, shape ``(D,)``."""
        return self._replace(
            first=self.first[:, order],
            last=self.last[:, order],
            skip=None if self.skip is None else self.skip[:, order][..., order],
            last_bias=self.last_bias[:, order],
        )


class MLPBlocks:
    """The evaluation of one network at one batch, from the first level to the last.

    :param layout: the sorted layout.
    :param weights: the sorted weights.
    :param nonlinearity: the elementwise activation.
    :param known: an empty tensor of shape ``(B, 0)``, of the dtype and device of the inputs.
    """

    def __init__(
        self,
        layout: Layout,
        weights: Weights,
        nonlinearity: Callable[[Tensor], Tensor],
        known: Tensor,
    ) -> None:
        self._layout, self._weights, self._act = layout, weights, nonlinearity
        self._known = known
        self._hidden = [known for _ in layout.units]

    @property
    def order(self) -> Tensor | None:
        """The coordinates sorted by level, or None if they are in that order already."""
        return self._layout.order

    @property
    def levels(self) -> list[int]:
        """``levels[k]`` coordinates come before level k; ``depth + 1`` entries."""
        return self._layout.levels

    def open(self, start: int, stop: int) -> None:
        """Begins the block of the levels ``start`` to ``stop - 1``; all before it are closed.

        :param start: its first level.
        :param stop: one more than its last level.
        """
        first, last = self._layout.levels[start], self._layout.levels[stop]
        self._complete(start)
        self._base = [self._preactivation(i, start, stop - 1) for i in range(len(self._hidden))]
        w = self._weights
        ready = self._hidden[-1].shape[-1]
        moving = self._layout.units[-1][stop - 1]
        rows = w.last[:, first:last]
        bias = w.last_bias[:, first:last].reshape(-1)
        self._out_base = torch.addmm(bias, self._hidden[-1], rows[..., :ready].flatten(0, 1).T)
        self._out = rows[..., ready:moving].flatten(0, 1).T
        self._skip = None
        if w.skip is not None:
            known = w.skip[:, first:last, :first].flatten(0, 1).T
            self._out_base = torch.addmm(self._out_base, self._known, known)
            self._skip = w.skip[:, first:last, first:last].flatten(0, 1).T
        self._first, self._width = first, last - first
        self._moving = [self._square(i, start, stop - 1) for i in range(len(self._hidden))]
        self._moved = [base[:, :0] for base in self._base]

    def params(self, x: Tensor | None) -> Tensor:
        """The parameters of the block's coordinates.

        :param x: the block's coordinates, shape ``(B, n)``, or None for a block of one level, whose
            parameters do not depend on them.
        :return: shape ``(B, n, P)``.
        """
        out = self._out_base
        if x is not None:
            hidden = x
            self._moved = []
            for base, weight in zip(self._base, self._moving):
                hidden = self._act(torch.addmm(base, hidden, weight))
                self._moved.append(hidden)
            out = torch.addmm(out, hidden, self._out)
            if self._skip is not None:
                out = torch.addmm(out, x, self._skip)
        return out.unflatten(-1, (-1, self._width)).transpose(-1, -2)

    def close(self, x: Tensor, levels: int) -> None:
        """Makes the first levels of the block known, with the units of the last evaluation.

        :param x: the values of their coordinates, shape ``(B, n)``.
        :param levels: the level up to which, not included, all is known then.
        """
        self._known = torch.cat([self._known, x], -1)
        for i, moved in enumerate(self._moved):
            count = self._layout.units[i][levels - 1] - self._hidden[i].shape[-1]
            if count > 0:
                self._hidden[i] = torch.cat([self._hidden[i], moved[:, :count]], -1)

    def _complete(self, start: int) -> None:
        """Computes the units that can be known now and are not yet."""
        for i, done in enumerate(self._hidden):
            end = self._layout.units[i][start]
            if end > done.shape[-1]:
                new = self._act(self._affine(i, slice(done.shape[-1], end)))
                self._hidden[i] = torch.cat([done, new], -1)

    def _affine(self, i: int, rows: slice) -> Tensor:
        """What is known contributes to some units of a layer, shape ``(B, number of units)``."""
        source = self._known if i == 0 else self._hidden[i - 1]
        weight = self._weights.first if i == 0 else self._weights.hidden[i - 1]
        bias = self._weights.biases[i][..., rows]
        return torch.addmm(bias, source, weight[rows, : source.shape[-1]].T)

    def _preactivation(self, i: int, start: int, last: int) -> Tensor:
        units = self._layout.units[i]
        return self._affine(i, slice(units[start], units[last]))

    def _square(self, i: int, start: int, last: int) -> Tensor:
        """The weights from a block's own part of one layer to its part of the next, transposed."""
        rows = slice(self._layout.units[i][start], self._layout.units[i][last])
        if i == 0:
            return self._weights.first[rows, self._first : self._first + self._width].T
        columns = slice(self._layout.units[i - 1][start], self._layout.units[i - 1][last])
        return self._weights.hidden[i - 1][rows, columns].T
