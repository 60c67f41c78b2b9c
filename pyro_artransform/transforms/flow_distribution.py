# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A transformed distribution that knows the density of what it drew."""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from .flow_module import FlowModule


class _Draw(NamedTuple):
    value: Tensor
    log_prob: Tensor
    with_gradients: bool
    version: int | None


class FlowDistribution(dist.TransformedDistribution):
    """A transformed distribution that keeps its last draw together with the log-density there.

    A transform of this package remembers nothing. So a plain ``TransformedDistribution`` inverts it to
    score its own draw, where here value and log-density come from one evaluation, and the density of
    any other value from one evaluation of the inverse. An edit of the draw in place, and gradients that
    are wanted now and were not then, are noticed.

    The log-density of the draw is that of the parameters when it was drawn, and carries its graph: make
    one object for each step, as models and guides do.

    :param base_distribution: the distribution of the argument.
    :param transforms: one :class:`FlowModule`; :func:`chain` makes one of several.
    :param validate_args: as for Pyro's distributions.

    Example::

        >>> import torch
        >>> import pyro.distributions as dist
        >>> from pyro_artransform import iaf
        >>> base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
        >>> q = FlowDistribution(base, iaf(3))
        >>> draw = q.rsample((5,))
        >>> q.log_prob(draw).shape
        torch.Size([5])
    """

    # no __init__ of its own, which expand, as plates call it, would refuse
    _draw: _Draw | None = None

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """A reparameterized draw, of shape ``sample_shape + batch_shape + event_shape``."""
        flow = self._flow()
        x = self.base_dist.rsample(sample_shape)
        value, ladj = flow.call_and_ladj(x)
        log_prob = self.base_dist.log_prob(x) - self._summed(ladj, flow.codomain.event_dim)
        self._draw = _Draw(value, log_prob, torch.is_grad_enabled(), _version(value))
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape ``sample_shape + batch_shape``."""
        draw = self._draw
        if (
            draw is not None
            and draw.value is value
            and draw.with_gradients == torch.is_grad_enabled()
            and draw.version == _version(value)
        ):
            return draw.log_prob
        if self._validate_args:
            self._validate_sample(value)
        flow = self._flow()
        x, ladj = flow.inverse_and_ladj(value)
        return self.base_dist.log_prob(x) + self._summed(ladj, flow.codomain.event_dim)

    def _flow(self) -> FlowModule:
        if len(self.transforms) != 1 or not isinstance(self.transforms[0], FlowModule):
            raise TypeError(
                f"transforms: expected one transform of this package, got {self.transforms}; "
                "chain([...]) makes one of any torch transforms"
            )
        return self.transforms[0]

    def _summed(self, ladj: Tensor, event_dim: int) -> Tensor:
        """The log-determinant summed over the event dimensions that only the base has."""
        extra = len(self.event_shape) - event_dim
        return ladj.sum(tuple(range(-extra, 0))) if extra else ladj


def _version(value: Tensor) -> int | None:
    # a tensor of inference mode counts none
    return None if value.is_inference() else value._version
