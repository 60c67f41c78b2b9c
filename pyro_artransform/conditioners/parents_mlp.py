# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A small network for each coordinate, of its parents alone, and its evaluation level by level."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..arguments import check_callable, check_integer
from ..graphs.markov_graph import graph_levels
from ..graphs.padding import PaddedGroup, padded_groups
from .activations import ELEMENTWISE
from .adjoint import Activations, ParentsLinearization, with_padding
from .base import Blocks, Conditioner
from .masked_mlp import check_input


class ParentsMLP(Conditioner):
    r"""A network of its own for each coordinate, of the coordinates that it depends on.

    .. math::

        \theta_i = b_i + L_i x_{\mathrm{pa}(i)} + V_i \, \sigma(W_i x_{\mathrm{pa}(i)} + a_i)

    The number of parameters is proportional to the number of edges of the graph. Coordinates with similar
    numbers of parents are evaluated by one batched product, and the inverse of a transform goes through
    the graph level by level. L and V start at zero.

    :param parents: for each of the D coordinates those that it depends on, without a cycle.
    :param num_params: the number P of parameters of each coordinate.
    :param hidden_dim: the number of hidden units of each coordinate.
    :param nonlinearity: the activation, by default ``torch.nn.SiLU()``, an elementwise deterministic
        function, checked as for :class:`~pyro_artransform.conditioners.MaskedMLP`.
    :param bias: whether there is a b.
    :raises TypeError: if the nonlinearity is not a function.
    :raises ValueError: for a size that is not positive, a graph with a cycle, or parents that are not
        coordinates.

    Example::

        >>> chain = ParentsMLP([[], [0], [1]], 2, hidden_dim=4)
        >>> chain(torch.zeros(5, 3)).shape, chain.depth
        (torch.Size([5, 3, 2]), 3)

    **References**

    1. Inference via Low-Dimensional Couplings (Spantini, Bigoni, Marzouk, 2018),
       https://arxiv.org/abs/1703.06131
    """

    autoregressive = True
    num_params: int
    depth: int
    graph: Tensor  # the number of parents of each coordinate, then all parents
    order: Tensor  # the coordinates by level
    place: Tensor  # where the outputs of each coordinate are among those of all groups
    groups: Any  # a ModuleList of ParentsGroup
    bias: nn.Parameter | None

    def __init__(
        self,
        parents: Sequence[Sequence[int]],
        num_params: int,
        hidden_dim: int = 8,
        *,
        nonlinearity: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = check_integer("the number of coordinates", len(parents))
        self.parents = tuple(map(tuple, parents))
        self.num_params = check_integer("num_params", num_params)
        self.hidden_dim = check_integer("hidden_dim", hidden_dim)
        wanted = "a function or a module such as torch.nn.SiLU()"
        activation = nn.SiLU() if nonlinearity is None else nonlinearity
        self.nonlinearity = check_callable("nonlinearity", activation, wanted)
        self.autoregressive = self.autoregressive and isinstance(activation, ELEMENTWISE)
        level = graph_levels(parents)
        self.depth = max(level) + 1
        counts = [len(own) for own in parents]
        self.register_buffer("graph", _indices([*counts, *(j for own in parents for j in own)]))
        self.groups = nn.ModuleList()
        for group in padded_groups(parents, level):
            self.groups.append(ParentsGroup(group, self.num_params, self.hidden_dim))
        self._arrange(level)
        like = nn.Linear(1, 1).weight  # PyTorch knows where new parameters go
        zeros = torch.zeros(self.input_dim, self.num_params, dtype=like.dtype, device=like.device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)
        self.to(like.device)

    def _arrange(self, level: list[int]) -> None:
        """Sorts the coordinates by level, within a level by group, and finds the outputs of groups."""
        of_group = dict[int, int]()
        for g, group in enumerate(self.groups):
            of_group.update(dict.fromkeys(group.layout.coordinates, g))
        order = sorted(range(self.input_dim), key=lambda i: (level[i], of_group.get(i, -1), i))
        self.levels = [0]
        for k in range(self.depth):
            self.levels.append(self.levels[-1] + level.count(k))
        # the outputs of all groups, one after the other, then a row of zeros
        place = [len(of_group)] * self.input_dim
        for row, i in enumerate(of_group):
            place[i] = row
        rank = [0] * (self.input_dim + 1)
        for position, i in enumerate(order):
            rank[i] = position + 1  # padding reads the first row
        self.register_buffer("order", _indices(order), persistent=False)
        self.register_buffer("place", _indices(place), persistent=False)
        for group in self.groups:
            group.register_buffer("ranks", _indices(rank)[group.parents], persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        graph = state_dict.get(f"{prefix}graph")
        if graph is not None and not torch.equal(graph.to("cpu"), self.graph.to("cpu")):
            raise RuntimeError("the state dict is of a network of another graph")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_input(x, context, self.input_dim, dtype=next(self.parameters(), x).dtype)
        known = with_padding(x.reshape(-1, self.input_dim).T)
        outputs = [
            group(known, group.parents, slice(None), self.nonlinearity) for group in self.groups
        ]
        params = self.assembled(outputs, known)
        params = params if self.bias is None else params + self.bias
        return params.reshape(x.shape + (self.num_params,))

    def assembled(self, outputs: list[Tensor], like: Tensor) -> Tensor:
        """The parameters without the bias, shape ``(B, D, P)``, from those of the groups.

        :param outputs: for each group of m coordinates, shape ``(m, P, B)``.
        :param like: a tensor of shape ``(*, B)``, whose dtype and device are used.
        """
        # a row of zeros for coordinates without parents
        rows = [*outputs, like.new_zeros(1, self.num_params, like.shape[-1])]
        return torch.cat(rows).index_select(0, self.place).permute(2, 0, 1)

    def blocks(
        self, x: Tensor, context: Tensor | None = None, *, in_place: bool = False
    ) -> Blocks | None:
        """None for a subclass with another ``forward``, or with hooks, which blocks do not go through."""
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (self, *self.groups))
        if type(self).forward is not ParentsMLP.forward or hooked:
            return None
        check_input(x, context, self.input_dim, dtype=next(self.parameters(), x).dtype)
        return ParentsBlocks(self, x, in_place)

    @torch.no_grad()
    def set_linear(self, k: int, coefficients: Sequence[Tensor]) -> None:
        """Sets the linear part of the k-th parameter.

        :param coefficients: for each coordinate those of its parents.
        """
        for group in self.groups:
            rows = [coefficients[i] for i in group.layout.coordinates]
            is_parent = group.layout.is_parent.to(group.linear.device)
            values = torch.zeros_like(group.linear[:, k])
            values[is_parent] = torch.cat(rows).to(values)
            group.linear[:, k] = values

    def step_scales(self, sizes: Tensor) -> dict[nn.Parameter, Tensor]:
        """The sizes of steps by parameter of the network.

        :param sizes: those of the P parameters of each coordinate, shape ``(D, P)``.
        """
        found: dict[nn.Parameter, Tensor] = {} if self.bias is None else {self.bias: sizes}
        for group in self.groups:
            own = sizes[group.coordinates, :, None]
            found.update({group.outer: own, group.linear: own})
        return found

    def extra_repr(self) -> str:
        sizes = f"input_dim={self.input_dim}, num_params={self.num_params}"
        edges = len(self.graph) - self.input_dim
        return f"{sizes}, hidden_dim={self.hidden_dim}, num_edges={edges}, depth={self.depth}"


class ParentsGroup(nn.Module):
    """The networks of coordinates with at most k parents each.

    :param layout: the m coordinates, their parents and levels.
    """

    coordinates: Tensor
    parents: Tensor
    ranks: Tensor  # the parents by their place in the order of levels

    def __init__(self, layout: PaddedGroup, num_params: int, hidden_dim: int) -> None:
        super().__init__()
        self.layout = layout
        m, k = layout.parents.shape
        self.register_buffer("coordinates", _indices(layout.coordinates), persistent=False)
        self.register_buffer("parents", layout.parents, persistent=False)
        like = nn.Linear(k, hidden_dim)
        options: dict[str, Any] = {"dtype": like.weight.dtype, "device": like.weight.device}
        # as in PyTorch's linear layers, by the number of parents without padding
        bound = layout.is_parent.sum(-1).to(**options).rsqrt()[:, None, None]
        self.inner = nn.Parameter((2 * torch.rand(m, hidden_dim, k, **options) - 1) * bound)
        self.inner_bias = nn.Parameter((2 * torch.rand(m, hidden_dim, 1, **options) - 1) * bound)
        self.outer = nn.Parameter(torch.zeros(m, num_params, hidden_dim, **options))
        self.linear = nn.Parameter(torch.zeros(m, num_params, k, **options))

    def forward(
        self, known: Tensor, index: Tensor, rows: slice, nonlinearity: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The parameters of n of the coordinates, shape ``(n, P, B)``.

        :param known: coordinates and padding, shape ``(*, B)``.
        :param index: the parents among them, shape ``(m, k)``.
        :param rows: which of the m coordinates.
        """
        x = embedding(index[rows], known)
        hidden = nonlinearity(torch.baddbmm(self.inner_bias[rows], self.inner[rows], x))
        return torch.baddbmm(self.linear[rows] @ x, self.outer[rows], hidden)


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
            self._parts = [Activations(group, self._act, like) for group in network.groups]
        # padding reads the first row
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
        for g, group in enumerate(network.groups):
            if (rows := group.layout.slices.get(level)) is None:
                continue
            if self._parts is None:
                found.append(group(known, group.ranks, rows, self._act))
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

    def linearization(self) -> ParentsLinearization | None:
        """See :class:`~.base.Blocks`."""
        if self._parts is None:
            return None
        return ParentsLinearization(self._network, self._parts, self._known)


def _indices(values: Sequence[int]) -> Tensor:
    """Integers on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=torch.long, device="cpu")
