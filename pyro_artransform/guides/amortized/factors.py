# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The factors of an amortised posterior: one for the globals, one for each group of locals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn

from ...transforms import ComposedTransform, check_structure
from ...univariate.base import ElementwiseTransform, soft_bound
from ..distributions import LocationScale
from .legacy.flow_factory import check_callables, new_flow

# of more globals than this the locals see a linear summary, of this size
_MOST_GLOBALS = 64
_FULL_RANK_LIMIT = 200
# how far the context moves a log-scale from its constant part
_LOG_SCALE_BOUND = 7.0

MakeFlow = Callable[[int], Any]
MakeLocalFlow = Callable[[int, int], Any]


class GlobalFactor(nn.Module):
    """The posterior of the globals, on the unconstrained space: a flow, then location and scale.

    :param make_flow: takes the latent dimension and returns a flow; None for no flow.
    :param loc: where to start, shape ``(D,)``.
    :param scale: the standard deviation to start with.
    """

    def __init__(self, make_flow: MakeFlow | None, loc: Tensor, scale: float) -> None:
        super().__init__()
        affine = LocationScale(loc, scale, full_rank=len(loc) <= _FULL_RANK_LIMIT)
        flows = [] if make_flow is None else [new_flow(make_flow, loc)]
        self.transform = ComposedTransform(*flows, affine)
        self.summary: nn.Linear | None = None
        if len(loc) > _MOST_GLOBALS:
            self.summary = _linear(loc, len(loc), _MOST_GLOBALS, bias=False)

    @property
    def loc(self) -> Tensor:
        """The location, shape ``(D,)``."""
        return self._affine.loc

    def step_units(self, of_location: float, of_flow: float) -> dict[str, Tensor]:
        """The sizes of an optimiser's unit steps, by the names of parameters.

        :param of_location: that of the location, in units of the scale.
        :param of_flow: that of all parameters of the flow.
        """
        scale = self._affine.log_scale.detach().exp()
        *flows, affine = [
            f"transform.transforms.{k}" for k in range(len(self.transform.transforms))
        ]
        units = {f"{affine}.loc": of_location * scale}
        if of_flow != 1:
            flow = scale.new_full((), of_flow)
            named = (name for name, _ in self.named_parameters())
            units.update({name: flow for name in named if name.startswith(tuple(flows))})
        return units

    @property
    def context_dim(self) -> int:
        """The number of what the locals see of the globals."""
        return len(self.loc) if self.summary is None else _MOST_GLOBALS

    @property
    def _affine(self) -> LocationScale:
        affine: LocationScale = self.transform.transforms[-1]  # type: ignore[assignment]
        return affine

    def as_context(self, latent: Tensor) -> Tensor:
        """What the locals see of the globals: their deviations in units of the posterior's scale.

        A posterior may be as narrow as it is; a network that reads it sees numbers of order one.

        :param latent: shape ``(*, D)``.
        :return: shape ``(*, context_dim)``.
        """
        deviation = (latent - self.loc) * (-self._affine.log_scale).exp()
        return deviation if self.summary is None else self.summary(deviation)

    @torch.no_grad()
    def start_near(self, latent: Tensor, share: float) -> None:
        """Becomes a Gaussian of the location of draws, and of their covariance times a share.

        :param latent: draws, shape ``(n, D)``.
        :param share: the share.
        """
        loc = latent.mean(0)
        tril = torch.linalg.cholesky(share * torch.atleast_2d(latent.T.cov()))
        self._affine.set_(loc, tril if self._affine.lower is not None else tril.diagonal().diag())


