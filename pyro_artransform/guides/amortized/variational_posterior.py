# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""An amortized posterior on the unconstrained space: global latents, then each local group."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...flows.builders import (
    conditional_iaf,
    conditional_spline_autoregressive,
    iaf,
    spline_marginals,
)
from ...flows.transforms import ComposedTransform, LocationScale, chain
from ...flows.transforms.flow_distribution import FlowDistribution, standard_normal
from ...flows.univariate import soft_bound
from ...flows.univariate.affine import GivenLocationScale
from ...model.density import Args, Kwargs
from ...model.sites import Latents
from ..distributions import FULL_RANK_LIMIT, PathDistribution, make_flow
from .encoder import Encoder, Features, MakePlates, encode, given_rows, minibatch_rows
from .plates import GLOBAL, Group, LatentLayout, Plates, PlateSizes, Vectors

_OTHER_TABLE = "Only the elements at set-up have embeddings: make a new guide, or use an encoder"
_OTHER_ELEMENTS = "All latents must have the same elements, since embeddings are for all of them"
# with more global latents, local ones depend on a linear summary of this size
_MAX_GLOBALS = 64

MakeFlow = Callable[[int], nn.Module]
MakeLocalFlow = Callable[[int, int], nn.Module]
MakeFlows = tuple[MakeFlow | None, MakeLocalFlow | None]


def default_flow(latent_dim: int) -> nn.Module:
    """An IAF of three layers; splines in one dimension, where an IAF is affine."""
    return iaf(latent_dim, 3) if latent_dim > 1 else chain([spline_marginals(1) for _ in range(3)])


def default_local_flow(latent_dim: int, context_dim: int) -> nn.Module:
    """A conditional IAF of two layers; in one dimension a conditional spline."""
    if latent_dim > 1:
        return conditional_iaf(latent_dim, context_dim, 2)
    return conditional_spline_autoregressive(1, context_dim)


class GlobalFactor(nn.Module):
    """The posterior of the global latents: an optional flow, then location and scale."""

    def __init__(self, make: MakeFlow | None, loc: Tensor, scale: float) -> None:
        super().__init__()
        dim = len(loc)
        affine = LocationScale(loc, scale, full_rank=dim <= FULL_RANK_LIMIT)
        flows = [] if make is None else [make_flow("flow", make, loc)]
        self.transform = ComposedTransform(*flows, affine)
        self.context_dim = min(dim, _MAX_GLOBALS)
        is_large = dim > _MAX_GLOBALS
        self.summary = _linear(loc, dim, _MAX_GLOBALS, bias=False) if is_large else None

    @property
    def affine(self) -> Any:
        return self.transform.transforms[-1]

    def condition(self, features: Tensor, rest: Sequence[Tensor]) -> ComposedTransform:
        return self.transform

    def as_context(self, z: Tensor, num_elements: int) -> Tensor:
        """The context ``(*, context_dim)`` of elements that depend on global latents z.

        The unit is the posterior sd given one element: the sd given all, times the root of their number. In
        smaller units a random initial dependence costs so much that the posterior collapses.
        """
        deviation = (z - self.affine.loc) * (-self.affine.log_scale).exp()
        context = deviation if self.summary is None else self.summary(deviation)
        return context / math.sqrt(num_elements)

    @torch.no_grad()
    def start_near(self, z: Tensor, share: float) -> None:
        """Becomes a Gaussian with the mean of draws ``(n, D)`` and ``share`` of their covariance."""
        tril = torch.linalg.cholesky(share * torch.atleast_2d(z.T.cov()))
        self.affine.set_(z.mean(0), tril.diagonal() if self.affine.lower is None else tril)


