# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit minimizes: the negative ELBO as a function of all parameters."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pyro import poutine
from torch import Tensor


class Objective(Protocol):
    """The negative ELBO of a guide as a function of all parameters, the model's included."""

    @property
    def has_weights(self) -> bool:
        """Whether :meth:`elbo_draws` are log weights of single draws, and :meth:`tail_loss` exists."""
        ...

    def loss(self, num_particles: int) -> Tensor:
        """A differentiable estimate of the negative ELBO in nats, a scalar."""
        ...

    def tail_loss(self, num_particles: int) -> Tensor:
        """As :meth:`loss`, with a gradient that covers the tails of the posterior better."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters by name."""
        ...

    def elbo_draws(self, count: int) -> Tensor:
        """Independent unbiased estimates of the ELBO in nats, shape ``(n,)``, from ``count`` draws.

        Where single draws have no log weights, n is smaller than ``count``.
        """
        ...

    def nonfinite_sites(self) -> list[str]:
        """The sites that made the last loss other than finite, as far as that can be found."""
        ...


class BatchObjective(Objective, Protocol):
    """An objective that can be had for the arguments of another mini-batch."""

    def with_arguments(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> "BatchObjective":
        """The same objective, of the same parameters, for other arguments of model and guide."""
        ...


def traced_parameters(run: Callable[[], object]) -> dict[str, Tensor]:
    """The unconstrained parameters that a run asks Pyro for, by name.

    :param run: runs a model or a guide.
    """
    with poutine.trace(param_only=True) as capture:
        run()
    found: dict[int, tuple[str, Tensor]] = {}
    nodes: dict[str, Any] = capture.trace.nodes
    for name, node in nodes.items():
        if node["type"] == "param":
            value = node["value"]
            # Pyro attaches this function; a parameter without it is its own unconstrained value
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            # a module's parameter may come by several names
            found.setdefault(id(leaf), (name, leaf))
    return dict(found.values())
