# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Composition that keeps every parameter, in both directions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import ConditionalTransformModule, constraints
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform
from torch.distributions.transforms import _InverseTransform

from .evaluate import call_and_ladj, inverse_and_ladj, inverse_at, sum_ladj
from .flow_module import FlowModule
from .score import call_and_score

Step = Callable[[Transform, Tensor], tuple[Tensor, Tensor]]


class FixedTransform(nn.Module):
    """Holds a transform that is no module in a list of modules.

    :param transform: a torch transform.
    :raises TypeError: if there is a module inside, whose parameters would be lost.
    """

    def __init__(self, transform: Transform | ConditionalTransform) -> None:
        super().__init__()
        inside = [v for v in vars(transform).values() if isinstance(v, nn.Module)]
        if inside:
            raise TypeError(
                f"{type(transform).__name__} holds the module {type(inside[0]).__name__}, whose "
                "parameters would be lost: expected a transform that is a module itself, or one "
                "without modules"
            )
        self.transform = transform


def as_module(transform: Any) -> nn.Module:
    """A transform as a module that owns whatever parameters there are.

    torch's inverses and compositions are no modules, and lose what they are made of.

    :param transform: a torch transform, or a conditional one.
    """
    if isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, _InverseTransform):
        return ComposedTransform(transform.inv).inv
    if isinstance(transform, ComposeTransform) and transform.parts:
        return ComposedTransform(*transform.parts)
    return FixedTransform(transform)


class ComposedTransform(FlowModule):
    r"""Applies transforms one after the other, the first one first.

    .. math::

        T = T_n \circ \dots \circ T_1

    Every part that is a module is registered, whichever direction is used; the log-determinants are
    summed over all event dimensions.

    :param transforms: torch transforms, in the order in which they are applied.
    :param cache_size: 1 to remember the last pair, 0 not to.
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

    def __init__(self, *transforms: Transform, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        _check_parts(transforms, Transform)
        self.transforms = nn.ModuleList(map(as_module, transforms))
        composed = ComposeTransform(list(transforms))
        self.domain = _at_least_vector(composed.domain)
        self.codomain = _at_least_vector(composed.codomain)
        self.bijective = composed.bijective

    @property
    def parts(self) -> list[Any]:
        """The transforms, in the order in which they are applied."""
        return [t.transform if isinstance(t, FixedTransform) else t for t in self.transforms]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._follow(x, self.parts, call_and_ladj, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._follow(y, self.parts[::-1], inverse_and_ladj, inverse=True)

    def _follow(
        self, value: Tensor, parts: list[Any], step: Step, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Each part in turn, by a function of the part and its argument, and the sum of the ladjs."""
        event_dim = self.codomain.event_dim if inverse else self.domain.event_dim
        total: Any = None
        for part in parts:
            ends = part.domain.event_dim, part.codomain.event_dim
            source, target = reversed(ends) if inverse else ends
            result, ladj = step(part, value)
            event_dim += target - source
            ladj = sum_ladj(ladj, result, target, event_dim)
            total = ladj if total is None else total + ladj
            value = result
        return value, total

    def inverse_at(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            known = [x.detach()]
            for part in self.parts[:-1]:
                known.append(call_and_ladj(part, known[-1])[0])

        def step(part: Transform, value: Tensor) -> tuple[Tensor, Tensor]:
            return inverse_at(part, known.pop(), value)

        return self._follow(y, self.parts[::-1], step, inverse=True)

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def step(part: Transform, value: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal score
            y, ladj, score = call_and_score(part, value, score)
            return y, ladj

        y, ladj = self._follow(x, self.parts, step, inverse=False)
        return y, ladj, score

    def clear_cache(self) -> None:
        """Forgets the remembered pair, of the parts too."""
        super().clear_cache()
        for part in self.parts:
            if hasattr(part, "clear_cache"):
                part.clear_cache()

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of y for an x of the given shape."""
        for part in self.parts:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of x for a y of the given shape."""
        for part in reversed(self.parts):
            shape = part.inverse_shape(shape)
        return shape


class ConditionalComposedTransform(ConditionalTransformModule):
    """Transforms one after the other, some of which depend on a context.

    :param transforms: conditional transforms and torch transforms, in the order in which they are
        applied.
    :raises TypeError: if a part is neither.
    :raises ValueError: if there is none.
    """

    domain = FlowModule.domain
    codomain = FlowModule.codomain
    bijective = True
    event_dim = 1

    def __init__(self, *transforms: Transform | ConditionalTransform) -> None:
        super().__init__()
        _check_parts(transforms, (Transform, ConditionalTransform))
        self.transforms = nn.ModuleList(map(as_module, transforms))

    def forward(self, *_: Any) -> None:
        """Says what to call."""
        raise TypeError("a conditional transform has no value by itself: call .condition(context)")

    def condition(self, context: Tensor) -> ComposedTransform:
        """The composition for one context.

        :param context: shape ``(*, C)``; its batch shape broadcasts with that of x.
        """
        return ComposedTransform(*(self._conditioned(t, context) for t in self.transforms))

    @staticmethod
    def _conditioned(part: Any, context: Tensor) -> Any:
        if isinstance(part, FixedTransform):
            return part.transform
        return part.condition(context) if isinstance(part, ConditionalTransform) else part

    def clear_cache(self) -> None:
        """Does nothing: each conditioned transform has its own memory."""


def chain(
    transforms: Sequence[Transform | ConditionalTransform],
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
    transforms = _as_list(transforms)
    if any(isinstance(t, ConditionalTransform) for t in transforms):
        return ConditionalComposedTransform(*transforms)
    return ComposedTransform(*transforms)


def _as_list(transforms: Any) -> list[Any]:
    if isinstance(transforms, (Transform, ConditionalTransform)):
        raise TypeError(
            f"expected a sequence of transforms, got one {type(transforms).__name__}; "
            "chain([transform]) takes it"
        )
    return list(transforms)


def _check_parts(transforms: Sequence[object], kinds: type | tuple[type, ...]) -> None:
    if not transforms:
        raise ValueError("expected at least one transform, got none")
    for part in transforms:
        if not isinstance(part, kinds):
            raise TypeError(f"expected transforms, got {type(part).__name__}")


def _at_least_vector(constraint: constraints.Constraint) -> Any:
    missing = 1 - constraint.event_dim
    return constraints.independent(constraint, missing) if missing > 0 else constraint
