# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The distribution of a guide: its flow, the location and scale after it, and their draws."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform

from ..transforms import FlowModule, check_structure


def check_flow_argument(name: str, make: Any, wanted: str) -> None:
    """Refuses what cannot make a flow, and a flow that is one already.

    :param name: the name of the argument, such as ``"flow"``.
    :param make: its value.
    :param wanted: its parameters in words.
    :raises TypeError: if it is no callable, or a module.
    """
    if not callable(make):
        raise TypeError(f"{name}: expected a callable, got {type(make).__name__}")
    if isinstance(make, nn.Module):
        raise TypeError(
            f"{name}: expected a callable that takes {wanted} and returns a flow, got the module "
            f"{type(make).__name__}; write {name}=lambda latent_dim: ..."
        )


def make_flow(
    name: str, make: Callable[..., Any], like: Tensor, context_dim: int | None = None
) -> Any:
    """Makes a flow with the dtype and the device of the guide.

    :param name: the name of the guide's argument that makes it.
    :param make: takes the latent dimension, and the size of the context where there is one.
    :param like: shape ``(latent_dim,)``.
    :param context_dim: the size of the context of a conditional flow; None for a flow without one.
    :return: a module that is a transform, or a conditional one.
    :raises TypeError: if what it returns is no such module, or has no parameters.
    :raises ValueError: if the flow is not autoregressive (where Pyro's validation is on).
    """
    # not on the default device
    with like.device:
        flow = make(len(like)) if context_dim is None else make(len(like), context_dim)
    _check_flow(name, flow, is_conditional=context_dim is not None)
    flow.to(dtype=like.dtype, device=like.device)
    for parameter in flow.parameters():
        # of a parameter that is not contiguous the param store would train a copy
        parameter.data = parameter.data.contiguous()
    if not dist.is_validation_enabled():
        return flow
    if context_dim is None:
        check_structure(flow, like)
    else:
        check_structure(flow.condition(like.new_zeros((1, context_dim))), like.reshape(1, -1))
    return flow


def _check_flow(name: str, flow: Any, is_conditional: bool) -> None:
    kind: type = Transform
    if is_conditional:
        kind, wanted = ConditionalTransform, "a conditional transform that is a module"
        advice = "pyro_artransform.conditional_iaf makes one"
    else:
        wanted = "a TransformModule"
        advice = (
            "pyro_artransform.transforms.chain([...]) makes one of transforms and keeps their "
            "parameters, in its .inv too"
        )
    got = type(flow).__name__
    if not (isinstance(flow, nn.Module) and isinstance(flow, kind)):
        raise TypeError(f"{name}: expected it to return {wanted}, got {got}; {advice}")
    for parameter in flow.parameters():
        if parameter.requires_grad:
            return
    raise TypeError(f"{name}: expected a module with parameters to train, got one without: {got}")