class GivenLocationScale(ElementwiseTransform):
    """An affine transform of a given location and scale.

    :param loc: shape ``(*, D)``.
    :param log_scale: shape ``(*, D)``.
    """

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.loc, self.log_scale = loc, log_scale

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` and the log-derivatives, shape ``(*, D)`` each."""
        y = torch.addcmul(self.loc, x, self.log_scale.exp())
        return y, self.log_scale.expand_as(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and the log-derivatives of the inverse, shape ``(*, D)`` each."""
        x = (y - self.loc) * (-self.log_scale).exp()
        return x, -self.log_scale.expand_as(x)


class AmortizedLocationScale(nn.Module):
    r"""A location and a scale that are functions of a context h, constants at first.

    .. math::

        y = \mathrm{loc} + W h + s \, (b(h) + x), \qquad \log s = \log s_0 + a(h)

    a and b are a network whose last layer starts at zero, as W does. W carries what is linear, such as
    a global mean that every element shares; b is in units of s, so that its error counts the same
    for a narrow posterior as for a wide one.

    :param loc: where to start, shape ``(D,)``.
    :param scale: the standard deviation to start with.
    :param context_dim: the size C of the context.
    """

    def __init__(self, loc: Tensor, scale: float, context_dim: int) -> None:
        super().__init__()
        loc = loc.detach().clone()
        latent_dim, width = len(loc), max(64, 2 * len(loc))
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))
        self.linear = _linear(loc, context_dim, latent_dim, bias=False)
        layers = [(context_dim, width), (width, width), (width, 2 * latent_dim)]
        first, second, last = (_linear(loc, *sizes) for sizes in layers)
        self.network = nn.Sequential(first, nn.ELU(), second, nn.ELU(), last)
        for parameter in (self.linear.weight, *last.parameters()):
            nn.init.zeros_(parameter)

    def condition(
        self, context: Tensor, offsets: tuple[Tensor, Tensor] | None = None
    ) -> GivenLocationScale:
        """The transform for one context.

        :param context: shape ``(*, C)``.
        :param offsets: what to add to the location and to the log-scale, shape ``(*, D)`` each.
        """
        shift, bend = self.network(context).tensor_split(2, dim=-1)
        loc = self.loc + self.linear(context)
        log_scale = self.log_scale + soft_bound(bend, _LOG_SCALE_BOUND)
        if offsets is not None:
            loc, log_scale = loc + offsets[0], log_scale + offsets[1]
        return GivenLocationScale(torch.addcmul(loc, shift, log_scale.exp()), log_scale)


class LocalFactor(nn.Module):
    """The posterior of one group of locals, for each element given its features and the rest.

    :param make_flow: takes the latent dimension and the size of the context and returns a
        conditional flow; None for no flow.
    :param loc: where to start, shape ``(D,)``.
    :param scale: the standard deviation to start with.
    :param feature_dim: the number of features of an element.
    :param rest_dim: the size of the rest of the context.
    :param table_shape: where each element has an embedding of its own, the full batch shape of its
        plates; None where its features are given. An embedding is features, and offsets of the
        location and of the log-scale, so that each element can have any place and width by itself.
    """

    table: Tensor | None

    def __init__(
        self,
        make_flow: MakeLocalFlow | None,
        loc: Tensor,
        scale: float,
        feature_dim: int,
        rest_dim: int,
        table_shape: Sequence[int] | None,
    ) -> None:
        super().__init__()
        context_dim = feature_dim + rest_dim
        self.latent_dim, self.feature_dim = len(loc), feature_dim
        self.flow = None if make_flow is None else new_local_flow(make_flow, loc, context_dim)
        self.affine = AmortizedLocationScale(loc, scale, context_dim)
        table = None
        if table_shape is not None:
            table = nn.Parameter(loc.new_zeros((*table_shape, feature_dim + 2 * len(loc))))
        self.register_parameter("table", table)

    @property
    def loc(self) -> Tensor:
        """The constant part of the location, shape ``(D,)``."""
        return self.affine.loc

    def embeddings(self, indices: dict[int, Tensor]) -> Tensor:
        """The embeddings of some elements, a row each.

        :param indices: those of the elements of each plate that is sub-sampled, by its dimension.
        :return: shape ``batch + (feature_dim + 2 D,)``.
        """
        rows: Any = self.table
        for dim, index in indices.items():
            rows = rows.index_select(dim - 1, index)
        selected: Tensor = rows
        return selected

    @torch.no_grad()
    def start_near(self, context: Tensor, elements: Tensor) -> None:
        """Sets the location, the scale and the linear part so that they suit draws of elements.

        :param context: what the elements see of the globals, shape ``(n, C)``.
        :param elements: the draws, shape ``(n, elements, D)``.
        """
        loc, seen = elements.mean(0), slice(self.feature_dim, self.feature_dim + context.shape[-1])
        centred = context - context.mean(0)
        # the mean over elements first: their slopes are linear in it
        slopes = torch.linalg.lstsq(centred, (elements - loc).mean(1)).solution
        rest = elements - loc - (centred @ slopes)[:, None]
        self.affine.linear.weight[:, seen] = slopes.T
        self.affine.loc.copy_(loc.mean(0))
        self.affine.log_scale.copy_(rest.square().mean((0, 1)).sqrt().log())

    def transform(self, row: Tensor, rest: Sequence[Tensor]) -> ComposedTransform:
        """From the base to the unconstrained space, for given elements.

        :param row: the features of each element, or its embedding, shape ``(*, F)``.
        :param rest: the rest of the context, each of shape ``(*, C)``; batch shapes broadcast.
        """
        offsets = None
        if self.table is not None:
            row, *both = row.split([self.feature_dim, self.latent_dim, self.latent_dim], dim=-1)
            offsets = both[0], both[1]
        context = _joined([row, *rest])
        affine = self.affine.condition(context, offsets)
        return ComposedTransform(
            *([] if self.flow is None else [self.flow.condition(context)]), affine
        )


def base_of(like: Tensor, batch_shape: Sequence[int], latent_dim: int) -> dist.TorchDistribution:
    """Standard Normals, of which values are never checked: that would read them.

    :param like: gives the dtype and the device.
    :param batch_shape: the batch shape.
    :param latent_dim: the size of the event.
    """
    zeros = like.new_zeros((*batch_shape, latent_dim))
    normal = dist.Normal(zeros, torch.ones_like(zeros), validate_args=False)
    base: dist.TorchDistribution = normal.to_event(1)
    return base


def new_local_flow(make_flow: MakeLocalFlow, loc: Tensor, context_dim: int) -> Any:
    """Makes a conditional flow with the dtype and the device of the guide.

    :param make_flow: takes the latent dimension and the size of the context.
    :param loc: shape ``(latent_dim,)``.
    :param context_dim: the size of the context.
    :raises TypeError: if what it returns is no module, no conditional transform, or has no
        parameters.
    :raises ValueError: if the flow is not autoregressive (where Pyro's validation is on).
    """
    with loc.device:
        flow = make_flow(len(loc), context_dim)
    if not isinstance(flow, nn.Module) or not isinstance(flow, ConditionalTransform):
        raise TypeError(
            "local_flow: expected it to return a conditional transform that is a module, as "
            f"pyro_artransform.conditional_iaf does, got {type(flow).__name__}"
        )
    if not any(parameter.requires_grad for parameter in flow.parameters()):
        raise TypeError(
            "local_flow: expected a module with parameters to train, got one without: "
            f"{type(flow).__name__}"
        )
    flow.to(dtype=loc.dtype, device=loc.device)
    for parameter in flow.parameters():
        # of a parameter that is not contiguous the param store would train a copy
        parameter.data = parameter.data.contiguous()
    if dist.is_validation_enabled():
        conditioned: Any = flow.condition(loc.new_zeros((1, context_dim)))
        check_structure(conditioned, loc.reshape(1, -1))
    return flow


def check_flows(flow: Any, local_flow: Any, init_loc_fn: Any, create_plates: Any) -> None:
    """Refuses what cannot be called, and flows that are such already.

    :raises TypeError: if one of them is such.
    """
    check_callables(flow=_nothing if flow is None else flow, init_loc_fn=init_loc_fn)
    if create_plates is not None and not callable(create_plates):
        raise TypeError(f"create_plates: expected a callable, got {type(create_plates).__name__}")
    if local_flow is not None and (isinstance(local_flow, nn.Module) or not callable(local_flow)):
        raise TypeError(
            "local_flow: expected a callable that takes the latent dimension and the size of the "
            f"context and returns a conditional flow, got {type(local_flow).__name__}; write "
            "local_flow=lambda latent_dim, context_dim: ..."
        )


def _nothing() -> None:
    """Stands for a flow that is not wanted."""


def _joined(parts: list[Tensor]) -> Tensor:
    """Contexts side by side, their batch shapes broadcast."""
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(batch + part.shape[-1:]) for part in parts], dim=-1)


def _linear(like: Tensor, inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=like.dtype, device=like.device)
