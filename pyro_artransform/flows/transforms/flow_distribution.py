# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A transformed distribution that stores the density of its own draw."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from .composition import as_flow
from .flow_module import FlowModule


def standard_normal(zeros: Tensor) -> Any:
    """A standard Normal without validation, which would read values in each step."""
    return dist.Normal(zeros, torch.ones_like(zeros), validate_args=False).to_event(1)


class FlowDistribution(dist.TransformedDistribution):
    """A transformed distribution that stores its last draw with the log density there.

    A plain ``TransformedDistribution`` inverts a :class:`~pyro_artransform.flows.transforms.FlowModule`,
    which has no cache, to score its own draw; here value and log density come from one evaluation. The
    stored density is not used if the draw was edited in place (except through ``draw.data``, which cannot be
    detected), or if it lacks gradients that are now needed. It is that of the parameters when the value was
    drawn, with its graph, so create a new object in each step, as models and guides do.

    :param base_distribution: the distribution of the argument.
    :param transforms: a single transform, or a module that makes one, such as a flow of Zuko, whose own base
        is not used; combine several with
        :class:`~pyro_artransform.flows.transforms.ComposedTransform`.
    :raises TypeError: for anything else.

    Example::

        >>> import torch
        >>> import pyro.distributions as dist
        >>> from pyro_artransform import FlowDistribution
        >>> from pyro_artransform.flows.transforms import LocationScale
        >>> flow = LocationScale(torch.zeros(3), 2.0, full_rank=True)
        >>> q = FlowDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), flow)
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5])
    """

    #: the last draw, the log density there, whether it has a graph, and the version of the draw
    _draw: tuple[Tensor, Tensor, bool, int] | None = None

    def __init__(
        self, base_distribution: Any, transforms: Any, validate_args: bool | None = None
    ) -> None:
        parts = transforms if isinstance(transforms, list) else [transforms]
        if len(parts) != 1:
            raise TypeError(
                f"transforms: expected one transform, got {len(parts)}: ComposedTransform(...) makes one of "
                "several"
            )
        super().__init__(base_distribution, [as_flow(parts[0])], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """A copy with another batch shape, without the stored draw."""
        # torch requires an instance from classes with a constructor of their own
        instance = self._get_checked_instance(FlowDistribution, _instance)
        return super().expand(batch_shape, instance)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """A reparameterized draw, of shape ``sample_shape + batch_shape + event_shape``."""
        flow, extra_dims = self._flow()
        x = self.base_dist.rsample(sample_shape)
        value, ladj = flow.call_and_ladj(x)
        return self._remembered(value, self.base_dist.log_prob(x) - sum_rightmost(ladj, extra_dims))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density, of shape ``sample_shape + batch_shape``."""
        if self._draw is not None:
            draw, log_prob, has_graph, version = self._draw
            is_new = draw is not value or version != value._version
            if not is_new and has_graph == torch.is_grad_enabled():
                return log_prob
        if self._validate_args:
            self._validate_sample(value)
        flow, extra_dims = self._flow()
        x, ladj = flow.inverse_and_ladj(value)
        return self.base_dist.log_prob(x) + sum_rightmost(ladj, extra_dims)

    def _flow(self) -> tuple[FlowModule, int]:
        """The flow, and the number of event dimensions in addition to its own."""
        (flow,) = self.transforms
        return flow, len(self.event_shape) - flow.codomain.event_dim

    def _remembered(self, value: Tensor, log_prob: Tensor) -> Tensor:
        # edits of inference tensors cannot be detected
        is_sure = not value.is_inference()
        self._draw = (value, log_prob, torch.is_grad_enabled(), value._version) if is_sure else None
        return value
