# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Builders of flows, in lower case as Pyro's.

The forward direction of what a builder returns costs one evaluation of its network, the inverse a
few. Used as the transform of a :class:`~pyro.distributions.TransformedDistribution`, drawing samples and
scoring a sample that was just drawn are cheap, and the density of other points is dear; :func:`maf`
and ``.inv`` exchange the two.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .arguments import check_integer
from .conditioners import MaskedMLP, Unconditional
from .transforms import (
    AutoregressiveTransform,
    ComposedTransform,
    ConditionalAutoregressiveTransform,
    ConditionalComposedTransform,
    ConditionedUnivariate,
    InverseTransformModule,
)
from .univariate import Affine, Hinged, RationalQuadraticSpline, Univariate

HiddenDims = int | Sequence[int] | None
Nonlinearity = Callable[[Tensor], Tensor] | None


def affine_autoregressive(
    input_dim: int,
    hidden_dims: HiddenDims = None,
    *,
    nonlinearity: Nonlinearity = None,
    order: Tensor | Sequence[int] | None = None,
    adjacency: Tensor | None = None,
) -> AutoregressiveTransform:
    r"""One affine layer, :math:`y_i = x_i e^{s_i(x_{<i})} + m_i(x_{<i})`, the identity at first.

    The forward direction is cheap; the inverse costs a few times as much.

    :param input_dim: the number D of coordinates.
    :param hidden_dims: the width or widths of the hidden layers, by default two of ``max(64, 2 D)``.
    :param nonlinearity: the elementwise activation, by default ``torch.nn.ELU()``.
    :param order: ``order[k]`` is the coordinate that comes k-th, by default 0 .. D-1.
    :param adjacency: in place of ``order``, any acyclic graph: ``[i, j]`` says that i depends on j.
    :raises TypeError: if the nonlinearity is no function.
    :raises ValueError: for a wrong size, order or graph, or a nonlinearity that is not elementwise.

    Example::

        >>> import torch
        >>> import pyro.distributions as dist
        >>> base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
        >>> dist.TransformedDistribution(base, [affine_autoregressive(3)]).rsample((5,)).shape
        torch.Size([5, 3])
    """
    network = _options(nonlinearity, order, adjacency)
    return AutoregressiveTransform(_meta(Affine(), input_dim, hidden_dims, **network))


