# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Coordinates of latents from the model's own prior.

What bends a hierarchical posterior most is what the model says: the scale of theta is tau. In

.. math::

    u = \mathrm{loc} + (\mathrm{scale} / \mathrm{unit})^{1 - \lambda} (x - \lambda \, \mathrm{loc})

u is a latent on the unconstrained space, loc and scale are those of its prior given its parents, and
:math:`\lambda`, element by element, is how centred x is: at 1 it is u itself, as the model is written, and
at 0 it is in units of the prior. The unit is a constant near the scale: at it u moves by :math:`1 - \lambda`
with the location, whatever units the model has. Where the prior has another shape than a normal one, and
lambda is below 0.9, it is 0, and x goes through the quantiles of that shape too, so that x is standard
normal under the prior. Sites come in the order of the model, so that the map is triangular; its
log-determinant is the sum of :math:`(1 - \lambda) \log (\mathrm{scale} / \mathrm{unit})`, and of the
shapes. It is made as the model runs, each latent as its distribution comes by, so that a density in x
costs one run.

**References**

1. A General Framework for the Parametrization of Hierarchical Models (Papaspiliopoulos, Roberts, Skold,
   2007), https://arxiv.org/abs/0708.3797
2. Automatic Reparameterisation of Probabilistic Programs (Gorinova, Moore, Hoffman, 2020),
   https://arxiv.org/abs/1906.03028
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import validation_enabled
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform

from ..graphs.dependencies import value_and_gradient
from .handlers import hidden_sites
from .prior_scale import PriorScale
from .sites import Latents
from .vectorization import DrawPlate

# above it an element is as the model is written, which costs nothing (benchmarks/coordinates.md)
_CENTERED = 0.95
_BETWEEN_QUARTILES = 1.349  # sds of a normal distribution
_LABELS_AT_ONCE = 64  # second derivatives that are computed together


class SiteCoordinates(NamedTuple):
    """How the coordinates of one latent are made.

    :param centered: lambda, broadcasts to the latent on the unconstrained space.
    :param unit: positive, broadcasts to it too.
    :param with_location: whether the location of the prior is a part of the map; without it x is in units
        of the scale alone, and latents depend on each other as the model writes it.
    :param bijection: from the unconstrained space onto the support.
    """

    centered: Tensor
    unit: Tensor
    with_location: bool
    bijection: Transform


class Coordinates(NamedTuple):
    """Which latents have coordinates from the prior, and how centred these are.

    :param centered: lambda, shape ``(latent_dim,)``, between 0 and 1; 1 for all other latents.
    :param unit: of the same shape, positive: about the scale of each prior.
    :param with_location: by site, see :class:`SiteCoordinates`.
    """

    centered: Tensor
    unit: Tensor
    with_location: Mapping[str, bool]

    @property
    def is_identity(self) -> bool:
        """Whether all latents are as the model is written."""
        return min(self.centered.tolist()) == 1

    def of_sites(self, latents: Latents) -> dict[str, SiteCoordinates]:
        """The coordinates of each of these latents, among all in the vector."""
        found, units = {}, latents.split(self.unit.detach())
        for name, centered in latents.split(self.centered.detach()).items():
            if name in self.with_location:
                rest = self.with_location[name], latents.sites[name].bijection
                found[name] = SiteCoordinates(centered, units[name], *rest)
        return found

    def non_centered(self, latents: Latents) -> "Coordinates":
        """The same with lambda 0 for all of these latents, in units of their priors."""
        found = torch.ones_like(self.centered)
        for name, part in latents.views(found).items():
            if name in self.with_location:
                part.zero_()
        return self._replace(centered=found, unit=torch.ones_like(found))


class AllMapped(Exception):
    """Ends a run of a model of which no more is wanted: neither its data nor what it predicts."""


