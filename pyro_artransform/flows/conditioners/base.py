# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The interface of conditioners."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor


class Linearization(Protocol):
    """A conditioner at B known points, with the Jacobian products that gradients need."""

    @property
    def params(self) -> Tensor:
        """The parameters, shape ``(B, D, P)``, with a graph to the network's weights only."""

    def pull_back(self, weights: Tensor) -> Tensor:
        """The gradient in the points, ``(B, D)``, of the sum of parameters times weights, ``(B, D, P)``."""

    def solve_adjoint(self, slopes: Tensor, gradient: Tensor) -> Tensor:
        r"""Solves for the adjoint v of an inverse, along the graph.

        .. math::
            v = g + N^\top v, \qquad N_{ij} = \sum_p s_{ip} \frac{\partial \theta_{ip}}{\partial x_j}

        :param slopes: s, shape ``(B, D, P)``.
        :param gradient: g, shape ``(B, D)``.
        """


class Blocks(Protocol):
    """A conditioner at one batch, by blocks of levels; coordinates before the open block are known."""

    #: The coordinates sorted by level, shape ``(D,)``; None if they already are in that order.
    order: Tensor | None
    #: The number of coordinates before each level; ``depth + 1`` entries.
    levels: list[int]
    #: Whether each block must be a single level.
    single_levels: bool

    def open(self, start: int, stop: int) -> None:
        """Opens the block of levels ``start`` to ``stop - 1``."""

    def params(self, x: Tensor | None) -> Tensor:
        """The parameters of the block's n coordinates, shape ``(B, n, P)``.

        :param x: the values of these coordinates, shape ``(B, n)``; None for a block of one level.
        """

    def close(self, x: Tensor, levels: int) -> None:
        """Marks the block's coordinates before level ``levels`` as known, with values ``x``."""

    def linearization(self) -> Linearization | None:
        """The conditioner linearized at the points found by all blocks; None if not supported."""


class Conditioner(torch.nn.Module, ABC):
    r"""Maps x to the parameters of each coordinate's univariate transform, reading only earlier coordinates.

    .. math:: \theta_i = c_i(x_{<i}, \mathrm{context})

    A subclass implements ``forward(x, context=None)`` for ``x`` of shape ``(*, D)`` and an optional
    context of shape ``(*, C)``, whose batch shapes broadcast, and returns parameters of shape
    ``(*, D, P)``. Its last layer should start at zero, so that a flow starts as the identity.
    """

    #: Whether it reads only earlier coordinates by construction, whatever the values of its parameters.
    #: If not, transforms check this when Pyro's validation is on.
    autoregressive: bool = False
    #: The number P of parameters per coordinate; None if unknown.
    num_params: int | None = None
    #: The number of coordinates on the longest path of the graph, which is the number of fixed-point passes
    #: to an exact inverse; None if unknown.
    depth: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # a subclass with its own forward may not be autoregressive, so it must declare this again
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if "autoregressive" in vars(base):
                return
            if "forward" in vars(base):
                cls.autoregressive = False
                return

    def constant(self) -> Tensor | None:
        """The parameters, shape ``(D, P)``, if they are the same for every x; else None."""
        return None

    def blocks(
        self, x: Tensor, context: Tensor | None = None, *, in_place: bool = False
    ) -> Blocks | None:
        """Returns the evaluation by blocks of levels; if None, the inverse takes fixed-point passes.

        :param x: a tensor of shape ``(B, D)``; only its dtype and device are used.
        :param context: shape ``(B, C)`` or ``(C,)``, or None.
        :param in_place: whether values may be written in place, because the evaluation is not differentiated.
        """
        return None

    def linearize(self, x: Tensor, context: Tensor | None = None) -> Linearization | None:
        """Linearizes at x, shape ``(B, D)``; if None, path gradients take vector-Jacobian products."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters, shape ``(*, D, P)``, at ``x`` and the context, if there is one."""
