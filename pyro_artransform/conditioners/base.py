# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a conditioner promises."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Conditioner(torch.nn.Module, ABC):
    r"""Maps x to the parameters of each coordinate's law, reading only earlier coordinates.

    .. math::

        \theta_i = c_i(x_{<i}, \mathrm{context})

    A subclass implements ``forward(x, context=None)`` for ``x`` of shape ``(*, D)`` and an optional
    context of shape ``(*, C)``, whose batch shapes broadcast, and returns parameters of shape
    ``(*, D, P)``. Its last layer should start at zero, so that a flow starts as the identity.

    :cvar bool autoregressive: whether the dependence on earlier coordinates alone holds by
        construction, whatever the values of the parameters. Where it is false, transforms check it
        by differentiation when Pyro's validation is on.
    """

    autoregressive: bool = False

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the parameters.

        :param x: shape ``(*, D)``.
        :param context: shape ``(*, C)``, or None.
        :return: shape ``(*, D, P)``.
        """