def spline_autoregressive(
    input_dim: int,
    hidden_dims: HiddenDims = None,
    *,
    count_bins: int = 8,
    bound: float = 5.0,
    nonlinearity: Nonlinearity = None,
    order: Tensor | Sequence[int] | None = None,
    adjacency: Tensor | None = None,
) -> AutoregressiveTransform:
    """One layer of rational-quadratic splines on [-bound, bound], the identity outside and at first.

    The forward direction is cheap; the inverse costs a few times as much.

    :param input_dim: the number D of coordinates.
    :param hidden_dims: the width or widths of the hidden layers, by default two of ``max(64, 2 D)``.
    :param count_bins: the number of bins of each spline.
    :param bound: half the width of the interval that is bent.
    :param nonlinearity: the elementwise activation, by default ``torch.nn.ELU()``.
    :param order: ``order[k]`` is the coordinate that comes k-th, by default 0 .. D-1.
    :param adjacency: in place of ``order``, any acyclic graph: ``[i, j]`` says that i depends on j.
    :raises TypeError: if the nonlinearity is no function.
    :raises ValueError: for a wrong size, order or graph, or a nonlinearity that is not elementwise.

    Example::

        >>> import torch
        >>> spline_autoregressive(3, count_bins=4)(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    univariate = RationalQuadraticSpline(count_bins=count_bins, bound=bound)
    network = _options(nonlinearity, order, adjacency)
    return AutoregressiveTransform(_meta(univariate, input_dim, hidden_dims, **network))


def hinged_marginals(input_dim: int) -> AutoregressiveTransform:
    """A law of its own for each coordinate, with smooth hinges, whatever the other ones are.

    In front of a stack of affine layers it makes of Gaussian noise such that is skewed and has the
    tails that the posterior wants. It is the identity at first.

    :param input_dim: the number D of coordinates.
    :raises ValueError: if it is not positive.

    Example::

        >>> import torch
        >>> hinged_marginals(3)(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    univariate = Hinged()
    conditioner = Unconditional(input_dim, univariate.num_params)
    return AutoregressiveTransform(ConditionedUnivariate(conditioner, univariate))


def conditional_affine_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: HiddenDims = None,
    *,
    nonlinearity: Nonlinearity = None,
    order: Tensor | Sequence[int] | None = None,
    adjacency: Tensor | None = None,
) -> ConditionalAutoregressiveTransform:
    """:func:`affine_autoregressive` whose laws depend on a context too, see its parameters.

    The forward direction of ``.condition(context)`` is cheap; the inverse costs a few times as much.

    :param context_dim: the size C of the context.
    :raises TypeError: if the nonlinearity is no function.
    :raises ValueError: for a wrong size, order or graph, or a nonlinearity that is not elementwise.

    Example::

        >>> import torch
        >>> t = conditional_affine_autoregressive(3, context_dim=2)
        >>> t.condition(torch.zeros(5, 2))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    network = _conditional_options(context_dim, nonlinearity, order, adjacency)
    return ConditionalAutoregressiveTransform(_meta(Affine(), input_dim, hidden_dims, **network))


def conditional_spline_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: HiddenDims = None,
    *,
    count_bins: int = 8,
    bound: float = 5.0,
    nonlinearity: Nonlinearity = None,
    order: Tensor | Sequence[int] | None = None,
    adjacency: Tensor | None = None,
) -> ConditionalAutoregressiveTransform:
    """:func:`spline_autoregressive` whose laws depend on a context too, see its parameters.

    The forward direction of ``.condition(context)`` is cheap; the inverse costs a few times as much.

    :param context_dim: the size C of the context.
    :raises TypeError: if the nonlinearity is no function.
    :raises ValueError: for a wrong size, order or graph, or a nonlinearity that is not elementwise.

    Example::

        >>> import torch
        >>> t = conditional_spline_autoregressive(3, context_dim=2)
        >>> t.condition(torch.zeros(5, 2))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    univariate = RationalQuadraticSpline(count_bins=count_bins, bound=bound)
    network = _conditional_options(context_dim, nonlinearity, order, adjacency)
    return ConditionalAutoregressiveTransform(_meta(univariate, input_dim, hidden_dims, **network))


def iaf(
    input_dim: int,
    num_transforms: int = 3,
    hidden_dims: HiddenDims = None,
    *,
    univariate: Callable[[], Univariate] = Affine,
    nonlinearity: Nonlinearity = None,
) -> ComposedTransform:
    """An inverse autoregressive flow: layers whose order alternates, the identity at first.

    Sampling and scoring the sample cost one evaluation of each network; the density of other
    points costs the inverse, a few times as much.

    :param input_dim: the number D of coordinates.
    :param num_transforms: the number of layers.
    :param hidden_dims: the width or widths of the hidden layers, by default two of ``max(64, 2 D)``.
    :param univariate: makes the univariate family of each layer, such as
        :class:`~pyro_artransform.univariate.Affine` or ``lambda: RationalQuadraticSpline(count_bins=8)``.
    :param nonlinearity: the elementwise activation, by default ``torch.nn.ELU()``; one module given
        here is shared by all layers, with its parameters if it has some.
    :raises TypeError: if the nonlinearity or the maker of families is no function.
    :raises ValueError: for a wrong size, or a nonlinearity that is not elementwise.

    Example::

        >>> import torch
        >>> iaf(3, num_transforms=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 3])

    **References**

    1. Improved Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans, Jozefowicz,
       Chen, Sutskever, Welling, 2016), https://arxiv.org/abs/1606.04934
    """
    network = _options(nonlinearity, None, None)
    metas = _metas(input_dim, num_transforms, hidden_dims, univariate, network)
    return ComposedTransform(*(AutoregressiveTransform(meta) for meta in metas))


def maf(
    input_dim: int,
    num_transforms: int = 3,
    hidden_dims: HiddenDims = None,
    *,
    univariate: Callable[[], Univariate] = Affine,
    nonlinearity: Nonlinearity = None,
) -> InverseTransformModule:
    """A masked autoregressive flow: the inverse of :func:`iaf`, whose parameters it takes.

    The density of any point costs one evaluation of each network; sampling costs the inverse, a
    few times as much.

    Example::

        >>> import torch
        >>> maf(3, num_transforms=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 3])

    **References**

    1. Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
       https://arxiv.org/abs/1705.07057
    """
    flow = iaf(
        input_dim, num_transforms, hidden_dims, univariate=univariate, nonlinearity=nonlinearity
    )
    return flow.inv