class LocationScale(FlowModule):
    r"""A location and a lower-triangular scale.

    .. math::

        y = \mathrm{loc} + \mathrm{diag}(s) (I + A) x, \qquad s = \exp(\mathrm{log\_scale})

    A is strictly lower triangular, or zero. The diagonal is free on the log scale, so that an
    optimizer crosses orders of magnitude at one pace, and the rest is relative to it.

    :param loc: the location, shape ``(D,)``; gives the dtype and the device.
    :param scale: the standard deviation to start with.
    :param full_rank: whether there is an A. It starts at zero.

    Example::

        >>> layer = LocationScale(torch.zeros(3), 0.1, full_rank=True)
        >>> y, ladj = layer.call_and_ladj(torch.zeros(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    lower: Tensor | None

    def __init__(self, loc: Tensor, scale: float, *, full_rank: bool) -> None:
        super().__init__(cache_size=0)
        loc = loc.detach().clone()
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))
        # at D = 1 there is nothing off the diagonal, and a parameter that cannot act is none
        full_rank = full_rank and len(loc) > 1
        lower = nn.Parameter(loc.new_zeros(2 * loc.shape)) if full_rank else None
        self.register_parameter("lower", lower)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` of shape ``(*, D)`` and the log-determinant of shape ``(*,)``."""
        mixed = x if self.lower is None else x + x @ self.lower.tril(-1).T
        ladj = self.log_scale.sum().expand(x.shape[:-1])
        return self.loc + self.log_scale.exp() * mixed, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` of shape ``(*, D)`` and the log-determinant of the inverse, shape ``(*,)``."""
        x = (y - self.loc) * (-self.log_scale).exp()
        if self.lower is not None:
            rows = x.reshape(-1, x.shape[-1])
            # the routine takes the diagonal as ones, whatever is there
            rows = torch.linalg.solve_triangular(
                self.lower.T, rows, upper=True, left=False, unitriangular=True
            )
            x = rows.reshape(x.shape)
        return x, -self.log_scale.sum().expand(y.shape[:-1])

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``y``, the log-determinant and the score of y, of shapes ``(*, D)``, ``(*,)``, ``(*, D)``."""
        y, ladj = self.call_and_ladj(x)
        with torch.no_grad():
            if self.lower is not None:
                rows = score.reshape(-1, score.shape[-1])
                rows = torch.linalg.solve_triangular(
                    self.lower, rows, upper=False, left=False, unitriangular=True
                )
                score = rows.reshape(score.shape)
            return y, ladj, score * (-self.log_scale).exp()

    def set_(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Sets the location and the scale in place.

        :param loc: shape ``(D,)``.
        :param scale_tril: lower triangular with a positive diagonal, shape ``(D, D)``; diagonal
            where this layer is.
        :raises ValueError: if one of them is not so.
        """
        diagonal = self._check(loc, scale_tril)
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_scale.copy_(diagonal.log())
            if self.lower is not None:
                self.lower.copy_((scale_tril / diagonal[:, None]).tril(-1))

    def _check(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The diagonal of a valid scale."""
        size = len(self.loc)
        for name, value, shape in (("loc", loc, (size,)), ("scale_tril", scale_tril, (size, size))):
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")
        diagonal = scale_tril.diagonal()
        if not (diagonal > 0).all() or scale_tril.triu(1).any():
            raise ValueError(
                "scale_tril: expected a lower-triangular matrix with a positive diagonal, "
                f"got {scale_tril.tolist()}"
            )
        if self.lower is None and scale_tril.tril(-1).any():
            raise ValueError(
                "scale_tril: expected a diagonal matrix, since the scale of this guide is diagonal "
                "(full_rank=True makes it triangular), got entries off the diagonal"
            )
        return diagonal

    def extra_repr(self) -> str:
        """The size and the kind of the scale."""
        return f"dim={len(self.loc)}, full_rank={self.lower is not None}"


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
        >>> from pyro_artransform import FlowDistribution, iaf
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


class PathDistribution(FlowDistribution):
    """A distribution whose density of its own draw has the pathwise gradient only.

    The gradient of that density flows through the draw, and not through the parameters, so that the
    gradient of an ELBO is the path gradient. The maker of the object sets :attr:`through`.

    Where there are many draws and :attr:`location` is set, the mean of their gradients goes to the
    location alone, and the deviations from the mean to all other parameters. The optimum is the same,
    since the mean gradient vanishes where the location is right. Most of the noise of mini-batches is
    the same for all draws: this keeps it away from scales and flows.
    """

    #: the log-density at fixed parameters, from the argument and the value of the transform
    through: Callable[[Tensor, Tensor], Tensor]
    #: what the last layer of the transform adds to its values, shape ``(D,)``
    location: Tensor | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PathDistribution":
        """The distribution with another batch shape."""
        expanded: PathDistribution = super().expand(batch_shape, _instance)
        expanded.through, expanded.location = self.through, self.location
        return expanded

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """A reparameterized draw, of shape ``sample_shape + batch_shape + event_shape``."""
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
        return value


def _are_paired(count: int) -> bool:
    """Whether so many draws are made as mirror images: a single pair has no spread."""
    return count % 2 == 0 and count > 2


def _in_pairs(x: Tensor) -> Tensor:
    """Antithetic draws, where their number allows: for each its mirror image.

    The mean gradient of the location then has no noise, as far as the density is a Gaussian.
    """
    count = x.shape[:-1].numel()
    if not _are_paired(count):
        return x
    half = x.reshape(count, -1)[: count // 2]
    return torch.cat([half, -half]).reshape(x.shape)


def _moved_by(location: Tensor, value: Tensor) -> Tensor:
    """Draws whose mean gradient goes to the location; a single draw stays as it is."""
    count = value.shape[:-1].numel()
    if count == 1 or not value.requires_grad:
        return value
    rows = value.reshape(count, -1)
    rows.register_hook(_without_mean)
    return rows.reshape(value.shape) + (location - location.detach())


def _without_mean(grad: Tensor) -> Tensor:
    """Gradients of draws without their mean, scaled so that estimates of covariances are unbiased.

    Of pairs only the even part has a mean, of half as many independent draws.
    """
    if not _are_paired(len(grad)):
        return (grad - grad.mean(0)) * (len(grad) / (len(grad) - 1))
    one, other = grad.chunk(2)
    odd, even, pairs = (one - other) / 2, (one + other) / 2, len(one)
    even = (even - even.mean(0)) * (pairs / (pairs - 1))
    return torch.cat([even + odd, even - odd])


def _version(value: Tensor) -> int | None:
    # a tensor of inference mode counts none
    return None if value.is_inference() else value._version