class PriorMap(Messenger):
    """Gives latents their values as a model runs: from coordinates x, or from u, whose x are then found.

    :param sites: the latents, by name.
    :param is_inverse: whether it is u that is given.
    :param is_alone: whether the run ends, by :class:`AllMapped`, once all of these latents have come by.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteCoordinates],
        is_inverse: bool = False,
        is_alone: bool = False,
    ) -> None:
        super().__init__()
        self.sites, self._is_inverse, self._is_alone = sites, is_inverse, is_alone
        self._given: dict[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}  #: what was not given, u or x, by site
        #: the log-determinants of the map from x to u, of the batch shape of a site, and from u to the value
        self.ladjs: dict[str, Tensor] = {}
        self.bijection_ladjs: dict[str, Tensor] = {}

    def take(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes x, or u, of its latents, and returns the values of the others."""
        self._given = {name: values[name] for name in self.sites}
        return {name: value for name, value in values.items() if name not in self.sites}

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        if name not in self.sites or message["is_observed"]:
            return
        centered, unit, with_location, bijection = self.sites[name]
        given, prior = self._given[name], PriorScale.of(message["fn"])
        if prior is None:
            raise TypeError(
                f"site '{name}': expected a prior with a location and a scale, as when the guide was "
                f"set up, got {type(message['fn']).__name__}: make the guide with coordinates='model'"
            )
        if not with_location:
            prior = prior._replace(loc=torch.zeros_like(prior.loc), shape=None)
        log_prob = None
        if self._is_inverse:
            u, (self.found[name], ladj) = given, prior.coordinates(given, centered, unit)
        else:
            u, ladj, log_prob = prior.unconstrained(given, centered, unit)
            self.found[name] = u
        message["value"] = value = bijection(u)
        event_dim = message["fn"].event_dim
        batch_dim = value.dim() - event_dim
        of_value = bijection.log_abs_det_jacobian(u, value)
        self.ladjs[name] = sum_rightmost(ladj, ladj.dim() - batch_dim)
        self.bijection_ladjs[name] = of_value = sum_rightmost(of_value, of_value.dim() - batch_dim)
        if self._is_alone and len(self.found) == len(self.sites):
            raise AllMapped
        if log_prob is not None and with_location:
            log_prob = log_prob.expand_as(u)
            log_prob = sum_rightmost(log_prob, log_prob.dim() - batch_dim) - of_value
            message["fn"] = dist.Delta(value, log_prob, event_dim)


def map_sites(
    run: Callable[[], object],
    sites: Mapping[str, SiteCoordinates],
    values: Mapping[str, Tensor],
    is_inverse: bool = False,
) -> PriorMap:
    """One run of a model, at x or u of the mapped latents and the values of other sites."""
    prior = PriorMap(sites, is_inverse, is_alone=True)
    rest = prior.take(values)
    # not in a plate of draws: in a guide another one, of particles, may have its dimension
    with validation_enabled(False), hidden_sites(), suppress(AllMapped), prior:
        poutine.condition(run, rest)()
    return prior


def map_draws(
    run: Callable[[], object],
    latents: Latents,
    sites: Mapping[str, SiteCoordinates],
    num_plates: int,
    is_inverse: bool,
    draws: Mapping[str, Tensor],
    size: int | None,
) -> dict[str, Tensor]:
    """Draws "z" in coordinates on the unconstrained space, or the other way, as ``evaluate_many`` takes it.

    :return: "z", and the log-determinant of the map from coordinates to the unconstrained space, "total".
    """
    z, plate = draws["z"], DrawPlate(size, num_plates)
    values, _ = latents.constrain_with_ladj(z, sites)
    prior = map_sites(run, sites, plate.place(values, latents.event_dims), is_inverse)
    parts = latents.split(z)
    for name, part in prior.found.items():
        parts[name] = part.reshape(parts[name].shape)
    found = torch.cat([part.reshape((*z.shape[:-1], -1)) for part in parts.values()], -1)
    return {"z": found, "total": plate.total(prior.ladjs, z.new_zeros(z.shape[:-1]))}


def centered_by_curvature(
    non_centered: Any, x: Tensor, together: Tensor | None = None, weights: Tensor | float = 1.0
) -> Tensor:
    r"""lambda by what the data say of each element, against its prior.

    .. math::

        \lambda = \frac{h}{1 + h}, \qquad 1 + h = - \frac{\partial^2}{\partial x^2} \log p

    in non-centred coordinates x, where the prior has a curvature of 1 and the likelihood h: with weak data
    an element is left in units of its prior, with strong data it is as the model is written: 1 above 0.95.

    :param non_centered: the log joint density in coordinates with lambda 0.
    :param x: points, shape ``(n, latent_dim)``, over which h is averaged.
    :param together: labels, shape ``(latent_dim,)``: coordinates of one label have no second derivatives
        with each other, as the elements of a plate, and move together.
    :param weights: by which the density of a coordinate is scaled down: the share of a mini-batch.
    :return: shape ``(latent_dim,)``; 1 for all other latents.
    """
    _, second = _second_derivatives(non_centered, x, together)
    return _centered(non_centered.coordinates.centered.clone(), -weights * second)


