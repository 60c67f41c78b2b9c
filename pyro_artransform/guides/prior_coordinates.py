# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates from the model's prior as a transform, where Pyro asks for one."""

from typing import Any

from torch import Tensor

from ..transforms import FlowModule


class ToUnconstrained(FlowModule):
    """From coordinates of the prior to the unconstrained space, by runs of the model.

    :param log_joint: the log joint density of the model, in these coordinates.
    """

    def __init__(self, log_joint: Any) -> None:
        super().__init__()
        self._log_joint = log_joint

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._mapped(self._log_joint.to_unconstrained, x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._mapped(self._log_joint.from_unconstrained, y)

    def _mapped(self, function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        found, ladj = function(x.reshape(-1, x.shape[-1]))
        return found.reshape(x.shape), ladj.reshape(x.shape[:-1])
