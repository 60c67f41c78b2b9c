# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The flow guide for hierarchical models and mini-batches."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from ..._base.arguments import check_callable, check_integer, check_positive, is_tracing
from ...model.coordinates.centering import CoordinatesArgument
from ...model.density import MOST_SIGNATURES, Args, Kwargs, LogJoint
from ...model.protocols import MinibatchGuide
from ...model.sites import Latents
from ...model.traces import argument_signature
from ..base import BaseGuide, Model
from ..distributions import SiteDelta, check_flow_argument
from ..prototype import one_more_run, refuse_missing, refuse_moving_structure, sites_by_name
from .element_map import ElementMap, center_elements, center_elements_at_start, mean_start
from .encoder import Encoder, check_encoder, first_feature_units
from .plates import (
    GivenIndices,
    LatentLayout,
    Plates,
    PlateSizes,
    Vectors,
    compare_elements,
    complete_plates,
    entered,
    latents_of_one_element,
    plate_sizes,
    plates_of_user,
    plates_were_dropped,
)
from .variational_posterior import (
    AmortizedPosterior,
    MakeFlow,
    MakeLocalFlow,
    default_flow,
    default_local_flow,
)


class AutoAmortized(BaseGuide, MinibatchGuide):
    r"""A guide for models with plates: a flow for the global latents, and one for each element.

    .. math::

        q(g) \prod_i q(z_i \mid g, h_i)

    g are the latents in no plate, z_i those of element i of a plate, and h_i its features, which an encoder
    computes from its data. Without an encoder h_i is an embedding, a row of parameters per element. Latents
    in one plate share a flow; those in nested plates also depend on those in the outer plates. Plates may be
    subsampled, so the guide can train on mini-batches.

    On the unconstrained space, a new guide is ``Normal(init_loc, init_scale)``. Elements of a plate start at
    their mean.

    The guide creates the plates, and the model uses their indices, as with Pyro's autoguides. If mini-batches
    of data are passed as the model's arguments, embeddings need ``create_plates``.

    :param model: a Pyro model.
    :param encoder: a module or function of the model's arguments that returns the features of each element,
        of the mini-batch or of all data, shape ``(size, features)``, or ``(second, first, features)`` for
        nested plates in dimensions -2 and -1; or a dict of such by the name of the (innermost) plate, with
        embeddings for omitted plates. Inside, ``pyro.subsample(data, event_dim=...)`` selects the mini-batch.
        Features that are not trained are standardized by the mean and sd of the first ones.
    :param flow: takes the number of global latents and returns a flow, by default an IAF; None for
        Gaussian global latents.
    :param local_flow: takes the number of an element's latents and the size of the context, and
        returns a conditional flow such as ``pyro_artransform.conditional_iaf``; None for elements that
        are Gaussians with independent coordinates, given the global latents.
    :param embedding_dim: the number of features of an embedding.
    :param init_loc_fn: as for :class:`~pyro_artransform.AutoAutoregressive`.
    :param init_scale: the initial standard deviation on the unconstrained space.
    :param create_plates: as for Pyro's autoguides, a function of the model's arguments that returns one or
        more plates with the indices of the mini-batch, if the model sets these itself.
    :param coordinates: as for :class:`~pyro_artransform.AutoAutoregressive`, with the same numbers for all
        elements of a plate. Draws of all elements need a model with a prior for each: by plates that it
        subsamples itself, by arguments for all, or by priors that do not depend on the data.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if a number is not positive; at the first call, if the model has no latents in plates,
        has discrete latents, or sets indices itself, or if the encoder's result does not fit.

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

    #: Whether the density of the guide's draws has the path gradient, through the draws only. Its
    #: variance is lower, and zero at the exact posterior of an element. With several particles their
    #: mean gradient goes to the location of the global latents alone. It costs one evaluation of each
    #: network. Objectives such as ``RenyiELBO`` need it to be false.
    path = False

    _num_quantile_draws = 2_000
    _functions = (*BaseGuide._functions, "create_plates")

    def __init__(
        self,
        model: Model,
        encoder: Encoder | None = None,
        *,
        flow: MakeFlow | None = default_flow,
        local_flow: MakeLocalFlow | None = default_local_flow,
        embedding_dim: int = 8,
        init_loc_fn: Model = init_to_median,
        init_scale: float = 0.1,
        create_plates: Callable[..., pyro.plate | Iterable[pyro.plate]] | None = None,
        coordinates: CoordinatesArgument = "prior",
    ) -> None:
        if flow is not None:
            check_flow_argument("flow", flow, "the latent dimension")
        if local_flow is not None:
            check_flow_argument("local_flow", local_flow, "the latent and the context dimension")
        if encoder is not None:
            check_encoder(encoder)
        embedding_dim = check_integer("embedding_dim", embedding_dim)
        init_scale = check_positive("init_scale", init_scale)
        super().__init__(model, (flow, local_flow), init_loc_fn, coordinates)
        self._embedding_dim, self._init_scale = embedding_dim, init_scale
        if create_plates is not None:
            self.create_plates = check_callable("create_plates", create_plates)
        # in a tuple, like the model, as its parameters become the guide's only at set-up
        self._encoder = (encoder,)
        #: the location and scale of features, by group
        self._feature_units: dict[str, list[list[float]]] = {}
        self._sizes = PlateSizes()
        self._sizes_by_shapes: dict[Hashable, PlateSizes] = {}

    @property
    def needs_indices(self) -> bool:
        """Whether batches of data need ``create_plates``, to look up their embeddings."""
        has_embeddings = any(factor.table is not None for factor in self._posterior.locals)
        return has_embeddings and self.create_plates is None

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        rng_state, given = torch.get_rng_state(), GivenIndices()
        super()._setup_prototype(*args, **kwargs)
        latents, start = latents_of_one_element(self.prototype_trace)
        run = partial(given(self.model), *args, **kwargs)
        dependent = refuse_moving_structure(self.prototype_trace, run, rng_state)
        sizes = plate_sizes(latents.sites.values())
        given.refuse(sizes, self, args, kwargs)
        (encoder,) = self._encoder
        if encoder is not None:
            plates = partial(complete_plates, {}, sizes, start.device)
            groups = LatentLayout(latents).local_groups
            self._feature_units = first_feature_units(encoder, plates, groups, args, kwargs)
        with_location = self._find_coordinates(args, kwargs, bool(dependent))

        def locate(_: Tensor) -> Tensor:
            density, coordinates = self._bind((), {}), self.coordinates
            share = 1 / density.structure(args, kwargs).scale
            center_elements_at_start(coordinates, self._requested, density, share)
            return mean_start(coordinates, density)

        self._set_up_from(latents, with_location, start, locate)
        self._sizes_by_shapes = {argument_signature((args, kwargs)): self._sizes}
        self._register()

    def _build(self, latents: Latents, start: Tensor) -> nn.Module:
        (encoder,) = self._encoder
        self._sizes, self._sizes_by_shapes = plate_sizes(latents.sites.values()), {}
        return AmortizedPosterior(
            latents,
            start,
            self._flow_maker(),
            encoder,
            init_scale=self._init_scale,
            embedding_dim=self._embedding_dim,
            units=self._feature_units,
        )

    def __getstate__(self) -> dict[str, Any]:
        plates = None if self.create_plates is None else plates_were_dropped
        return {**super().__getstate__(), "create_plates": plates}

    @property
    def _posterior(self) -> Any:
        """The posterior, without the param statements that reading ``transform`` makes."""
        self._known_coordinates()
        return self._modules["transform"]

    # Pyro's guide interface

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws all latents, local ones for a mini-batch, like any Pyro guide.

        :return: the value of each site.
        :raises ValueError: if the model has other latents with these arguments than at the first call, or a
            plate has a size for which the guide has no embeddings or features.
        """
        self.set_up(*args, **kwargs)
        self._update_sizes(args, kwargs)
        posterior: AmortizedPosterior = self._registered_transform()
        make = cache(lambda: self._plates_for(args, kwargs))
        features = posterior.encode(make, args, kwargs)
        if not (make.cache_info().currsize or posterior.fits(features, self._sizes)):
            self._update_sizes(args, kwargs, again=True)  # sizes may depend on values
        rows = posterior.minibatch_rows(features, plates := make())
        vectors, values = Vectors(), dict[str, Tensor]()
        parts: dict[str, Any] = {name: plate.indices for name, plate in plates.items()}
        for group in posterior.layout.groups:
            distribution = posterior.distribution(group, rows[group.name], vectors, path=self.path)
            name = f"_{self._pyro_name}_{group.name and group.name + '_'}latent"
            with entered(plates[plate] for plate in group.dims):
                vectors[group.name] = pyro.sample(name, distribution, infer={"is_auxiliary": True})
            parts.update(group.latents.place(vectors[group.name]))
        found, ladjs = self.coordinates.to_sites(parts, self._run_of_model(args, kwargs))
        for group in posterior.layout.groups:
            with entered(plates[plate] for plate in group.dims):
                for name, site in group.latents.sites.items():
                    delta = SiteDelta(found[name], -ladjs[name], site.event_dim)
                    values[name] = pyro.sample(name, delta)
        return values

    def _update_sizes(self, args: Args, kwargs: Kwargs, *, again: bool = False) -> None:
        """Updates plate sizes for these arguments; runs the model if their shapes are new."""
        if self._model is None or is_tracing():
            return
        shapes = argument_signature((args, kwargs))
        if again or shapes not in self._sizes_by_shapes:
            given, known = GivenIndices(), self.coordinates.latents.sites
            now = sites_by_name(one_more_run(partial(given(self.model), *args, **kwargs)))
            refuse_missing(self.coordinates.sites, now)
            common = [name for name in known if name in now]
            for name in common:
                compare_elements(known[name], now[name])
            sizes = plate_sizes(map(now.__getitem__, common))
            given.refuse(sizes, self, args, kwargs)
            if len(self._sizes_by_shapes) >= MOST_SIGNATURES:
                self._sizes_by_shapes.clear()
            self._sizes_by_shapes[shapes] = {**self._sizes, **sizes}
        self._sizes = self._sizes_by_shapes[shapes]

    def _plates_for(self, args: Args, kwargs: Kwargs) -> Plates:
        if self.master is not None:
            return {name: self.master().plates[name] for name in self._sizes}
        made = plates_of_user(self, args, kwargs)
        now = {name: (plate.subsample_size, plate.size) for name, plate in made.items()}
        if any(self._sizes[name][1:] != now[name] for name in now.keys() & self._sizes.keys()):
            self._update_sizes(args, kwargs, again=True)
        self.plates: Plates = complete_plates(made, self._sizes, self._posterior.like.device)
        return self.plates

    # Fits, draws and densities

    @torch.no_grad()
    def center_at(self, u: Tensor | None, log_joint: LogJoint, share: float) -> float:
        """See ``MinibatchGuide``. Resets the location to the initial values in the new coordinates."""
        change = center_elements(self.coordinates, u, log_joint, share)
        self._posterior.locate_at(mean_start(self.coordinates, log_joint))
        return change

    @contextmanager
    def path_gradient(self) -> Iterator[None]:
        """A context in which :attr:`path` is true."""
        before, self.path = self.path, True
        try:
            yield
        finally:
            self.path = before

    @torch.no_grad()
    def start_near(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Starts near draws of a mini-batch's latents, with unchanged flows.

        Global latents become a Gaussian with the mean of their draws, and their covariance times ``share``.
        Elements become Gaussians that depend on the global latents like the mean element.

        :param values: values by site, shape ``(n,) + site shape``, for any number of elements; draws in
            coordinates of the prior are mapped by the sites' bijections only.
        :param share: the share of these elements in all; with all elements the posterior is narrower.
        :raises ValueError: if a site is missing or unknown, or a value has another shape.
        """
        posterior, layout = self._posterior, self._posterior.layout
        shapes = {}
        for group in layout.groups:
            name, site = next(iter(group.latents.sites.items()))
            shape = values[name].shape if group.dims and name in values else ()
            shapes[group.name] = torch.Size(shape[1 : len(shape) - site.event_dim])
        posterior.start_near(layout.unconstrain_with_ladj(values, shapes, posterior.like)[0], share)

    def step_scales(self) -> Mapping[nn.Parameter, Tensor]:
        """Units of optimizer steps, for some parameters.

        The unit of the global location is its scale times the square root of the number of mini-batches, the
        distance between the optima for one and for all. Steps of the flow are divided by that root.
        """
        globals_ = self._posterior.globals
        if globals_ is None:
            return {}
        ratio = max(plate.full_size / plate.size for plate in self._sizes.values())
        scale = globals_.affine.log_scale.detach().exp()
        scales = {globals_.affine.loc: ratio**0.5 * scale}
        if ratio != 1:
            for parameter in globals_.transform.transforms[:-1].parameters():
                scales[parameter] = scale.new_full((), ratio**-0.5)
        return scales

    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws all sites for all elements, without gradients.

        Elements are those with embeddings, or those for which the encoder returns features.

        :param n: the number of draws.
        :param args: the model's arguments, like ``kwargs``, for an encoder or a guide never called.
        :return: for each site a tensor of shape ``(n,) + site shape``.
        :raises ValueError: if ``n`` is not positive, or the features do not fit.
        """
        self.set_up(*args, **kwargs)
        rows, posterior = self._all_rows(args, kwargs), self._posterior
        # at most 65,536 latent vectors at once
        chunk = max(1, 2**16 // max(row.shape[:-1].numel() for row in rows.values()))
        sizes = [min(chunk, n - start) for start in range(0, check_integer("n", n), chunk)]
        parts = (posterior.draw(rows, size) for size in sizes)
        if not self.coordinates.is_identity:
            element_map = ElementMap.of(self.mapped_density(args, kwargs), posterior.layout)
            parts = (element_map(vectors)[0] for vectors in parts)
        draws = [posterior.layout.constrain(vectors) for vectors in parts]
        return {name: torch.cat([d[name] for d in draws]) for name in draws[0]}

    def log_prob(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The log density at values of all sites and elements, on the constrained space.

        No plate is scaled. The inverse map loses precision near the edges of a support.

        :param values: for each site a tensor, array or list of shape ``(n,) + site shape``, as
            :meth:`sample_posterior`, with the same ``args`` and ``kwargs``, returns them.
        :return: shape ``(n,)``.
        :raises ValueError: if a site is missing or unknown, or a value has another shape.
        """
        self.set_up(*args, **kwargs)
        rows, posterior = self._all_rows(args, kwargs), self._posterior
        shapes = {name: row.shape[:-1] for name, row in rows.items()}
        vectors, ladj = posterior.layout.unconstrain_with_ladj(values, shapes, posterior.like)
        if not self.coordinates.is_identity:
            density = self.mapped_density(args, kwargs)
            element_map = ElementMap.of(density, posterior.layout, is_inverse=True)
            vectors, of_map = element_map(vectors)
            ladj = ladj + of_map
        return posterior.log_prob(rows, vectors) - ladj

    def _all_rows(self, args: Args, kwargs: Kwargs) -> Vectors:
        self._register()
        posterior = self._posterior
        if (args or kwargs) and any(factor.table is None for factor in posterior.locals):
            self._update_sizes(args, kwargs)
        whole = {name: plate._replace(size=plate.full_size) for name, plate in self._sizes.items()}
        plates = partial(complete_plates, {}, whole, posterior.like.device)
        with poutine.block():
            return posterior.all_rows(posterior.encode(plates, args, kwargs))
