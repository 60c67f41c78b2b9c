# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""A masked multilayer perceptron, evaluated block by block.

Coordinates are sorted by level in the graph, and hidden units by the step at which all their inputs are
known, so that a range of levels is a contiguous slice of the weights. Opening a block computes, once, the
contribution of the known coordinates; each evaluation then uses only the small square of weights within the
block. All blocks together use each weight about once, like a forward pass. A triangular system in the
Jacobian is solved in the same way, from the last block of levels to the first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

_SIZE = 8  # coordinates per adjoint solve


class BlockLayout(NamedTuple):
    """Where levels begin among the sorted coordinates and units, as Python integers, which tracing needs."""

    natural: bool  # whether the coordinates already are in the order of levels
    levels: list[int]  # levels[k] coordinates come before level k; depth + 1 entries
    #: ``units[i][k]`` units of hidden layer i depend only on coordinates before level k.
    units: list[list[int]]


class Weights(NamedTuple):
    """The masked weights and the biases of all layers."""

    inner: list[Tensor]  # of the hidden layers, (H, D) for the first, (H', H) for later ones
    last: Tensor  # (P, D, H)
    skip: Tensor | None  # from inputs to outputs, (P, D, D)
    biases: list[Tensor]  # of the hidden layers, (H,), or (B, H) for the first with a context
    last_bias: Tensor  # (P, D)

    def sorted_by(self, order: Tensor | None) -> "Weights":
        """The weights with coordinates in another order."""
        if order is None:
            return self
        first, *others = self.inner
        skip = None if self.skip is None else self.skip[:, order][..., order]
        last, last_bias = self.last[:, order], self.last_bias[:, order]
        return Weights([first[:, order], *others], last, skip, self.biases, last_bias)


class MLPBlocks:
    """The :class:`~.base.Blocks` of one network at one batch."""

    single_levels: bool = False

    def __init__(
        self,
        layout: BlockLayout,
        order: Tensor | None,
        weights: Weights,
        nonlinearity: Callable[[Tensor], Tensor],
        like: Tensor,
    ) -> None:
        self.order, self.levels = order, layout.levels
        self._units, self._weights, self._act = layout.units, weights, nonlinearity
        self._batch = like.shape[0]
        # the known inputs, the known units of each hidden layer, and the numbers of these columns
        self._known = [like[:, :0]] * (1 + len(layout.units))
        self._counts = [0] * len(self._known)

    def open(self, start: int, stop: int) -> None:
        # the units whose inputs are now known
        for i, units in enumerate(self._units):
            if count := units[start] - self._counts[i + 1]:
                new = self._act(self._affine(i, slice(units[start] - count, units[start])))
                self._add_known(i + 1, new.expand(self._batch, count), count)
        # the block's own coordinates, and the units of each layer that depend on them
        own = [slice(self.levels[start], self.levels[stop])]
        own += [slice(units[start], units[stop - 1]) for units in self._units]
        self._base: list[Tensor] = []
        self._square: list[Tensor] = []
        self._moved: list[Tensor] = []
        if stop > start + 1:  # the units of a single level become known later
            for i, weight in enumerate(self._weights.inner):
                self._base.append(self._affine(i, own[i + 1]))
                self._square.append(weight[own[i + 1], own[i]].T)
        self._width = own[0].stop - own[0].start
        # the contribution of known units to the block's parameters, and the weights of the other units
        rows, bias = self._weights.last[:, own[0]], self._weights.last_bias[:, own[0]]
        self._out_base = self._with_known(-1, bias.reshape(-1), rows)
        self._out, self._skip = rows[..., own[-1]].flatten(0, 1).T, None
        if self._weights.skip is not None:
            rows = self._weights.skip[:, own[0]]
            self._out_base = self._with_known(0, self._out_base, rows)
            self._skip = rows[..., own[0]].flatten(0, 1).T

    def params(self, x: Tensor | None) -> Tensor:
        out = self._out_base
        if x is None:
            out = out.expand(self._batch, out.shape[-1])
        else:
            hidden, self._moved = x, []
            for base, weight in zip(self._base, self._square):
                hidden = self._act(torch.addmm(base, hidden, weight))
                self._moved.append(hidden)
            out = torch.addmm(out, hidden, self._out)
            if self._skip is not None:
                out = torch.addmm(out, x, self._skip)
        num_params = out.shape[-1] // self._width
        return out.reshape(self._batch, num_params, self._width).mT

    def close(self, x: Tensor, levels: int) -> None:
        """See :class:`~.base.Blocks`; uses the units of the last evaluation."""
        self._add_known(0, x, self.levels[levels] - self._counts[0])
        for i, (moved, units) in enumerate(zip(self._moved, self._units), 1):
            self._add_known(i, moved, units[levels - 1] - self._counts[i])

    def linearization(self) -> None:
        """See :class:`~.base.Blocks`; gradients take another evaluation."""

    def _add_known(self, i: int, columns: Tensor, count: int) -> None:
        """Adds the first columns as known; their number is a tensor during tracing."""
        self._known[i] = torch.cat([self._known[i], columns[:, :count]], -1)
        self._counts[i] += count

    def _with_known(self, i: int, bias: Tensor, weight: Tensor) -> Tensor:
        """``bias + known @ weight.T`` for a weight ``(*, N)``; only the bias if none is known."""
        if not (count := self._counts[i]):
            return bias
        return torch.addmm(bias, self._known[i], weight[..., :count].reshape(-1, count).T)

    def _affine(self, i: int, rows: slice) -> Tensor:
        """The known contribution to some units of a layer, shape ``(B, number of units)``."""
        return self._with_known(i, self._weights.biases[i][..., rows], self._weights.inner[i][rows])


