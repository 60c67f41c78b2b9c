# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Coordinates of latents derived from the model's prior.

The geometry of a hierarchical posterior is hard mostly due to its prior, in which tau is the scale of theta.
In

.. math::

    u = \mathrm{loc} + (\mathrm{scale} / \mathrm{unit})^{1 - \lambda} (x - \lambda \, \mathrm{loc})

u is a latent on the unconstrained space, and loc and scale are those of its prior given its parents. The
elementwise degree of centring, :math:`\lambda`, makes x equal to u, as the model is written, at 1, and
non-centred at 0. The unit is a constant near the scale; where the scale equals it, u moves by :math:`1 -
\lambda` with the location, in any units of the model. If the prior is not normal in shape and lambda is below
0.9, lambda is set to 0 and x also passes through the quantile function of that shape, so that x is standard
normal under the prior. Sites follow the order of the model, so the map is triangular. Its log-determinant
sums :math:`(1 - \lambda) \log (\mathrm{scale} / \mathrm{unit})` and the terms of the shapes. The map is
applied while the model runs, at each sample statement, so a density in x costs one run.

**References**

1. A General Framework for the Parametrization of Hierarchical Models (Papaspiliopoulos, Roberts, Skold,
   2007), https://arxiv.org/abs/0708.3797
2. Automatic Reparameterisation of Probabilistic Programs (Gorinova, Moore, Hoffman, 2020),
   https://arxiv.org/abs/1906.03028
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import validation_enabled
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Transform

from ..draw_plate import DrawPlate
from ..sites import Latents
from .factors import OtherUseError, Products
from .gaussian_sites import GaussianSites, LocScale
from .prior_scale import PriorScale


class SiteCoordinates(NamedTuple):
    """The coordinates of one latent.

    :param centered: lambda, broadcastable to the latent on the unconstrained space; ``None`` if it is zero.
    :param unit: positive, broadcastable to it too.
    :param with_location: whether the map includes the location of the prior; if not, x is only scaled, and
        latents depend on each other through locations as in the model.
    :param bijection: the bijection from the unconstrained space onto the support.
    :param gaussian_sites: a normal approximation of the likelihood, for lambda of zero.
    :param num_factors: with pseudo-data, the number of factors of the latent.
    """

    centered: Tensor | None
    unit: Tensor
    with_location: bool
    bijection: Transform
    gaussian_sites: GaussianSites | None = None
    num_factors: int = 0


class Coordinates(nn.Module):
    """The latents with coordinates from the prior, and their degree of centring.

    Tensors are parameters, so that files, copies and the param store hold them, but require no gradient.

    :param centered: lambda, shape ``(latent_dim,)``, between 0 and 1; 1 for all other latents.
    :param unit: the approximate scale of each prior, positive, same shape.
    :param with_location: flags by site, see :class:`SiteCoordinates`.
    :param factors: by how many factors the model multiplies a latent before any other use, by site.
    :param gaussian_sites: normal approximations of the likelihood for lambda of zero, of chains only.
    """

    def __init__(
        self,
        centered: Tensor,
        unit: Tensor,
        with_location: Mapping[str, bool],
        factors: Mapping[str, int] | None = None,
        gaussian_sites: GaussianSites | None = None,
    ) -> None:
        super().__init__()
        self.centered = nn.Parameter(centered.detach(), requires_grad=False)
        self.unit = nn.Parameter(unit.detach(), requires_grad=False)
        self.with_location = dict(with_location)
        self.factors, self.gaussian_sites = dict(factors or {}), gaussian_sites
        # the tensor and its version when lambda was read, and whether it was 1 everywhere
        self._read: tuple[Tensor | None, int, bool] = None, 0, False
        self._non_centered = list[bool]()  # whether lambda of each site is 0; empty if not read yet

    @property
    def is_identity(self) -> bool:
        """Whether lambda is 1 everywhere; it is read once after each change."""
        centered, (seen, version, is_identity) = self.centered, self._read
        now = 0 if centered.is_inference() else centered._version
        if seen is not centered or version != now:
            is_identity, self._non_centered = bool((centered == 1).all()), []
            self._read = centered, now, is_identity
        return is_identity

    def of_sites(self, latents: Latents) -> dict[str, SiteCoordinates]:
        """The coordinates of each mapped site."""
        found, parts = {}, self.centered.detach().split(latents.sizes)
        if not (self.is_identity or self._non_centered):
            self._non_centered = [bool((part == 0).all()) for part in parts]
        rest = zip(latents.sites.values(), self.unit.detach().split(latents.sizes))
        is_zero = self._non_centered or [False] * len(parts)
        for (site, unit), centered, is_non_centered in zip(rest, parts, is_zero):
            if (name := site.name) in self.with_location:
                shape = site.unconstrained_shape
                lambda_ = None if is_non_centered else centered.reshape(shape).to(site.dtype)
                unit = unit.reshape(shape).to(site.dtype)
                found[name] = SiteCoordinates(
                    lambda_, unit, self.with_location[name], site.bijection
                )
        if self.gaussian_sites is not None:
            by_site = zip(*(latents.split(part).values() for part in self.gaussian_sites))
            for name, parts in zip(latents.sites, by_site):
                if name in found and found[name].centered is None:
                    found[name] = found[name]._replace(
                        gaussian_sites=GaussianSites(*parts), num_factors=self.factors.get(name, 0)
                    )
        return found

    def with_pseudo_data(self, gaussian_sites: GaussianSites | None) -> "Coordinates":
        """The same coordinates with these pseudo-data, or none."""
        return Coordinates(
            self.centered, self.unit, self.with_location, self.factors, gaussian_sites
        )

    def non_centered(self, latents: Latents) -> "Coordinates":
        """Coordinates with lambda 0 and unit 1 for all mapped latents."""
        found = torch.ones_like(self.centered)
        for name, part in latents.views(found).items():
            if name in self.with_location:
                part.zero_()
        return Coordinates(found, torch.ones_like(found), self.with_location, self.factors)

    @torch.no_grad()
    def set_(self, centered: Tensor, unit: Tensor) -> None:
        """Sets lambda and the unit in place."""
        self.centered.copy_(centered)
        self.unit.copy_(unit)

    def map(
        self, values: Mapping[str, Tensor], latents: Latents, run: Callable[[], object]
    ) -> "PriorMap":
        """Runs the model to map coordinates, passed with values of other sites and plate indices."""
        return PriorMap(self.of_sites(latents), values).run_alone(run)


