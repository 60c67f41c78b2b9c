# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit minimizes: the negative ELBO as a function of all parameters."""

from typing import Protocol

from torch import Tensor

from ..loader import Batch


class Objective(Protocol):
    """The negative ELBO of a guide as a function of all parameters, the model's included."""

    #: whether :meth:`elbo_draws` are log weights of single draws
    has_weights: bool = False

    def loss(self, num_particles: int) -> Tensor:
        """A differentiable estimate of the negative ELBO in nats, a scalar."""

    def tail_loss(self, num_particles: int) -> Tensor:
        """As :meth:`loss`, with a gradient that covers the tails better where there is one."""
        return self.loss(num_particles)

    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters by name."""

    def is_guide_alone(self) -> bool:
        """Whether all parameters are the guide's, as far as that is known."""
        return False

    def elbo_draws(self, count: int) -> Tensor:
        """Independent unbiased estimates of the ELBO in nats, shape ``(n,)``, from ``count`` draws.

        Where single draws have no log weights, n is smaller than ``count``.
        """

    def nonfinite_sites(self) -> list[str]:
        """The sites that made the last loss other than finite, as far as that can be found."""


class BatchObjective(Objective, Protocol):
    """An objective that can be had for the arguments of another mini-batch."""

    def with_arguments(self, batch: Batch) -> "BatchObjective":
        """The same objective, of the same parameters, for other arguments of model and guide."""
