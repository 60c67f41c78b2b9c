# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The target density of chains in a base space, and the state of chains."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..capture import Captured
from ..joint import LogJoint

# calls before a gradient is captured for replay: chains evaluate hundreds
_PATIENCE = 2

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


def identity(base: Tensor) -> tuple[Tensor, Tensor]:
    """The identity transform, for a density that is sampled in its own coordinates."""
    return base, base.new_zeros(len(base))


class PulledBack:
    """The pullback ``log p(T(x)) + log |det T'(x)|`` of a posterior p to the base space of a transform T.

    ``num_gradients`` counts the points at which it was evaluated.
    """

    def __init__(self, log_joint: LogJoint, to_latent: ToLatent = identity) -> None:
        self.log_joint, self.to_latent = log_joint, to_latent
        self.num_gradients = 0
        self._evaluate: Callable[[Tensor], tuple[Tensor, ...]] = self._with_gradient
        self._captured: Captured | None = None
        if log_joint.strategy != "loop":
            self._evaluate = self._captured = Captured(self._with_gradient, _PATIENCE)

    def __call__(self, base: Tensor) -> State:
        """Evaluates latents, log densities and gradients at points ``(C, D)``, one chunk at a time."""
        self.num_gradients += len(base)
        parts = base.detach().split(self.log_joint.chunk_size)
        return State(base.detach(), *map(torch.cat, zip(*map(self._evaluate, parts))))

    def confirm(self) -> None:
        """Compares the last replay with a direct evaluation, as calls do now and then.

        :raises ReplayError: if they differ.
        """
        if self._captured is not None:
            self._captured.confirm()

    def _with_gradient(self, base: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            base = base.detach().requires_grad_()
            latent, ladj = self.to_latent(base)
            log_density = self.log_joint(latent) + ladj
            (gradient,) = torch.autograd.grad(log_density.sum(), base)
        return latent.detach(), log_density.detach(), gradient