class AllMapped(Exception):
    """Ends a run of a model after its last mapped latent, before data and predictions."""


class PriorMap(Messenger):
    """Sets latents as a model runs, from coordinates x, or from u, computing their x.

    :param sites: the coordinates of latents, by site.
    :param given: x, or u, by latent; for :meth:`run_alone` also values of other sites and plate indices.
    :param is_inverse: whether ``given`` holds u.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteCoordinates],
        given: Mapping[str, Tensor],
        is_inverse: bool = False,
    ) -> None:
        super().__init__()
        self.sites, self._given, self._is_inverse = sites, given, is_inverse
        self._is_alone, self._products = False, Products()
        self._at_last = dict[str, Callable[[Any], Tensor]]()
        self._has_factors = any(site.num_factors for site in sites.values())
        self.found: dict[str, Tensor] = {}  #: the result, u or x, by site
        self.values: dict[str, Tensor] = {}
        #: log-determinants by site, of its batch shape: of the map from x to u, and from u to the value
        self.ladjs: dict[str, Tensor] = {}
        self.bijection_ladjs: dict[str, Tensor] = {}
        self.log_probs: dict[str, Tensor] = {}  #: log densities of latents with factors, the same
        self.priors: dict[str, LocScale] = {}  #: of latents with pseudo-data, factors included

    def __enter__(self) -> Any:
        if self._has_factors:
            self._products.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        if self._has_factors:
            self._products.__exit__(*error)
            if error[0] is None and (left := self.sites.keys() - self.found.keys()):
                raise OtherUseError(f"sites {sorted(left)}: {OtherUseError.words}")
        return super().__exit__(*error)

    def run_alone(self, model: Callable[[], object]) -> "PriorMap":
        """Runs a model up to its last mapped latent, hiding all but parameters from outer handlers."""
        self._is_alone = True
        # without a plate of draws: in a guide, a plate of particles may use its dimension
        with validation_enabled(False), suppress(AllMapped), self:
            model()
        return self

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        if self._is_alone:
            message["stop"] = True
            if name in self._given and name not in self.sites:
                message["value"], message["is_observed"] = self._given[name], True
        if name not in self.sites or message["is_observed"]:
            return
        site, prior = self.sites[name], PriorScale.of(message["fn"])
        if prior is None:
            raise TypeError(
                f"site '{name}': expected a prior with a location and a scale, as when the guide was "
                f"set up, got {type(message['fn']).__name__}: make the guide with coordinates='model'"
            )
        if not site.with_location:
            prior = prior._replace(loc=torch.zeros_like(prior.loc), shape=None)
        event_dim = message["fn"].event_dim
        if site.num_factors:
            value = self._given[name].view_as(self._given[name])  # a tensor of its own
            self._at_last[name] = partial(self._multiplied, name, prior, event_dim)
            log_prob = torch.zeros_like(sum_rightmost(value, event_dim))
        else:
            _, of_u = self._map(name, prior, event_dim)
            message["value"] = value = self.values[name]
            if of_u is None or not site.with_location:
                return
            log_prob = of_u - self.bijection_ladjs[name]
        message["value"], message["fn"] = value, dist.Delta(value, log_prob, event_dim)

    def _pyro_post_sample(self, message: Any) -> None:
        # what follows are uses of the model
        if (at_last := self._at_last.pop(message["name"], None)) is not None:
            num_factors = self.sites[message["name"]].num_factors
            self._products.follow(message["value"], num_factors, at_last)

    def _multiplied(self, name: str, prior: PriorScale, event_dim: int, factor: Any) -> Tensor:
        """Maps a latent once all its factors are known; returns its product with them."""
        u, log_prob = self._map(name, prior, event_dim, factor)
        if log_prob is not None:
            self.log_probs[name] = log_prob
        return u * factor

    def _map(
        self, name: str, prior: PriorScale, event_dim: int, factor: Any = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Maps a latent and keeps the results; returns u and, where computed, its log density."""
        site, given, log_prob = self.sites[name], self._given[name], None
        gaussian_sites = site.gaussian_sites if type(prior) is PriorScale else None
        if gaussian_sites is not None:
            self.priors[name] = LocScale(prior.loc * factor, prior.scale * factor)
        if self._is_inverse:
            lambda_ = torch.zeros_like(site.unit) if site.centered is None else site.centered
            found, ladj = prior.coordinates(given, lambda_, site.unit)
            u = given
            if gaussian_sites is not None:
                found, of_residual = gaussian_sites.inverse(found, self.priors[name])
                ladj = ladj + of_residual
        else:
            of_residual = torch.zeros_like(given)
            if gaussian_sites is not None:
                given, of_residual = gaussian_sites.residual(given, self.priors[name])
            u, ladj, log_prob = prior.unconstrained(given, site.centered, site.unit)
            found, ladj = u, ladj if gaussian_sites is None else ladj + of_residual
        self.found[name], self.values[name] = found, (value := site.bijection(u))
        num_summed = event_dim - value.dim() + u.dim()
        of_value = site.bijection.log_abs_det_jacobian(u, value)
        self.ladjs[name] = sum_rightmost(ladj, num_summed)
        self.bijection_ladjs[name] = sum_rightmost(
            of_value, of_value.dim() - value.dim() + event_dim
        )
        if self._is_alone and len(self.found) == len(self.sites):
            raise AllMapped
        return u, None if log_prob is None else sum_rightmost(log_prob.expand_as(u), num_summed)


