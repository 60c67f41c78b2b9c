# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The flow guide of hierarchical models and of mini-batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from ..distributions import DrawnDistribution, PathDistribution
from ..flow_factory import check_count, check_model, check_scale
from ..sites import packing
from . import default_flows
from . import encoder as encoding
from .element_packing import (
    Plates,
    batch_shape_of,
    from_values,
    inside,
    sample_sites,
    split_globals,
    to_values,
)
from .factors import base_of, check_flows
from .layout import Frame
from .plates import check_plates, check_same, check_table, new_plate
from .posterior import Hierarchy
from .setup import KeptAmortized

_CHUNK = 2**16
# of the noise of the steps: it averages out sooner than a location comes from far away
_AHEAD = 2.0

Rows = dict[str, Tensor]


class AutoAmortized(KeptAmortized):
    r"""A guide of a model with plates: a flow for the globals, and one for each element given them.

    .. math::

        q(g) \prod_i q(z_i \mid g, h_i)

    g are the latents in no plate, z_i those of element i of a plate, and h_i are its features: what an
    encoder makes of its data, or an embedding of its own. Several latents in one plate share one
    flow, which learns how they depend on each other; those in nested plates depend on those in the
    outer plates too. A plate may be sub-sampled or not. So the guide trains on mini-batches, and
    with an encoder a step costs the same however many elements there are.

    At the start the globals are ``Normal(init_loc, init_scale)`` on the unconstrained space, and
    each element is ``Normal(m, init_scale)``, where m is the mean of the starting values of the
    elements that the first call sees.

    The guide makes the plates, and the model takes their indices, as with Pyro's autoguides. Where
    the data of a mini-batch are the model's arguments, the indices count for nothing but embeddings: those
    need ``create_plates``.

    :param model: a Pyro model.
    :param encoder: a module or function of the model's arguments that returns the features of each
        element, shape ``(subsample size, features)``, or ``(second, first, features)`` for nested
        plates in the dimensions -2 and -1; or a dict of such by the name of the (innermost) plate.
        In it ``pyro.subsample(data, event_dim=...)`` takes the mini-batch from the data, as in the
        plates of the model; a row for each of all elements will do too. Elements of plates
        that the dict leaves out have embeddings.
    :param flow: a callable that takes the number of globals and returns a flow, or None for none:
        then the globals are a Gaussian. By default an IAF.
    :param local_flow: a callable that takes the number of an element's latents and the size of the
        context, and returns a conditional flow such as ``pyro_artransform.conditional_iaf``; None
        for none: then each element is a Gaussian with independent coordinates, given the globals.
    :param embedding_dim: the number of features of an embedding.
    :param init_loc_fn: the starting value of each site, one of Pyro's starting functions; by
        default the median of the prior.
    :param init_scale: the standard deviation to start with, on the unconstrained space.
    :param create_plates: as for Pyro's autoguides, a function of the model's arguments that returns
        a plate or several, with the indices of the mini-batch (``subsample=``). A model that gives
        indices itself needs it.
    :raises TypeError: if an argument is of the wrong kind.
    :raises ValueError: if a number is not positive; at the first call, if the model has no latents in
        plates, discrete ones, or plates with indices of its own, or if the encoder's result does
        not fit them.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform import AutoAmortized
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("groups", 100, subsample_size=20) as index:
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])
        >>> y = torch.zeros(100)
        >>> guide = AutoAmortized(model)
        >>> {name: tuple(value.shape) for name, value in guide(y).items()}
        {'mean': (), 'z': (20,)}
        >>> {name: tuple(value.shape) for name, value in guide.sample_posterior(10).items()}
        {'mean': (10,), 'z': (10, 100)}

    **References**

    1. Auto-Encoding Variational Bayes (Kingma, Welling, 2013), https://arxiv.org/abs/1312.6114
    2. Improved Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans,
       Jozefowicz, Chen, Sutskever, Welling, 2016), https://arxiv.org/abs/1606.04934
    3. Amortized Variational Inference for Simple Hierarchical Models (Agrawal, Domke, 2021),
       https://arxiv.org/abs/2111.03144
    """

    #: Whether the density of the guide's draws has a gradient by the draws only, and not by its own
    #: parameters. Its variance is lower: at the exact posterior of an element, none. Of several
    #: particles the mean gradient moves the location of the globals alone, and vanishes with it, so
    #: that an ELBO has the same optima. It takes one more evaluation of each network. Other
    #: objectives, such as ``RenyiELBO``, need it to be false.
    path = False

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any] | None = None,
        *,
        flow: Callable[[int], nn.Module] | None = default_flows.global_flow,
        local_flow: Callable[[int, int], nn.Module] | None = default_flows.local_flow,
        embedding_dim: int = 8,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_model(model)
        check_flows(flow, local_flow, init_loc_fn, create_plates)
        super().__init__(model, init_loc_fn, encoding.check_encoder(encoder), create_plates)
        self._make_flow, self._make_local_flow = flow, local_flow
        self._arguments = {
            "embedding_dim": check_count("embedding_dim", embedding_dim),
            "init_scale": check_scale(init_scale),
        }

    @property
    def needs_indices(self) -> bool:
        """Whether elements are looked up by their plates' indices, and nobody says what these are.

        Then batches of data as the model's arguments would meet embeddings of other elements.

        :raises RuntimeError: if the guide was never called.
        """
        return self.create_plates is None and any(f.table is not None for f in self._parts.factors)

    # The guide as Pyro calls it

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws all latents, the locals of a mini-batch, as a Pyro guide does.

        :param args: the model's arguments.
        :param kwargs: its keyword arguments.
        :return: the value of each site.
        :raises ValueError: if for these arguments the model has other latents than at the first call,
            or a plate has a size for which the guide has no embeddings or features.
        """
        self.set_up(*args, **kwargs)
        frames = self._frames_for(args, kwargs)
        self._claim()
        hierarchy: Hierarchy = self.transform
        plates, indices = self._plates_for(frames, args, kwargs)
        rows = self._rows(hierarchy, plates, indices, args, kwargs)
        return self._sample(hierarchy, plates, rows)

    def _sample(self, hierarchy: Hierarchy, plates: Plates, rows: Rows) -> dict[str, Tensor]:
        layout, values, drawn, latent = self._layout, dict[str, Tensor](), Rows(), None
        if hierarchy.globals is not None:
            base = base_of(hierarchy.like, (), len(hierarchy.globals.loc))
            known: Any = (layout, None, None, None, drawn)
            posterior = self._drawn(hierarchy, base, hierarchy.globals.transform, known)
            latent = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer=_auxiliary())
            values.update(sample_sites(split_globals(layout, latent), plates))
        for k, (group, factor) in enumerate(zip(layout.groups, hierarchy.factors)):
            row, rest = rows[group.name], hierarchy.rest(layout, group, latent, drawn)
            batch = torch.broadcast_shapes(row.shape[:-1], *(part.shape[:-1] for part in rest))
            base = base_of(hierarchy.like, batch, factor.latent_dim)
            known = (layout, k, row.detach(), latent, drawn)
            posterior = self._drawn(hierarchy, base, factor.transform(row, rest), known)
            name = f"_{self._pyro_name}_{group.name}_latent"
            with inside(plates, group.dims):
                drawn[group.name] = pyro.sample(name, posterior, infer=_auxiliary())
            values.update(sample_sites(group.split(drawn[group.name]), plates))
        return values

    def _drawn(
        self, hierarchy: Hierarchy, base: Any, transform: Any, known: tuple[Any, ...]
    ) -> DrawnDistribution:
        """The distribution of a latent vector, with the gradient that is wanted of its density."""
        if not self.path:
            return DrawnDistribution(base, transform, validate_args=False)
        posterior = PathDistribution(base, transform, validate_args=False)
        posterior.through = lambda *pair: hierarchy.at_fixed_parameters(*known, pair)
        if known[1] is None and hierarchy.globals is not None:
            posterior.location = hierarchy.globals.loc
        return posterior

    def _plates_for(
        self, frames: Mapping[str, Frame], args: Any, kwargs: Any
    ) -> tuple[Plates, Rows]:
        """The plates, and the indices of those whose elements are not all, in their order."""
        if self.master is not None:
            plates = {name: self.master().plates[name] for name in frames}
            return plates, {name: plate.indices for name, plate in plates.items()}
        created = self._created_plates(args, kwargs)
        check_plates(created, frames)
        plates, device = dict(created), self._parts.like.device
        for name, frame in sorted(frames.items()):
            if name not in created:
                plates[name] = new_plate(name, frame, device)
        self.plates = plates
        partial = [name for name in frames if name in created or _is_partial(frames[name])]
        return plates, {name: plates[name].indices for name in partial}

    def _rows(
        self, hierarchy: Hierarchy, plates: Plates, indices: Rows, args: Any, kwargs: Any
    ) -> Rows:
        """The features, or the embeddings, of the elements of a mini-batch."""
        features = self._features(hierarchy, plates, args, kwargs)
        sizes = {name: plate.subsample_size for name, plate in plates.items()}
        full_sizes = {name: plate.size for name, plate in plates.items()}
        rows = {}
        for group, factor in zip(self._layout.groups, hierarchy.factors):
            if factor.table is None:
                found, feature_dim = features[group.name], factor.feature_dim
                row = encoding.rows_of(group, found, feature_dim, sizes, full_sizes, indices)
                rows[group.name] = row.to(hierarchy.like.dtype)
                continue
            check_table(group, factor.table, full_sizes)
            chosen = {dim: indices[name] for name, dim in group.dims.items() if name in indices}
            rows[group.name] = factor.embeddings(chosen)
        return rows

    def _features(self, hierarchy: Hierarchy, plates: Plates, args: Any, kwargs: Any) -> Rows:
        groups = zip(self._layout.groups, hierarchy.factors)
        encoded = [group.name for group, factor in groups if factor.table is None]
        if not encoded:
            return {}
        encoder: Any = self._encoder[0] if hierarchy.encoder is None else hierarchy.encoder
        mine = {name: plates[name] for group in self._layout.groups for name in group.dims}
        found = encoding.encode(encoder, mine, args, kwargs)
        features = encoding.features_by_group(found, self._layout.groups)
        encoding.check_keys(features, encoded)
        return features

    @torch.no_grad()
    def start_near(self, values: Mapping[str, Any], share: float = 1.0) -> None:
        """Starts near draws of the latents of a mini-batch, as the globals and an element vary in them.

        The globals become a Gaussian of the draws' location and of their covariance times ``share``,
        each element one that depends on them as the mean element does. The flows are left as
        they are.

        :param values: for each site a tensor of shape ``(n,) + site shape``, the locals of any
            number of elements.
        :param share: what part of all elements these are: the posterior given all is narrower.
        :raises ValueError: if a site is missing or unknown, or a value has another shape.
        """
        shapes = {group.name: batch_shape_of(group, values) for group in self._layout.groups}
        latent, drawn, _ = from_values(self._layout, values, shapes)
        self._parts.start_near(self._layout, latent, drawn, share)

    def step_units(self) -> dict[str, Tensor]:
        """The size of an optimiser's unit step, for each parameter of which it is not one.

        That of the globals' location is their scale, times the square root of how many mini-batches
        there are: by so much the location that one of them asks for misses that of all. Their flow
        goes slower by as much.

        :return: by the name of a parameter, a tensor of its shape or a number as a tensor.
        """
        if self._parts.globals is None:
            return {}
        ratio = max(frame.full_size / frame.size for frame in self._frames.values())
        units = self._parts.globals.step_units(_AHEAD * ratio**0.5, ratio**-0.5)
        return {f"transform.globals.{name}": unit for name, unit in units.items()}

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        """For each parameter whose steps are not in its own units, a factor that broadcasts to it."""
        named = dict(self.named_parameters())
        return {named[name]: unit for name, unit in self.step_units().items()}

    @contextmanager
    def path_gradient(self) -> Iterator[None]:
        """A context in which the density of the guide's draws has a gradient by the draws only."""
        before, self.path = self.path, True
        try:
            yield
        finally:
            self.path = before

    # Draws and densities

    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of all sites, of all elements, without gradients.

        The elements are those that have embeddings, or those that the encoder returns features for:
        of all data, or of a mini-batch that is the model's arguments.

        :param n: how many.
        :param args: the model's arguments, needed if there is an encoder, or the guide was never
            called.
        :param kwargs: its keyword arguments, likewise.
        :return: for each site a tensor of shape ``(n,) + site shape``.
        :raises ValueError: if ``n`` is no positive integer, or the features do not fit.
        """
        self.set_up(*args, **kwargs)
        rows = self._all_rows(args, kwargs)
        elements = max(row.shape[:-1].numel() for row in rows.values())
        chunk = max(1, _CHUNK // elements)
        sizes = [min(chunk, n - start) for start in range(0, check_count("n", n), chunk)]
        draws = [to_values(self._layout, *self._parts.draw(self._layout, rows, s)) for s in sizes]
        return {name: torch.cat([d[name] for d in draws]) for name in self.prototype_trace.nodes}

    def log_prob(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The log-density at values of all sites and all elements, on the constrained space.

        No plate is scaled: it is the density of the elements that there are values of. Going back to
        the unconstrained space loses digits near the edges of a support.

        :param values: for each site a tensor, array or list of shape ``(n,) + site shape``, as
            :meth:`sample_posterior` returns them.
        :param args: the model's arguments, needed if there is an encoder, or the guide was never
            called.
        :param kwargs: its keyword arguments, likewise.
        :return: shape ``(n,)``.
        :raises ValueError: if a site is missing or unknown, or a value has another shape.
        """
        self.set_up(*args, **kwargs)
        rows = self._all_rows(args, kwargs)
        shapes = {name: row.shape[:-1] for name, row in rows.items()}
        latent, drawn, ladj = from_values(self._layout, values, shapes)
        like = self._parts.like
        latent = None if latent is None else latent.to(like.dtype)
        drawn = {name: z.to(like.dtype) for name, z in drawn.items()}
        log_density: Tensor = self._parts.log_prob(self._layout, rows, latent, drawn) - ladj
        return log_density

    @torch.no_grad()
    def quantiles(
        self,
        quantiles: Sequence[float] | Tensor,
        *args: Any,
        num_samples: int = 2_000,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Quantiles of each coordinate of each site, from draws, which are all in memory at a time.

        :param quantiles: q levels between 0 and 1.
        :param args: the model's arguments, as for :meth:`sample_posterior`.
        :param num_samples: how many draws.
        :param kwargs: its keyword arguments, likewise.
        :return: for each site a tensor of shape ``(q,) + site shape``.
        :raises ValueError: if a level is not between 0 and 1.
        """
        self.set_up(*args, **kwargs)
        levels = packing.check_levels(quantiles, self._parts.like)
        draws = self.sample_posterior(check_count("num_samples", num_samples), *args, **kwargs)
        return {name: packing.quantiles_of(value, levels) for name, value in draws.items()}

    def median(self, *args: Any, num_samples: int = 2_000, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each coordinate of each site, from draws.

        :param args: the model's arguments, as for :meth:`sample_posterior`.
        :param num_samples: how many draws.
        :param kwargs: its keyword arguments, likewise.
        :return: for each site a tensor of its shape.
        """
        found = self.quantiles([0.5], *args, num_samples=num_samples, **kwargs)
        return {name: value[0] for name, value in found.items()}

    def _all_rows(self, args: Any, kwargs: Any) -> Rows:
        """The embeddings of all elements, and whatever features the encoder has for the arguments."""
        hierarchy, rows, sizes = self._parts, Rows(), dict[str, int]()
        self._claim()
        with poutine.block():
            features = self._features_of_all(hierarchy, args, kwargs)
        for group, factor in zip(self._layout.groups, hierarchy.factors):
            if factor.table is None:
                found, feature_dim = features[group.name], factor.feature_dim
                row, now = encoding.rows_as_given(group, found, feature_dim)
                row = row.to(hierarchy.like.dtype)
            else:
                row = factor.embeddings({})
                now = {name: row.shape[dim - 1] for name, dim in group.dims.items()}
            check_same(group, sizes, now)
            sizes.update(now)
            rows[group.name] = row
        return rows

    def _features_of_all(self, hierarchy: Hierarchy, args: Any, kwargs: Any) -> Rows:
        if all(factor.table is not None for factor in hierarchy.factors):
            return {}
        frames = self._frames_for(args, kwargs) if args or kwargs else self._frames
        plates = {name: pyro.plate(name, f.full_size, dim=f.dim) for name, f in frames.items()}
        return self._features(hierarchy, plates, args, kwargs)


def _auxiliary() -> Any:
    return {"is_auxiliary": True}


def _is_partial(frame: Frame) -> bool:
    partial: bool = frame.size != frame.full_size
    return partial