def conditional_iaf(
    input_dim: int,
    context_dim: int,
    num_transforms: int = 3,
    hidden_dims: HiddenDims = None,
    *,
    univariate: Callable[[], Univariate] = Affine,
    nonlinearity: Nonlinearity = None,
) -> ConditionalComposedTransform:
    """:func:`iaf` whose laws depend on a context too, see its parameters.

    For ``.condition(context)`` sampling and scoring the sample are cheap, the density of other points
    costs a few times as much.

    :param context_dim: the size C of the context; a context of shape ``(1, C)`` broadcasts.
    :raises TypeError: if the nonlinearity or the maker of families is no function.
    :raises ValueError: for a wrong size, or a nonlinearity that is not elementwise.

    Example::

        >>> import torch
        >>> flow = conditional_iaf(3, context_dim=2, num_transforms=2)
        >>> flow.condition(torch.zeros(1, 2))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    network = _conditional_options(context_dim, nonlinearity, None, None)
    metas = _metas(input_dim, num_transforms, hidden_dims, univariate, network)
    return ConditionalComposedTransform(*(ConditionalAutoregressiveTransform(m) for m in metas))


def conditional_maf(
    input_dim: int,
    context_dim: int,
    num_transforms: int = 3,
    hidden_dims: HiddenDims = None,
    *,
    univariate: Callable[[], Univariate] = Affine,
    nonlinearity: Nonlinearity = None,
) -> Any:
    """:func:`maf` whose laws depend on a context too: the inverse of :func:`conditional_iaf`.

    For ``.condition(context)`` the density of any point is cheap, sampling costs a few times as much.

    :param context_dim: the size C of the context; a context of shape ``(1, C)`` broadcasts.
    :raises TypeError: if the nonlinearity or the maker of families is no function.
    :raises ValueError: for a wrong size, or a nonlinearity that is not elementwise.

    Example::

        >>> import torch
        >>> flow = conditional_maf(3, context_dim=2, num_transforms=2)
        >>> flow.condition(torch.zeros(1, 2))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    flow = conditional_iaf(
        input_dim,
        context_dim,
        num_transforms,
        hidden_dims,
        univariate=univariate,
        nonlinearity=nonlinearity,
    )
    return flow.inv


def _metas(
    input_dim: int,
    num_transforms: int,
    hidden_dims: HiddenDims,
    univariate: Callable[[], Univariate],
    options: dict[str, Any],
) -> list[ConditionedUnivariate]:
    """One meta for each layer; every other one takes the coordinates from the last to the first."""
    input_dim = check_integer("input_dim", input_dim)
    layers = range(check_integer("num_transforms", num_transforms))
    orders = [range(input_dim - 1, -1, -1) if k % 2 else None for k in layers]
    networks = [{**options, "order": order} for order in orders]
    return [_meta(_family(univariate), input_dim, hidden_dims, **network) for network in networks]


def _family(univariate: Callable[[], Univariate]) -> Univariate:
    """A new family for a layer."""
    expected = "univariate: expected a function that makes a family, such as Affine, got"
    if isinstance(univariate, Univariate):
        article = "an" if type(univariate).__name__[0] in "AEIOU" else "a"
        raise TypeError(
            f"{expected} {article} {univariate!r}; one family would be shared by all layers"
        )
    if not callable(univariate):
        raise TypeError(f"{expected} {univariate!r}")
    family = univariate()
    if not isinstance(family, Univariate):
        raise TypeError(f"univariate: expected it to make a Univariate, got {family!r}")
    return family


def _meta(
    univariate: Univariate, input_dim: int, hidden_dims: HiddenDims, **options: Any
) -> ConditionedUnivariate:
    conditioner = MaskedMLP(input_dim, univariate.num_params, hidden_dims, **options)
    return ConditionedUnivariate(conditioner, univariate)


def _options(
    nonlinearity: Nonlinearity,
    order: Tensor | Sequence[int] | None,
    adjacency: Tensor | None,
) -> dict[str, Any]:
    """The options of a network."""
    return {"nonlinearity": nonlinearity, "order": order, "adjacency": adjacency}


def _conditional_options(context_dim: int, *options: Any) -> dict[str, Any]:
    """The options of a network with a context, whose size is positive."""
    return {**_options(*options), "context_dim": check_integer("context_dim", context_dim)}
