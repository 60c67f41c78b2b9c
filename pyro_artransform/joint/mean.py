# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The mean of a log joint density over several mini-batches."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .density import LogJoint


class MeanLogJoint(LogJoint):
    """The log joint density of a model, as the weighted mean of that for several arguments.

    That of each mini-batch is scaled up to all data, and its mode is far from that of all data, in
    standard deviations of the posterior. The more of them, the nearer.

    :param log_joint: the log joint density for any arguments.
    :param arguments: the positional and the keyword arguments of each mini-batch.
    :param weights: the weight of each, positive.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        arguments: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
        weights: Sequence[float],
    ) -> None:
        self.__dict__.update(log_joint.__dict__)
        self._parts = [log_joint.at(args, kwargs) for args, kwargs in arguments]
        self._shares = [weight / sum(weights) for weight in weights]

    def __call__(self, z: Tensor) -> Tensor:
        values = [share * part(z) for share, part in zip(self._shares, self._parts)]
        return sum(values[1:], values[0])

    def culprits(self, z: Tensor) -> list[str]:
        found = [name for part in self._parts for name in part.culprits(z)]
        return list(dict.fromkeys(found))
