# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Small networks of the parents of each coordinate: level by level, and their gradients in closed form.

The inverse of a transform goes through the levels of the graph. What the networks compute on the way is
kept: the gradients, the score of the result and the adjoint of the inverse are products with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .parents_mlp import ParentsGroup, ParentsMLP

Nonlinearity = Callable[[Tensor], Tensor]


@dataclass
class Activations:
    """What a group of m networks computes for B points.

    :param group: the networks.
    :param nonlinearity: their activation.
    :param x: the values of the parents, shape ``(m, k, B)``.
    :param before: the hidden units before the activation, shape ``(m, h, B)``.
    :param hidden: those after it, of the same shape.
    """

    group: "ParentsGroup"
    nonlinearity: Nonlinearity
    x: Tensor
    before: Tensor
    hidden: Tensor

    @classmethod
    def empty(
        cls, group: "ParentsGroup", nonlinearity: Nonlinearity, like: Tensor
    ) -> "Activations":
        """Those of ``(B, D)`` points that are not known yet."""
        m, h, k = group.inner.shape
        shapes = [(m, width, len(like)) for width in (k, h, h)]
        return cls(group, nonlinearity, *(like.new_empty(shape) for shape in shapes))

    def fill(self, known: Tensor, index: Tensor, rows: slice) -> None:
        """Computes some rows from coordinates at an index of shape ``(m, k)``, in place."""
        group, x, before = self.group, self.x[rows], self.before[rows]
        torch.index_select(known, 0, index[rows].reshape(-1), out=x.view(-1, x.shape[-1]))
        torch.baddbmm(group.inner_bias[rows], group.inner[rows], x, out=before)
        self.hidden[rows] = self.nonlinearity(before)

    def outputs(self, rows: slice) -> Tensor:
        """The parameters of some rows, shape ``(m, P, B)``."""
        linear = self.group.linear[rows] @ self.x[rows]
        return torch.baddbmm(linear, self.group.outer[rows], self.hidden[rows])

    @cached_property
    def slope(self) -> Tensor:
        """The derivative of the activation, shape ``(m, h, B)``."""
        with torch.enable_grad():
            before = self.before.detach().requires_grad_()
            hidden = self.nonlinearity(before)
            return torch.autograd.grad(hidden, before, torch.ones_like(hidden))[0]

    def pull_back(self, weights: Tensor) -> Tensor:
        """The gradient of a weighted sum of the parameters in each parent, shape ``(m, k, B)``.

        :param weights: shape ``(m, P, B)``.
        """
        moved = (self.group.outer.mT @ weights).mul_(self.slope)
        return torch.baddbmm(self.group.linear.mT @ weights, self.group.inner.mT, moved)

    def parameter_gradients(self, weights: Tensor) -> list[Tensor]:
        """The gradients of a weighted sum in ``inner``, ``inner_bias``, ``outer`` and ``linear``."""
        moved = (self.group.outer.mT @ weights).mul_(self.slope)
        bias = moved.sum(-1, keepdim=True)
        return [moved @ self.x.mT, bias, weights @ self.hidden.mT, weights @ self.x.mT]


class ParentsEvaluation:
    """The :class:`~.base.Evaluation` of a :class:`ParentsMLP`."""

    def __init__(self, network: "ParentsMLP", parts: list[Activations], known: Tensor) -> None:
        self._network, self._parts, self._known = network, parts, known

    @property
    def params(self) -> Tensor:
        """See :class:`~.base.Evaluation`; not kept, since its graph keeps the evaluation."""
        parameters = []
        for group in self._network.all_groups():
            parameters += [group.inner, group.inner_bias, group.outer, group.linear]
        found: Tensor = _Params.apply(self, *parameters)
        bias = self._network.bias
        return found if bias is None else found + bias

    def pull_back(self, weights: Tensor) -> Tensor:
        """See :class:`~.base.Evaluation`."""
        total = torch.zeros_like(weights[..., 0].T)
        total = torch.cat([total, total.new_zeros(1, total.shape[1])])
        for part, own in zip(self._parts, self._by_group(weights)):
            total.index_add_(0, part.group.parents.reshape(-1), part.pull_back(own).flatten(0, 1))
        return total[:-1].T

    def solve_adjoint(self, slopes: Tensor, gradient: Tensor) -> Tensor:
        """See :class:`~.base.Evaluation`: one sweep from the last level to the first."""
        edges = [part.pull_back(own) for part, own in zip(self._parts, self._by_group(slopes))]
        v = with_padding(gradient.T)
        for level in range(self._network.depth - 1, 0, -1):
            for part, edge in zip(self._parts, edges):
                group = part.group
                if (rows := group.layout.slices.get(level)) is not None:
                    moved = edge[rows] * v[group.coordinates[rows], None]
                    v.index_add_(0, group.parents[rows].reshape(-1), moved.flatten(0, 1))
        return v[:-1].T

    @cached_property
    def outputs(self) -> Tensor:
        """The parameters without the bias and without a graph, shape ``(B, D, P)``."""
        rows = [part.outputs(slice(None)) for part in self._parts]
        return self._network.assembled(rows, self._known)

    def gradients(self, weights: Tensor) -> list[Tensor]:
        """The gradients of a weighted sum of the parameters in those of the networks."""
        found = []
        for part, own in zip(self._parts, self._by_group(weights)):
            found += part.parameter_gradients(own)
        return found

    def _by_group(self, weights: Tensor) -> list[Tensor]:
        """Weights of shape ``(B, D, P)`` for each group, shape ``(m, P, B)``."""
        rows = weights.permute(1, 2, 0).contiguous()
        return [rows[part.group.coordinates] for part in self._parts]