class AmortizedLocationScale(nn.Module):
    r"""A location and scale that are functions of a context h, initially constant.

    .. math::

        y = \mathrm{loc} + W h + s \, (b(h) + x), \qquad \log s = \log s_0 + a(h)

    a and b are outputs of a network whose last layer starts at zero, like W. b is in units of s, so that its
    error counts equally for narrow and wide posteriors.
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
        """The transform for contexts ``(*, C)``; offsets ``(*, D)`` are added to location and log scale."""
        shift, bend = self.network(context).tensor_split(2, dim=-1)
        loc = self.loc + self.linear(context)
        log_scale = self.log_scale + soft_bound(bend, 7.0)
        if offsets:
            loc, log_scale = loc + offsets[0], log_scale + offsets[1]
        return GivenLocationScale(torch.addcmul(loc, shift, log_scale.exp()), log_scale)


class LocalFactor(nn.Module):
    """The posterior of a group of local latents: each element given its features and the other context.

    An embedding holds features, and offsets of location and log scale, so that each element can have any
    location and scale.

    :param rest_dim: the size of the context without features.
    :param units: the location and the scale of features; None for embeddings, of ``embedding_dim`` features.
    """

    units: Tensor | None  # location and scale by which features are standardized
    table: Tensor | None  # the embeddings of all elements

    def __init__(
        self,
        make: MakeLocalFlow | None,
        loc: Tensor,
        rest_dim: int,
        group: Group,
        scale: float,
        embedding_dim: int,
        units: Sequence[Sequence[float]] | None,
    ) -> None:
        super().__init__()
        self.context_dim = len(loc)
        self.feature_dim = embedding_dim if units is None else len(units[0])
        context_dim = self.feature_dim + rest_dim
        self.flow = None if make is None else make_flow("local_flow", make, loc, context_dim)
        self.affine = AmortizedLocationScale(loc, scale, context_dim)
        self.register_buffer("units", None if units is None else loc.new_tensor(units))
        shape = *group.batch_shape(group.full_sizes), self.feature_dim + 2 * len(loc)
        table = nn.Parameter(loc.new_zeros(shape)) if units is None else None
        self.register_parameter("table", table)

    def condition(self, features: Tensor, rest: Sequence[Tensor]) -> ComposedTransform:
        """The transform from the base to the unconstrained space, for features or embeddings ``(*, F)``.

        :param rest: the other parts of the context, each ``(*, C)``; batch shapes broadcast.
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
        return z - self.affine.loc

    @torch.no_grad()
    def start_near(self, context: Tensor, elements: Tensor) -> None:
        """Fits draws of elements ``(n, elements, D)``, and of their global context ``(n, C)``."""
        loc, centered = elements.mean(0), context - context.mean(0)
        # average over elements first, as the mean slope is linear in them
        slopes = torch.linalg.lstsq(centered, (elements - loc).mean(1)).solution
        rest = elements - loc - (centered @ slopes)[:, None]
        self.affine.linear.weight[:, self.feature_dim :][:, : context.shape[1]] = slopes.T
        self.affine.loc.copy_(loc.mean(0))
        self.affine.log_scale.copy_(rest.square().mean((0, 1)).sqrt().log())


