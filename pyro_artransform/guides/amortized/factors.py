# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The factors of an amortized posterior: one for the global latents, one for each local group."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...flows import conditional_iaf, conditional_spline_autoregressive, iaf, spline_marginals
from ...transforms import ComposedTransform, LocationScale, chain
from ...univariate.affine import GivenLocationScale
from ...univariate.base import soft_bound
from ..distributions import make_flow

# of more global latents than this the local ones depend on a linear summary of this size
_MAX_GLOBALS = 64
_FULL_RANK_LIMIT = 200
# the largest change of a log-scale by the context
_LOG_SCALE_BOUND = 7.0

MakeFlow = Callable[[int], nn.Module]
MakeLocalFlow = Callable[[int, int], nn.Module]
MakeFlows = tuple[MakeFlow | None, MakeLocalFlow | None]


def default_flow(latent_dim: int) -> nn.Module:
    """An IAF of three layers; in one dimension, where an IAF is affine, one of splines."""
    return iaf(latent_dim, 3) if latent_dim > 1 else chain([spline_marginals(1) for _ in range(3)])


def default_local_flow(latent_dim: int, context_dim: int) -> nn.Module:
    """A conditional IAF of two layers; in one dimension a conditional spline."""
    if latent_dim > 1:
        return conditional_iaf(latent_dim, context_dim, 2)
    return conditional_spline_autoregressive(1, context_dim)


class GlobalFactor(nn.Module):
    """The posterior of the global latents: a flow, if any, then location and scale.

    :param loc: the initial location, shape ``(D,)``.
    :param scale: the initial standard deviation.
    """

    def __init__(self, make: MakeFlow | None, loc: Tensor, scale: float) -> None:
        super().__init__()
        affine = LocationScale(loc, scale, full_rank=len(loc) <= _FULL_RANK_LIMIT)
        flows = [] if make is None else [make_flow("flow", make, loc)]
        self.transform = ComposedTransform(*flows, affine)
        self.context_dim = min(len(loc), _MAX_GLOBALS)
        has_summary = len(loc) > _MAX_GLOBALS
        self.summary = _linear(loc, len(loc), _MAX_GLOBALS, bias=False) if has_summary else None

    @property
    def affine(self) -> Any:
        """The location and the scale."""
        return self.transform.transforms[-1]

    def condition(self, features: Tensor, rest: Sequence[Tensor]) -> ComposedTransform:
        """From the base to the unconstrained space; global latents have no context."""
        return self.transform

    def as_context(self, z: Tensor, num_elements: int) -> Tensor:
        """The context, shape ``(*, context_dim)``, of the elements that depend on global latents z.

        Its units are the sd that one element alone would leave, that of all times the root of their
        number. In smaller ones a random initial dependence costs so much that the posterior collapses.
        """
        deviation = (z - self.affine.loc) * (-self.affine.log_scale).exp()
        context = deviation if self.summary is None else self.summary(deviation)
        return context / math.sqrt(num_elements)

    @torch.no_grad()
    def start_near(self, z: Tensor, share: float) -> None:
        """Becomes a Gaussian with the mean of draws ``(n, D)``, and a share of their covariance."""
        tril = torch.linalg.cholesky(share * torch.atleast_2d(z.T.cov()))
        self.affine.set_(z.mean(0), tril.diagonal() if self.affine.lower is None else tril)


