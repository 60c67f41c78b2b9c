# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The masked multilayer perceptron, its layer and activations, and parameters that do not depend on x."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._base.arguments import (
    check_callable,
    check_flag,
    check_hidden_dims,
    check_integer,
    check_share,
    is_tracing,
)
from .base import Conditioner
from .blocks import BlockLayout, MLPBlocks, MLPLinearization, Weights
from .masks import check_graph, hidden_sets, levels, mlp_masks, set_levels, spread


class TiltedSiLU(nn.Module):
    r"""Twice SiLU, tilted to a given slope at zero.

    .. math:: x \, (\mathrm{slope} + \tanh(x / 2)) = 2 \, \mathrm{SiLU}(x) + (\mathrm{slope} - 1) \, x

    The sum of many units has a linear part, which training must remove if only the even part is needed. With
    slope 1 this is twice SiLU; with slope 0 it is an even function.

    :param slope: the derivative at zero, from 0 to 1.
    :raises ValueError: if the slope is not between 0 and 1.
    """

    __constants__ = ("slope",)
    elementwise = True  # for is_elementwise

    def __init__(self, slope: float = 0.5) -> None:
        super().__init__()
        self.slope = check_share("slope", slope)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the activation to each element."""
        return ((self.slope - 1.0) * x).add(F.silu(x), alpha=2.0)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


#: PyTorch's elementwise activations without randomness.
ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish),
    *(nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink),
)


def is_elementwise(nonlinearity: object) -> bool:
    """Whether an activation is known, by its exact class, to be elementwise and deterministic."""
    cls = type(nonlinearity)
    return cls in ELEMENTWISE or "elementwise" in vars(cls)


def default_activation(dim: int) -> nn.Module:
    """The activation of a guide's networks: SiLU up to 64 coordinates, then :class:`TiltedSiLU`."""
    # beyond 64, narrower networks get as close with a smaller linear part (benchmarks/flows.md)
    return nn.SiLU() if dim <= 64 else TiltedSiLU()


