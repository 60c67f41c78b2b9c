# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Builders of flows, in lower case like Pyro's. Every flow starts as the identity.

Flows take one evaluation of each network forwards, and a few backwards, except those named ``maf``, where it
is the reverse; ``.inv`` exchanges the two directions.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pyro.distributions import ConditionalTransformModule
from torch import Tensor

from .._base.arguments import check_integer, shown
from .conditioners import MaskedMLP, Unconditional
from .transforms import (
    AutoregressiveTransform,
    ComposedTransform,
    ConditionalAutoregressiveTransform,
    ConditionalComposedTransform,
    ConditionedUnivariate,
    FlowModule,
)
from .univariate import Affine, Hinged, RationalQuadraticSpline, Univariate

HiddenDims = int | Sequence[int] | None
Nonlinearity = Callable[[Tensor], Tensor] | None
Order = Tensor | Sequence[int] | None


def affine_autoregressive(
    input_dim: int,
    hidden_dims: HiddenDims = None,
    *,
    nonlinearity: Nonlinearity = None,
    order: Order = None,
    adjacency: Tensor | None = None,
) -> AutoregressiveTransform:
    r"""One affine layer, :math:`y_i = x_i e^{s_i(x_{<i})} + m_i(x_{<i})`.

    :param input_dim: the number D of coordinates.
    :param hidden_dims: the width or widths of the hidden layers; by default two of ``max(64, 2 D)``.
    :param nonlinearity: the elementwise activation, by default ``torch.nn.ELU()``.
    :param order: ``order[k]`` is the k-th coordinate in the order; by default 0 .. D-1.
    :param adjacency: an acyclic graph, instead of ``order``: ``[i, j]`` says that i depends on j.
    :raises TypeError: if the nonlinearity is not a function.
    :raises ValueError: if a size, the order or the graph is invalid.

    Example::

        >>> import torch
        >>> import pyro.distributions as dist
        >>> base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
        >>> q = dist.TransformedDistribution(base, [affine_autoregressive(3)])
        >>> q.rsample((5,)).shape
        torch.Size([5, 3])
    """
    options = {"nonlinearity": nonlinearity, "order": order, "adjacency": adjacency}
    return AutoregressiveTransform(_meta(Affine(), input_dim, hidden_dims, **options))


def spline_autoregressive(
    input_dim: int,
    hidden_dims: HiddenDims = None,
    *,
    count_bins: int = 8,
    bound: float = 5.0,
    nonlinearity: Nonlinearity = None,
    order: Order = None,
    adjacency: Tensor | None = None,
) -> AutoregressiveTransform:
    """One layer of rational-quadratic splines on [-bound, bound], the identity outside.

    Other parameters and errors are those of :func:`affine_autoregressive`.

    :param count_bins: the number of bins of each spline.
    :param bound: half the width of the interval.
    """
    family = RationalQuadraticSpline(count_bins=count_bins, bound=bound)
    options = {"nonlinearity": nonlinearity, "order": order, "adjacency": adjacency}
    return AutoregressiveTransform(_meta(family, input_dim, hidden_dims, **options))


def hinged_marginals(input_dim: int) -> AutoregressiveTransform:
    """A univariate transform with smooth hinges for each of D coordinates, independent of the others.

    Placed before affine layers, it adds skewness and heavier or lighter tails to the base distribution.
    """
    return _marginals(input_dim, Hinged())


def spline_marginals(
    input_dim: int, *, count_bins: int = 8, bound: float = 5.0
) -> AutoregressiveTransform:
    """A spline for each coordinate, as in :func:`spline_autoregressive`, independent of the others."""
    return _marginals(input_dim, RationalQuadraticSpline(count_bins=count_bins, bound=bound))


def _marginals(input_dim: int, family: Univariate) -> AutoregressiveTransform:
    conditioner = Unconditional(input_dim, family.num_params)
    return AutoregressiveTransform(ConditionedUnivariate(conditioner, family))


def conditional_affine_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: HiddenDims = None,
    *,
    nonlinearity: Nonlinearity = None,
    order: Order = None,
    adjacency: Tensor | None = None,
) -> ConditionalAutoregressiveTransform:
    """An :func:`affine_autoregressive` that also depends on a context of size ``context_dim``."""
    options = {"nonlinearity": nonlinearity, "order": order, "adjacency": adjacency}
    context_dim = check_integer("context_dim", context_dim)
    meta = _meta(Affine(), input_dim, hidden_dims, context_dim=context_dim, **options)
    return ConditionalAutoregressiveTransform(meta)


def conditional_spline_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: HiddenDims = None,
    *,
    count_bins: int = 8,
    bound: float = 5.0,
    nonlinearity: Nonlinearity = None,
    order: Order = None,
    adjacency: Tensor | None = None,
) -> ConditionalAutoregressiveTransform:
    """A :func:`spline_autoregressive` that also depends on a context of size ``context_dim``."""
    options = {"nonlinearity": nonlinearity, "order": order, "adjacency": adjacency}
    context_dim = check_integer("context_dim", context_dim)
    family = RationalQuadraticSpline(count_bins=count_bins, bound=bound)
    meta = _meta(family, input_dim, hidden_dims, context_dim=context_dim, **options)
    return ConditionalAutoregressiveTransform(meta)


