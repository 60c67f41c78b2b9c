# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The masked multilayer perceptron."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_callable, check_elementwise, check_hidden_dims, check_size
from .base import Conditioner
from .blocks import MLPBlocks, Weights, layout
from .masked_linear import MaskedLinear
from .masks import (
    check_adjacency,
    check_order,
    hidden_sets,
    levels,
    mlp_masks,
    order_to_adjacency,
    set_levels,
    spread,
)


class MaskedMLP(Conditioner):
    r"""A multilayer perceptron that is autoregressive by its masks.

    The last layer starts at zero. If a hidden layer is too narrow to carry every set of parents, a
    masked linear layer from the inputs to the outputs keeps each dependence of the graph.

    :param input_dim: the number D of coordinates.
    :param num_params: the number P of parameters of each coordinate.
    :param hidden_dims: the width or widths of the hidden layers; by default two layers of width
        ``max(64, 2 * input_dim)``.
    :param context_dim: the size C of the context, 0 for none.
    :param nonlinearity: the elementwise activation, by default ``torch.nn.ELU()``: a deterministic
        function of each number alone, the same for every unit, which leaves its argument as it is. All
        hidden layers share it, and its parameters if it is a module that has some.
    :param order: a permutation, shape ``(D,)``: ``order[k]`` is the coordinate that comes k-th; by
        default 0 .. D-1.
    :param adjacency: in place of ``order``, any acyclic graph, boolean of shape ``(D, D)``: entry
        ``[i, j]`` says that coordinate i depends on coordinate j.
    :raises TypeError: if the nonlinearity is no function.
    :raises ValueError: for a size that is not positive, a nonlinearity that is not elementwise, an order
        that is no permutation, a graph with a cycle, or both an order and a graph.

    Example::

        >>> import torch
        >>> conditioner = MaskedMLP(3, 2, hidden_dims=[16, 16], context_dim=4)
        >>> conditioner(torch.zeros(5, 3), torch.zeros(5, 4)).shape
        torch.Size([5, 3, 2])

    **References**

    1. MADE: Masked Autoencoder for Distribution Estimation (Germain, Gregor, Murray, Larochelle, 2015),
       https://arxiv.org/abs/1502.03509
    """

    autoregressive = True
    num_params: int
    adjacency: Tensor
    order: Tensor
    by_level: Tensor

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        hidden_dims: int | Sequence[int] | None = None,
        *,
        context_dim: int = 0,
        nonlinearity: Callable[[Tensor], Tensor] | None = None,
        order: Tensor | Sequence[int] | None = None,
        adjacency: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = check_size("input_dim", input_dim, 1)
        self.num_params = check_size("num_params", num_params, 1)
        self.context_dim = check_size("context_dim", context_dim, 0)
        self.hidden_dims = check_hidden_dims(hidden_dims, self.input_dim)
        self.nonlinearity = nn.ELU() if nonlinearity is None else nonlinearity
        check_callable(self.nonlinearity)
        self._register_graph(order, adjacency)
        self._read_graph()
        self._build_layers()
        like = next(self.layers.parameters())
        check_elementwise(self.nonlinearity, max(self.hidden_dims), like)

    def _register_graph(
        self, order: Tensor | Sequence[int] | None, adjacency: Tensor | None
    ) -> None:
        if order is not None and adjacency is not None:
            raise ValueError("expected an order or an adjacency, got both")
        if adjacency is not None:
            adjacency = check_adjacency(adjacency, self.input_dim)
            checked = levels(adjacency).argsort(stable=True)
        else:
            checked = check_order(range(self.input_dim) if order is None else order, self.input_dim)
            adjacency = order_to_adjacency(checked)
        self.register_buffer("order", checked)
        self.register_buffer("adjacency", adjacency)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_graph()

    def _read_graph(self) -> None:
        """What follows from the graph, kept for the inverse."""
        if self.adjacency.is_meta:
            return  # there is nothing to read; what was known stays
        adjacency = self.adjacency.to("cpu")
        level = levels(adjacency)
        sets = hidden_sets(adjacency, self.context_dim > 0)
        steps = [set_levels(spread(sets, width), level) for width in self.hidden_dims]
        self._layout = layout(level, steps)
        by_level = level.argsort(stable=True).to(self.adjacency.device)
        self.register_buffer("by_level", by_level, persistent=False)
        #: The number of coordinates on the longest path: as many passes invert exactly.
        self.depth = len(self._layout.levels) - 1

    def _build_layers(self) -> None:
        masks = mlp_masks(self.adjacency, self.hidden_dims, self.context_dim > 0)
        masks[-1] = masks[-1].repeat(self.num_params, 1)
        self.layers = nn.ModuleList(MaskedLinear(m.shape[1], m.shape[0], m) for m in masks)
        self.context_layer = self._maybe_linear(self.context_dim > 0)
        sets = hidden_sets(self.adjacency, self.context_dim > 0)
        self.skip = self._maybe_skip(min(self.hidden_dims) < len(sets))
        for layer in (self.layers[-1], self.skip):
            if layer is not None:
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)
        # the graph was worked out on the CPU; the layers are wherever torch puts new tensors
        self.to(next(self.layers.parameters()).device)

    def _maybe_linear(self, wanted: bool) -> nn.Linear | None:
        return nn.Linear(self.context_dim, self.hidden_dims[0], bias=False) if wanted else None

    def _maybe_skip(self, wanted: bool) -> MaskedLinear | None:
        mask = self.adjacency.repeat(self.num_params, 1)
        return MaskedLinear(self.input_dim, len(mask), mask, bias=False) if wanted else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the parameters.

        :param x: shape ``(*, D)``.
        :param context: shape ``(*, C)``, its batch shape broadcasts with that of ``x``.
        :return: shape ``(*, D, P)``.
        :raises ValueError: if ``x`` or the context has another size, or the context is missing.
        """
        self._check_input(x, context)
        first, *others = self.layers
        hidden = first(x)
        if self.context_layer is not None:
            hidden = hidden + self.context_layer(context)
        for layer in others:
            hidden = layer(self.nonlinearity(hidden))
        if self.skip is not None:
            hidden = hidden + self.skip(x)
        # each parameter is one contiguous row of D numbers: slices of it are as fast as tensors
        rows = hidden.reshape(hidden.shape[:-1] + (self.num_params, self.input_dim))
        return rows.transpose(-1, -2)

    def blocks(
        self, x: Tensor, context: Tensor | None = None, *, in_place: bool = False
    ) -> MLPBlocks | None:
        """The network as it is evaluated block by block, see :class:`~.base.Conditioner`.

        None if a subclass has another ``forward`` or there are hooks: blocks do not go through them.
        """
        if type(self).forward is not MaskedMLP.forward or self._has_hooks():
            return None
        self._check_input(x, context)
        order = None if self._layout.natural else self.by_level
        weights = self._sorted_weights(context, order)
        return MLPBlocks(self._layout, order, weights, self.nonlinearity, x, in_place)

    def _has_hooks(self) -> bool:
        layers = [*self.layers] if self.skip is None else [*self.layers, self.skip]
        if any(type(layer).forward is not MaskedLinear.forward for layer in layers):
            return True
        return any(m._forward_hooks or m._forward_pre_hooks for m in (self, *layers))

    def _sorted_weights(self, context: Tensor | None, order: Tensor | None) -> Weights:
        layers: Any = list(self.layers)  # slices of a ModuleList are modules, and slow to make
        biases = [layer.bias for layer in layers[:-1]]
        if self.context_layer is not None:
            biases[0] = biases[0] + self.context_layer(context)
        rows = self.num_params, self.input_dim
        weights = Weights(
            first=layers[0].masked_weight(),
            hidden=[layer.masked_weight() for layer in layers[1:-1]],
            last=layers[-1].masked_weight().view(*rows, -1),
            skip=None if self.skip is None else self.skip.masked_weight().view(*rows, -1),
            biases=biases,
            last_bias=layers[-1].bias.view(rows),
        )
        return weights if order is None else weights.sorted(order)

    def _check_input(self, x: Tensor, context: Tensor | None) -> None:
        if torch.jit.is_tracing():
            return  # sizes are tensors then and cannot be compared
        if x.dim() == 0 or x.shape[-1] != self.input_dim:
            raise ValueError(f"x: expected shape (*, {self.input_dim}), got {tuple(x.shape)}")
        dtype = self.layers[0].mask.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x: expected {dtype}, the network's own, got {x.dtype}")
        if (context is None) != (self.context_dim == 0):
            got = "none" if context is None else f"one of shape {tuple(context.shape)}"
            wanted = f"a context of shape (*, {self.context_dim})" if self.context_dim else "none"
            raise ValueError(f"context: expected {wanted}, got {got}")
        if context is not None and context.shape[-1:] != (self.context_dim,):
            raise ValueError(
                f"context: expected shape (*, {self.context_dim}), got {tuple(context.shape)}"
            )

    def extra_repr(self) -> str:
        sizes = f"input_dim={self.input_dim}, num_params={self.num_params}"
        return f"{sizes}, hidden_dims={self.hidden_dims}, context_dim={self.context_dim}"