def slope_of(nonlinearity: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an elementwise function at x, in the shape of x, without a graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = nonlinearity(x)
        return torch.autograd.grad(value.sum(), x)[0]


def runs_only(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module's values come only from the forward of a class, without hooks."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module).forward is cls.forward and not hooked


def check_input(
    x: Tensor, context: Tensor | None, input_dim: int, context_dim: int, dtype: torch.dtype | None
) -> None:
    """Raises a ValueError if x or the context has a wrong shape, or x a wrong dtype."""
    if is_tracing():
        return  # sizes are tensors during tracing, and cannot be compared
    if x.shape[-1:] != (input_dim,):
        raise ValueError(f"x: expected shape (*, {input_dim}), got {tuple(x.shape)}")
    if x.dtype != (dtype or x.dtype) and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x: expected {dtype}, the dtype of the network, got {x.dtype}")
    size = None if context is None else tuple(context.shape[-1:])
    if size != ((context_dim,) if context_dim else None):
        wanted = f"shape (*, {context_dim})" if context_dim else "none"
        got = "none" if context is None else tuple(context.shape)
        raise ValueError(f"context: expected {wanted}, got {got}")


class MaskedLinear(nn.Linear):
    r"""A linear layer whose weight is masked whenever it is evaluated.

    .. math:: y = (M \odot W) x + b

    Masked connections stay cut even if the weight is overwritten.

    :param mask: zeros and ones, shape ``(out_features, in_features)``, a tensor or lists.
    :raises ValueError: if the mask has another shape.
    """

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, mask: Any, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        mask = torch.as_tensor(mask, device=self.weight.device)
        if mask.shape != self.weight.shape:
            wanted = f"{tuple(self.weight.shape)} (out_features, in_features)"
            raise ValueError(f"mask: expected shape {wanted}, got {tuple(mask.shape)}")
        # a product of two float tensors is many times faster than one of float and boolean
        self.register_buffer("mask", mask.to(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer, from shape ``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, self.weight * self.mask, self.bias)


class MaskedMLP(Conditioner):
    r"""A multilayer perceptron that is autoregressive by its masks.

    The last layer starts at zero. If a hidden layer has too few units for all sets of parents,
    skip connections are always added, to represent every dependence of the graph.

    :param input_dim: the number D of coordinates.
    :param num_params: the number P of parameters per coordinate.
    :param hidden_dims: the width or widths of the hidden layers; by default two layers of width
        ``max(64, 2 * input_dim)``.
    :param context_dim: the size C of the context, 0 for none. A context is cast to the network's dtype.
    :param nonlinearity: the activation of all hidden layers, an elementwise deterministic function, by
        default ``torch.nn.ELU()``. Unless it is a usual module of ``torch.nn``, transforms check that the
        network is autoregressive when Pyro's validation is on.
    :param skip_connections: whether to add a masked linear layer from the inputs to the outputs.
    :param order: a permutation, shape ``(D,)``: ``order[k]`` is the k-th coordinate in the order; by
        default 0 .. D-1.
    :param adjacency: an acyclic graph, instead of ``order``, boolean of shape ``(D, D)``: entry
        ``[i, j]`` says that coordinate i depends on coordinate j.
    :raises TypeError: if the nonlinearity is not a function.
    :raises ValueError: if a size is not positive, the order is not a permutation, the graph has a cycle, or
        both an order and a graph are given.

    Example::

        >>> conditioner = MaskedMLP(3, 2, hidden_dims=[16, 16], context_dim=4)
        >>> conditioner(torch.zeros(5, 3), torch.zeros(5, 4)).shape
        torch.Size([5, 3, 2])

    **References**

    1. MADE: Masked Autoencoder for Distribution Estimation (Germain, Gregor, Murray, Larochelle, 2015),
       https://arxiv.org/abs/1502.03509
    """

    autoregressive = True
    num_params: int
    depth: int
    adjacency: Tensor
    order: Tensor  # the coordinates sorted by level
    layers: Any  # a ModuleList of MaskedLinear

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        hidden_dims: int | Sequence[int] | None = None,
        *,
        context_dim: int = 0,
        nonlinearity: Callable[[Tensor], Tensor] | None = None,
        skip_connections: bool = False,
        order: Tensor | Sequence[int] | None = None,
        adjacency: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = check_integer("input_dim", input_dim)
        self.num_params = check_integer("num_params", num_params)
        self.context_dim = check_integer("context_dim", context_dim, least=0)
        if hidden_dims is None:
            hidden_dims = [max(64, 2 * self.input_dim)] * 2
        self.hidden_dims = tuple(check_hidden_dims(hidden_dims))
        wanted = "a function or a module such as torch.nn.ELU()"
        activation = nn.ELU() if nonlinearity is None else nonlinearity
        self.nonlinearity = check_callable("nonlinearity", activation, wanted)
        self.autoregressive = self.autoregressive and is_elementwise(activation)
        order, adjacency = check_graph(order, adjacency, self.input_dim)
        self.register_buffer("order", order)
        self.register_buffer("adjacency", adjacency)
        self._read_levels()
        masks = mlp_masks(self.adjacency, self.hidden_dims, self.context_dim > 0)
        masks[-1] = masks[-1].repeat(self.num_params, 1)
        self.layers = nn.ModuleList(MaskedLinear(m.shape[1], m.shape[0], m) for m in masks)
        last = self.layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.context_layer: nn.Linear | None = None
        if self.context_dim:
            self.context_layer = nn.Linear(self.context_dim, self.hidden_dims[0], bias=False)
        self.skip: MaskedLinear | None = None
        if check_flag("skip_connections", skip_connections) or self._is_narrow:
            mask = self.adjacency.repeat(self.num_params, 1)
            self.skip = MaskedLinear(self.input_dim, len(mask), mask, bias=False)
            nn.init.zeros_(self.skip.weight)
        # the graph is computed on the CPU; the layers are on the default device
        self.to(last.weight.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_levels()

    def _read_levels(self) -> None:
        """Computes the layout for the inverse now, since tensor values may not be readable later."""
        if self.adjacency.is_meta:
            return  # no values, so the layout is unchanged
        adjacency = self.adjacency.to("cpu")
        level, sets = levels(adjacency), hidden_sets(adjacency, self.context_dim > 0)
        self.depth = int(level.max()) + 1
        units = [set_levels(spread(sets, width), level) for width in self.hidden_dims]
        starts = [
            some.bincount(minlength=self.depth).cumsum(0).tolist() for some in (level, *units)
        ]
        is_natural = bool((level.diff() >= 0).all())
        self._layout = BlockLayout(is_natural, [0, *starts[0]], starts[1:])
        self._is_narrow = min(self.hidden_dims) < len(sets)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.layers
        if (context is None) is not (self.context_layer is None):
            self._check(x, context)
        try:
            output = first(x) if context is None else self._with_context(first(x), context)
        except RuntimeError:  # torch's message does not name the argument
            self._check(x, context)
            raise
        for layer in others:
            output = layer(self.nonlinearity(output))
        return self._as_params(output if self.skip is None else output + self.skip(x))

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        check_input(x, context, self.input_dim, self.context_dim, self.layers[0].mask.dtype)

    def _as_params(self, outputs: Tensor) -> Tensor:
        # each parameter is a contiguous row of D numbers, so that its slices are fast
        rows = outputs.reshape(outputs.shape[:-1] + (self.num_params, self.input_dim))
        return rows.transpose(-1, -2)

    def _with_context(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        if self.context_layer is None or context is None:
            return hidden
        return hidden + self.context_layer(context.to(self.context_layer.weight.dtype))

    def linearize(self, x: Tensor, context: Tensor | None = None) -> MLPLinearization | None:
        """The conditioner at x, or None if :meth:`blocks` returns None."""
        if not self._is_unmodified():
            return None
        self._check(x, context)
        masked, skip = self._masked()  # once, for values and derivatives
        first, *others = self.layers
        output, slopes = self._with_context(F.linear(x, masked[0], first.bias), context), []
        for weight, layer in zip(masked[1:], others):
            slopes.append(slope_of(self.nonlinearity, output))
            output = F.linear(self.nonlinearity(output), weight, layer.bias)
        params = self._as_params(output if skip is None else output + F.linear(x, skip))
        with torch.no_grad():
            weights = self._weights(masked, skip, None)
        return MLPLinearization(params, self._layout, self._order(), weights, slopes)

    def blocks(
        self, x: Tensor, context: Tensor | None = None, *, in_place: bool = False
    ) -> MLPBlocks | None:
        """None for a subclass with its own ``forward``, or with hooks, which blocks would skip."""
        if not self._is_unmodified():
            return None
        self._check(x, context)
        weights = self._weights(*self._masked(), context).sorted_by(self._order())
        return MLPBlocks(self._layout, self._order(), weights, self.nonlinearity, x)

    def _order(self) -> Tensor | None:
        return None if self._layout.natural else self.order

    def _is_unmodified(self) -> bool:
        """Whether parameters come only from the masked layers and activations, without hooks."""
        layers = self.layers if self.skip is None else [*self.layers, self.skip]
        plain = [runs_only(layer, MaskedLinear) for layer in layers]
        return all(plain) and runs_only(self, MaskedMLP)

    def _masked(self) -> tuple[list[Tensor], Tensor | None]:
        masked = [layer.weight * layer.mask for layer in self.layers]
        return masked, None if self.skip is None else self.skip.weight * self.skip.mask

    def _weights(
        self, masked: list[Tensor], skip: Tensor | None, context: Tensor | None
    ) -> Weights:
        rows = (self.num_params, self.input_dim)
        *biases, last_bias = [layer.bias for layer in self.layers]
        biases[0] = self._with_context(biases[0], context)
        *inner, last = masked
        skip = None if skip is None else skip.view(*rows, -1)
        return Weights(inner, last.view(*rows, -1), skip, biases, last_bias.view(rows))


class Unconditional(Conditioner):
    """Parameters that are the same for every x, for a univariate flow of each marginal.

    :raises ValueError: if a size is not positive; see :class:`MaskedMLP`.
    """

    autoregressive = True
    depth = 1
    num_params: int

    def __init__(self, input_dim: int, num_params: int) -> None:
        super().__init__()
        self.input_dim = check_integer("input_dim", input_dim)
        self.num_params = check_integer("num_params", num_params)
        # a PyTorch layer determines the device and dtype of new parameters
        self.params = nn.Linear(self.num_params, self.input_dim, bias=False).weight
        nn.init.zeros_(self.params)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_input(x, None, self.input_dim, 0, None)
        return self.params.expand(x.shape + (self.num_params,))

    def constant(self) -> Tensor | None:
        return self.params if runs_only(self, Unconditional) else None
