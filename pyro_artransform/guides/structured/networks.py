# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Groups of networks of coordinates and their parents, with closed-form gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from ...model.graphs.markov_graph import PaddedGroup


class Activations(NamedTuple):
    """The values in the networks of n coordinates at B points."""

    x: Tensor  # the values of the parents, (n, k, B), or (1, k, B) if they are shared
    before: Tensor  # the hidden units before the activation, (n, h, B) or (1, h, B)
    hidden: Tensor  # the hidden units after it
    params: Tensor  # (n, P, B)


class ParentsGroup(nn.Module):
    """The networks of m coordinates with at most k parents each."""

    is_shared = False  # whether all coordinates have the same hidden units
    coordinates: Tensor
    parents: Tensor
    ranks: Tensor  # the positions of the parents in the order of levels

    def __init__(self, layout: PaddedGroup, num_params: int, hidden_dim: int) -> None:
        super().__init__()
        self.layout = layout
        m, k = layout.parents.shape
        self.register_buffer("coordinates", indices(layout.coordinates), persistent=False)
        self.register_buffer("parents", layout.parents, persistent=False)
        like = nn.Linear(k, hidden_dim)
        options: dict[str, Any] = {"dtype": like.weight.dtype, "device": like.weight.device}
        # as in PyTorch's linear layers, by the number of parents, excluding padding
        rows = slice(1 if self.is_shared else m)
        bound = layout.is_parent.sum(-1).to(**options).rsqrt()[rows, None, None]
        n = len(bound)
        self.inner = nn.Parameter((2 * torch.rand(n, hidden_dim, k, **options) - 1) * bound)
        self.inner_bias = nn.Parameter((2 * torch.rand(n, hidden_dim, 1, **options) - 1) * bound)
        self.outer = nn.Parameter(torch.zeros(m, num_params, hidden_dim, **options))
        self.linear = nn.Parameter(torch.zeros(m, num_params, k, **options))

    @property
    def num_values(self) -> int:
        """How many numbers an evaluation holds for each point."""
        (n, h, k), (m, p, _) = self.inner.shape, self.outer.shape
        return n * (h + k) + m * p

    def step_scales(self, sizes: Tensor) -> dict[nn.Parameter, Tensor]:
        """See :meth:`~.parents_mlp.ParentsMLP.step_scales`."""
        own = sizes[self.coordinates, :, None]
        share = share_of_inputs(self.layout.is_parent.sum(-1).to(own))[:, None, None]
        of_units = share_of_inputs(own.new_tensor(self.outer.shape[-1]))
        inner = share[: len(self.inner)]
        return {self.outer: of_units * own, self.linear: share * own, self.inner: inner}

    def forward(self, known: Tensor, index: Tensor, rows: slice) -> Activations:
        """Evaluates the networks of some rows.

        :param known: coordinates and padding, shape ``(*, B)``, with the parents at ``index``, ``(m, k)``.
        """
        x = embedding(index[rows], known)
        before = torch.baddbmm(self.inner_bias[rows], self.inner[rows], x)
        hidden = silu(before)
        params = torch.baddbmm(self.linear[rows] @ x, self.outer[rows], hidden)
        return Activations(x, before, hidden, params)

    def pull_back(self, weights: Tensor, slope: Tensor) -> "Edges":
        """The gradients of weighted outputs in the parents.

        :param weights: shape ``(m, P, B)``.
        :param slope: the derivative of the hidden units, ``(m, h, B)``.
        """
        moved = (self.outer.mT @ weights).mul_(slope)
        edges = torch.baddbmm(self.linear.mT @ weights, self.inner.mT, moved)
        return Edges(self.parents, self.coordinates, edges)

    def gradients(self, part: Activations, weights: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        """The gradients of weighted outputs in the parameters, in their order."""
        moved, x = (self.outer.mT @ weights).mul_(slope), part.x.mT
        return moved @ x, moved.sum(-1, keepdim=True), weights @ part.hidden.mT, weights @ x


class SharedGroup(ParentsGroup):
    """The networks of m coordinates with the same k parents, which share their hidden units."""

    is_shared = True

    def _outputs(self) -> Tensor:
        """The matrix from hidden units and parents to outputs, shape ``(m P, h + k)``."""
        return torch.cat([self.outer, self.linear], -1).flatten(0, 1)

    def forward(self, known: Tensor, index: Tensor, rows: slice) -> Activations:
        x = embedding(index[:1], known)
        before = torch.baddbmm(self.inner_bias, self.inner, x)
        hidden = silu(before)
        params = self._outputs() @ torch.cat([hidden, x], 1)[0]
        return Activations(x, before, hidden, params.unflatten(0, self.outer.shape[:2]))

    def pull_back(self, weights: Tensor, slope: Tensor) -> "Edges":
        return SharedEdges(self, weights, slope)

    def gradients(self, part: Activations, weights: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        rows, x = weights.flatten(0, 1), part.x.mT
        moved = (self.outer.flatten(0, 1).T @ rows)[None].mul_(slope)
        outputs = (rows @ torch.cat([part.hidden, part.x], 1)[0].T).unflatten(
            0, self.outer.shape[:2]
        )
        sizes = self.outer.shape[-1], self.linear.shape[-1]
        return moved @ x, moved.sum(-1, keepdim=True), *outputs.split(sizes, -1)


class Edges:
    """The derivative of each of m weighted outputs in each parent, shape ``(m, k, B)``."""

    def __init__(self, parents: Tensor, coordinates: Tensor, values: Tensor) -> None:
        self._parents, self._coordinates, self._values = parents, coordinates, values

    def add_to(self, total: Tensor, rows: slice = slice(None), v: Tensor | None = None) -> None:
        """Adds their sums over outputs, weighted by ``v`` ``(D, B)``, to those of parents, ``(D, B)``."""
        moved = self._values[rows]
        if v is not None:
            moved = moved * v[self._coordinates[rows], None]
        total.index_add_(0, self._parents[rows].reshape(-1), moved.flatten(0, 1))


class SharedEdges(Edges):
    """The same for a :class:`SharedGroup`, whose sums need no matrix of each output."""

    def __init__(self, group: SharedGroup, weights: Tensor, slope: Tensor) -> None:
        self._group, self._weights, self._slope = group, weights, slope

    def add_to(self, total: Tensor, rows: slice = slice(None), v: Tensor | None = None) -> None:
        group, weights = self._group, self._weights
        if v is not None:
            weights = weights * v[group.coordinates, None]
        found = group._outputs().T @ weights.flatten(0, 1)
        sizes = group.outer.shape[-1], group.linear.shape[-1]
        moved, direct = found.split(sizes)
        total.index_add_(
            0, group.parents[0], torch.addmm(direct, group.inner[0].T, moved * self._slope[0])
        )


def indices(values: Sequence[Any]) -> Tensor:
    """A tensor of integers on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=torch.long, device="cpu")


def share_of_inputs(num_inputs: Tensor) -> Tensor:
    """Step sizes of the weights of linear maps, by their numbers of inputs: 1 up to 8 inputs.

    Adam moves all weights by the same amount, and hence an output in proportion to the number of its inputs,
    see Tensor Programs V (Yang et al., 2022), https://arxiv.org/abs/2203.03466.
    """
    return (8 / num_inputs).clamp(max=1.0)
