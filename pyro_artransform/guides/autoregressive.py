# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The flow guide for any Pyro model with continuous latents."""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, init_to_median
from torch import Tensor, nn

from .._base.arguments import check_flag, check_integer, check_positive, is_tracing, to_tensor
from ..flows.transforms import ComposedTransform, LocationScale
from ..flows.transforms.flow_distribution import standard_normal
from ..model.coordinates.centering import CoordinatesArgument, center_at_start
from ..model.protocols import FlowGuide
from ..model.sites import Latents
from ..model.traces import argument_signature
from . import prototype
from .base import BaseGuide
from .distributions import (
    FULL_RANK_LIMIT,
    LatentDistribution,
    SiteDelta,
    ToUnconstrained,
    check_flow_argument,
    density_through,
    draws_through,
    make_flow,
)

# the values of draws evaluated at once without gradients, which a processor cache holds: with 303 latents
# a draw takes two thirds of the time that it takes with 2**18 (benchmarks/price.md); and the fewest draws
_MOST_VALUES, _FEWEST_DRAWS = 2**15, 16


class AutoAutoregressive(BaseGuide, AutoContinuous, FlowGuide):
    r"""A guide with a flow on the unconstrained space of all latents of a model.

    .. math::

        x \sim \mathrm{Normal}(0, I), \quad z = \mathrm{loc} + L \, T(x), \quad \mathrm{site} = c(z)

    T is the flow, L a lower-triangular scale, c Pyro's bijection onto the support of each site. A
    flow of this package starts as the identity, and L as ``init_scale`` times the identity, so a new
    guide is exactly ``Normal(init_loc, init_scale)`` on the unconstrained space.

    If the prior of a latent depends on other latents, as in a hierarchy, z is in units of the model's prior,
    and a run of the model maps it to the unconstrained space, so that the flow need not learn this map.

    The guide works wherever Pyro's autoguides do: ``SVI`` with any ELBO, ``Predictive``, ``NeuTraReparam``,
    ``AutoGuideList``. Enumerated discrete latents are left to ``TraceEnum_ELBO``.

    :param model: a Pyro model.
    :param flow: a function of the latent dimension that returns a flow, a transform that is a module, such as
        ``pyro_artransform.spline_autoregressive``, one of Pyro's, also without an inverse, or a flow of Zuko.
    :param full_rank: whether L is triangular, or diagonal; by default triangular up to 200 latents.
    :param init_loc_fn: one of Pyro's initialization functions, by default the prior's median.
    :param init_scale: the initial standard deviation, on the unconstrained space.
    :param coordinates: "prior" for coordinates from the model's prior; "model" for the latents as the model
        is written; or the degree of centring by site, numbers or tensors that broadcast to the site on the
        unconstrained space: 0 for units of its prior, 1 for the latent as written. See
        ``guide.prior_coordinates``. A guide with such coordinates needs its model to draw.
    :raises TypeError: if ``model`` or ``flow`` has the wrong type; at the first call, if the flow is not a
        module, or has no parameters.
    :raises ValueError: if ``init_scale`` is not positive, or a number of ``coordinates`` is not between 0 and
        1; at the first call, for sites in ``coordinates`` without coordinates from the prior, discrete
        latents that are not enumerated, latents in a subsampled plate, a support that depends on another
        latent, or a flow that is not autoregressive or has another dimension.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform import AutoAutoregressive, spline_autoregressive
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))
        >>> guide = AutoAutoregressive(model, flow=spline_autoregressive)
        >>> {name: tuple(value.shape) for name, value in guide.sample_posterior(10).items()}
        {'scale': (10,), 'z': (10, 3)}
    """

    def __init__(
        self,
        model: Callable[..., object],
        *,
        flow: Callable[[int], nn.Module],
        full_rank: bool | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        coordinates: CoordinatesArgument = "prior",
    ) -> None:
        check_flow_argument("flow", flow, "the latent dimension")
        if full_rank is not None:
            full_rank = check_flag("full_rank", full_rank)
        init_scale = check_positive("init_scale", init_scale)
        super().__init__(model, flow, init_loc_fn, coordinates)
        self._full_rank, self._init_scale = full_rank, init_scale
        self._arguments_seen: Hashable = None

    def _build(self, latents: Latents, start: Tensor) -> nn.Module:
        """The flow, then location and scale."""
        flow = make_flow("flow", self._flow_maker(), start)
        full_rank = len(start) <= FULL_RANK_LIMIT if self._full_rank is None else self._full_rank
        affine = LocationScale(start, self._init_scale, full_rank=full_rank)
        self._flow_start: dict[str, Tensor] = copy.deepcopy(flow.state_dict())
        return ComposedTransform(flow, affine)

    @property
    def _parts(self) -> Any:
        """The flow, and its location and scale, without the param statements that attribute access makes."""
        self._known_coordinates()
        return cast(ComposedTransform, self._modules["transform"]).transforms

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AutoAutoregressive":
        super()._apply(fn, recurse)
        if self.coordinates is not None:
            self._flow_start = {name: fn(value) for name, value in self._flow_start.items()}
        return self

    # Set-up

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        rng_state = torch.get_rng_state()
        try:
            self._set_up_once(*args, **kwargs)
        except ValueError:
            torch.set_rng_state(rng_state)
            if not self._is_rejected(*args, **kwargs):
                raise
            torch.set_rng_state(rng_state)
            with pyro.validation_enabled(False):
                self._set_up_once(*args, **kwargs)

    def _is_rejected(self, *args: object, **kwargs: object) -> bool:
        """Whether the model's distributions reject their parameters at the initial values.

        They may at medians of vague priors. A fit or SVI says so if they do elsewhere, too.
        """
        try:
            with poutine.block():
                self.model(*args, **kwargs)
        except ValueError:
            return dist.is_validation_enabled()
        return False

    def _set_up_once(self, *args: object, **kwargs: object) -> None:
        rng_state = torch.get_rng_state()
        try:
            super()._setup_prototype(*args, **kwargs)
            first = self.prototype_trace
            run = partial(self.model, *args, **kwargs)
            dependent = prototype.refuse_moving_structure(first, run, rng_state)
            sites = [s.to(Tensor.clone) for s in prototype.sites_by_name(first).values()]
            latents = Latents(sites)
            values = {name: first.nodes[name]["value"].detach() for name in latents.sites}
            start = latents.unconstrain(values)
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(rng_state)  # the density starts where the guide does
                with_location = self._find_coordinates(args, kwargs, bool(dependent))

            def locate(z: Tensor) -> Tensor:
                given = self.coordinates, self._requested, self._bind((), {})
                return center_at_start(*given, z, self._colors(z))

            self._set_up_from(latents, with_location, start, locate)
        except BaseException:
            self.prototype_trace = None
            raise
        if args or kwargs:
            self._arguments_seen = argument_signature((args, kwargs))
        self._register()

    def _set_up_from(
        self, latents: Latents, with_location: Mapping[str, bool], start: Tensor, locate: Any = None
    ) -> None:
        prototype.refuse_subsampling(latents.sites.values())
        super()._set_up_from(latents, with_location, start, locate)
        # attributes that Pyro's autoguides set after a run of the model
        self.latent_dim = latents.latent_dim
        frames = (frame for site in latents.sites.values() for frame in site.plates)
        self._prototype_frames = {frame.name: frame for frame in frames}
        if self.master is None:
            # NeuTraReparam may read the plates before the first call
            with poutine.block():
                self._create_plates()

    def _colors(self, start: Tensor) -> Tensor | None:
        """Colours ``(latent_dim,)``: latents of one colour have separable curvatures when moved together."""
        return None

    def _check_latents(self, args: Any, kwargs: Any, *, with_values: bool = True) -> None:
        """Rejects latents other than the guide's, by a run of the model for new shapes or values."""
        # a JitTrace_ELBO trace must not include another run of the model
        if self.coordinates is None or self._model is None or is_tracing():
            return
        signature = argument_signature((args, kwargs), with_values=with_values)
        if signature != self._arguments_seen and dist.is_validation_enabled():
            sites, mapped = self.coordinates.latents.sites, self.coordinates.with_location
            prototype.refuse_other_latents(sites, mapped, partial(self.model, *args, **kwargs))
        self._arguments_seen = signature

    # Pyro's guide interface

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draws all latents, like any Pyro guide.

        :return: the value of each site.
        :raises ValueError: if a latent has another shape than at the first call (with Pyro's validation on).
        """
        if self.coordinates is None:
            self._setup_prototype(*args, **kwargs)
        if args or kwargs:
            self._check_latents(args, kwargs, with_values=False)
        coordinates = self.coordinates
        latents = coordinates.latents
        parts = latents.place(self.sample_latent())
        if coordinates.with_location:
            values, ladjs = coordinates.to_sites(parts, self._run_of_model(args, kwargs))
        else:
            values, ladjs = latents.to_sites(parts)
        plates = self._create_plates(*args, **kwargs)
        for name, site in latents.sites.items():
            delta = SiteDelta(values[name], -ladjs[name], site.event_dim)
            with ExitStack() as stack:
                for frame in site.plates:
                    stack.enter_context(plates[frame.name])
                values[name] = pyro.sample(name, delta)
        return values

    def sample_latent(self, *args: object, **kwargs: object) -> Tensor:
        """Draws the latent vector in the guide's coordinates, as an auxiliary site.

        :return: shape ``(latent_dim,)``, preceded by the shapes of plates around the guide.
        """
        self._registered_transform()
        name = f"_{self._pyro_name}_latent"
        return pyro.sample(name, LatentDistribution(self), infer={"is_auxiliary": True})

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for name, value in self._known_coordinates().latents.place(latent).items():
            yield self.prototype_trace.nodes[name], value

    def get_base_dist(self) -> dist.TorchDistribution:
        """The standard Normal."""
        return standard_normal(self._zeros())

    def get_transform(self, *args: object, **kwargs: object) -> ComposedTransform:
        """The transform from the base to the unconstrained space."""
        transform: ComposedTransform = self._registered_transform()
        if not self.coordinates.is_identity:
            density = self.mapped_density(args, kwargs)
            transform = ComposedTransform(transform, ToUnconstrained(density))
        return transform

    def get_posterior(self, *args: object, **kwargs: object) -> dist.TorchDistribution:
        """The distribution of all latents on the unconstrained space."""
        base, transform = self.get_base_dist(), self.get_transform(*args, **kwargs)
        return dist.TransformedDistribution(base, transform, validate_args=False)

    # Draws and densities

    @torch.no_grad()
    def sample_posterior(self, n: int, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draws all sites, without gradients.

        :param args: the model's arguments, like ``kwargs`` needed only if the guide was never called.
        :return: for each site a tensor of shape ``(n,) + site shape``.
        :raises ValueError: if the model has other latents with these arguments.
        """
        self.set_up(*args, **kwargs)
        if args or kwargs:
            self._check_latents(args, kwargs)
        coordinates, parts = self.coordinates, []
        density = None if coordinates.is_identity else self.mapped_density(args, kwargs)
        for z, _ in self._draws(check_integer("n", n)):
            parts.append(z if density is None else density.to_unconstrained(z)[0])
        return coordinates.latents.constrain(torch.cat(parts))

    def rsample_and_log_prob(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Reparametrized draws in the guide's coordinates, and their log densities there.

        These are coordinates from the prior if the guide has any, else the unconstrained space.

        :param path: whether the gradient of the log density flows through the draws only; it has the same
            expectation and lower variance, zero at the optimum.
        :return: shapes ``(n, latent_dim)`` and ``(n,)``.

        **References**

        1. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
           Inference (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194
        """
        parts = [*self._draws(check_integer("n", n), path)]
        # the density is a function of the draws themselves, not of their concatenation
        if len(parts) == 1:
            return parts[0]
        z, log_q = zip(*parts)
        return torch.cat(z), torch.cat(log_q)

    def _draws(self, n: int, path: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Draws with their densities, in parts that bound the memory of the networks."""
        self._registered_transform()
        most = self._most_draws()
        if not torch.is_grad_enabled():
            most = min(most, max(_MOST_VALUES // self.latent_dim, _FEWEST_DRAWS))
        for start in range(0, n, most):
            yield self._draw(min(most, n - start), path)

    def _most_draws(self) -> int:
        return 4096

    def _draw(self, n: int, path: bool) -> tuple[Tensor, Tensor]:
        return draws_through(self._modules["transform"], self._standard_normal(n), path)

    def _standard_normal(self, n: int) -> Tensor:
        # each access of the attribute is a param statement
        like = next(cast(nn.Module, self._modules["transform"]).parameters())
        return torch.randn((n, self.latent_dim), dtype=like.dtype, device=like.device)

    def log_density(self, z: Tensor) -> Tensor:
        """The log density ``batch`` at ``batch + (latent_dim,)``, in the guide's coordinates."""
        return density_through(cast(Any, self._modules["transform"]), z)

    def log_prob(self, values: Mapping[str, Any], *args: object, **kwargs: object) -> Tensor:
        """The log density at values of all sites, on the constrained space.

        The base measure on simplices and matrices is that of Pyro's ``biject_to``. The inverse map to the
        unconstrained space loses precision near the edges of a support, in float32 all of it, and at an edge
        the density is zero. :meth:`rsample_and_log_prob` returns exact densities of the guide's draws.

        :param values: for each site a tensor, array or list of shape ``batch + site shape``.
        :return: shape ``batch``.
        :raises ValueError: if a site is missing or unknown, or a value has the wrong shape; with Pyro's
            validation on, also if one is outside its support, where the density means nothing.
        """
        z, ladj = self.unconstrain(values, *args, **kwargs)
        if args or kwargs:
            self._check_latents(args, kwargs)
        self._registered_transform()
        if not self.coordinates.is_identity:
            to_unconstrained = ToUnconstrained(self.mapped_density(args, kwargs))
            z, of_map = to_unconstrained.inverse_and_ladj(z)
            ladj = ladj - of_map
        return self.log_density(z) - ladj

    def unconstrain(
        self, values: Mapping[str, Any], *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Maps values of all sites to the unconstrained space; returns the inverse map's log-determinant.

        At the edge of a support both are 0 and infinity. Parameters and errors as for :meth:`log_prob`.

        :return: shapes ``batch + (latent_dim,)`` and ``batch``.
        """
        self.set_up(*args, **kwargs)
        like = self._zeros()
        latent, ladj = self.coordinates.latents.unconstrain_with_ladj(values, like.device)
        return latent.to(like.dtype), ladj

    # Methods that fits use beyond Pyro's interface

    def start_at(self, loc: object, scale_tril: object = None) -> None:
        """Becomes a Gaussian in the guide's coordinates, with the flow of a new guide.

        These are coordinates from the prior if the guide has any, else the unconstrained space.

        :param loc: the location, a tensor, array or list of shape ``(latent_dim,)``.
        :param scale_tril: the lower-triangular scale, shape ``(latent_dim, latent_dim)``, diagonal if the
            guide's is; by default ``init_scale`` times the identity.
        :raises ValueError: if a shape is wrong, a number is not finite, or the scale is no such matrix.
        """
        self._start_at(self._parts, loc, scale_tril)

    def _start_at(self, parts: Any, loc: object, scale_tril: object) -> None:
        flow, affine = parts
        if scale_tril is None:
            scale_tril = torch.full_like(affine.loc.detach(), self._init_scale).diag()
        self._registered_transform()  # first adopt entries of the param store that take precedence
        scale_tril = to_tensor("scale_tril", scale_tril, affine.loc)
        affine.set_(to_tensor("loc", loc, affine.loc), scale_tril)
        flow.load_state_dict(self._flow_start)

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        """Optimizer step sizes by parameter: the location moves in units of its scale."""
        affine = self._parts[1]
        return {affine.loc: affine.log_scale.detach().exp()}
