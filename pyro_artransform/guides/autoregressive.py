# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The flow guide of any Pyro model with continuous latents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TransformModule
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from ..transforms import ComposedTransform
from .distributions import DrawnDistribution
from .flow_factory import (
    check_callables,
    check_count,
    check_model,
    check_scale,
    new_flow,
    to_tensor,
)
from .initialization import StartingValues
from .location_scale import LocationScale
from .persistence.persistent_guide import KeptGuide
from .sites import packing
from .sites.checks import refuse_other_model
from .sites.records import (
    is_hidden,
    refuse_moving_structure,
    refuse_other_shapes,
    refuse_subsampling,
    shapes_of,
    slim_trace,
)

_FULL_RANK_LIMIT = 200
_CHUNK = 4096


class AutoAutoregressive(KeptGuide):
    r"""A guide that is a flow on the unconstrained space of all latents of a model.

    .. math::

        x \sim \mathrm{Normal}(0, I), \quad z = \mathrm{loc} + L \, T(x), \quad \mathrm{site} = c(z)

    T is the flow, L a lower-triangular scale, c Pyro's bijection onto the support of each site. T
    starts as the identity (every flow of this package does) and L as ``init_scale`` times the
    identity, so a new guide is exactly ``Normal(init_loc, init_scale)`` on the unconstrained space.

    It works wherever Pyro's autoguides do: ``SVI`` with any ELBO, ``Predictive``,
    ``NeuTraReparam``, ``AutoGuideList``. Discrete latents that are marked for enumeration are left
    to ``TraceEnum_ELBO``.

    :param model: a Pyro model.
    :param flow: a callable that takes the latent dimension and returns a flow, a module that is a
        transform; for example ``pyro_artransform.spline_autoregressive``.
    :param full_rank: whether L is triangular, or diagonal; by default triangular up to 200 latent
        dimensions.
    :param init_loc_fn: the starting value of each site, one of Pyro's starting functions; by
        default the median of the prior.
    :param init_scale: the standard deviation to start with, on the unconstrained space.
    :raises TypeError: if ``model`` or ``flow`` is of the wrong kind; at the first call, if the flow
        is no module or has no parameters.
    :raises ValueError: if ``init_scale`` is not positive; at the first call, if the model has
        discrete latents that are not enumerated, latents in a sub-sampled plate, or a latent whose
        support depends on another latent, or if the flow is not autoregressive.

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

    _prototype_hide_fn = staticmethod(is_hidden)  # type: ignore[assignment]

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        flow: Callable[[int], nn.Module],
        full_rank: bool | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        check_model(model)
        check_callables(flow=flow, init_loc_fn=init_loc_fn)
        if full_rank not in (None, True, False):
            raise ValueError(f"full_rank: expected None, True or False, got {full_rank!r}")
        super().__init__(model, StartingValues(init_loc_fn))
        self._make_flow = flow
        self._shapes: Any = None
        self._arguments = {"full_rank": full_rank, "init_scale": check_scale(init_scale)}

    # Set-up

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model, to learn its latents, and builds the flow, unless that is done already.

        The first call of the guide does the same.

        :param args: the model's arguments.
        :param kwargs: its keyword arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        rng_state = torch.get_rng_state()
        try:
            super()._setup_prototype(*args, **kwargs)
            loc = self._checked_init_loc()
            refuse_subsampling(self.prototype_trace)
            self._observed = refuse_moving_structure(
                self.prototype_trace, lambda: self.model(*args, **kwargs), rng_state
            )
            self._finish(self.prototype_trace, loc)
        except BaseException:
            # half a prototype would pass for a whole one at the next call
            self.prototype_trace = None
            raise
        self._shapes = shapes_of((args, kwargs))
        self._start_claim()

    def _checked_init_loc(self) -> Tensor:
        loc: Tensor = self._init_loc()
        for site, z in packing.split(self.prototype_trace, loc):
            if not z.isfinite().all():
                raise ValueError(
                    f"site '{site['name']}': expected a starting value inside its support, got "
                    f"{site['value'].tolist()}"
                )
        return loc

    def _finish(self, prototype: poutine.Trace, loc: Tensor) -> None:
        """Everything that follows from the latent sites and the starting point."""
        # a parameter made in inference mode could never train
        with torch.inference_mode(False):
            self._build(loc.detach().clone())
            self.prototype_trace = slim_trace(prototype, lambda t: t.detach().clone())
        if self.master is None:
            # NeuTraReparam looks at the plates, and may come before the first call
            with poutine.block():
                self._create_plates()

    def _build(self, loc: Tensor) -> None:
        """The flow, and the location and scale after it."""
        self.latent_dim = len(loc)
        flow = self._new_flow(loc)
        if self._arguments["full_rank"] is None:
            self._arguments["full_rank"] = self.latent_dim <= _FULL_RANK_LIMIT
        affine = LocationScale(
            loc, self._arguments["init_scale"], full_rank=self._arguments["full_rank"]
        )
        self._parts = flow, affine
        self._flow_start = {k: v.detach().clone() for k, v in flow.state_dict().items()}
        self.transform = ComposedTransform(flow, affine)

    def _new_flow(self, loc: Tensor) -> TransformModule:
        if self._make_flow is None:
            raise RuntimeError("this guide was pickled before its first call, without its flow")
        return new_flow(self._make_flow, loc)

    # The posterior, as Pyro's autoguides have it

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws all latents, as a Pyro guide does.

        :param args: the model's arguments.
        :param kwargs: its keyword arguments.
        :return: the value of each site.
        :raises ValueError: if a latent has another shape for these arguments than at the first call
            (where Pyro's validation is on); at the first call of a guide that was loaded with a
            model, if that has other latents than the file.
        """
        self.set_up(*args, **kwargs)
        self._check_arguments(args, kwargs)
        draws: dict[str, Tensor] = super().forward(*args, **kwargs)
        return draws

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs the model again where the shapes of its arguments are not those of the last call."""
        if self._model is None or torch._C._get_tracing_state():
            return
        shapes = shapes_of((args, kwargs))
        if not self._met_model:
            refuse_other_model(
                self.prototype_trace, self._observed, lambda: self.model(*args, **kwargs)
            )
            self._met_model = True
        elif (args or kwargs) and shapes != self._shapes and dist.is_validation_enabled():
            refuse_other_shapes(self.prototype_trace, lambda: self.model(*args, **kwargs))
        self._shapes = shapes

    def get_base_dist(self) -> dist.TorchDistribution:
        """The standard Normal of shape ``(latent_dim,)``."""
        loc = self._location_scale.loc
        # values are never checked: that reads them, on the path of every step
        normal = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc), validate_args=False)
        base: dist.TorchDistribution = normal.to_event(1)
        return base

    def get_transform(self, *args: Any, **kwargs: Any) -> ComposedTransform:
        """The flow, then location and scale: from the base to the unconstrained space."""
        self._check_set_up()
        self._claim()
        return self.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The distribution of all latents on the unconstrained space, shape ``(latent_dim,)``."""
        posterior: dist.TorchDistribution = dist.TransformedDistribution(
            self.get_base_dist(), self.get_transform(), validate_args=False
        )
        return posterior

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws the vector of all latents, as the auxiliary site of the guide.

        :param args: the model's arguments.
        :param kwargs: its keyword arguments.
        :return: shape ``(latent_dim,)``, after the shapes of the plates around the guide.
        """
        # one for each call, which can then answer for its draw without a look at any tensor
        posterior = DrawnDistribution(
            self.get_base_dist(), self.get_transform(), validate_args=False
        )
        name = f"_{self._pyro_name}_latent"
        latent: Tensor = pyro.sample(name, posterior, infer={"is_auxiliary": True})
        return latent

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for site, value in super()._unpack_latent(latent):
            # latents of mixed dtypes share one vector
            yield site, value.to(site["value"].dtype)

    # Draws and densities

    @torch.no_grad()
    def sample_posterior(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of all sites, without gradients.

        :param n: how many.
        :param args: the model's arguments, needed only if the guide was never called.
        :param kwargs: its keyword arguments, likewise.
        :return: for each site a tensor of shape ``(n,) + site shape``.
        :raises ValueError: if ``n`` is no positive integer.
        """
        self.set_up(*args, **kwargs)
        return packing.constrain(self.prototype_trace, self._draw(n))

    def _draw(self, n: int) -> Tensor:
        """Latents of shape ``(n, latent_dim)``, by chunks, which bounds what the network holds."""
        base, transform = self.get_base_dist(), self.get_transform()
        sizes = [min(_CHUNK, n - start) for start in range(0, check_count("n", n), _CHUNK)]
        return torch.cat([transform.call_and_ladj(base.sample((size,)))[0] for size in sizes])

    def log_prob(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The log-density at values of all sites, on the constrained space.

        The measure on simplices and matrices is Pyro's, that of ``biject_to``. Going back to the
        unconstrained space loses digits near the edges of a support, in float32 all of them: a
        draw's own density is better had from :meth:`rsample_and_log_prob`.

        :param values: for each site a tensor, array or list of shape ``batch + site shape``, as
            :meth:`sample_posterior` returns them.
        :param args: the model's arguments, needed only if the guide was never called.
        :param kwargs: its keyword arguments, likewise.
        :return: shape ``batch``.
        :raises ValueError: if a site is missing or unknown, or a value has another shape; where
            Pyro's validation is on, also if one is outside its support (its density means nothing).
        """
        self.set_up(*args, **kwargs)
        latent, ladj = packing.unconstrain(self.prototype_trace, values)
        latent = latent.to(self._location_scale.loc.dtype)
        x, inverse_ladj = self.get_transform().inverse_and_ladj(latent)
        normal: Any = self.get_base_dist()
        # summed here: torch's Independent cannot sum over no draws
        log_density: Tensor = normal.base_dist.log_prob(x).sum(-1) + inverse_ladj - ladj
        return log_density

    @torch.no_grad()
    def quantiles(
        self,
        quantiles: Sequence[float] | Tensor,
        *args: Any,
        num_samples: int = 10_000,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Quantiles of each coordinate of each site, from draws.

        :param quantiles: q levels between 0 and 1.
        :param args: the model's arguments, needed only if the guide was never called.
        :param num_samples: how many draws.
        :param kwargs: the model's keyword arguments, likewise.
        :return: for each site a tensor of shape ``(q,) + site shape``.
        :raises ValueError: if a level is not between 0 and 1.
        """
        self.set_up(*args, **kwargs)
        levels = packing.check_levels(quantiles, self._location_scale.loc)
        latent = self._draw(check_count("num_samples", num_samples))
        return {
            name: packing.quantiles_of(draws, levels)
            for name, draws in packing.constrain(self.prototype_trace, latent).items()
        }

    def median(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each coordinate of each site, from draws.

        :param args: the model's arguments, needed only if the guide was never called.
        :param num_samples: how many draws.
        :param kwargs: the model's keyword arguments, likewise.
        :return: for each site a tensor of its shape.
        """
        found = self.quantiles([0.5], *args, num_samples=num_samples, **kwargs)
        return {name: value[0] for name, value in found.items()}

    # What a fit uses beyond Pyro's interface

    def start_at(self, loc: Any, scale_tril: Any = None) -> None:
        """Becomes a Gaussian on the unconstrained space: the flow is again as it was when new.

        :param loc: its location, a tensor, array or list of shape ``(latent_dim,)``.
        :param scale_tril: its lower-triangular scale, shape ``(latent_dim, latent_dim)``; by
            default ``init_scale`` times the identity.
        :raises ValueError: if a shape is wrong, a number not finite, or the scale no such matrix;
            also if the guide's scale is diagonal and this one is not.
        """
        affine = self._location_scale
        if scale_tril is None:
            init_scale = self._arguments["init_scale"]
            scale_tril = torch.full_like(affine.loc.detach(), init_scale).diag()
        loc = to_tensor("loc", loc, affine.loc)
        scale_tril = to_tensor("scale_tril", scale_tril, affine.loc)
        self.get_transform()
        affine.set_(loc, scale_tril)
        self._flow.load_state_dict(self._flow_start)

    def rsample_and_log_prob(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Reparametrised draws on the unconstrained space, and their log-densities.

        :param n: how many.
        :param path: whether the gradient of the log-density flows through the draws only, and not
            through the parameters of the density. Its expectation is the same, since that of the
            score is zero, its variance lower, and at the optimum it is zero.
        :return: shapes ``(n, latent_dim)`` and ``(n,)``.

        **References**

        1. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
           Inference (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194
        """
        base, transform = self.get_base_dist(), self.get_transform()
        x = base.rsample((check_count("n", n),))
        if not path:
            latent, ladj = transform.call_and_ladj(x)
            return latent, base.log_prob(x) - ladj
        latent, ladj, score = transform.call_and_score(x, -x)
        log_q = (base.log_prob(x) - ladj).detach()
        through = (score * latent).sum(-1)
        return latent, log_q + (through - through.detach())

    def step_units(self) -> dict[str, Tensor]:
        """The size of an optimiser's unit step, for each parameter of which it is not one.

        The location is in the units of the model: a step suits it that is a share of its scale.

        :return: by the name of a parameter, a tensor of its shape.
        """
        return {"transform.transforms.1.loc": self._location_scale.log_scale.detach().exp()}

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        """For the location the factor of its steps, which is the scale."""
        named = dict(self.named_parameters())
        return {named[name]: unit for name, unit in self.step_units().items()}

    @property
    def _flow(self) -> nn.Module:
        self._check_set_up()
        return self._parts[0]

    @property
    def _location_scale(self) -> LocationScale:
        self._check_set_up()
        return self._parts[1]
