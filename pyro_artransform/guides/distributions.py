# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Parts of a guide's distribution, and draws with path gradients."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform, register_kl

from ..flows.transforms import AutoregressiveTransform, FlowModule
from ..flows.transforms.composition import ForeignTransform, as_flow
from ..flows.transforms.flow_distribution import FlowDistribution
from ..model.density import LogJoint

#: the most latents with a triangular scale
FULL_RANK_LIMIT = 200


def check_flow_argument(name: str, make: Any, wanted: str) -> None:
    """Requires a callable that makes a flow, not a flow; ``wanted`` describes its parameters."""
    if not callable(make):
        raise TypeError(f"{name}: expected a callable, got {type(make).__name__}")
    if isinstance(make, nn.Module):
        raise TypeError(
            f"{name}: expected a callable that takes {wanted} and returns a flow, got the module "
            f"{type(make).__name__}; write {name}=lambda latent_dim: ..."
        )


def make_flow(name: str, make: Callable[..., Any], like: Tensor, *context_dim: int) -> Any:
    """Makes a flow with the dtype and the device of ``like``, shape ``(latent_dim,)``, and checks it."""
    # on the device of ``like``, not the default one
    with like.device:
        made = make(len(like), *context_dim)
    flow = _flow(name, made, bool(context_dim))
    flow.to(dtype=like.dtype, device=like.device)
    for parameter in flow.parameters():
        # the param store would train a copy of a parameter that is not contiguous
        parameter.data = parameter.data.contiguous()
    if not any(parameter.requires_grad for parameter in flow.parameters()):
        got = type(made).__name__
        raise TypeError(
            f"{name}: expected a module with parameters to train, got one without: {got}"
        )
    if not context_dim and isinstance(foreign := as_flow(flow), ForeignTransform):
        _check_dimension(name, foreign, like)
    if dist.is_validation_enabled():
        given = flow.condition(like.new_zeros((1, *context_dim))) if context_dim else flow
        check_structure(given, like.reshape(1, -1))
    return flow


def _flow(name: str, made: Any, has_context: bool) -> Any:
    """A module that is a transform, or a conditional one."""
    if isinstance(made, nn.Module) and isinstance(made, ConditionalTransform) == has_context:
        try:
            return made if has_context or isinstance(made, Transform) else ForeignTransform(made)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
    kind, maker = "a transform", "transforms.chain([...])"
    if has_context:
        kind, maker = "a conditional transform", "conditional_iaf"
    raise TypeError(
        f"{name}: expected it to return {kind} that is a module, got {type(made).__name__}; "
        f"pyro_artransform.{maker} makes one, and keeps parameters, also in its .inv"
    )


def _check_dimension(name: str, flow: FlowModule, like: Tensor) -> None:
    try:
        found: object = flow(like.reshape(1, -1)).shape[-1]
    except (IndexError, RuntimeError, ValueError) as error:
        found = f"one that fails there, or needs a context: {error}"
    if found != len(like):
        raise ValueError(
            f"{name}: expected a flow of {len(like)} coordinates, as many as the model has latents on the "
            f"unconstrained space, got {found}"
        )


def check_structure(module: nn.Module, x: Tensor) -> None:
    """Checks all autoregressive transforms in a module, as a first call at x ``(*, D)`` does.

    :raises ValueError: if one is not autoregressive; the message names the coordinates.
    """
    for part in module.modules():
        if not isinstance(part, AutoregressiveTransform) or part.structure is None:
            continue
        if fault := part.structure.fault(part.meta, x):
            raise ValueError(fault)


