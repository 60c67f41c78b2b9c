# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides of all latents as one vector, from two hooks: modules for a model's latents, and draws."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous, init_to_median
from torch import Tensor, nn

from .._base.arguments import check_integer, is_tracing
from ..flows.transforms import ComposedTransform, FlowModule
from ..flows.transforms.flow_distribution import standard_normal
from ..model.coordinates.centering import CoordinatesArgument, center_at_start
from ..model.sites import Latents
from ..model.traces import argument_signature
from . import prototype
from .base import BaseGuide
from .distributions import SiteDelta, ToUnconstrained
from .persistence.spec import GuideSpec

# the values of draws evaluated at once without gradients, which a processor cache holds: with 303 latents
# a draw takes two thirds of the time that it takes with 2**18 (benchmarks/price.md); and the fewest draws
_MOST_VALUES, _FEWEST_DRAWS = 2**15, 16


class UnconstrainedGuide(BaseGuide, AutoContinuous):
    """A guide of all latents of a model, as one vector, in coordinates from its prior if it has any.

    A subclass defines ``build(latents, start)``, which makes its module. If this is a transform, draws are
    those of a standard Normal through it; otherwise the subclass also defines :meth:`draw`.

    :param model: a Pyro model.
    :param init_loc_fn: one of Pyro's initialization functions.
    :param coordinates: see :class:`~pyro_artransform.AutoAutoregressive`.
    :param arguments: the subclass's own arguments, plain data that files hold, for ``self.arguments``.
    :raises ValueError: at the first call, as for :class:`~pyro_artransform.AutoAutoregressive`.
    """

    def __init__(
        self,
        model: Callable[..., object],
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        coordinates: CoordinatesArgument = "prior",
        **arguments: Any,
    ) -> None:
        super().__init__(model, init_loc_fn, arguments, coordinates)
        self._arguments_seen: Hashable = None

    def draw(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Reparametrized draws ``(n, latent_dim)``, and their log densities ``(n,)``.

        :param path: whether the gradient of the log density should flow through the draws only.
        """
        return draws_through(self._modules["transform"], self._standard_normal(n), path)

    def _standard_normal(self, n: int) -> Tensor:
        # each access of the attribute is a param statement
        like = next(cast(nn.Module, self._modules["transform"]).parameters())
        return torch.randn((n, self.latent_dim), dtype=like.dtype, device=like.device)

    def log_density(self, z: Tensor) -> Tensor:
        """The log density ``batch`` of vectors z ``batch + (latent_dim,)``, which ``log_prob`` needs."""
        transform: Any = self._modules["transform"]
        if not isinstance(transform, FlowModule):
            raise NotImplementedError(
                f"{type(self).__name__} has no log_density(z), by which given values have a density"
            )
        return density_through(transform, z)

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
            run, plain = (partial(m, *args, **kwargs) for m in (self.model, self._model[1]))
            found = prototype.refuse_moving_structure(first, run, rng_state, plain)
            observed, dependent, self._traces = found
            sites = [s.to(Tensor.clone) for s in prototype.sites_by_name(first).values()]
            latents = Latents(sites)
            values = {name: first.nodes[name]["value"].detach() for name in latents.sites}
            start = latents.unconstrain(values)
            arguments = self.arguments | self._found_in_model(args, kwargs, bool(dependent))
            spec = GuideSpec(latents, arguments, observed, start.device)

            def locate(z: Tensor) -> Tensor:
                given = self.coordinates, self._requested, self._bind((), {})
                return center_at_start(*given, z, self._colors(z))

            self._set_up_from(spec, start, locate)
        except BaseException:
            # the next call must not see a guide that is only half set up
            self._spec = self.prototype_trace = None
            raise
        finally:
            self._traces = None
        if args or kwargs:
            self._arguments_seen = argument_signature((args, kwargs))
        self._register()

    def _set_up_from(self, spec: GuideSpec, start: Tensor, locate: Any = None) -> None:
        prototype.refuse_subsampling(spec.sites)
        super()._set_up_from(spec, start, locate)
        # without the access of the attribute, which is a param statement
        made = self._modules["transform"]
        if type(self).draw is UnconstrainedGuide.draw and not isinstance(made, FlowModule):
            raise TypeError(
                f"{type(self).__name__}: expected build to return a FlowModule, or a method "
                f"draw(n, path=False), got {type(made).__name__} and no such method"
            )
        # attributes that Pyro's autoguides set after a run of the model
        self.latent_dim = spec.latents.latent_dim
        self._prototype_frames = {f.name: f for site in spec.sites for f in site.plates}
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

    # Pyro's guide interface

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
        for name, value in self._checked_spec().latents.place(latent).items():
            yield self.prototype_trace.nodes[name], value

    def get_base_dist(self) -> dist.TorchDistribution:
        """The standard Normal."""
        return standard_normal(self._checked_spec().zeros())

    def get_transform(self, *args: object, **kwargs: object) -> ComposedTransform:
        """The transform from the base to the unconstrained space, for a guide that is made of one."""
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
            yield self.draw(min(most, n - start), path)

    def _most_draws(self) -> int:
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
        spec = self._checked_spec()
        latent, ladj = spec.latents.unconstrain_with_ladj(values, spec.device)
        return latent.to(spec.dtype), ladj


class LatentDistribution(dist.TorchDistribution):
    """The distribution of a guide's draws, which remembers the last one with its log density."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True
    #: the last draw, its version, whether it has a graph, and its log density
    _drawn: tuple[Tensor, int, bool, Tensor] | None = None

    def __init__(self, guide: UnconstrainedGuide, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self._guide = guide
        super().__init__(batch_shape, torch.Size([guide.latent_dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LatentDistribution":
        return LatentDistribution(self._guide, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape
        z, log_q = self._guide.draw(shape.numel())
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

    :param path: see :meth:`UnconstrainedGuide.draw`.
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
