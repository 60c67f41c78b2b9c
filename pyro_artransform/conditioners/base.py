# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The interface of conditioners."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor


class Linearization(Protocol):
    """A conditioner at B known points, with the products of its Jacobian that gradients need."""

    @property
    def params(self) -> Tensor:
        """The parameters, shape ``(B, D, P)``, with a graph to those of the network alone."""

    def pull_back(self, weights: Tensor) -> Tensor:
        """The gradient in the points, ``(B, D)``, of the parameters' sum with weights, ``(B, D, P)``."""

    def solve_adjoint(self, slopes: Tensor, gradient: Tensor) -> Tensor:
        r"""The adjoint v of an inverse, by the structure of the graph.

        .. math::
            v = g + N^\top v, \qquad N_{ij} = \sum_p s_{ip} \frac{\partial \theta_{ip}}{\partial x_j}

        :param slopes: s, shape ``(B, D, P)``.
        :param gradient: g, shape ``(B, D)``.
        """


class Blocks(Protocol):
    """A conditioner at one batch, on blocks of levels; coordinates before the open one are known."""

    #: The coordinates sorted by level, shape ``(D,)``, or None if they are in that order already.
    order: Tensor | None
    #: ``levels[k]`` coordinates come before level k; ``depth + 1`` entries.
    levels: list[int]
    #: The number of multiplications in one evaluation of one row, None where each level is a block.
    work: int | None

    def open(self, start: int, stop: int) -> None:
        """Begins the block of the levels ``start`` to ``stop - 1``."""

    def params(self, x: Tensor | None) -> Tensor:
        """The parameters of the block's n coordinates, shape ``(B, n, P)``.

        :param x: their values, shape ``(B, n)``, or None for a block of one level.
        """

    def close(self, x: Tensor, levels: int) -> None:
        """Sets the coordinates of the block before level ``levels`` to ``x``: they are known then."""

    def linearization(self) -> Linearization | None:
        """The conditioner at the points that all blocks led to, or None if that is not offered."""


class Conditioner(torch.nn.Module, ABC):
    r"""Maps x to the parameters of each coordinate's univariate transform, reading only earlier coordinates.

    .. math:: \theta_i = c_i(x_{<i}, \mathrm{context})

    A subclass implements ``forward(x, context=None)`` for ``x`` of shape ``(*, D)`` and an optional
    context of shape ``(*, C)``, whose batch shapes broadcast, and returns parameters of shape
    ``(*, D, P)``. Its last layer should start at zero, so that a flow starts as the identity.
    """

    #: Whether it reads earlier coordinates alone by construction, whatever the values of its parameters.
    #: If not, transforms check it when Pyro's validation is on.
    autoregressive: bool = False
    #: The number P of parameters of each coordinate, None if unknown.
    num_params: int | None = None
    #: The number of coordinates on the longest path of the graph, None if unknown: as many fixed-point
    #: passes invert exactly.
    depth: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # a class with another forward may break the promise of its base, and has to promise again
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if "autoregressive" in vars(base):
                return
            if "forward" in vars(base):
                cls.autoregressive = False
                return

    def constant(self) -> Tensor | None:
        """The parameters, shape ``(D, P)``, where they are the same for every x; else None."""
        return None

    def blocks(
        self, x: Tensor, context: Tensor | None = None, *, in_place: bool = False
    ) -> Blocks | None:
        """The evaluation level by level, or None: then fixed-point passes invert.

        :param x: a tensor of shape ``(B, D)``, whose dtype and device are used, not its values.
        :param context: shape ``(B, C)`` or ``(C,)``, or None.
        :param in_place: whether values may be written in place, where nothing has to differentiate it.
        """
        return None

    def linearize(self, x: Tensor, context: Tensor | None = None) -> Linearization | None:
        """At x, shape ``(B, D)``, or None: then path gradients take vector-Jacobian products."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters, shape ``(*, D, P)``, at ``x`` and a context where there is one."""