class _Params(torch.autograd.Function):
    """The parameters of an evaluation, with their gradients in closed form."""

    @staticmethod
    def forward(ctx: Any, evaluation: ParentsEvaluation, *_: Tensor) -> Tensor:
        ctx.evaluation = evaluation
        return evaluation.outputs.view_as(evaluation.outputs)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.evaluation.gradients(weights)


class ParentsBlocks:
    """The :class:`~.base.Blocks` of a :class:`ParentsMLP` at one batch.

    :param like: a tensor of shape ``(B, D)``, whose dtype and device are used.
    :param in_place: whether to write into tensors.
    """

    max_levels: int | None = 1

    def __init__(self, network: "ParentsMLP", like: Tensor, in_place: bool) -> None:
        self.order: Tensor | None = network.order
        self.levels = network.levels
        self._network, self._act = network, network.nonlinearity
        width = len(network.graph) - network.input_dim
        self.work = width * (network.hidden_dim + network.num_params)
        self._parts: list[Activations] | None = None
        if in_place:
            groups = network.all_groups()
            self._parts = [Activations.empty(group, self._act, like) for group in groups]
        # the first row is what padding reads
        self._known = like.new_zeros(like.shape[1] + 1 if in_place else 1, like.shape[0])

    def open(self, start: int, stop: int) -> None:
        """See :class:`~.base.Blocks`."""
        self._start, self._stop = start, stop

    def params(self, x: Tensor | None) -> Tensor:
        """See :class:`~.base.Blocks`."""
        known = self._known
        if x is not None:
            known = torch.cat([known[: self.levels[self._start] + 1], x.T])
        parts = [part for k in range(self._start, self._stop) for part in self._of_level(known, k)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._network.bias is not None:
            own = slice(self.levels[self._start], self.levels[self._stop])
            rows = rows + self._network.bias[self._network.order[own], :, None]
        return rows.permute(2, 0, 1)

    def _of_level(self, known: Tensor, level: int) -> list[Tensor]:
        network = self._network
        if level == 0:
            shape = self.levels[1], network.num_params, known.shape[1]
            return [known.new_zeros(shape)]
        found = []
        for g, group in enumerate(network.all_groups()):
            if (rows := group.layout.slices.get(level)) is None:
                continue
            if self._parts is None:
                found.append(group.evaluate(known, group.ranks, rows, self._act))
            else:
                self._parts[g].fill(known, group.ranks, rows)
                found.append(self._parts[g].outputs(rows))
        return found

    def close(self, x: Tensor, levels: int) -> None:
        """See :class:`~.base.Blocks`."""
        start, stop = self.levels[self._start], self.levels[levels]
        x = x[:, : stop - start]
        if self._parts is not None:
            self._known[start + 1 : stop + 1] = x.T
        else:
            self._known = torch.cat([self._known, x.T])

    def evaluation(self) -> ParentsEvaluation | None:
        """See :class:`~.base.Blocks`."""
        if self._parts is None:
            return None
        return ParentsEvaluation(self._network, self._parts, self._known)


def with_padding(rows: Tensor) -> Tensor:
    """Coordinates of shape ``(D, B)`` and a row of zeros, which padding reads."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
