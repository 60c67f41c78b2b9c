# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Any network, made autoregressive by masking its input."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..._base.arguments import check_callable
from .base import Conditioner
from .masked_mlp import is_elementwise
from .masks import check_graph

#: layers that treat rows of a batch independently, without randomness; subclasses may not
_BY_ROW = {nn.Sequential, nn.Linear, nn.LayerNorm, nn.Unflatten}


class MaskedInput(Conditioner):
    r"""Makes any network autoregressive by evaluating it on D masked copies of its input.

    .. math:: \theta_i = \mathrm{net}(x \odot m_i)_i,

    where the mask :math:`m_i` keeps the coordinates before i and sets the rest to zero. It takes D
    evaluations of the network, in one batch. If ``net`` returns parameters, shape ``(*, D, P)``, this is a
    conditioner. If it returns an elementwise :class:`~torch.distributions.transforms.Transform` on
    ``(*, D)``, this is a ``meta`` for :class:`~pyro_artransform.flows.transforms.AutoregressiveTransform`.

    :param net: a function or module of x, shape ``(*, D)``, and of a context, if one is passed.
    :param order: a permutation; it or ``adjacency`` is as for
        :class:`~pyro_artransform.flows.conditioners.MaskedMLP`.
    :raises TypeError: if ``net`` is not callable, or returns another type.
    :raises ValueError: if the order or the adjacency is invalid, or ``net`` returns another shape.

    Example::

        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(-1, (3, 2)))
        >>> MaskedInput(net)(torch.zeros(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    adjacency: Tensor | None

    @property
    def autoregressive(self) -> bool:  # type: ignore[override]  # read-only here
        """True if all layers are known to be deterministic and to treat rows of a batch independently."""
        net: object = self.net
        return isinstance(net, nn.Module) and all(
            type(m) in _BY_ROW or is_elementwise(m) for m in net.modules()
        )

    def __init__(
        self,
        net: Callable[..., Tensor | Transform],
        *,
        order: Tensor | Sequence[int] | None = None,
        adjacency: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.net = check_callable("net", net)
        graph = order if adjacency is None else adjacency
        if graph is not None:
            adjacency = check_graph(order, adjacency, len(graph))[1]
        self.register_buffer("adjacency", adjacency)

    def forward(  # type: ignore[override]  # a transform, where the network gives one
        self, x: Tensor, context: Tensor | None = None
    ) -> Tensor | Transform:
        """The parameters or the transform, each coordinate's from its own masked copy."""
        dim = x.shape[-1] if x.dim() else 0
        mask = self.adjacency
        if mask is None:
            mask = torch.ones((dim, dim), dtype=torch.bool, device=x.device).tril(-1)
        elif dim != len(mask):
            raise ValueError(f"x: expected shape (*, {len(mask)}), got {tuple(x.shape)}")
        # not a product, since masked entries may be infinite
        inputs = [torch.where(mask, x.unsqueeze(-2), torch.zeros_like(x).unsqueeze(-2))]
        if context is not None:
            inputs.append(context.unsqueeze(-2).expand(context.shape[:-1] + (dim, -1)))
        out = self.net(*inputs)
        if isinstance(out, Transform):
            return _OwnCopyTransform(out)
        if not isinstance(out, Tensor):
            raise TypeError(f"net: expected a tensor or a Transform, got {type(out).__name__}")
        if out.dim() < 3 or out.shape[-3:-1] != (dim, dim):
            got = f"{tuple(out.shape)} for an input of shape {tuple(inputs[0].shape)}"
            raise ValueError(f"net: expected parameters of shape (*, {dim}, P), got {got}")
        return out.diagonal(dim1=-3, dim2=-2).mT


class _OwnCopyTransform(Transform):
    """Takes coordinate i of an elementwise transform on ``(*, D, D)`` from the i-th copy."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True

    def __init__(self, base: Transform) -> None:
        super().__init__()
        if base.event_dim != 0:
            got = f"event_dim {base.event_dim}"
            raise ValueError(f"net: expected an elementwise transform (event_dim 0), got {got}")
        self.base = base

    @property
    def sign(self) -> int:
        return self.base.sign

    def _call(self, x: Tensor) -> Tensor:
        return self.base(_copies(x)).diagonal(dim1=-2, dim2=-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.base.inv(_copies(y)).diagonal(dim1=-2, dim2=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        ladj = self.base.log_abs_det_jacobian(_copies(x), _copies(y))
        return ladj.expand(_copies(x).shape).diagonal(dim1=-2, dim2=-1)


def _copies(x: Tensor) -> Tensor:
    """Expands shape ``(*, D)`` to ``(*, D, D)``."""
    return x.unsqueeze(-2).expand(x.shape[:-1] + (x.shape[-1], x.shape[-1]))
