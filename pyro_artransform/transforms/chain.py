# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Composition that keeps every parameter, in both directions."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform
from torch.distributions.transforms import _InverseTransform

from .evaluate import call_and_ladj, inverse_and_ladj, sum_ladj
from .flow_module import ConditionalFlowModule, FlowModule

AnyTransform = Transform | ConditionalTransform


class ForeignTransform(FlowModule):
    """Any torch transform, evaluated as those of this package are.

    :param transform: a torch transform.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__(cache_size=0)
        self.transform = transform
        self.domain, self.codomain = transform.domain, transform.codomain
        self.bijective = transform.bijective

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = call_and_ladj(self.transform, x)
        return y, sum_ladj(ladj, y, self.codomain.event_dim, self.codomain.event_dim)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = inverse_and_ladj(self.transform, y)
        return x, sum_ladj(ladj, x, self.domain.event_dim, self.domain.event_dim)

    def clear_cache(self) -> None:
        """Forgets what the transform remembers."""
        self.transform.clear_cache()  # type: ignore[attr-defined]  # which Pyro adds

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of y for an x of the given shape."""
        return self.transform.forward_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of x for a y of the given shape."""
        return self.transform.inverse_shape(shape)


class HeldConditional(nn.Module):
    """Holds a conditional transform that is no module in a list of modules."""

    def __init__(self, transform: ConditionalTransform) -> None:
        super().__init__()
        self.transform = transform


def as_module(transform: AnyTransform) -> nn.Module:
    """A transform as a module that owns whatever parameters there are.

    torch's inverses and compositions are no modules, and lose what they are made of.

    :param transform: a torch transform, or a conditional one.
    :raises TypeError: if there is a module inside, whose parameters would be lost.
    """
    if isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, _InverseTransform):
        return ComposedTransform(transform.inv).inv
    if isinstance(transform, ComposeTransform) and transform.parts:
        return ComposedTransform(*transform.parts)
    for value in vars(transform).values():
        if isinstance(value, nn.Module):
            raise TypeError(
                f"{type(transform).__name__} holds the module {type(value).__name__}, whose "
                "parameters would be lost: expected a transform that is a module itself, or one "
                "without modules"
            )
    if isinstance(transform, ConditionalTransform):
        return HeldConditional(transform)
    return ForeignTransform(transform)


class ComposedTransform(FlowModule):
    r"""Applies transforms one after the other, the first one first.

    .. math::

        T = T_n \circ \dots \circ T_1

    Every part that is a module is registered, whichever direction is used; the log-determinants are
    summed over all event dimensions.

    :param transforms: torch transforms, in the order in which they are applied.
    :param cache_size: as for :class:`FlowModule`.
    :raises TypeError: if a part is no transform.
    :raises ValueError: if there is none.

    Example::

        >>> import torch
        >>> from pyro_artransform import affine_autoregressive
        >>> from pyro_artransform.transforms import PermutationTransform
        >>> t = ComposedTransform(affine_autoregressive(3), PermutationTransform([2, 1, 0]))
        >>> t(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    #: A list of modules, each a transform.
    transforms: Any

    def __init__(self, *transforms: Transform, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        _check_parts(transforms, Transform)
        self.transforms = nn.ModuleList(map(as_module, transforms))
        composed = ComposeTransform(list(transforms))
        domain, codomain = composed.domain, composed.codomain
        # elementwise parts alone make a transform of vectors
        self.domain = domain if domain.event_dim else constraints.independent(domain, 1)
        self.codomain = codomain if codomain.event_dim else constraints.independent(codomain, 1)
        self.bijective = composed.bijective
        # the dimensions of a part's log-determinant that are events of the composition alone
        self._extra_dims = []
        event_dim = self.domain.event_dim
        for part in self.transforms:
            self._extra_dims.append(tuple(range(part.domain.event_dim - event_dim, 0)))
            event_dim += part.codomain.event_dim - part.domain.event_dim

    @property
    def parts(self) -> list[Transform]:
        """The transforms, in the order in which they are applied."""
        return [t.transform if isinstance(t, ForeignTransform) else t for t in self.transforms]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total: Any = None
        for part, dims in zip(self.transforms, self._extra_dims):
            flow = part if isinstance(part, FlowModule) else ForeignTransform(part)
            x, ladj = flow.call_and_ladj(x)
            ladj = ladj.sum(dims) if dims else ladj
            total = ladj if total is None else total + ladj
        return x, total

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total: Any = None
        for part, dims in zip(self.transforms, self._extra_dims):
            flow = part if isinstance(part, FlowModule) else ForeignTransform(part)
            x, ladj, score = flow.call_and_score(x, score)
            ladj = ladj.sum(dims) if dims else ladj
            total = ladj if total is None else total + ladj
        return x, total, score

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._invert(y, None)

    def inverse_at(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        known = [x.detach()]
        with torch.no_grad():
            for part in self.parts[:-1]:
                known.append(call_and_ladj(part, known[-1])[0])
        return self._invert(y, known)

    def _invert(self, y: Tensor, known: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """The inverse, with the help of each part's argument where that is known."""
        total: Any = None
        for part, dims in zip(reversed(self.transforms), reversed(self._extra_dims)):
            flow = part if isinstance(part, FlowModule) else ForeignTransform(part)
            y, ladj = flow.inverse_and_ladj(y) if known is None else flow.inverse_at(known.pop(), y)
            ladj = ladj.sum(dims) if dims else ladj
            total = ladj if total is None else total + ladj
        return y, total

    def clear_cache(self) -> None:
        """Forgets what parts from elsewhere may remember."""
        for part in self.transforms:
            part.clear_cache()

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of y for an x of the given shape."""
        for part in self.transforms:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of x for a y of the given shape."""
        for part in reversed(self.transforms):
            shape = part.inverse_shape(shape)
        return shape


class ConditionalComposedTransform(ConditionalFlowModule):
    """Transforms one after the other, some of which depend on a context.

    :param transforms: conditional transforms and torch transforms, in the order in which they are
        applied.
    :raises TypeError: if a part is neither.
    :raises ValueError: if there is none.
    """

    def __init__(self, *transforms: AnyTransform) -> None:
        super().__init__()
        _check_parts(transforms, (Transform, ConditionalTransform))
        self.transforms = nn.ModuleList(map(as_module, transforms))

    def condition(self, context: Tensor) -> ComposedTransform:
        """The composition for one context.

        :param context: shape ``(*, C)``; its batch shape broadcasts with that of x.
        """
        parts: list[Any] = []
        for part in self.transforms:
            held = isinstance(part, (ForeignTransform, HeldConditional))
            transform: Any = part.transform if held else part
            conditional = isinstance(transform, ConditionalTransform)
            parts.append(transform.condition(context) if conditional else transform)
        return ComposedTransform(*parts)


def chain(
    transforms: Sequence[AnyTransform],
) -> ComposedTransform | ConditionalComposedTransform:
    """Composes transforms, the first one first, and keeps every parameter, in ``chain(...).inv`` too.

    :param transforms: transforms, some of which may be conditional.
    :return: a transform, or a conditional one if a part is.
    :raises TypeError: if a part is no transform.
    :raises ValueError: if there is none.

    Example::

        >>> import torch
        >>> from pyro_artransform import affine_autoregressive
        >>> t = chain([affine_autoregressive(3), affine_autoregressive(3, order=[2, 1, 0])])
        >>> t.inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    if isinstance(transforms, (Transform, ConditionalTransform)):
        raise TypeError(
            f"expected a sequence of transforms, got one {type(transforms).__name__}; "
            "chain([transform]) takes it"
        )
    parts: list[Any] = list(transforms)
    for part in parts:
        if isinstance(part, ConditionalTransform):
            return ConditionalComposedTransform(*parts)
    return ComposedTransform(*parts)


def _check_parts(transforms: Sequence[object], kinds: type | tuple[type, ...]) -> None:
    if not transforms:
        raise ValueError("expected at least one transform, got none")
    for part in transforms:
        if not isinstance(part, kinds):
            raise TypeError(f"expected transforms, got {type(part).__name__}")
