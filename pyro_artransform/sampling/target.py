# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The target density of chains in a base space, and the state of chains."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._base.time_limit import check_time
from ..model import LogJoint
from ..model.coordinates.gaussian_sites import GaussianSites
from ..model.replay.capture import Captured, Function

#: nats by which no density or energy may fall, as in Stan
TOO_FAR = 1000.0

ToLatent = Callable[[Tensor], tuple[Tensor, Tensor]]  #: points to values and log-determinants


class State(NamedTuple):
    """The state of C chains: shapes ``(C, D)``, ``(C, D)``, ``(C,)`` and ``(C, D)``."""

    base: Tensor
    latent: Tensor
    log_density: Tensor
    gradient: Tensor

    def where(self, is_chosen: Tensor, other: "State") -> "State":
        """Takes chosen chains from this state and the rest from another."""
        rows = is_chosen[:, None]
        return State(*map(torch.where, (rows, rows, is_chosen, rows), self, other))

    def at(self, rows: Tensor) -> "State":
        """Selects chains by index."""
        return State(*(part[rows] for part in self))

    @classmethod
    def cat(cls, states: Sequence["State"]) -> "State":
        return cls(*map(torch.cat, zip(*states)))

    @property
    def is_finite(self) -> Tensor:
        """Whether chains have a finite density and gradient, shape ``(C,)``."""
        return self.log_density.isfinite() & self.gradient.isfinite().all(-1)

    @property
    def is_usable(self) -> Tensor:
        """Whether chains are finite and not far below the upper quartile of the densities, ``(C,)``."""
        is_finite = self.is_finite
        if not bool(is_finite.any()):
            return is_finite
        most_below = TOO_FAR + 10 * self.base.shape[-1]
        return is_finite & (
            self.log_density >= self.log_density[is_finite].quantile(0.75) - most_below
        )


def identity(base: Tensor) -> tuple[Tensor, Tensor]:
    """The identity transform, for a density that is sampled in its own coordinates."""
    return base, base.new_zeros(len(base))


class TransformedDensity:
    """The pullback ``log p(T(x)) + log |det T'(x)|`` of a posterior p to the base space of a transform T.

    ``num_gradients`` counts the points at which it was evaluated.

    :param before: a pullback whose captured density is shared if it is the same.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        to_latent: ToLatent = identity,
        before: "TransformedDensity | None" = None,
    ) -> None:
        self.log_joint, self.to_latent = log_joint, to_latent
        self.num_gradients: int = 0 if before is None else before.num_gradients
        self._density: Function = self._captured(self._density_and_gradient)
        self._transform: Function = self._captured(self._transformed)
        self._pull: Function = self._captured(self._pulled_back)
        if before is not None and before.log_joint is log_joint:
            self._density = before._density

    def with_gaussian_sites(self, log_joint: LogJoint) -> "TransformedDensity":
        """The pullback of a density that has other Gaussian sites, with the same captured functions."""
        other = copy.copy(self)
        other.log_joint = log_joint
        return other

    @property
    def gaussian_sites(self) -> GaussianSites | None:
        """The Gaussian sites of the coordinates of the density, if any."""
        given = self.log_joint.coordinates
        return None if given is None else given.gaussian_sites

    def _captured(self, function: Function) -> Function:
        is_loop = self.log_joint.strategy == "loop"
        return function if is_loop else Captured(function)

    def __call__(self, base: Tensor) -> State:
        """Evaluates latents, log densities and gradients at points ``(C, D)``, one chunk at a time."""
        check_time()
        self.num_gradients += len(base)
        parts = base.detach().split(self.log_joint.chunk_size)
        return State(base.detach(), *map(torch.cat, zip(*map(self._evaluate, parts))))

    def confirm(self) -> None:
        """Compares the last replay with a direct evaluation, as calls do now and then.

        :raises ReplayError: if they differ.
        """
        for function in (self._density, self._transform, self._pull):
            if isinstance(function, Captured):
                function.confirm()

    def _evaluate(self, base: Tensor) -> tuple[Tensor, ...]:
        if self.to_latent is identity:
            return base, *self._density(base, *(self.gaussian_sites or ()))
        latent, ladj = self._transform(base)
        log_density, gradient = self._density(latent, *(self.gaussian_sites or ()))
        return latent, log_density + ladj, *self._pull(base, gradient)

    def _density_and_gradient(self, latent: Tensor, *gaussian_sites: Tensor) -> tuple[Tensor, ...]:
        log_joint = self.log_joint
        if gaussian_sites:  # an input, since others have the same captured operations
            given: Any = log_joint.coordinates
            given = given.with_gaussian_sites(GaussianSites(*gaussian_sites))
            log_joint = log_joint.with_coordinates(given)
        with torch.enable_grad():
            latent = latent.detach().requires_grad_()
            log_density = log_joint(latent)
            (gradient,) = torch.autograd.grad(log_density.sum(), latent)
        return log_density.detach(), gradient

    def _transformed(self, base: Tensor) -> tuple[Tensor, ...]:
        latent, ladj = self.to_latent(base)
        return latent.detach(), ladj.detach()

    def _pulled_back(self, base: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """The gradient in the base space from that by the latents."""
        with torch.enable_grad():
            base = base.detach().requires_grad_()
            latent, ladj = self.to_latent(base)
            return torch.autograd.grad((latent * gradient).sum() + ladj.sum(), base)