def _second_derivatives(
    non_centered: Any, x: Tensor, together: Tensor | None
) -> tuple[bool, Tensor]:
    """Whether the density has digits and a slope at points ``(n, latent_dim)``, and the mean derivatives."""
    is_mapped, found = non_centered.coordinates.centered < 1, torch.zeros_like(x[0])
    labels = torch.arange(len(found), device=x.device) if together is None else together
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        value = non_centered(point)
        (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        for some in labels[is_mapped].unique().split(_LABELS_AT_ONCE):
            moved = (is_mapped & (labels == some[:, None])).to(slope)[:, None].expand(-1, *x.shape)
            with suppress(RuntimeError):  # some functions have no second derivative
                found += (_pulled_back(slope, point, moved) * moved).mean(1).sum(0)
    has_digits = value.detach().abs() * torch.finfo(x.dtype).eps <= 1
    return bool(has_digits.all() and slope.isfinite().all()), found


def _pulled_back(slope: Tensor, point: Tensor, directions: Tensor) -> Tensor:
    grad = partial(torch.autograd.grad, slope, point, retain_graph=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that its rules for vmap are slow
            return grad(grad_outputs=directions, is_grads_batched=True)[0]
    except RuntimeError:  # a function without such a rule
        return torch.stack([grad(grad_outputs=direction)[0] for direction in directions])


def centered_by_draws(non_centered: Any, u: Tensor) -> Tensor:
    """The same by draws of the posterior on the unconstrained space ``(n, latent_dim)``.

    The variance of the gradient there is the mean curvature, 1 + h; by its quartiles, since in the neck of a
    funnel it is of another order.
    """
    x, _ = non_centered.from_unconstrained(u)
    _, gradients = value_and_gradient(non_centered, x)
    ordered = gradients[gradients.isfinite().all(-1)].sort(0).values
    between = ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]
    curvature = (between / _BETWEEN_QUARTILES).square()
    return _centered(non_centered.coordinates.centered.clone(), curvature)


def _centered(lam: Tensor, curvature: Tensor) -> Tensor:
    """lambda by 1 + h where it is below 1, each of shape ``(latent_dim,)``."""
    curvature = curvature.nan_to_num(1.0, 1e6, 1.0).clamp_min(1.0)
    lam = torch.where(lam < 1, 1 - 1 / curvature, lam)
    return torch.where(lam > _CENTERED, 1.0, lam)


def non_centered(log_joint: Any, with_shapes: bool = False) -> Any:
    """A log joint density with lambda 0 for all latents that may have coordinates, if it has none yet.

    :param with_shapes: see :func:`find_mapped`.
    """
    if log_joint.coordinates is not None or not log_joint.maps_priors:
        return log_joint
    if not (sites := log_joint.mapped_sites(with_shapes)):
        return log_joint
    ones = torch.ones_like(log_joint.start)
    found = Coordinates(ones, ones, dict.fromkeys(sites, True)).non_centered(log_joint.latents)
    return log_joint.with_coordinates(found)


def with_strong_data_centered(log_joint: Any, gradients: Tensor, has_parents: Tensor) -> Any:
    """A density with lambda 0, or 1 for those elements of which data say far more than their priors.

    The variance of a gradient under the posterior is the mean curvature, 1 + h in
    :func:`centered_by_curvature`. Where it is not large in nine chains of ten, as where some are in the neck
    of a funnel, lambda stays 0.

    :param gradients: in the coordinates of the density, by chain: shape ``(C, n, latent_dim)``.
    :param has_parents: where priors depend on other latents, shape ``(latent_dim,)``; else lambda stays 0.
    """
    given = log_joint.coordinates
    if given is None:
        return log_joint
    curvature = gradients.var(1).quantile(0.1, 0)
    is_strong = (curvature > 1 / (1 - _CENTERED)) & (given.centered < 1) & has_parents
    if not bool(is_strong.any()):
        return log_joint
    centered = given.centered.masked_fill(is_strong, 1.0)
    return log_joint.with_coordinates(given._replace(centered=centered))


@torch.no_grad()
def coordinates_at(
    log_joint: Any, mapped: Coordinates, u: Tensor, together: Tensor | None = None
) -> Coordinates:
    """As centred as the curvature at points ``(n, latent_dim)`` asks, with the units of the prior there.

    :param mapped: which latents of the log joint density have coordinates.
    :param u: the points, on the unconstrained space; one that is a start may be left for the origin.
    :param together: see :func:`centered_by_curvature`.
    """
    unit = log_joint.with_coordinates(mapped.non_centered(log_joint.latents))
    x, _ = unit.from_unconstrained(u)
    is_sound, second = _second_derivatives(unit, x, together)
    if len(u) == 1 and not is_sound:
        (point,) = u
        if (other := log_joint.or_origin(point)) is not point:
            return coordinates_at(log_joint, mapped, other[None], together)
    centered = _centered(unit.coordinates.centered.clone(), -second)
    return mapped._replace(centered=centered, unit=log_joint.prior_scales(u.mean(0)))
