# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The flow guide for any Pyro model with continuous latents."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from .._base.arguments import check_flag, check_positive, to_tensor
from ..flows.transforms import ComposedTransform, LocationScale
from ..model.coordinates.centering import CoordinatesArgument
from ..model.protocols import FlowGuide
from ..model.sites import Latents
from .distributions import check_flow_argument, make_flow
from .persistence.spec import Arguments
from .unconstrained import UnconstrainedGuide


class AutoAutoregressive(UnconstrainedGuide, FlowGuide):
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
        given: Arguments = {"init_loc_fn": init_loc_fn, "coordinates": coordinates}
        super().__init__(model, **given, full_rank=full_rank, init_scale=init_scale)
        self._make_flow = flow

    def build(self, latents: Latents, start: Tensor) -> nn.Module:
        """The flow, then location and scale."""
        arguments = self.arguments
        if arguments["full_rank"] is None:
            arguments["full_rank"] = len(start) <= 200
        flow = make_flow("flow", self._flow_maker(), start)
        affine = LocationScale(start, arguments["init_scale"], full_rank=arguments["full_rank"])
        self._flow_start: dict[str, Tensor] = copy.deepcopy(flow.state_dict())
        return ComposedTransform(flow, affine)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AutoAutoregressive":
        super()._apply(fn, recurse)
        if self._spec is not None:
            self._flow_start = {name: fn(value) for name, value in self._flow_start.items()}
        return self

    @property
    def _parts(self) -> Any:
        """The flow, and its location and scale, without the param statements that attribute access makes."""
        self._checked_spec()
        return cast(ComposedTransform, self._modules["transform"]).transforms

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
            scale_tril = torch.full_like(affine.loc.detach(), self.arguments["init_scale"]).diag()
        self._registered_transform()  # first adopt entries of the param store that take precedence
        scale_tril = to_tensor("scale_tril", scale_tril, affine.loc)
        affine.set_(to_tensor("loc", loc, affine.loc), scale_tril)
        flow.load_state_dict(self._flow_start)

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        """Optimizer step sizes by parameter: the location moves in units of its scale."""
        affine = self._parts[1]
        return {affine.loc: affine.log_scale.detach().exp()}
