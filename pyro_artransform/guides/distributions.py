# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The distribution of one call of a guide, which knows the density of what it drew."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor


class _Draw(NamedTuple):
    value: Tensor
    log_prob: Tensor
    with_gradients: bool
    version: int | None


class DrawnDistribution(dist.TransformedDistribution):
    """A transformed distribution that keeps its last draw together with the log-density there.

    A step of SVI draws once and scores the draw, at the same parameters: both come from one
    evaluation of the transform, and nothing has to be inverted or compared. The log-density that is
    kept is that of the parameters at the draw, so there is one such object for each call of a guide.
    Any other value is scored as everywhere.

    It has one transform, a :class:`~pyro_artransform.transforms.FlowModule`.
    """

    # no __init__ of its own, which expand, as plates call it, would refuse
    _draw: _Draw | None = None

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """A reparametrised draw, of shape ``sample_shape + batch_shape + event_shape``."""
        (transform,) = self.transforms
        x = self.base_dist.rsample(sample_shape)
        value, ladj = transform.call_and_ladj(x)
        log_prob = self.base_dist.log_prob(x) - ladj
        self._draw = _Draw(value, log_prob, torch.is_grad_enabled(), _version(value))
        drawn: Tensor = value
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, of shape ``sample_shape + batch_shape``."""
        draw = self._draw
        if draw is not None and draw.value is value and _is_as_drawn(draw):
            return draw.log_prob
        log_prob: Tensor = super().log_prob(value)
        return log_prob


class PathDistribution(DrawnDistribution):
    """A distribution whose density of its own draw has a gradient by the draw, and by nothing else.

    The gradient of an ELBO then is the path gradient. The maker of the object sets :attr:`through`.

    Where there are many draws, the mean of their gradients goes to :attr:`location` alone, if that is
    set, and what deviates from the mean to all other parameters. It moves no optimum, since the mean
    gradient vanishes where the location is right, and keeps the noise of mini-batches, most of which
    is the same for all draws, away from scales and flows.
    """

    #: of the argument and the value of the transform, the log-density at fixed parameters
    through: Callable[[Tensor, Tensor], Tensor]
    #: what the transform adds to all its values at last, shape ``(D,)``
    location: Tensor | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PathDistribution":
        """The distribution with another batch shape."""
        expanded: PathDistribution = super().expand(batch_shape, _instance)
        expanded.through, expanded.location = self.through, self.location
        return expanded

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """A reparametrised draw, of shape ``sample_shape + batch_shape + event_shape``."""
        (transform,) = self.transforms
        x = self.base_dist.rsample(sample_shape)
        if self.location is not None and torch.is_grad_enabled():
            x = _in_pairs(x)
        value, ladj = transform.call_and_ladj(x)
        log_prob = self.base_dist.log_prob(x) - ladj
        if torch.is_grad_enabled():
            if self.location is not None:
                value = _moved_by(self.location, value)
            through = self.through(x.detach(), value)
            log_prob = log_prob.detach() + (through - through.detach())
        self._draw = _Draw(value, log_prob, torch.is_grad_enabled(), _version(value))
        drawn: Tensor = value
        return drawn


def _are_paired(count: int) -> bool:
    """Whether so many draws are made as mirror images: a single pair has no spread but its own."""
    return count % 2 == 0 and count > 2


def _in_pairs(x: Tensor) -> Tensor:
    """Draws of which each has its mirror image beside it, where their number allows.

    What bends the mean of the draws by a curve of the transform is then free of noise as far as the
    density is a Gaussian, and the location need not run after it.
    """
    count = x.shape[:-1].numel()
    if not _are_paired(count):
        return x
    half = x.reshape(count, -1)[: count // 2]
    return torch.cat([half, -half]).reshape(x.shape)


def _moved_by(location: Tensor, value: Tensor) -> Tensor:
    """Draws, in pairs, whose mean gradient goes to the location; of a single draw, the draw itself."""
    count = value.shape[:-1].numel()
    if count == 1 or not value.requires_grad:
        return value
    rows = value.reshape(count, -1)
    rows.register_hook(_without_mean)
    return rows.reshape(value.shape) + (location - location.detach())


def _without_mean(grad: Tensor) -> Tensor:
    """Gradients of draws without their mean, times what makes estimates of covariances unbiased.

    Of pairs only the even part has a mean, and there are half as many independent ones of it.
    """
    if not _are_paired(len(grad)):
        return (grad - grad.mean(0)) * (len(grad) / (len(grad) - 1))
    one, other = grad.chunk(2)
    odd, even, pairs = (one - other) / 2, (one + other) / 2, len(one)
    even = (even - even.mean(0)) * (pairs / (pairs - 1))
    return torch.cat([even + odd, even - odd])


def _is_as_drawn(draw: _Draw) -> bool:
    """Whether a draw has not been edited since, and gradients are wanted as then."""
    same_gradients = draw.with_gradients == torch.is_grad_enabled()
    return same_gradients and draw.version == _version(draw.value)


def _version(value: Tensor) -> int | None:
    # a tensor of inference mode counts none
    return None if value.is_inference() else value._version
