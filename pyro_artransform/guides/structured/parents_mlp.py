# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Small networks that map each coordinate's parents to its parameters, evaluated level by level."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..._base.arguments import check_integer
from ..._base.levels import graph_levels
from ...flows.conditioners.base import Blocks, Conditioner
from ...flows.conditioners.masked_mlp import check_input, runs_only, slope_of
from ...model.graphs.markov_graph import padded_groups
from .networks import Activations, ParentsGroup, SharedGroup, indices

# coordinates that share a network: at least so many, and this share of those with parents, so that there are
# ten at most; and its hidden units, relative to those of one coordinate (benchmarks/crossed.md)
_LEAST_ALIKE, _SHARE_ALIKE, _TIMES_HIDDEN = 8, 0.1, 4
_FEW_LEVELS = 32  # see ParentsBlocks (benchmarks/price.md)


class ParentsMLP(Conditioner):
    r"""A network for each coordinate, or for many with the same parents, whose inputs are its parents.

    .. math:: \theta_i = b_i + L_i x_{\mathrm{pa}(i)} + V_i \, \sigma(W_i x_{\mathrm{pa}(i)} + a_i)

    The number of parameters is proportional to the number of edges of the graph. The inverse of a transform
    goes through the graph level by level. L and V start at zero; :math:`\sigma` is SiLU.

    :param parents: for each of the D coordinates, the coordinates that it depends on, without a cycle.
    :param num_params: the number P of parameters per coordinate.
    :param hidden_dim: the number of hidden units per coordinate.
    :param bias: whether to include the bias b.
    :raises ValueError: if a size is not positive, the graph has a cycle, or parents are not
        coordinates.

    **References**

    1. Inference via Low-Dimensional Couplings (Spantini, Bigoni, Marzouk, 2018),
       https://arxiv.org/abs/1703.06131
    """

    autoregressive = True
    num_params: int
    depth: int
    graph: Tensor  # the number of parents of each coordinate, then all parents
    order: Tensor  # the coordinates sorted by level
    place: Tensor  # the position of each coordinate's outputs among those of all groups
    groups: Any  # a ModuleList of ParentsGroup
    bias: nn.Parameter | None

    def __init__(
        self,
        parents: Sequence[Sequence[int]],
        num_params: int,
        hidden_dim: int = 8,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.input_dim = check_integer("the number of coordinates", len(parents))
        self.parents = tuple(map(tuple, parents))
        self.num_params = check_integer("num_params", num_params)
        self.hidden_dim = check_integer("hidden_dim", hidden_dim)
        level = graph_levels(parents)
        self.depth = max(level) + 1
        graph = [*map(len, parents), *(j for own in parents for j in own)]
        self.register_buffer("graph", indices(graph))
        self.groups = nn.ModuleList(_groups(self.parents, level, num_params, hidden_dim))
        self._arrange(level)
        like = nn.Linear(1, 1).weight  # has PyTorch's default dtype and device
        zeros = torch.zeros(self.input_dim, self.num_params, dtype=like.dtype, device=like.device)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)
        self.to(like.device)

    @property
    def num_values(self) -> int:
        """How many numbers an evaluation holds for each point."""
        return sum(group.num_values for group in self.groups)

    def _arrange(self, level: list[int]) -> None:
        """Sorts coordinates by level, and by group within a level, and locates the outputs of groups."""
        of_group = dict[int, int]()
        for g, group in enumerate(self.groups):
            of_group.update(dict.fromkeys(group.layout.coordinates, g))
        order = sorted(range(self.input_dim), key=lambda i: (level[i], of_group.get(i, -1), i))
        self.levels = [0, *accumulate(level.count(k) for k in range(self.depth))]
        # the outputs of all groups in turn, then a row of zeros
        rows = {i: row for row, i in enumerate(of_group)}
        place = [rows.get(i, len(rows)) for i in range(self.input_dim)]
        self.register_buffer("order", indices(order), persistent=False)
        self.register_buffer("place", indices(place), persistent=False)
        # padding reads the first row
        ranks = torch.cat([self.order.argsort() + 1, indices([0])])
        for group in self.groups:
            group.register_buffer("ranks", ranks[group.parents], persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        graph = state_dict.get(f"{prefix}graph")
        if graph is not None and not torch.equal(graph.to("cpu"), self.graph.to("cpu")):
            raise RuntimeError("the state dict belongs to a network with another graph")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_input(x, context, self.input_dim, 0, next(self.parameters(), x).dtype)
        known = with_padding(x.reshape(-1, self.input_dim).T)
        outputs = [group(known, group.parents, slice(None)).params for group in self.groups]
        params = self.assembled(outputs, known)
        params = params if self.bias is None else params + self.bias
        return params.reshape(x.shape + (self.num_params,))

    def assembled(self, outputs: list[Tensor], like: Tensor) -> Tensor:
        """Collects parameters ``(B, D, P)``, without the bias, from groups, each ``(m, P, B)``."""
        # a row of zeros for coordinates without parents
        rows = [*outputs, like.new_zeros(1, self.num_params, like.shape[-1])]
        return torch.cat(rows).index_select(0, self.place).permute(2, 0, 1)

    def blocks(
        self, x: Tensor, context: Tensor | None = None, *, in_place: bool = False
    ) -> Blocks | None:
        """None for a subclass with its own ``forward``, or with hooks, which blocks would skip."""
        plain = [
            any(runs_only(group, kind) for kind in (ParentsGroup, SharedGroup))
            for group in self.groups
        ]
        if not all(plain) or not runs_only(self, ParentsMLP):
            return None
        check_input(x, context, self.input_dim, 0, next(self.parameters(), x).dtype)
        return ParentsBlocks(self, x, in_place)

    @torch.no_grad()
    def set_linear(self, k: int, coefficients: Sequence[Tensor]) -> None:
        """Sets the linear part of the k-th parameter: coefficients of parents, for each coordinate."""
        for group in self.groups:
            rows = [coefficients[i] for i in group.layout.coordinates]
            is_parent = group.layout.is_parent.to(group.linear.device)
            values = torch.zeros_like(group.linear[:, k])
            values[is_parent] = torch.cat(rows).to(values)
            group.linear[:, k] = values

    def step_scales(self, sizes: Tensor) -> dict[nn.Parameter, Tensor]:
        """Optimizer step sizes by parameter of the network, from step sizes of its outputs, ``(D, P)``."""
        found: dict[nn.Parameter, Tensor] = {} if self.bias is None else {self.bias: sizes}
        for group in self.groups:
            found.update(group.step_scales(sizes))
        return found


class ParentsLinearization:
    """The :class:`~.base.Linearization` of a :class:`ParentsMLP`, from the activations of each group."""

    def __init__(self, network: ParentsMLP, parts: list[Activations], like: Tensor) -> None:
        self.network, self.parts = network, parts
        self.outputs = network.assembled([part.params for part in parts], like)
        self.slopes = [slope_of(nn.SiLU(), part.before) for part in parts]

    @property
    def params(self) -> Tensor:
        """See :class:`~.base.Linearization`; not stored, since its graph refers to this object."""
        found: Tensor = _Params.apply(self, *self.network.groups.parameters())
        bias = self.network.bias
        return found if bias is None else found + bias

    def by_group(self, weights: Tensor) -> Iterator[tuple[Any, Activations, Tensor, Tensor]]:
        """Each group, with its activations, its weights, ``(m, P, B)``, and the slopes of hidden units."""
        rows = weights.permute(1, 2, 0).contiguous()
        for group, part, slope in zip(self.network.groups, self.parts, self.slopes):
            yield group, part, rows[group.coordinates], slope

    def pull_back(self, weights: Tensor) -> Tensor:
        total = with_padding(torch.zeros_like(weights[..., 0].T))
        for group, _, own, slope in self.by_group(weights):
            group.pull_back(own, slope).add_to(total)
        return total[:-1].T

    def solve_adjoint(self, slopes: Tensor, gradient: Tensor) -> Tensor:
        """See :class:`~.base.Linearization`; one sweep from the last level to the first."""
        v = with_padding(gradient.T)
        edges = [
            (group, group.pull_back(own, slope)) for group, _, own, slope in self.by_group(slopes)
        ]
        for level in range(self.network.depth - 1, 0, -1):
            for group, edge in edges:
                if (rows := group.layout.slices.get(level)) is not None:
                    edge.add_to(v, rows, v)
        return v[:-1].T


class _Params(torch.autograd.Function):
    """The parameters at known points, with closed-form gradients."""

    @staticmethod
    def forward(ctx: Any, linearization: ParentsLinearization, *_: Tensor) -> Tensor:
        ctx.linearization = linearization
        return linearization.outputs.view_as(linearization.outputs)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        found = list[Tensor]()
        for group, *given in ctx.linearization.by_group(weights):
            found += group.gradients(*given)
        return None, *found


class ParentsBlocks:
    """The :class:`~.base.Blocks` of a :class:`ParentsMLP` at one batch; each level is a block."""

    single_levels: bool = True

    def __init__(self, network: ParentsMLP, like: Tensor, in_place: bool) -> None:
        self.order: Tensor | None = network.order
        self.levels = network.levels
        self._network, self._in_place = network, in_place
        self._parts: list[list[Activations]] = [[] for _ in network.groups]
        # with few levels copies cost less than writes, which keep replays from being simplified
        self._writes = in_place and len(network.levels) > _FEW_LEVELS
        # padding reads the first row
        self._known = like.new_zeros(like.shape[1] + 1 if self._writes else 1, like.shape[0])

    def open(self, start: int, stop: int) -> None:
        self._level, self._own = start, slice(self.levels[start], self.levels[stop])

    def params(self, x: Tensor | None) -> Tensor:
        known, network, found = self._known, self._network, list[Tensor]()
        if self._level == 0:
            found.append(known.new_zeros(self.levels[1], network.num_params, known.shape[1]))
        for group, parts in zip(network.groups, self._parts):
            if (rows := group.layout.slices.get(self._level)) is not None:
                values = group(known, group.ranks, rows)
                found.append(values.params)
                if self._in_place:
                    parts.append(values)
        params = torch.cat(found)
        if network.bias is not None:
            params = params + network.bias[network.order[self._own], :, None]
        return params.permute(2, 0, 1)

    def close(self, x: Tensor, levels: int) -> None:
        if self._writes:
            self._known[self._own.start + 1 : self._own.stop + 1] = x.T
        else:
            self._known = torch.cat([self._known, x.T])

    def linearization(self) -> ParentsLinearization | None:
        if not self._in_place:
            return None
        parts = [Activations(*map(torch.cat, zip(*levels))) for levels in self._parts]
        return ParentsLinearization(self._network, parts, self._known)


def _groups(
    parents: Sequence[tuple[int, ...]], level: Sequence[int], num_params: int, hidden_dim: int
) -> list[ParentsGroup]:
    """The networks of all coordinates with parents; sets of parents of many coordinates have one each."""
    counts = Counter(filter(None, parents))
    least = max(_LEAST_ALIKE, _SHARE_ALIKE * counts.total())
    alike = {own for own, count in counts.items() if count >= least}
    separate = padded_groups([() if own in alike else own for own in parents], level)
    groups = [ParentsGroup(layout, num_params, hidden_dim) for layout in separate]
    for same in sorted(alike):
        (layout,) = padded_groups([own if own == same else () for own in parents], level)
        groups.append(SharedGroup(layout, num_params, _TIMES_HIDDEN * hidden_dim))
    return groups


def with_padding(rows: Tensor) -> Tensor:
    """Appends a row of zeros, which padding reads, to coordinates of shape ``(D, B)``."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