def map_draws(
    run: Callable[[], object],
    latents: Latents,
    sites: Mapping[str, SiteCoordinates],
    num_plates: int,
    is_inverse: bool,
    draws: Mapping[str, Tensor],
    size: int | None,
) -> dict[str, Tensor]:
    """Maps draws "z" from coordinates to the unconstrained space, or back, in the form of ``evaluate_many``.

    :return: "z"; as "total" the log-determinant of the map from coordinates to the unconstrained space; "loc"
        and "scale" of priors, zero for latents without pseudo-data.
    """
    z, plate = draws["z"], DrawPlate(size, num_plates)
    values, _ = latents.constrain_with_ladj(z, sites)
    prior = PriorMap(sites, plate.place(values, latents.event_dims), is_inverse).run_alone(run)
    parts = latents.split(z)
    for name, part in prior.found.items():
        parts[name] = part.reshape(parts[name].shape)
    priors = {}
    for key in LocScale._fields:
        views = latents.split(torch.zeros_like(z))
        for name, both in prior.priors.items():
            part = getattr(both, key).expand_as(prior.found[name])
            views[name] = part.reshape(views[name].shape)
        priors[key] = _joined(views, z)
    total = plate.total(prior.ladjs, z.new_zeros(z.shape[:-1]))
    return {"z": _joined(parts, z), "total": total, **priors}


def _joined(parts: Mapping[str, Tensor], z: Tensor) -> Tensor:
    return torch.cat([part.reshape((*z.shape[:-1], -1)) for part in parts.values()], -1)
