# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""An amortized posterior on the unconstrained space: global latents, then each local group."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...joint.sites import Latents
from ...transforms import ComposedTransform
from ..distributions import FlowDistribution, PathDistribution
from ..persistence.spec import GuideSpec
from ..prior_coordinates import prior_layer
from .encoder import Encoder, Features, MakePlates, encode, given_rows, minibatch_rows
from .factors import GlobalFactor, LocalFactor, MakeFlows
from .plates import GLOBAL, Args, Group, Kwargs, LatentLayout, Plates, PlateSizes, Vectors

_OTHER_TABLE = "Only elements of the set-up have embeddings: make a new guide, or use an encoder"
_OTHER_ELEMENTS = "Elements have to be the same for all latents: embeddings are of all elements"


class AmortizedPosterior(nn.Module):
    r"""The factors of an amortized posterior, and the encoder.

    .. math::

        q(g) \prod_k \prod_i q(z^k_i \mid g, z^{\mathrm{parents\ of\ } k}_i, h^k_i)

    :param start: the initial location, that of one element of each group, in the order of the sites.
    """

    def __init__(
        self, spec: GuideSpec, start: Tensor, make_flows: MakeFlows, encoder: Encoder | None
    ) -> None:
        super().__init__()
        self.layout = LatentLayout(spec.latents)
        self.globals: GlobalFactor | None = None
        self.locals = nn.ModuleList()
        self._factors: dict[str, GlobalFactor | LocalFactor] = {}
        scale, feature_dims = spec.arguments["init_scale"], spec.arguments["feature_dims"]
        # files of earlier versions have none
        units = spec.arguments.get("feature_units", {})
        parts = spec.latents.split(start)
        for group in self.layout.groups:
            # one dtype inside, whatever those of the sites
            loc = torch.cat([parts[name].flatten().to(spec.dtype) for name in group.latents.sites])
            if group.name == GLOBAL:
                self._factors[GLOBAL] = self.globals = GlobalFactor(make_flows[0], loc, scale)
                continue
            rest_dim = sum(self._factors[name].context_dim for name in group.parents)
            dim = feature_dims.get(group.name, spec.arguments["embedding_dim"])
            has_table = group.name not in feature_dims
            table_shape = group.batch_shape(group.full_sizes) if has_table else None
            given = make_flows[1], loc, scale, dim, rest_dim, table_shape, units.get(group.name)
            factor = LocalFactor(*given)
            self._factors[group.name] = factor
            self.locals.append(factor)
        self.prior = prior_layer(spec, start)
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
        """The groups of local latents, each with its factor."""
        return [(group, self._factors[group.name]) for group in self.layout.local_groups]

    @property
    def like(self) -> Any:
        """A tensor of the dtype and the device of the latents: the location of the first factor."""
        return next(iter(self._factors.values())).affine.loc

    def encode(self, plates: MakePlates, args: Args, kwargs: Kwargs) -> Features:
        """The features of the groups that have no embeddings, by the encoder."""
        expected = [group.name for group, factor in self.local_factors if factor.table is None]
        if not expected:
            return {}
        features = encode(self.encoder, plates, self.layout.local_groups, args, kwargs)
        if features.keys() != set(expected):
            wanted, got = f"features of {expected}, as at the guide's set-up", list(features)
            raise ValueError(f"encoder: expected {wanted}, got {got}")
        return features

    def fits(self, features: Features, sizes: PlateSizes) -> bool:
        """Whether features have a row for each element of the mini-batch, or for each of all."""
        for group, factor in self.local_factors:
            both = zip(*(sizes[name][1:] for name in group.plates))
            if factor.table is None and tuple(features[group.name].shape[:-1]) not in both:
                return False
        return True

    def minibatch_rows(
        self, features: Features, plates: Plates, indices: Mapping[str, Tensor]
    ) -> Vectors:
        """The features or embeddings of the elements of a mini-batch, by group."""
        like = self.like
        rows = {GLOBAL: like.new_empty(0)}
        for group, factor in self.local_factors:
            if factor.table is None:
                given, dim = features[group.name], factor.feature_dim
                rows[group.name] = minibatch_rows(group, given, dim, plates, indices).to(like.dtype)
            else:
                sizes = {name: plates[name].size for name in group.dims}
                group.check_sizes(group.sizes_of(factor.table), sizes, _OTHER_TABLE)
                rows[group.name] = group.select(factor.table, indices)
        return rows

    def all_rows(self, features: Features) -> Vectors:
        """The embeddings of all elements, or their features, of any number of elements."""
        like, sizes = self.like, dict[str, int]()
        rows = {GLOBAL: like.new_empty(0)}
        for group, factor in self.local_factors:
            if factor.table is None:
                row, now = given_rows(group, features[group.name], factor.feature_dim)
            else:
                row, now = factor.table, group.sizes_of(factor.table)
            group.check_sizes(sizes, now, _OTHER_ELEMENTS)
            sizes.update(now)
            rows[group.name] = row.to(like.dtype)
        return rows

    def condition(self, group: Group, features: Tensor, vectors: Vectors) -> ComposedTransform:
        """From the base to the unconstrained space, given features and the latents of the parents."""
        rest = []
        for name in group.parents:
            rest.append(self._factors[name].as_context(vectors[name], group.num_elements))
        return self._factors[group.name].condition(features, rest)

    def distribution(
        self, group: Group, features: Tensor, vectors: Vectors, *, path: bool
    ) -> FlowDistribution:
        """The distribution after :meth:`condition`; with ``path``, its density has the path gradient."""
        shapes = (vectors[name].shape[:-1] for name in group.parents)
        batch = torch.broadcast_shapes(features.shape[:-1], *shapes)
        base = base_of(self.like, (*batch, group.latents.latent_dim))
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
        """The log-density of one factor, shape ``(*,)``, at argument x and value z of its transform."""
        x, ladj = self.condition(group, features, vectors).inverse_at(x, z)
        return base_of(x, x.shape).log_prob(x) + ladj

    def draw(self, features: Vectors, n: int) -> Vectors:
        """Draws of the latents of each group, shape ``(n, 1, ...) + batch shape + (D,)``."""
        lead = (n,) + (1,) * self.layout.batch_dims
        vectors = Vectors()
        for group in self.layout.groups:
            batch = torch.broadcast_shapes(lead, features[group.name].shape[:-1])
            x = base_of(self.like, (*batch, group.latents.latent_dim)).sample()
            transform = self.condition(group, features[group.name], vectors)
            vectors[group.name] = transform.call_and_ladj(x)[0]
        return vectors

    def log_prob(self, features: Vectors, vectors: Vectors) -> Tensor:
        """The log-density of the latents of each group as :meth:`draw` returns them, shape ``(n,)``."""
        parts = []
        for group in self.layout.groups:
            transform = self.condition(group, features[group.name], vectors)
            x, ladj = transform.inverse_and_ladj(vectors[group.name])
            parts.append((base_of(x, x.shape).log_prob(x) + ladj).flatten(1).sum(-1))
        return torch.stack(parts).sum(0)

    def start_near(self, vectors: Vectors, share: float) -> None:
        """Starts near draws of the latents of a mini-batch, shapes as of :meth:`draw`."""
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


def place_sites(latents: Latents, z: Tensor) -> dict[str, tuple[Tensor, torch.Size]]:
    """The part of each site of a latent vector ``batch + (latent_dim,)``, and its batch shape."""
    placed = {}
    for name, part in latents.split(z).items():
        site = latents.sites[name]
        # batch dimensions of a site outside all plates lie where those of plates lie
        event_dim = len(site.unconstrained_shape) - len(site.batch_shape)
        ones = z.shape[:-1] + (1,) * event_dim
        part = part.reshape(torch.broadcast_shapes(site.unconstrained_shape, ones))
        placed[name] = part, part.shape[: part.dim() - event_dim]
    return placed


def base_of(like: Tensor, shape: Sequence[int]) -> Any:
    """Standard Normals, whose values are never checked: that would read them."""
    zeros = like.new_zeros(shape)
    return dist.Normal(zeros, torch.ones_like(zeros), validate_args=False).to_event(1)