class AmortizedLocationScale(nn.Module):
    r"""A location and a scale that are functions of a context h, constant at first.

    .. math::

        y = \mathrm{loc} + W h + s \, (b(h) + x), \qquad \log s = \log s_0 + a(h)

    a and b are a network whose last layer starts at zero, as W does. b is in units of s, so that its
    error counts the same for a narrow posterior as for a wide one.
    """

    def __init__(self, loc: Tensor, scale: float, context_dim: int) -> None:
        super().__init__()
        loc = loc.detach().clone()
        latent_dim, width = len(loc), max(64, 2 * len(loc))
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))
        self.linear = _linear(loc, context_dim, latent_dim, bias=False)
        first, second = _linear(loc, context_dim, width), _linear(loc, width, width)
        last = _linear(loc, width, 2 * latent_dim)
        self.network = nn.Sequential(first, nn.ELU(), second, nn.ELU(), last)
        for parameter in (self.linear.weight, *last.parameters()):
            nn.init.zeros_(parameter)

    def condition(self, context: Tensor, offsets: Sequence[Tensor]) -> GivenLocationScale:
        """The transform for contexts ``(*, C)``; offsets ``(*, D)`` add to location and log-scale."""
        shift, bend = self.network(context).tensor_split(2, dim=-1)
        loc = self.loc + self.linear(context)
        log_scale = self.log_scale + soft_bound(bend, _LOG_SCALE_BOUND)
        if offsets:
            loc, log_scale = loc + offsets[0], log_scale + offsets[1]
        return GivenLocationScale(torch.addcmul(loc, shift, log_scale.exp()), log_scale)


class LocalFactor(nn.Module):
    """The posterior of one group of local latents, of each element given its features and the rest.

    An embedding is features, and offsets of the location and of the log-scale, so that each element
    can have any location and scale by itself.

    :param rest_dim: the size of the context without the features.
    :param table_shape: the full batch shape of the plates whose elements have embeddings.
    :param units: the location and the scale of the features, which the networks see in these units.
    """

    units: Tensor | None

    def __init__(
        self,
        make: MakeLocalFlow | None,
        loc: Tensor,
        scale: float,
        feature_dim: int,
        rest_dim: int,
        table_shape: Sequence[int] | None,
        units: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        context_dim = feature_dim + rest_dim
        self.context_dim, self.feature_dim = len(loc), feature_dim
        self.flow = None if make is None else make_flow("local_flow", make, loc, context_dim)
        self.affine = AmortizedLocationScale(loc, scale, context_dim)
        # not persistent: a guide's spec has them
        given = None if units is None else loc.new_tensor(units)
        self.register_buffer("units", given, persistent=False)
        self.table: nn.Parameter | None = None
        if table_shape is not None:
            self.table = nn.Parameter(loc.new_zeros((*table_shape, feature_dim + 2 * len(loc))))

    def condition(self, features: Tensor, rest: Sequence[Tensor]) -> ComposedTransform:
        """From the base to the unconstrained space, for features or embeddings, shape ``(*, F)``.

        :param rest: the rest of the context, each shape ``(*, C)``; batch shapes broadcast.
        """
        offsets: list[Tensor] = []
        if self.table is not None:
            sizes = [self.feature_dim, self.context_dim, self.context_dim]
            features, *offsets = features.split(sizes, dim=-1)
        if self.units is not None:
            features = (features - self.units[0]) / self.units[1]
        parts = [features, *rest]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        context = torch.cat([part.expand(batch + part.shape[-1:]) for part in parts], dim=-1)
        affine = self.affine.condition(context, offsets)
        flows = [] if self.flow is None else [self.flow.condition(context)]
        return ComposedTransform(*flows, affine)

    def as_context(self, z: Tensor, num_elements: int) -> Tensor:
        """The context of the elements in inner plates that depend on these, shape ``(*, D)``."""
        return z - self.affine.loc

    @torch.no_grad()
    def start_near(self, context: Tensor, elements: Tensor) -> None:
        """Fits to draws of elements ``(n, elements, D)``, and of their global context ``(n, C)``."""
        loc, centered = elements.mean(0), context - context.mean(0)
        # the mean over elements first: their slopes are linear in it
        slopes = torch.linalg.lstsq(centered, (elements - loc).mean(1)).solution
        rest = elements - loc - (centered @ slopes)[:, None]
        self.affine.linear.weight[:, self.feature_dim :][:, : context.shape[1]] = slopes.T
        self.affine.loc.copy_(loc.mean(0))
        self.affine.log_scale.copy_(rest.square().mean((0, 1)).sqrt().log())


def _linear(like: Tensor, inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=like.dtype, device=like.device)
