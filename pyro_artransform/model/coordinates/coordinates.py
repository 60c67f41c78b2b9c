# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Selection of the latents with coordinates from the model's prior, and of their degree of centring.

The degree of centring of an element weighs the information in its data against its prior:

.. math::

    \lambda = \frac{h}{1 + h}, \qquad 1 + h = - \frac{\partial^2}{\partial x^2} \log p

in non-centred coordinates x, where the prior has curvature 1 and the likelihood curvature h. Elements with
weak data are non-centred. Elements with strong data are as the model is written: lambda above 0.95 is set to
1. The curvature is averaged over some points, or is the posterior variance of the gradient, its expectation.
"""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor

from ..graphs.dependencies import value_and_gradient
from ..sites import Latents, LatentSpace
from .factors import find_factors
from .gaussian_sites import GaussianSites
from .prior_map import Coordinates
from .prior_scale import is_identity

# above this lambda an element is as the model is written, at no cost (benchmarks/coordinates.md)
_CENTERED = 0.95
_BETWEEN_QUARTILES = 1.349  # interquartile range of a standard normal
# points at which the curvature is evaluated, and second derivatives computed in one batch
_NUM_POINTS, _LABELS_AT_ONCE = 8, 64

CoordinatesArgument = str | Mapping[str, Any]


def centered_by_curvature(
    non_centered: Any, x: Tensor, together: Tensor | None = None, weights: Tensor | float = 1.0
) -> Tensor:
    """Computes lambda from second derivatives.

    :param non_centered: the log joint density in coordinates with lambda 0.
    :param x: points, shape ``(n, latent_dim)``; h is averaged over at most eight of them.
    :param together: labels, shape ``(latent_dim,)``. Coordinates of one label have no mixed second
        derivatives, like the elements of a plate, and share one Hessian-vector product.
    :param weights: factors by which the density of a coordinate is scaled down: the share of a mini-batch.
    :return: shape ``(latent_dim,)``; 1 for all other latents.
    """
    _, second = _second_derivatives(non_centered, x, together)
    return _centered(non_centered.coordinates.centered.detach(), -weights * second)


def _second_derivatives(
    non_centered: Any, x: Tensor, together: Tensor | None
) -> tuple[bool, Tensor]:
    """Whether density and gradient are usable at points ``(n, latent_dim)``; mean second derivatives."""
    is_mapped, found = non_centered.coordinates.centered < 1, torch.zeros_like(x[0])
    labels = torch.arange(len(found), device=x.device) if together is None else together
    with torch.enable_grad():
        x = x[:: -(-len(x) // _NUM_POINTS)]
        point = x.detach().requires_grad_()
        value = non_centered(point)
        (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        for some in labels[is_mapped].unique().split(_LABELS_AT_ONCE):
            moved = (is_mapped & (labels == some[:, None])).to(slope)[:, None].expand(-1, *x.shape)
            with suppress(RuntimeError):  # some functions lack a second derivative
                found += (_pulled_back(slope, point, moved) * moved).mean(1).sum(0)
    has_digits = value.detach().abs() * torch.finfo(x.dtype).eps <= 1
    return bool(has_digits.all() and slope.isfinite().all()), found


def _pulled_back(slope: Tensor, point: Tensor, directions: Tensor) -> Tensor:
    grad = partial(torch.autograd.grad, slope, point, retain_graph=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of slow vmap rules
            return grad(grad_outputs=directions, is_grads_batched=True)[0]
    except RuntimeError:  # a function without a vmap rule
        return torch.stack([grad(grad_outputs=direction)[0] for direction in directions])


def centered_by_draws(non_centered: Any, u: Tensor) -> Tensor:
    """Computes lambda from gradients at posterior draws ``(n, latent_dim)`` on the unconstrained space.

    Their variance is estimated from quartiles, since it is of another order in the neck of a funnel.
    """
    x, _ = non_centered.from_unconstrained(u)
    _, gradients = value_and_gradient(non_centered, x)
    ordered = gradients[gradients.isfinite().all(-1)].sort(0).values
    between = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
    curvature = (between / _BETWEEN_QUARTILES).square()
    return _centered(non_centered.coordinates.centered.detach(), curvature)


def _centered(lam: Tensor, curvature: Tensor) -> Tensor:
    """Recomputes lambda from 1 + h where lambda is below 1; both have shape ``(latent_dim,)``."""
    curvature = curvature.nan_to_num(1.0, 1e6, 1.0).clamp_min(1.0)
    lam = torch.where(lam < 1, 1 - 1 / curvature, lam)
    return torch.where(lam > _CENTERED, 1.0, lam)


def non_centered(log_joint: Any, with_shapes: bool = False) -> Any:
    """A log joint density with lambda 0 for all latents that may be mapped, unless it has coordinates.

    :param with_shapes: whether to map priors with a shape although no prior depends on other latents, and
        latents that the model multiplies by others.
    """
    if log_joint.coordinates is not None or not log_joint.maps_priors:
        return log_joint
    factors = _factors_in(log_joint) if with_shapes else {}
    sites = [*log_joint.mapped_sites(with_shapes), *factors]
    if not sites:
        return log_joint
    ones = torch.ones_like(log_joint.start)
    found = Coordinates(ones, ones, dict.fromkeys(sites, True), factors)
    return log_joint.with_coordinates(found.non_centered(log_joint.latents))


def _factors_in(log_joint: Any) -> dict[str, int]:
    """The factors of latents by site; none if the model is looped over, or has discrete latents."""
    if log_joint.strategy == "loop" or log_joint.is_enumerated:
        return {}
    latents, start = log_joint.latents, log_joint.with_coordinates(None).start
    names = {name for name, site in latents.sites.items() if is_identity(site.bijection)}
    return find_factors(log_joint.run, latents.constrain(start), names - log_joint.improper)


@torch.no_grad()
def with_pseudo_data(log_joint: Any, x: Tensor, gradients: Tensor) -> Any:
    """A density in coordinates given pseudo-data that fit its likelihood; itself if there are none.

    :param x: draws in the coordinates of the density, shape ``(n, latent_dim)``.
    :param gradients: of its log density, same shape.
    """
    if (given := log_joint.coordinates) is None:
        return log_joint
    zeros = torch.zeros_like(given.unit)
    before = given.gaussian_sites or GaussianSites(zeros, zeros)
    prior = log_joint.with_coordinates(given.with_pseudo_data(before)).priors_at(x)
    found = before.refitted(x, gradients, prior, log_joint.latents.sizes)
    if not bool(found.precision.any()):
        return log_joint
    return log_joint.with_coordinates(given.with_pseudo_data(found))


@torch.no_grad()
def coordinates_at(
    log_joint: Any, mapped: Coordinates, u: Tensor, together: Tensor | None = None
) -> Coordinates:
    """Coordinates with lambda by the curvature at points ``(n, latent_dim)`` and units of the prior there.

    :param mapped: determines which latents of the log joint density have coordinates.
    :param u: the points, on the unconstrained space; a single point may be replaced by the origin.
    :param together: see :func:`centered_by_curvature`.
    """
    unit = log_joint.with_coordinates(mapped.non_centered(log_joint.latents))
    x, _ = unit.from_unconstrained(u)
    is_sound, second = _second_derivatives(unit, x, together)
    if len(u) == 1 and not is_sound:
        (point,) = u
        if (other := log_joint.or_usable(point)) is not point:
            return coordinates_at(log_joint, mapped, other[None], together)
    centered = _centered(unit.coordinates.centered.detach(), -second)
    return Coordinates(centered, log_joint.prior_scales(u.mean(0)), mapped.with_location)


class ModelPrior:
    """The coordinates that a guide takes from its model's prior, and the model's log joint density.

    :param requested: the argument ``coordinates`` of a guide: "prior", "model", or a mapping from sites to
        numbers between 0 and 1.
    """

    space: LatentSpace  #: the latents and their coordinates, set by :meth:`set_up`

    def __init__(self, requested: CoordinatesArgument) -> None:
        if isinstance(requested, Mapping):
            requested = {name: torch.as_tensor(value) for name, value in requested.items()}
            is_right = all(bool(((c >= 0) & (c <= 1)).all()) for c in requested.values())
        else:
            is_right = isinstance(requested, str) and requested in ("prior", "model")
        if not is_right:
            raise ValueError(
                "coordinates: expected 'prior', 'model', or a mapping from sites to degrees of centring, "
                f"from 0 (non-centred) to 1 (as in the model), got {requested!r}"
            )
        self.requested = requested
        self.is_chosen = False  #: whether a fit may change lambda, in place
        self.is_wanted = True  #: whether chains may use them: not with ``coordinates="model"``
        self.log_joint: Any = None  #: the model's density on the unconstrained space
        self.arguments: Any = None  #: positional and keyword arguments of the last call

    @property
    def coordinates(self) -> Coordinates | None:
        """The coordinates in which a fit works; None for the unconstrained space."""
        return self.space.coordinates

    def set_up(self, arguments: Mapping[str, Any], latents: Latents, like: Tensor) -> None:
        """Makes coordinates from the arguments of a specification, for vectors like ``like``."""
        with_location, coordinates = arguments.get("coordinates"), None
        self.is_wanted = with_location != {}
        self.is_chosen = bool(arguments.get("chooses_coordinates"))
        if with_location:
            if unknown := sorted(with_location.keys() - latents.sites.keys()):
                expected = f"expected sites of {list(latents.sites)}"
                raise ValueError(f"coordinates: {expected}, got {unknown}")
            ones = torch.ones_like(like)
            coordinates = Coordinates(ones, ones.clone(), with_location)
        self.space = LatentSpace(latents, coordinates)

    def arguments_of(self, with_location: dict[str, bool]) -> dict[str, Any]:
        """The arguments of a specification, as :meth:`set_up` reads them."""
        if not (with_location or self.requested == "model"):
            return {}
        return {"coordinates": with_location, "chooses_coordinates": self.requested == "prior"}

    @property
    def density(self) -> Any:
        """The log joint density at the last call's arguments, in the coordinates."""
        bound = self.log_joint.bound_to(*self.arguments)
        return bound.with_coordinates(self.coordinates)

    def log_joint_of(self, model: object, args: Any, kwargs: Any) -> Any:
        """The log joint density at these arguments; None for another model."""
        is_own = self.log_joint is not None and self.log_joint.model is model
        return self.log_joint.with_arguments(args, kwargs) if is_own else None

    def find_sites(self) -> dict[str, bool]:
        """The sites with coordinates from the prior, and whether their prior depends on other latents."""
        with torch.random.fork_rng(devices=[]), poutine.block():
            found: dict[str, bool] = self.log_joint.mapped_sites()
        if isinstance(self.requested, Mapping):
            if unknown := sorted(self.requested.keys() - found.keys()):
                raise ValueError(
                    "coordinates: expected latents whose prior is not normal, or has a location or a scale "
                    f"that depends on other latents, {list(found)}, got {unknown}"
                )
            found = {name: found[name] for name in found if name in self.requested}
        return found

    def center_as_asked(self, latents: Latents) -> None:
        """Sets lambda to the user's numbers."""
        given = cast(Coordinates, self.coordinates)
        centered = torch.ones_like(given.centered)
        parts = latents.views(centered)
        for name, value in cast(Mapping[str, Tensor], self.requested).items():
            try:
                parts[name].copy_(value)
            except RuntimeError as error:
                raise ValueError(
                    f"coordinates['{name}']: expected a number, or some that broadcast to shape "
                    f"{tuple(parts[name].shape)}, got shape {tuple(value.shape)}"
                ) from error
        given.set_(centered, given.unit)

    @torch.no_grad()
    def start_at(self, start: Tensor, together: Tensor | None) -> Tensor:
        """Sets lambda to the user's values or by the curvature; returns the start in coordinates.

        :param start: a point on the unconstrained space, shape ``(latent_dim,)``.
        :param together: see :func:`~pyro_artransform.model.coordinates.coordinates.centered_by_curvature`.
        """
        log_joint, given = self.log_joint, cast(Coordinates, self.coordinates)
        with torch.random.fork_rng(devices=[]), poutine.block():
            if isinstance(self.requested, Mapping):
                given.set_(given.centered, log_joint.prior_scales(log_joint.or_usable(start)))
                self.center_as_asked(log_joint.latents)
            else:
                found = coordinates_at(log_joint, given, start[None], together)
                given.set_(found.centered, found.unit)
            return log_joint.with_coordinates(given).from_unconstrained(start[None])[0][0]

    def __getstate__(self) -> dict[str, Any]:
        # pickles hold neither the model nor its data
        return {**self.__dict__, "log_joint": None, "arguments": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelPrior":
        twin = type(self).__new__(type(self))
        shared = "log_joint", "arguments"
        for name, value in vars(self).items():
            setattr(twin, name, value if name in shared else deepcopy(value, memo))
        return twin
