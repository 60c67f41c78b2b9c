# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Transforms of torch, Pyro and Zuko as flows, and compositions that register all parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform
from torch.distributions.transforms import _InverseTransform

from ..._base.arguments import shown
from .flow_module import ConditionalFlowModule, FlowModule, call_and_ladj

AnyTransform = Transform | ConditionalTransform


class ForeignTransform(FlowModule):
    """Wraps any other transform, such as those of torch, Pyro and Zuko.

    Some transforms of Pyro have no inverse: their draws have densities with gradients, but the inverse
    raises a ``NotImplementedError``.

    :param source: a torch transform; or a module that, called without arguments, returns one, or a flow as
        Zuko's do, with the ``transform`` of its values to a base, which is used in the direction of draws.
    :raises TypeError: if it is neither.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.source = source
        made = self._make_transform()
        self.domain, self.codomain = made.domain, made.codomain
        self.bijective = made.bijective

    def _make_transform(self) -> Transform:
        """The transform, made by the source in each call if it is not the source itself."""
        if isinstance(self.source, Transform):
            return self.source
        cause = None
        try:
            made = self.source()
            made = made if isinstance(made, Transform) else made.transform.inv
            if isinstance(made, Transform):
                return made
        except (AttributeError, TypeError, NotImplementedError) as error:
            cause = error
        raise TypeError(
            "expected a transform, or a module that returns one when called without arguments, as Zuko's "
            f"flows do, got {type(self.source).__name__}. If it needs a context, condition the flow first: "
            "flow.condition(context)"
        ) from cause

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return call_and_ladj(self._make_transform(), x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return call_and_ladj(self._make_transform().inv, y)
        except (KeyError, NotImplementedError) as error:  # Pyro's ways of saying so
            raise NotImplementedError(
                f"{type(self.source).__name__} has no inverse, so only the densities of its own draws are "
                "known. For those of other values use a flow with an inverse, such as an autoregressive one "
                "of affine layers or splines"
            ) from error

    def inverse_at(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.inverse_and_ladj(y)
        except NotImplementedError:
            # a step of Newton's method, which at a solution has the value and the gradients of the inverse
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                known, _ = self.call_and_ladj(point)
                slopes = [
                    torch.autograd.grad(known[..., i].sum(), point, retain_graph=True)[0]
                    for i in range(known.shape[-1])
                ]
            step = torch.linalg.solve(torch.stack(slopes, -2), (y - known)[..., None])[..., 0]
            new = x.detach() + step
            return new, -self.call_and_ladj(new)[1]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return self._make_transform().forward_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return self._make_transform().inverse_shape(shape)


def as_flow(transform: Any) -> FlowModule:
    """A transform, or a module that makes one, as a :class:`FlowModule`."""
    return transform if isinstance(transform, FlowModule) else ForeignTransform(transform)


def _as_modules(parts: Sequence[Any], *kinds: type) -> Any:
    """Converts transforms to modules of these kinds that register all parameters."""
    if not parts:
        raise ValueError("expected at least one transform, got none")
    modules = nn.ModuleList()
    for part in parts:
        is_ready = isinstance(part, nn.Module) and isinstance(part, kinds)
        modules.append(part if is_ready else _as_module(part))
    return modules


def _as_module(transform: Any) -> nn.Module:
    """Converts to a module; torch's inverses and compositions lose their parameters."""
    kind = type(transform).__name__
    if isinstance(transform, _InverseTransform):
        return ComposedTransform(transform.inv).inv
    if isinstance(transform, ComposeTransform) and transform.parts:
        return ComposedTransform(*transform.parts)
    if isinstance(transform, ConditionalTransform) and not isinstance(transform, nn.Module):
        raise TypeError(f"expected a conditional transform that is a module, got {kind}")
    flow = ForeignTransform(transform)
    for value in vars(transform).values():
        if isinstance(value, nn.Module):
            raise TypeError(
                f"{kind} holds the module {type(value).__name__}, whose parameters would be lost: "
                "expected a transform that is a module itself, or holds none"
            )
    return flow


class ComposedTransform(FlowModule):
    r"""Applies transforms in sequence, the first one first.

    .. math:: T = T_n \circ \cdots \circ T_1

    :param transforms: torch transforms, or modules that make them, such as flows of Zuko; modules are
        registered.
    :raises TypeError: if a part is not a transform, or would lose parameters.
    :raises ValueError: if there are no parts.
    """

    def __init__(self, *transforms: Transform) -> None:
        super().__init__()
        self.transforms = _as_modules(transforms, Transform)
        composed = ComposeTransform(list(self.transforms))
        domain, codomain = composed.domain, composed.codomain
        # elementwise parts together form a transform of vectors
        self.domain = domain if domain.event_dim else constraints.independent(domain, 1)
        self.codomain = codomain if codomain.event_dim else constraints.independent(codomain, 1)
        self.bijective = composed.bijective
        #: the original transforms
        self.parts: list[Any] = []
        # the parts as flows, with the dimensions over which to sum their log-determinants
        self._steps: list[tuple[FlowModule, tuple[int, ...]]] = []
        event_dim = self.domain.event_dim
        for part in self.transforms:
            is_wrapped = isinstance(part, ForeignTransform) and isinstance(part.source, Transform)
            self.parts.append(part.source if is_wrapped else part)
            self._steps.append((as_flow(part), tuple(range(part.domain.event_dim - event_dim, 0))))
            event_dim += part.codomain.event_dim - part.domain.event_dim

    def call_and_ladj(self, x: Tensor) -> Any:
        return self._run("call_and_ladj", self._steps, x)

    def inverse_and_ladj(self, y: Tensor) -> Any:
        return self._run("inverse_and_ladj", self._steps[::-1], y)

    def inverse_at(self, x: Tensor, y: Tensor) -> Any:
        known, ladjs = [x.detach()], []  # the arguments of all parts
        with torch.no_grad():
            for flow, _ in self._steps[:-1]:
                known.append(flow.call_and_ladj(known[-1])[0])
        for flow, dims in self._steps[::-1]:
            y, ladj = flow.inverse_at(known.pop(), y)
            ladjs.append(ladj.sum(dims) if dims else ladj)
        return y, sum(ladjs[1:], ladjs[0])

    def call_and_score(self, x: Tensor, score: Tensor) -> Any:
        return self._run("call_and_score", self._steps, x, score)

    def _run(self, method: str, steps: Sequence[Any], x: Tensor, *score: Tensor) -> Any:
        """Runs the steps in sequence; adds log-determinants, the second output of each."""
        ladjs = []
        for flow, dims in steps:
            x, ladj, *score = getattr(flow, method)(x, *score)
            ladjs.append(ladj.sum(dims) if dims else ladj)
        return x, sum(ladjs[1:], ladjs[0]), *score

    # shapes, through the parts in sequence
    forward_shape = ComposeTransform.forward_shape
    inverse_shape = ComposeTransform.inverse_shape


