# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What an autoregressive transform asks of its meta.

Any callable that returns, given x of shape ``(*, D)``, a torch transform for that x is a meta: its inverse
takes fixed-point passes, and its structure is checked by differentiation. A :class:`StructuredMeta` says
more of itself, and is inverted for about the price of one evaluation.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from ..conditioners import Blocks, Linearization
from ..univariate import Univariate
from ..univariate.base import ElementwiseTransform

Meta = Callable[[Tensor], Transform]


class StructuredMeta(torch.nn.Module):
    """A meta that describes its dependency graph; each answer has a default that promises nothing.

    A subclass implements ``forward(x)``, which returns the transform for x of shape ``(*, D)``.
    """

    #: What the batch shape of x broadcasts with, such as that of a context.
    batch_shape = torch.Size()

    @property
    def autoregressive(self) -> bool:
        """Whether it is autoregressive by construction, whatever the values of its parameters."""
        return False

    @property
    def depth(self) -> int | None:
        """The number of coordinates on the longest path of the graph, None if it is unknown."""
        return None

    @property
    def family(self) -> Univariate:
        """The univariate family, which makes transforms of the parameters that :meth:`blocks` gives."""
        raise NotImplementedError

    def blocks(self, y: Tensor, *, in_place: bool = False) -> Blocks | None:
        """The parameters for a batch of the shape of y, ``(*, D)``, level by level; None if they cannot be.

        :param in_place: see :meth:`~pyro_artransform.conditioners.Conditioner.blocks`.
        """
        return None

    def linearize(self, x: Tensor) -> Linearization | None:
        """The conditioner at x, shape ``(*, D)``, by rows; None if it is not known."""
        return None


def check_returned(value: object) -> Transform:
    """What a meta returned, if it is a bijection of real numbers or vectors."""
    if isinstance(value, ElementwiseTransform):
        return value
    if not isinstance(value, Transform):
        raise TypeError(
            f"meta: expected a function that returns a torch Transform, got one that returns a "
            f"{type(value).__name__}. For a network that returns parameters, "
            "ConditionedUnivariate(conditioner, family) is the meta"
        )
    for side in (value.domain, value.codomain):
        if getattr(side, "base_constraint", side) is not constraints.real or side.event_dim > 1:
            raise ValueError(
                f"meta: expected a transform of real numbers or vectors, got {type(value).__name__} "
                f"from {value.domain} to {value.codomain}"
            )
    return value
