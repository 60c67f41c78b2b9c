# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Networks linearized at known points: pull-backs of their derivative, and adjoint solves with it.

A triangular system in the Jacobian of a flow is solved by substitution, from the last level of the graph
to the first. All blocks of levels of a :class:`MaskedMLP` together touch each weight about once.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.linalg import solve_triangular
from torch.nn.functional import silu

from .activations import slope_of
from .blocks import BlockLayout, Weights

if TYPE_CHECKING:
    from .parents_mlp import ParentsGroup, ParentsMLP

# coordinates in a block: as fast as 10, 12 and 20 from 10 to 200 dimensions (benchmarks/steps.md)
_SIZE = 16


@dataclass(eq=False)
class MLPLinearization:
    """The :class:`~.base.Linearization` of one network at one batch."""

    params: Tensor
    layout: BlockLayout
    order: Tensor | None  # the coordinates by level
    weights: Weights  # masked, in the coordinates' own order
    slopes: list[Tensor]  # the derivatives of the activations of each hidden layer, (B, H)

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
        weights, done = self.weights.sorted_by(order), list[Tensor]()
        carried: Tensor | None = None  # the derivatives of later blocks by the last hidden units
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
                # the routine takes the diagonal as ones, whatever is there
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
        """The derivative of some levels by themselves, shape ``(B, n, n)``, strictly lower triangular."""
        own = slice(self.layout.levels[start], self.layout.levels[stop])
        # the units that read the block and are read by it
        units = [slice(places[start], places[stop - 1]) for places in self.layout.units]
        last = weights.last[:, own, units[-1]]
        skip = None if weights.skip is None else weights.skip[:, own, own]
        if len(weights.inner) == 1:
            # the products of weights first: they have no rows, and are few
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
        """The derivatives by inputs from a level on, from those by the last hidden units, ``(B, H)``."""
        # the units that read these inputs, if only through others
        readers = [slice(places[start], None) for places in self.layout.units]
        pulled = by_units[:, readers[-1]]
        layers = zip(network.inner, self.slopes, readers, [own, *readers[:-1]])
        for weight, slope, units, inputs in [*layers][::-1]:
            pulled = (pulled * slope[:, units]) @ weight[units, inputs]
        return pulled


class Activations:
    """The inputs and hidden units of a group of m networks at B points, filled level by level."""

    def __init__(self, group: "ParentsGroup", like: Tensor) -> None:
        self.group = group
        m, h, k = group.inner.shape
        self.x = like.new_empty(m, k, len(like))  # the values of the parents
        self.before = like.new_empty(m, h, len(like))  # the hidden units before the activation
        self.hidden = torch.empty_like(self.before)

    def fill(self, known: Tensor, index: Tensor, rows: slice) -> None:
        """Computes some rows from coordinates at an index of shape ``(m, k)``, in place."""
        group, x, before = self.group, self.x[rows], self.before[rows]
        torch.index_select(known, 0, index[rows].reshape(-1), out=x.view(-1, x.shape[-1]))
        torch.baddbmm(group.inner_bias[rows], group.inner[rows], x, out=before)
        self.hidden[rows] = silu(before)

    def outputs(self, rows: slice) -> Tensor:
        """The parameters of some rows, shape ``(m, P, B)``."""
        linear = self.group.linear[rows] @ self.x[rows]
        return torch.baddbmm(linear, self.group.outer[rows], self.hidden[rows])

    @cached_property
    def slope(self) -> Tensor:
        """The derivative of the activation, shape ``(m, h, B)``."""
        return slope_of(nn.SiLU(), self.before)

    def pull_back(self, weights: Tensor) -> Tensor:
        """The gradient of a sum, weighted by shape ``(m, P, B)``, in the parents: ``(m, k, B)``."""
        moved = (self.group.outer.mT @ weights).mul_(self.slope)
        return torch.baddbmm(self.group.linear.mT @ weights, self.group.inner.mT, moved)


class ParentsLinearization:
    """The :class:`~.base.Linearization` of a :class:`ParentsMLP`."""

    def __init__(self, network: "ParentsMLP", parts: list[Activations], known: Tensor) -> None:
        self._network, self.parts, self._known = network, parts, known

    @property
    def params(self) -> Tensor:
        """See :class:`~.base.Linearization`; not kept, since its graph keeps this object."""
        parameters = []
        for group in self._network.groups:
            parameters += [group.inner, group.inner_bias, group.outer, group.linear]
        found: Tensor = _Params.apply(self, *parameters)
        bias = self._network.bias
        return found if bias is None else found + bias

    def pull_back(self, weights: Tensor) -> Tensor:
        total = with_padding(torch.zeros_like(weights[..., 0].T))
        for part, own in zip(self.parts, self.by_group(weights)):
            total.index_add_(0, part.group.parents.reshape(-1), part.pull_back(own).flatten(0, 1))
        return total[:-1].T

    def solve_adjoint(self, slopes: Tensor, gradient: Tensor) -> Tensor:
        """See :class:`~.base.Linearization`: one sweep from the last level to the first."""
        edges = [part.pull_back(own) for part, own in zip(self.parts, self.by_group(slopes))]
        v = with_padding(gradient.T)
        for level in range(self._network.depth - 1, 0, -1):
            for part, edge in zip(self.parts, edges):
                group = part.group
                if (rows := group.layout.slices.get(level)) is not None:
                    moved = edge[rows] * v[group.coordinates[rows], None]
                    v.index_add_(0, group.parents[rows].reshape(-1), moved.flatten(0, 1))
        return v[:-1].T

    @cached_property
    def outputs(self) -> Tensor:
        """The parameters without the bias and without a graph, shape ``(B, D, P)``."""
        rows = [part.outputs(slice(None)) for part in self.parts]
        return self._network.assembled(rows, self._known)

    def by_group(self, weights: Tensor) -> list[Tensor]:
        """Weights of shape ``(B, D, P)`` for each group, shape ``(m, P, B)``."""
        rows = weights.permute(1, 2, 0).contiguous()
        return [rows[part.group.coordinates] for part in self.parts]


class _Params(torch.autograd.Function):
    """The parameters at known points, with their gradients in closed form."""

    @staticmethod
    def forward(ctx: Any, linearization: ParentsLinearization, *_: Tensor) -> Tensor:
        ctx.linearization = linearization
        return linearization.outputs.view_as(linearization.outputs)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        found = []
        for part, own in zip(ctx.linearization.parts, ctx.linearization.by_group(weights)):
            x, moved = part.x.mT, (part.group.outer.mT @ own).mul_(part.slope)
            found += [moved @ x, moved.sum(-1, keepdim=True), own @ part.hidden.mT, own @ x]
        return None, *found


def with_padding(rows: Tensor) -> Tensor:
    """Coordinates of shape ``(D, B)`` and a row of zeros, which padding reads."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