class ConditionalComposedTransform(ConditionalFlowModule):
    """A :class:`ComposedTransform` with parts that depend on a context.

    :param transforms: conditional transforms that are modules, and torch transforms.
    """

    def __init__(self, *transforms: AnyTransform) -> None:
        super().__init__()
        self.transforms = _as_modules(transforms, Transform, ConditionalTransform)

    def condition(self, context: Tensor) -> ComposedTransform:
        """The composition given a context ``(*, C)``, whose batch shape broadcasts with that of x."""
        parts: list[Any] = [*self.transforms]
        given = [t.condition(context) if isinstance(t, ConditionalTransform) else t for t in parts]
        return ComposedTransform(*given)


def chain(transforms: Sequence[AnyTransform]) -> ComposedTransform | ConditionalComposedTransform:
    """Composes transforms to a :class:`ComposedTransform`, or a conditional one if any part is conditional.

    Example::

        >>> from pyro_artransform import iaf, spline_autoregressive
        >>> t = chain([spline_autoregressive(3), iaf(3)])
        >>> t.inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    if isinstance(transforms, (Transform, ConditionalTransform)):
        raise TypeError(f"expected a sequence of transforms, got one {type(transforms).__name__}")
    parts: list[Any] = list(transforms)
    if any(isinstance(part, ConditionalTransform) for part in parts):
        return ConditionalComposedTransform(*parts)
    return ComposedTransform(*parts)


class PermutationTransform(FlowModule):
    r"""Reorders the coordinates, :math:`y_k = x_{\mathrm{order}_k}`.

    :param order: a permutation of 0 .. D-1, shape ``(D,)``, which is saved as a buffer.
    """

    order: Tensor

    def __init__(self, order: Tensor | Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.as_tensor(order).long())
        if self.order.dim() != 1 or sorted(self.order.tolist()) != list(range(len(self.order))):
            raise ValueError(
                f"order: expected a permutation of 0 .. D-1, got {shown(self.order.tolist())}"
            )

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._pick(x, self.order)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._pick(y, self.order.argsort())

    def _pick(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1:] != index.shape:
            raise ValueError(f"x: expected shape (*, {len(index)}), got {tuple(x.shape)}")
        return x[..., index], x.new_zeros(x.shape[:-1])


class PartitionTransform(FlowModule):
    r"""Transforms disjoint sets of coordinates by separate transforms.

    .. math:: y_{S_k} = T_k(x_{S_k})

    :param parts: pairs of the coordinates of a set, and a :class:`FlowModule` for vectors of that size.
    :raises ValueError: if the sets are not a partition of 0 .. D-1.
    """

    order: Tensor  # the coordinates of all parts, concatenated
    inverse_order: Tensor

    def __init__(self, parts: Sequence[tuple[Sequence[int], FlowModule]]) -> None:
        super().__init__()
        sets = [list(coordinates) for coordinates, _ in parts]
        order = [i for coordinates in sets for i in coordinates]
        if not order or sorted(order) != list(range(len(order))):
            raise ValueError(f"parts: expected a partition of 0 .. D-1, got {sets}")
        self.transforms = nn.ModuleList(transform for _, transform in parts)
        self._sizes = [len(coordinates) for coordinates in sets]
        index = torch.tensor(order, dtype=torch.long, device="cpu")
        self.register_buffer("order", index, persistent=False)
        self.register_buffer("inverse_order", index.argsort(), persistent=False)

    def call_and_ladj(self, x: Tensor) -> Any:
        return self._each("call_and_ladj", x)

    def inverse_and_ladj(self, y: Tensor) -> Any:
        return self._each("inverse_and_ladj", y)

    def inverse_at(self, x: Tensor, y: Tensor) -> Any:
        return self._each("inverse_at", x, y)

    def call_and_score(self, x: Tensor, score: Tensor) -> Any:
        return self._each("call_and_score", x, score)

    def _each(self, method: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs each transform on its coordinates; adds log-determinants, the second output."""
        split = [x.index_select(-1, self.order).split(self._sizes, -1) for x in inputs]
        outputs = [getattr(t, method)(*parts) for t, *parts in zip(self.transforms, *split)]
        values, ladjs, *scores = zip(*outputs)
        joined = [torch.cat(v, -1).index_select(-1, self.inverse_order) for v in (values, *scores)]
        return joined[0], sum(ladjs[1:], ladjs[0]), *joined[1:]