class ToUnconstrained(FlowModule):
    """Maps coordinates from the prior to the unconstrained space, by runs of the model.

    :param log_joint: the log joint density of the model, in these coordinates.
    """

    def __init__(self, log_joint: LogJoint) -> None:
        super().__init__()
        self._log_joint = log_joint

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, ladj = self._log_joint.to_unconstrained(x.reshape(-1, x.shape[-1]))
        return u.reshape(x.shape), ladj.reshape(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._log_joint.from_unconstrained(y.reshape(-1, y.shape[-1]))
        return x.reshape(y.shape), ladj.reshape(y.shape[:-1])


class LatentDistribution(dist.TorchDistribution):
    """The distribution of a guide's draws, which remembers the last one with its log density."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True
    #: the last draw, its version, whether it has a graph, and its log density
    _drawn: tuple[Tensor, int, bool, Tensor] | None = None

    def __init__(self, guide: Any, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self._guide = guide
        super().__init__(batch_shape, torch.Size([guide.latent_dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LatentDistribution":
        return LatentDistribution(self._guide, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape
        z, log_q = self._guide._draw(shape.numel(), False)
        z, log_q = z.reshape(shape + self.event_shape), log_q.reshape(shape)
        if not z.is_inference():  # edits of inference tensors cannot be detected
            self._drawn = z, z._version, torch.is_grad_enabled(), log_q
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None:
            z, version, has_graph, log_q = self._drawn
            is_same = z is value and version == value._version
            if is_same and has_graph == torch.is_grad_enabled():
                return log_q
        return self._guide.log_density(value)


def draws_through(transform: Any, x: Tensor, path: bool) -> tuple[Tensor, Tensor]:
    """Maps standard Normal draws ``(n, D)`` through a flow, with the log densities ``(n,)`` of the results.

    :param path: whether the gradient of the log density flows through the draws only.
    """
    if not path:
        z, ladj = transform.call_and_ladj(x)
        return z, _normal_log_prob(x) - ladj
    z, ladj, score = transform.call_and_score(x, -x)
    return z, with_path_gradient(_normal_log_prob(x) - ladj, z, score)


def with_path_gradient(log_q: Tensor, z: Tensor, score: Tensor) -> Tensor:
    """Log densities ``(n,)`` whose gradient flows through draws ``(n, D)`` only, by the score there."""
    through = (score * z).sum(-1)
    return log_q.detach() + (through - through.detach())


def density_through(transform: FlowModule, z: Tensor) -> Tensor:
    """The log density ``batch`` at z, ``batch + (D,)``, of a standard Normal through a flow."""
    x, ladj = transform.inverse_and_ladj(z)
    return _normal_log_prob(x) + ladj


def _normal_log_prob(x: Tensor) -> Tensor:
    """The log density of the standard Normal, summed over the last dimension, which may be of no draws."""
    return -0.5 * x.square().sum(-1) - x.shape[-1] * (0.5 * math.log(2 * math.pi))


class SiteDelta(dist.Delta):
    """A Delta whose density counts in ``TraceMeanField_ELBO``, too."""


@register_kl(SiteDelta, dist.Distribution)
def _kl_of_site(p: SiteDelta, q: Any) -> Tensor:
    return p.log_prob(p.v) - q.log_prob(p.v)


class PathDistribution(FlowDistribution):
    """A distribution whose log density at its own draw has the path gradient only.

    With several draws and :attr:`location` set, the mean of their gradients goes to the location only, and
    deviations from the mean to all other parameters. The optimum, where the mean gradient vanishes, is the
    same. Mini-batch noise is mostly common to all draws, so this keeps it away from scales and flows.
    """

    #: the log density at fixed parameters, from the argument and the value of the transform
    through: Callable[[Tensor, Tensor], Tensor]
    #: the shift of the transform's last layer, shape ``(D,)``
    location: Tensor | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PathDistribution":
        expanded: PathDistribution = super().expand(batch_shape, _instance)
        expanded.through, expanded.location = self.through, self.location
        return expanded

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        if not torch.is_grad_enabled():
            return super().rsample(sample_shape)
        (transform,) = self.transforms
        x = self.base_dist.rsample(sample_shape)
        x = x if self.location is None else _in_pairs(x)
        value, ladj = transform.call_and_ladj(x)
        log_prob = (self.base_dist.log_prob(x) - ladj).detach()
        if self.location is not None:
            value = _moved_by(self.location, value)
        through = self.through(x.detach(), value)
        return self._remembered(value, log_prob + (through - through.detach()))


def _in_pairs(x: Tensor) -> Tensor:
    """Antithetic pairs if the number of draws is even: for a Gaussian the mean gradient has no noise."""
    count = x.shape[:-1].numel()
    if count % 2 or count == 2:  # a single pair has no spread
        return x
    half = x.reshape(count, -1)[: count // 2]
    return torch.cat([half, -half]).reshape(x.shape)


def _moved_by(location: Tensor, value: Tensor) -> Tensor:
    """Routes the mean gradient of draws to the location; leaves a single draw unchanged."""
    count = value.shape[:-1].numel()
    if count == 1 or not value.requires_grad:
        return value
    rows = value.reshape(count, -1)
    rows.register_hook(_without_mean)
    return rows.reshape(value.shape) + (location - location.detach())


def _without_mean(grad: Tensor) -> Tensor:
    """Subtracts the mean from gradients, rescaled so that covariance estimates are unbiased.

    For antithetic pairs only the even part has a mean, over half as many independent draws.
    """
    if len(grad) % 2 or len(grad) == 2:
        return (grad - grad.mean(0)) * (len(grad) / (len(grad) - 1))
    one, other = grad.chunk(2)
    odd, even, pairs = (one - other) / 2, (one + other) / 2, len(one)
    even = (even - even.mean(0)) * (pairs / (pairs - 1))
    return torch.cat([even + odd, even - odd])