@dataclass(eq=False)
class MLPLinearization:
    """The :class:`~.base.Linearization` of one network at one batch."""

    params: Tensor
    layout: BlockLayout
    order: Tensor | None  # the coordinates sorted by level
    weights: Weights  # masked, in the original order of coordinates
    slopes: list[Tensor]  # the derivatives of the activations, (B, H) per hidden layer

    def pull_back(self, weights: Tensor) -> Tensor:
        network, rows = self.weights, weights.mT.flatten(1)
        pulled = self._through_layers(network, rows @ network.last.flatten(0, 1), slice(None), 0)
        if network.skip is not None:
            pulled = pulled + rows @ network.skip.flatten(0, 1)
        return pulled

    def solve_adjoint(self, slopes: Tensor, gradient: Tensor) -> Tensor:
        slopes, rest, order, levels = slopes.mT, gradient, self.order, self.layout.levels
        if order is not None:
            slopes, rest = slopes[..., order], rest[..., order]
        weights, done = self.weights.sorted_by(order), []
        carried: Tensor | None = None  # the derivatives of later blocks in the last hidden units
        stop = len(levels) - 1
        while stop > 0:
            start = stop - 1
            while start > 0 and levels[stop] - levels[start - 1] <= _SIZE:
                start -= 1
            own = slice(levels[start], levels[stop])
            known = rest[:, own]
            if carried is not None:
                known = known + self._through_layers(weights, carried, own, start)
            v = known
            if stop > start + 1:
                square = self._square(weights, -slopes[..., own], start, stop)
                # unitriangular: the diagonal is taken as ones
                options = {"upper": False, "left": False, "unitriangular": True}
                v = solve_triangular(square, known[:, None], **options)[:, 0]
            done.append(v)
            if start == 0:
                break
            weighted = (slopes[..., own] * v[:, None]).flatten(1)
            added = weighted @ weights.last[:, own].flatten(0, 1)
            carried = added if carried is None else carried + added
            if weights.skip is not None:
                rest = rest + weighted @ weights.skip[:, own].flatten(0, 1)
            stop = start
        v = torch.cat(done[::-1], -1)
        return v if order is None else torch.empty_like(v).index_copy_(-1, order, v)

    def _square(self, weights: Weights, slopes: Tensor, start: int, stop: int) -> Tensor:
        """The Jacobian of some levels in their own coordinates, ``(B, n, n)``, strictly lower triangular."""
        own = slice(self.layout.levels[start], self.layout.levels[stop])
        # the units that the block feeds and that feed the block
        units = [slice(places[start], places[stop - 1]) for places in self.layout.units]
        last = weights.last[:, own, units[-1]]
        skip = None if weights.skip is None else weights.skip[:, own, own]
        if len(weights.inner) == 1:
            # products of weights first, since they do not depend on rows, and are few
            first, slope = weights.inner[0][units[0], own], self.slopes[0][:, units[0]]
            products = last[:, :, None] * first.T
            flat = products.flatten(0, 2).T
            rows = slope @ flat if skip is None else torch.addmm(skip.flatten(), slope, flat)
            return (slopes[..., None] * rows.view(-1, *products.shape[:3])).sum(1)
        rows = slopes.permute(2, 0, 1) @ last.transpose(0, 1)  # (n, B, units)
        layers = zip(weights.inner, self.slopes, units, [own, *units[:-1]])
        for weight, slope, unit, reader in [*layers][::-1]:
            rows = (rows * slope[:, unit]) @ weight[unit, reader]
        if skip is not None:
            rows = rows + slopes.permute(2, 0, 1) @ skip.transpose(0, 1)
        return rows.transpose(0, 1).contiguous()

    def _through_layers(self, network: Weights, by_units: Tensor, own: slice, start: int) -> Tensor:
        """Backpropagates from the last hidden units, ``(B, H)``, to the inputs from a level on."""
        # the units that depend on these inputs, directly or indirectly
        readers = [slice(places[start], None) for places in self.layout.units]
        pulled = by_units[:, readers[-1]]
        layers = zip(network.inner, self.slopes, readers, [own, *readers[:-1]])
        for weight, slope, units, inputs in [*layers][::-1]:
            pulled = (pulled * slope[:, units]) @ weight[units, inputs]
        return pulled
