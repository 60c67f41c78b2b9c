# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Metas: functions that return a transform for each x, made of a conditioner and a univariate family.

Any function that returns a torch transform for x of shape ``(*, D)`` is a meta. An
:class:`AutoregressiveMeta` also describes its dependency graph, so that its inverse costs about as much as
one evaluation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from ..._base.arguments import check_broadcast, is_tracing
from ..conditioners import Blocks, Conditioner, Linearization
from ..conditioners.masked_mlp import runs_only
from ..univariate import Univariate
from ..univariate.base import ElementwiseTransform

Meta = Callable[[Tensor], Transform]


class AutoregressiveMeta(torch.nn.Module):
    """A meta that describes its dependency graph; the defaults declare nothing."""

    #: The shape with which the batch shape of x broadcasts, such as that of a context.
    batch_shape: torch.Size = torch.Size()

    def expand(self, x: Tensor) -> Tensor:
        """Broadcasts the batch shape of x with :attr:`batch_shape`."""
        if not self.batch_shape:
            return x
        check_broadcast("batches of the context and of x", self.batch_shape, x.shape[:-1])
        return x.expand(torch.broadcast_shapes(x.shape, (*self.batch_shape, x.shape[-1])))

    @property
    def autoregressive(self) -> bool:
        """Whether it is autoregressive by construction, for any values of its parameters."""
        return False

    @property
    def depth(self) -> int | None:
        """The number of coordinates on the longest path of the graph; None if unknown."""
        return None

    @property
    def family(self) -> Univariate:
        """The univariate family, which makes transforms from the parameters of :meth:`blocks`."""
        raise NotImplementedError

    def blocks(self, y: Tensor, *, in_place: bool = False) -> Blocks | None:
        """As :meth:`~pyro_artransform.flows.conditioners.Conditioner.blocks`, for y of shape ``(*, D)``."""
        return None

    def linearize(self, x: Tensor) -> Linearization | None:
        """The conditioner linearized at the rows of x ``(*, D)``, or None."""
        return None


def check_returned(value: object) -> Transform:
    """Checks that a meta returned a bijection of real numbers or vectors."""
    if isinstance(value, ElementwiseTransform):
        return value
    if not isinstance(value, Transform):
        raise TypeError(
            f"meta: expected a function that returns a torch Transform, got one that returns a "
            f"{type(value).__name__}. For a network that returns parameters, "
            "ConditionedUnivariate(conditioner, family) is the meta"
        )
    real = type(constraints.real)  # copies of metas have copied constraints
    for side in (value.domain, value.codomain):
        if type(getattr(side, "base_constraint", side)) is not real or side.event_dim > 1:
            raise ValueError(
                f"meta: expected a transform of real numbers or vectors, got {type(value).__name__} "
                f"from {value.domain} to {value.codomain}"
            )
    return value


#: Classes that may declare to be autoregressive; a conditioner that returns transforms is a meta too.
SELF_DESCRIBING = (AutoregressiveMeta, Conditioner)


def is_right_by_construction(meta: object) -> bool:
    """Whether a meta declares to be autoregressive for any values of its parameters."""
    return isinstance(meta, SELF_DESCRIBING) and meta.autoregressive


class ConditionedUnivariate(AutoregressiveMeta):
    r"""A conditioner followed by a univariate family, as the ``meta`` of an autoregressive transform.

    .. math:: x \mapsto f(\cdot; \theta(x)), \qquad \theta_i = c_i(x_{<i}, \mathrm{context})

    :param conditioner: a module that returns parameters of shape ``(*, D, P)``.
    :param univariate: the family that makes a transform from them.
    :raises ValueError: if the two disagree on the number P of parameters.
    """

    def __init__(self, conditioner: Conditioner, univariate: Univariate) -> None:
        super().__init__()
        for value, kind in ((conditioner, Conditioner), (univariate, Univariate)):
            if not isinstance(value, kind):
                raise TypeError(f"expected a {kind.__name__}, got {type(value).__name__}")
        if conditioner.num_params not in (None, univariate.num_params):
            raise ValueError(
                f"expected a conditioner with {univariate.num_params} parameters for each coordinate, "
                f"as {type(univariate).__name__} takes, got {conditioner.num_params}"
            )
        self.conditioner = conditioner
        self.univariate = univariate

    @property
    def autoregressive(self) -> bool:
        own = type(self).forward is ConditionedUnivariate.forward
        return own and self.conditioner.autoregressive

    @property
    def depth(self) -> int | None:
        return self.conditioner.depth

    @property
    def family(self) -> Univariate:
        return self.univariate

    def blocks(
        self, y: Tensor, context: Tensor | None = None, *, in_place: bool = False
    ) -> Blocks | None:
        if self._is_unmodified():
            return self.conditioner.blocks(*_as_rows(y, context), in_place=in_place)
        return None

    def linearize(self, x: Tensor, context: Tensor | None = None) -> Linearization | None:
        if self._is_unmodified():
            return self.conditioner.linearize(*_as_rows(x, context))
        return None

    def _is_unmodified(self) -> bool:
        """Whether transforms come only from the conditioner and the family, without hooks."""
        family = self.univariate
        return runs_only(self, ConditionedUnivariate) and runs_only(family, type(family))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Transform:
        """The elementwise transform for x of shape ``(*, D)`` and a context of shape ``(*, C)``."""
        # looked up once, since each lookup is a call
        conditioner, univariate = self.conditioner, self.univariate
        # parameters that are the same for all rows of a batch are computed once
        params = conditioner.constant() if univariate.broadcasts else None
        if params is None or x.shape[-1:] != params.shape[:1]:
            params = conditioner(x) if context is None else conditioner(x, context)
        return univariate(params)


def _as_rows(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Reshapes x to ``(B, D)``, and a context to the same rows unless it is a vector."""
    if context is not None and context.dim() > 1:
        context = context.expand(x.shape[:-1] + context.shape[-1:]).flatten(0, -2)
    return x.reshape(-1, *x.shape[-1:]), context


class ContextMeta(AutoregressiveMeta):
    """A meta of x and a context, at a fixed context of shape ``(*, C)``."""

    def __init__(self, meta: Any, context: Tensor) -> None:
        super().__init__()
        self.meta = meta
        self.context = context
        self.batch_shape = self._context_for(1).shape[:-1]

    @property
    def autoregressive(self) -> bool:
        return is_right_by_construction(self.meta)

    @property
    def depth(self) -> int | None:
        return self.meta.depth if isinstance(self.meta, SELF_DESCRIBING) else None

    @property
    def family(self) -> Univariate:
        return self.meta.univariate

    def blocks(self, y: Tensor, *, in_place: bool = False) -> Blocks | None:
        if isinstance(self.meta, ConditionedUnivariate):
            return self.meta.blocks(y, self._context_for(y.dim()), in_place=in_place)
        return None

    def linearize(self, x: Tensor) -> Linearization | None:
        if isinstance(self.meta, ConditionedUnivariate):
            return self.meta.linearize(x, self._context_for(x.dim()))
        return None

    def forward(self, x: Tensor) -> Transform:
        return self.meta(self.expand(x), self._context_for(x.dim()))

    def _context_for(self, dim: int) -> Tensor:
        """The context for x with ``dim`` dimensions, without leading dimensions of size 1 that x lacks."""
        context = self.context
        # sizes are tensors during tracing, and cannot be compared
        while context.dim() > dim and not is_tracing() and context.shape[0] == 1:
            context = context[0]
        return context