def iaf(
    input_dim: int,
    num_transforms: int = 3,
    hidden_dims: HiddenDims = None,
    *,
    univariate: Callable[[], Univariate] = Affine,
    nonlinearity: Nonlinearity = None,
    skip_connections: bool = False,
) -> ComposedTransform:
    """An inverse autoregressive flow: layers in alternating order.

    Other parameters and errors are those of :func:`affine_autoregressive`.

    :param num_transforms: the number of layers.
    :param univariate: a class or function that makes the univariate family of each layer, by default
        :class:`~pyro_artransform.flows.univariate.Affine`.
    :param nonlinearity: the activation, shared by all layers, including any parameters.
    :param skip_connections: whether each network also has a linear layer from its inputs to its outputs.
    :raises TypeError: if ``univariate`` does not make families.

    Example::

        >>> import torch
        >>> iaf(3, num_transforms=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 3])

    **References**

    1. Improved Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans, Jozefowicz,
       Chen, Sutskever, Welling, 2016), https://arxiv.org/abs/1606.04934
    """
    options = {"nonlinearity": nonlinearity, "skip_connections": skip_connections}
    metas = _metas(input_dim, num_transforms, univariate, hidden_dims, **options)
    return ComposedTransform(*map(AutoregressiveTransform, metas))


def maf(
    input_dim: int,
    num_transforms: int = 3,
    hidden_dims: HiddenDims = None,
    *,
    univariate: Callable[[], Univariate] = Affine,
    nonlinearity: Nonlinearity = None,
    skip_connections: bool = False,
) -> FlowModule:
    """A masked autoregressive flow: the inverse of :func:`iaf`, with the same parameters.

    **References**

    1. Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
       https://arxiv.org/abs/1705.07057
    """
    network: Any = {"nonlinearity": nonlinearity, "skip_connections": skip_connections}
    return iaf(input_dim, num_transforms, hidden_dims, univariate=univariate, **network).inv


def conditional_iaf(
    input_dim: int,
    context_dim: int,
    num_transforms: int = 3,
    hidden_dims: HiddenDims = None,
    *,
    univariate: Callable[[], Univariate] = Affine,
    nonlinearity: Nonlinearity = None,
    skip_connections: bool = False,
) -> ConditionalComposedTransform:
    """An :func:`iaf` that also depends on a context, with the same parameters.

    :param context_dim: the size C of the context; a context of shape ``(1, C)`` broadcasts.
    """
    options: Any = {"nonlinearity": nonlinearity, "skip_connections": skip_connections}
    options["context_dim"] = check_integer("context_dim", context_dim)
    metas = _metas(input_dim, num_transforms, univariate, hidden_dims, **options)
    return ConditionalComposedTransform(*map(ConditionalAutoregressiveTransform, metas))


def conditional_maf(
    input_dim: int,
    context_dim: int,
    num_transforms: int = 3,
    hidden_dims: HiddenDims = None,
    *,
    univariate: Callable[[], Univariate] = Affine,
    nonlinearity: Nonlinearity = None,
    skip_connections: bool = False,
) -> ConditionalTransformModule:
    """The inverse of :func:`conditional_iaf`, with the same parameters."""
    sizes = input_dim, context_dim, num_transforms, hidden_dims
    network: Any = {"nonlinearity": nonlinearity, "skip_connections": skip_connections}
    return conditional_iaf(*sizes, univariate=univariate, **network).inv


def _metas(
    input_dim: int,
    num_transforms: int,
    univariate: Callable[[], Univariate],
    hidden_dims: HiddenDims,
    **options: Any,
) -> list[ConditionedUnivariate]:
    """One meta per layer; the order of coordinates is reversed in every other one."""
    input_dim = check_integer("input_dim", input_dim)
    if isinstance(univariate, Univariate) or not callable(univariate):
        raise TypeError(
            "univariate: expected a function that makes a new family for each layer, such as Affine, got "
            f"{univariate!r}"
        )
    metas = []
    for k in range(check_integer("num_transforms", num_transforms)):
        family = univariate()
        if not isinstance(family, Univariate):
            raise TypeError(f"univariate: expected it to return a Univariate, got {shown(family)}")
        order = range(input_dim - 1, -1, -1) if k % 2 else None
        metas.append(_meta(family, input_dim, hidden_dims, order=order, **options))
    return metas


def _meta(
    family: Univariate, input_dim: int, hidden_dims: HiddenDims, **options: Any
) -> ConditionedUnivariate:
    """A masked network that returns the parameters of a family."""
    conditioner = MaskedMLP(input_dim, family.num_params, hidden_dims, **options)
    return ConditionedUnivariate(conditioner, family)