class AmortizedPosterior(nn.Module):
    """An amortized posterior: an encoder, and a factor for each group given its features and parents.

    :param init_scale: the initial standard deviation.
    :param units: see :class:`LocalFactor`, by group with an encoder.
    :param start: the initial location of one element of each group, in the order of the sites.
    """

    def __init__(
        self,
        latents: Latents,
        start: Tensor,
        make_flows: MakeFlows,
        encoder: Encoder | None,
        *,
        init_scale: float,
        embedding_dim: int,
        units: Mapping[str, Sequence[Sequence[float]]],
    ) -> None:
        super().__init__()
        self.layout = LatentLayout(latents)
        self.globals: GlobalFactor | None = None
        self.locals = nn.ModuleList()
        self._factors: dict[str, GlobalFactor | LocalFactor] = {}
        make_global, make_local = make_flows
        parts = latents.split(start)
        for group in self.layout.groups:
            # one dtype for all sites
            loc = torch.cat([parts[name].flatten().to(start.dtype) for name in group.latents.sites])
            if group.name == GLOBAL:
                self.globals = GlobalFactor(make_global, loc, init_scale)
                self._factors[GLOBAL] = self.globals
                continue
            rest_dim = sum(self._factors[name].context_dim for name in group.parents)
            of_features = init_scale, embedding_dim, units.get(group.name)
            factor = LocalFactor(make_local, loc, rest_dim, group, *of_features)
            self._factors[group.name] = factor
            self.locals.append(factor)
        self.encoder: Any = encoder

    @torch.no_grad()
    def locate_at(self, start: Tensor) -> None:
        """Moves the factors to another initial location."""
        parts = self.layout.latents.split(start)
        for group in self.layout.groups:
            loc = torch.cat([parts[name].flatten() for name in group.latents.sites])
            self._factors[group.name].affine.loc.copy_(loc)

    @property
    def local_factors(self) -> list[tuple[Group, Any]]:
        return [(group, self._factors[group.name]) for group in self.layout.local_groups]

    @property
    def like(self) -> Any:
        """A tensor with the dtype and device of the latents: the location of the first factor."""
        return next(iter(self._factors.values())).affine.loc

    def encode(self, plates: MakePlates, args: Args, kwargs: Kwargs) -> Features:
        """Runs the encoder; returns features of the groups without embeddings."""
        expected = [group.name for group, factor in self.local_factors if factor.table is None]
        if not expected:
            return {}
        features = encode(self.encoder, plates, self.layout.local_groups, args, kwargs)
        if features.keys() != set(expected):
            wanted, got = f"features of {expected}, as at the guide's set-up", list(features)
            raise ValueError(f"encoder: expected {wanted}, got {got}")
        return features

    def fits(self, features: Features, sizes: PlateSizes) -> bool:
        """Whether features have one row per element of the mini-batch, or of all data."""
        for group, factor in self.local_factors:
            both = zip(*(sizes[name][1:] for name in group.plates))
            if factor.table is None and tuple(features[group.name].shape[:-1]) not in both:
                return False
        return True

    def minibatch_rows(self, features: Features, plates: Plates) -> Vectors:
        """The features or embeddings of the elements of a mini-batch, by group."""
        like = self.like
        rows = {GLOBAL: like.new_empty(0)}
        for group, factor in self.local_factors:
            if factor.table is None:
                row = minibatch_rows(group, features[group.name], factor.feature_dim, plates)
                rows[group.name] = row.to(like.dtype)
            else:
                sizes = {name: plates[name].size for name in group.dims}
                group.check_sizes(group.sizes_of(factor.table), sizes, _OTHER_TABLE)
                indices = {name: plates[name].indices for name in group.dims}
                rows[group.name] = group.select(factor.table, indices)
        return rows

    def all_rows(self, features: Features) -> Vectors:
        """The embeddings of all elements, or features of any number of elements, by group."""
        like, sizes = self.like, dict[str, int]()
        rows = {GLOBAL: like.new_empty(0)}
        for group, factor in self.local_factors:
            row = factor.table
            if row is None:
                row = given_rows(group, features[group.name], factor.feature_dim)
            now = group.sizes_of(row)
            group.check_sizes(sizes, now, _OTHER_ELEMENTS)
            sizes.update(now)
            rows[group.name] = row.to(like.dtype)
        return rows

    def condition(self, group: Group, features: Tensor, vectors: Vectors) -> ComposedTransform:
        """The transform from the base to the unconstrained space, given features and parents' latents."""
        rest = []
        for name in group.parents:
            rest.append(self._factors[name].as_context(vectors[name], group.num_elements))
        return self._factors[group.name].condition(features, rest)

    def distribution(
        self, group: Group, features: Tensor, vectors: Vectors, *, path: bool = False
    ) -> FlowDistribution:
        """The distribution of a group given features and parents; with ``path``, with path gradients."""
        shapes = (vectors[name].shape[:-1] for name in group.parents)
        batch = torch.broadcast_shapes(features.shape[:-1], *shapes)
        base = standard_normal(self.like.new_zeros((*batch, group.latents.latent_dim)))
        transform = self.condition(group, features, vectors)
        if not path:
            return FlowDistribution(base, transform, validate_args=False)
        posterior = PathDistribution(base, transform, validate_args=False)
        given = group, features.detach(), vectors

        def through(x: Tensor, z: Tensor) -> Any:
            fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
            return functional_call(self, fixed, (*given, x, z))

        posterior.through = through
        if group.name == GLOBAL:
            posterior.location = self.like
        return posterior

    def forward(
        self, group: Group, features: Tensor, vectors: Vectors, x: Tensor, z: Tensor
    ) -> Tensor:
        """The log density ``(*,)`` of one factor, at argument x and value z of its transform."""
        x, ladj = self.condition(group, features, vectors).inverse_at(x, z)
        return standard_normal(torch.zeros_like(x)).log_prob(x) + ladj

    def draw(self, features: Vectors, n: int) -> Vectors:
        """Draws latents by group, shape ``(n, 1, ...) + batch shape + (D,)``."""
        vectors = Vectors()
        for group in self.layout.groups:
            # parents' draws already have the dimension of draws
            ones = (1,) * (self.layout.batch_dims - group.batch_dims)
            lead = torch.Size([] if group.parents else [n, *ones])
            distribution = self.distribution(group, features[group.name], vectors)
            vectors[group.name] = distribution.sample(lead)
        return vectors

    def log_prob(self, features: Vectors, vectors: Vectors) -> Tensor:
        """The log density ``(n,)`` at latents by group, in the shapes of :meth:`draw`."""
        parts = []
        for group in self.layout.groups:
            distribution = self.distribution(group, features[group.name], vectors)
            parts.append(distribution.log_prob(vectors[group.name]).flatten(1).sum(-1))
        return torch.stack(parts).sum(0)

    def start_near(self, vectors: Vectors, share: float) -> None:
        """Starts near draws of a mini-batch's latents, in the shapes of :meth:`draw`."""
        if self.globals is None:
            return
        z = vectors[GLOBAL].flatten(0, -2)
        self.globals.start_near(z, share)
        for group, factor in self.local_factors:
            elements = vectors[group.name].reshape(len(z), -1, group.latents.latent_dim)
            factor.start_near(self.globals.as_context(z, group.num_elements), elements)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AmortizedPosterior":
        super()._apply(fn, recurse)
        latents = Latents(site.to(fn) for site in self.layout.latents.sites.values())
        self.layout = LatentLayout(latents)
        return self


def _linear(like: Tensor, inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=like.dtype, device=like.device)
