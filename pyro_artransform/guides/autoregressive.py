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

from .._base.arguments import (
    check_flag,
    check_integer,
    check_positive,
    is_tracing,
    to_tensor,
)
from ..flows.transforms import ComposedTransform, FlowModule, LocationScale
from ..flows.transforms.flow_distribution import FlowDistribution, standard_normal
from ..model.coordinates.centering import CoordinatesArgument, center_at_start
from ..model.density import LogJoint
from ..model.sites import Latents
from ..model.traces import argument_signature
from . import prototype
from .distributions import SiteDelta, check_flow_argument, make_flow
from .persistence.persistent_guide import PersistentGuide
from .persistence.spec import Arguments, GuideSpec


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


class AutoAutoregressive(PersistentGuide, AutoContinuous):
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
        A flow from elsewhere is checked: it warns if its two directions do not undo each other.
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

        >>> import pyro
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
        arguments = {"full_rank": full_rank, "init_scale": init_scale}
        super().__init__(model, init_loc_fn, arguments, coordinates)
        self._arguments_seen: Hashable = None
        self._make_flow = flow

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        rng_state = torch.get_rng_state()
        try:
            super()._setup_prototype(*args, **kwargs)
            first = self.prototype_trace
            run, plain = (partial(m, *args, **kwargs) for m in (self.model, self._model[1]))
            found = prototype.refuse_moving_structure(first, run, rng_state, plain)
            observed, dependent, self._traces = found
            sites = [s.to(Tensor.clone) for s in prototype.sites_by_name(first).values()]
            latents = Latents(sites)
            values = {name: first.nodes[name]["value"].detach() for name in latents.sites}
            start = latents.unconstrain(values)
            arguments = self._resolved_arguments(len(start))
            arguments |= self._found_in_model(args, kwargs, bool(dependent))
            spec = GuideSpec(latents, arguments, observed, start.device)
            self._set_up_from(spec, start)
            if (given := self.prior_coordinates) is not None:
                density = self._bind((), {})
                loc = center_at_start(given, self._requested, density, start, self._colors())
                self._parts[1].loc.data.copy_(loc)
        except BaseException:
            # the next call must not see a guide that is only half set up
            self._spec = self.prototype_trace = None
            raise
        finally:
            self._traces = None
        if args or kwargs:
            self._arguments_seen = argument_signature((args, kwargs))
        self._register()

    def _resolved_arguments(self, latent_dim: int) -> Arguments:
        given = self._arguments["full_rank"]
        full_rank = latent_dim <= 200 if given is None else given
        return {**self._arguments, "full_rank": full_rank}

    def _build(self, spec: GuideSpec, start: Tensor) -> None:
        prototype.refuse_subsampling(spec.sites)
        flow = make_flow("flow", self._flow_maker(), start)
        arguments = spec.arguments
        affine = LocationScale(start, arguments["init_scale"], full_rank=arguments["full_rank"])
        self._flow_start: dict[str, Tensor] = copy.deepcopy(flow.state_dict())
        self.transform = ComposedTransform(flow, affine)
        # attributes that Pyro's autoguides set after a run of the model
        self.latent_dim = spec.latents.latent_dim
        self._prototype_frames = {f.name: f for site in spec.sites for f in site.plates}
        if self.master is None:
            # NeuTraReparam may read the plates before the first call
            with poutine.block():
                self._create_plates()

    def _least_numbers(self, spec: GuideSpec) -> int:
        dim = spec.latents.latent_dim
        # a plate has a latent for each of its elements
        sizes = [frame.size for site in spec.sites for frame in site.plates]
        return max(dim * dim if spec.arguments["full_rank"] else dim, *sizes, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AutoAutoregressive":
        super()._apply(fn, recurse)
        self._entries = {}
        if self._spec is not None:
            self._flow_start = {name: fn(value) for name, value in self._flow_start.items()}
        return self

    @property
    def _parts(self) -> Any:
        """The flow, and its location and scale, without the param statements that attribute access makes."""
        self._checked_spec()
        return cast(ComposedTransform, self._modules["transform"]).transforms

    def _colors(self) -> Tensor | None:
        """Colours ``(latent_dim,)``: latents of one colour have separable curvatures when moved together."""
        return None

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draws all latents, like any Pyro guide.

        :return: the value of each site.
        :raises ValueError: if a latent has another shape than at the first call (with Pyro's validation on);
            if the model of a loaded guide has other latents than the file.
        """
        if self._spec is None:
            self._setup_prototype(*args, **kwargs)
        if args or kwargs or not self._model_is_checked:
            self._check_latents(args, kwargs, with_values=False)
        z, latents = self.sample_latent(), self.coordinates.latents
        run = self._run_of_model(args, kwargs)
        values, ladjs = self.coordinates.to_sites(latents.place(z), run)
        plates = self._create_plates(*args, **kwargs)
        for name, site in latents.sites.items():
            delta = SiteDelta(values[name], -ladjs[name], site.event_dim)
            with ExitStack() as stack:
                for frame in site.plates:
                    stack.enter_context(plates[frame.name])
                values[name] = pyro.sample(name, delta)
        return values

    def _check_latents(self, args: Any, kwargs: Any, *, with_values: bool = True) -> None:
        """Rejects latents other than the guide's, by a run of the model for new shapes or values."""
        # a JitTrace_ELBO trace must not include another run of the model
        spec = self._spec
        if spec and self._model is not None and not is_tracing():
            signature = argument_signature((args, kwargs), with_values=with_values)
            sites, run = spec.latents.sites, partial(self.model, *args, **kwargs)
            if not self._model_is_checked:
                prototype.refuse_other_model(sites, spec.observed, run)
                self._model_is_checked = True
            elif signature != self._arguments_seen and dist.is_validation_enabled():
                mapped = self.coordinates.with_location
                prototype.refuse_other_latents(sites, mapped, run)
            self._arguments_seen = signature

    def get_base_dist(self) -> dist.TorchDistribution:
        """The standard Normal."""
        return standard_normal(torch.zeros_like(self._parts[1].loc))

    def get_transform(self, *args: object, **kwargs: object) -> ComposedTransform:
        """The transform from the base to the unconstrained space: the flow, then location and scale."""
        transform: ComposedTransform = self._registered_transform()
        if not self.coordinates.is_identity:
            density = self.mapped_density(args, kwargs)
            transform = ComposedTransform(transform, ToUnconstrained(density))
        return transform

    def get_posterior(self, *args: object, **kwargs: object) -> dist.TorchDistribution:
        """The distribution of all latents on the unconstrained space."""
        base, transform = self.get_base_dist(), self.get_transform(*args, **kwargs)
        return dist.TransformedDistribution(base, transform, validate_args=False)

    def sample_latent(self, *args: object, **kwargs: object) -> Tensor:
        """Draws the latent vector in the guide's coordinates, as an auxiliary site.

        :return: shape ``(latent_dim,)``, preceded by the shapes of plates around the guide.
        """
        transform = self._registered_transform()
        base = standard_normal(torch.zeros_like(transform.transforms[-1].loc))
        # a new one in each call, as it caches the density of its draw
        posterior = FlowDistribution(base, transform, validate_args=False)
        name = f"_{self._pyro_name}_latent"
        return pyro.sample(name, posterior, infer={"is_auxiliary": True})

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for name, value in self._checked_spec().latents.place(latent).items():
            yield self.prototype_trace.nodes[name], value

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
        base, transform = self.get_base_dist(), self.get_transform(*args, **kwargs)
        # in chunks, to bound the memory of the networks
        chunk = self._chunk_size()
        sizes = [min(chunk, n - start) for start in range(0, check_integer("n", n), chunk)]
        z = torch.cat([transform.call_and_ladj(base.sample((size,)))[0] for size in sizes])
        return self._checked_spec().latents.constrain(z)

    def _chunk_size(self) -> int:
        return 4096

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
        latent, ladj = self.unconstrain(values, *args, **kwargs)
        if args or kwargs:
            self._check_latents(args, kwargs)
        x, inverse_ladj = self.get_transform(*args, **kwargs).inverse_and_ladj(latent)
        normal = dist.Normal(torch.zeros_like(x), 1.0, validate_args=False)
        # summed here, as torch's Independent fails on empty batches
        return normal.log_prob(x).sum(-1) + inverse_ladj - ladj

    # Methods that fits use beyond Pyro's interface

    def unconstrain(
        self, values: Mapping[str, Any], *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Maps values of all sites to the unconstrained space; returns the inverse map's log-determinant.

        At the edge of a support both are 0 and infinity. Parameters and errors as for :meth:`log_prob`.

        :return: shapes ``batch + (latent_dim,)`` and ``batch``.
        """
        self.set_up(*args, **kwargs)
        spec = self._checked_spec()
        latent, ladj = spec.latents.unconstrain_with_ladj(values, spec.device)
        return latent.to(spec.dtype), ladj

    def start_at(self, loc: object, scale_tril: object = None) -> None:
        """Becomes a Gaussian in the guide's coordinates, with the flow of a new guide.

        These are coordinates from the prior if the guide has any, else the unconstrained space.

        :param loc: the location, a tensor, array or list of shape ``(latent_dim,)``.
        :param scale_tril: the lower-triangular scale, shape ``(latent_dim, latent_dim)``, diagonal if the
            guide's is; by default ``init_scale`` times the identity.
        :raises ValueError: if a shape is wrong, a number is not finite, or the scale is no such matrix.
        """
        spec = self._checked_spec()
        flow, affine = self._parts
        if scale_tril is None:
            scale_tril = torch.full_like(affine.loc.detach(), spec.arguments["init_scale"]).diag()
        self._registered_transform()  # first adopt entries of the param store that take precedence
        scale_tril = to_tensor("scale_tril", scale_tril, affine.loc)
        affine.set_(to_tensor("loc", loc, affine.loc), scale_tril)
        flow.load_state_dict(self._flow_start)

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
        base, transform = self.get_base_dist(), self._registered_transform()
        x = base.rsample((check_integer("n", n),))
        if not path:
            latent, ladj = transform.call_and_ladj(x)
            return latent, base.log_prob(x) - ladj
        latent, ladj, score = transform.call_and_score(x, -x)
        log_q = (base.log_prob(x) - ladj).detach()
        through = (score * latent).sum(-1)
        return latent, log_q + (through - through.detach())

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        """Optimizer step sizes by parameter: the location moves in units of its scale."""
        affine = self._parts[1]
        return {affine.loc: affine.log_scale.detach().exp()}
