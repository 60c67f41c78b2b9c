# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The mean of a model's log joint densities for several arguments."""

from collections.abc import Sequence

from torch import Tensor

from .density import Args, Kwargs, LogDensity, LogJoint


class MeanLogJoint(LogDensity):
    """The log joint density of a model as the weighted mean of that for several arguments.

    The density of each mini-batch is scaled up to all data, and its mode is many standard deviations
    of the posterior away from that of all data. The more mini-batches, the closer is their mean.

    :param log_joint: the log joint density for any arguments.
    :param arguments: the positional and the keyword arguments of each mini-batch.
    :param weights: the weight of each, positive.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        arguments: Sequence[tuple[Args, Kwargs]],
        weights: Sequence[float],
    ) -> None:
        self.latents, self.start = log_joint.latents, log_joint.start
        self.strategy = log_joint.strategy
        self._parts = [log_joint.with_arguments(args, kwargs) for args, kwargs in arguments]
        self._shares = [weight / sum(weights) for weight in weights]

    def __call__(self, z: Tensor) -> Tensor:
        values = [share * part(z) for share, part in zip(self._shares, self._parts)]
        return sum(values[1:], values[0])

    def nonfinite_sites(self, z: Tensor) -> list[str]:
        found = [name for part in self._parts for name in part.nonfinite_sites(z)]
        return list(dict.fromkeys(found))
