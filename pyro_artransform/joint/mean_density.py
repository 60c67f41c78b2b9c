# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The mean of a model's log joint densities for several arguments."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .coordinates import Coordinates
from .density import Args, Kwargs, LogJoint
from .protocols import LogDensity


class MeanLogJoint(LogDensity):
    """The log joint density of a model as the weighted mean of that for several arguments.

    The density of one mini-batch is scaled up to all data, and its mode is many standard deviations
    of the posterior away from that of all data. The more mini-batches, the closer their mean is.

    :param log_joint: the log joint density for any arguments.
    :param arguments: the positional and the keyword arguments of each mini-batch.
    :param weights: the weight of each, positive.
    :raises ValueError: if coordinates from the prior are others for other arguments.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        arguments: Sequence[tuple[Args, Kwargs]],
        weights: Sequence[float],
    ) -> None:
        self.latents, self.strategy = log_joint.latents, log_joint.strategy
        self._parts = [log_joint.with_arguments(args, kwargs) for args, kwargs in arguments]
        self._shares = [weight / sum(weights) for weight in weights]
        ends = [part.from_unconstrained(log_joint.start[None])[0] for part in self._parts]
        if not all(torch.equal(end, ends[0]) for end in ends):
            raise ValueError(
                "expected priors that are the same for each mini-batch, got some whose location or scale "
                "depends on its data: make the guide with coordinates='model'"
            )

    def __call__(self, z: Tensor) -> Tensor:
        values = [share * part(z) for share, part in zip(self._shares, self._parts)]
        return sum(values[1:], values[0])

    @property
    def chunk_size(self) -> int:
        """How many draws are evaluated at once without gradients."""
        return self._parts[0].chunk_size

    @property
    def coordinates(self) -> Coordinates | None:
        """Which latents have coordinates from the prior, and how centred."""
        return self._parts[0].coordinates

    @property
    def start(self) -> Tensor:
        return self._parts[0].start

    def with_coordinates(self, coordinates: Coordinates | None) -> "MeanLogJoint":
        """See :meth:`LogJoint.with_coordinates`."""
        other = copy.copy(self)
        other._parts = [part.with_coordinates(coordinates) for part in self._parts]
        return other

    def prior_scales(self, u: Tensor) -> Tensor:
        """See :meth:`LogJoint.prior_scales`."""
        return self._parts[0].prior_scales(u)

    def to_unconstrained(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`LogJoint.to_unconstrained`."""
        return self._parts[0].to_unconstrained(z)

    def from_unconstrained(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._parts[0].from_unconstrained(u)

    def nonfinite_sites(self, z: Tensor) -> list[str]:
        return list(dict.fromkeys(k for part in self._parts for k in part.nonfinite_sites(z)))
