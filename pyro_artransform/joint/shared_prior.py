# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log joint density of a mini-batch by itself."""

import copy
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor

from .coordinates import Coordinates
from .density import Args, Kwargs, LogJoint
from .protocols import LogDensity

T = TypeVar("T")


class SharedPrior(LogDensity):
    """The log joint density of a mini-batch by itself, with its share of the density of the globals.

    The mini-batch is a share of all data, and its elements have some of the latents.
    """

    def __init__(self, log_joint: LogJoint, share: float, elements: Collection[str]) -> None:
        self._log_joint, self._share, self._elements = log_joint, share, elements
        self.latents, self.strategy = log_joint.latents, log_joint.strategy
        self.nonfinite_sites = log_joint.nonfinite_sites  # type: ignore[method-assign]
        self.chunk_size = log_joint.chunk_size
        sites = [self.latents.sites[name] for name in elements]
        self._constrained = [site for site in sites if not site.is_unconstrained]
        self._random_state = torch.get_rng_state()

    @classmethod
    def of(cls, log_joint: LogJoint, args: Args, kwargs: Kwargs) -> "SharedPrior":
        """That of a mini-batch which is the model's arguments."""
        structure = log_joint.structure(args, kwargs)
        elements = log_joint.latents.sites.keys() - set(structure.global_latents)
        return cls(log_joint, 1 / structure.scale, elements)

    @property
    def start(self) -> Tensor:
        return self._log_joint.start

    @property
    def coordinates(self) -> Coordinates | None:
        """Which latents have coordinates from the prior, and how centred."""
        return self._log_joint.coordinates

    def with_coordinates(self, coordinates: Coordinates | None) -> "SharedPrior":
        """See :meth:`LogJoint.with_coordinates`."""
        other = copy.copy(self)
        other._log_joint = self._log_joint.with_coordinates(coordinates)
        return other

    def to_unconstrained(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`LogJoint.to_unconstrained`."""
        return self._at_state(self._log_joint.to_unconstrained, z)

    def from_unconstrained(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._at_state(self._log_joint.from_unconstrained, u)

    def __call__(self, z: Tensor) -> Tensor:
        u, _ = self.to_unconstrained(z)
        parts, ladj = self.latents.split(u), z.new_zeros(z.shape[:-1])
        for site in self._constrained:
            ladj = ladj + site.constrain_with_ladj(parts[site.name], z.shape[:-1])[1]
        if self.coordinates is not None:
            names = self.coordinates.with_location
            mapped = {name: names[name] for name in names if name in self._elements}
            alone = self.with_coordinates(self.coordinates._replace(with_location=mapped))
            ladj = ladj - alone.from_unconstrained(u)[1]
        # the Jacobian of an element is not scaled up as its density is
        joint = self._at_state(self._log_joint, z)
        return self._share * joint + (1 - self._share) * ladj

    def _at_state(self, function: Callable[[Tensor], T], z: Tensor) -> T:
        """A function of draws, of the same mini-batch each time."""
        is_random = self._log_joint.is_random
        with torch.random.fork_rng(devices=[], enabled=is_random):
            if is_random:
                torch.set_rng_state(self._random_state)
            return function(z)
