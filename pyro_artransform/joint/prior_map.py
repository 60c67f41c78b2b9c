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

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import validation_enabled
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Transform

from .prior_scale import PriorScale
from .sites import Latents
from .vectorization import DrawPlate


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


class Coordinates(nn.Module):
    """Which latents have coordinates from the prior, and how centred these are.

    No gradient flows to the tensors, which are parameters so that files and the param store hold them.

    :param centered: lambda, shape ``(latent_dim,)``, between 0 and 1; 1 for all other latents.
    :param unit: of the same shape, positive: about the scale of each prior.
    :param with_location: by site, see :class:`SiteCoordinates`.
    """

    def __init__(self, centered: Tensor, unit: Tensor, with_location: Mapping[str, bool]) -> None:
        super().__init__()
        self.centered, self.unit = nn.Parameter(centered.detach()), nn.Parameter(unit.detach())
        self.with_location = dict(with_location)
        self._read: tuple[Tensor | None, int, bool] = None, 0, False

    @property
    def is_identity(self) -> bool:
        """Whether all latents are as the model is written: lambda is read once after each change."""
        centered, (seen, version, is_identity) = self.centered, self._read
        now = 0 if centered.is_inference() else centered._version
        if seen is not centered or version != now:
            is_identity = bool((centered == 1).all())
            self._read = centered, now, is_identity
        return is_identity

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
        return Coordinates(found, torch.ones_like(found), self.with_location)

    @torch.no_grad()
    def set_(self, centered: Tensor, unit: Tensor) -> None:
        """Sets lambda and the unit in place."""
        self.centered.copy_(centered)
        self.unit.copy_(unit)

    def map(
        self, values: Mapping[str, Tensor], latents: Latents, run: Callable[[], object]
    ) -> "PriorMap":
        """The map of coordinates, given with values of the other sites and indices of plates."""
        return PriorMap(self.of_sites(latents), values).run_alone(run)


class AllMapped(Exception):
    """Ends a run of a model of which no more is wanted: neither its data nor what it predicts."""


class PriorMap(Messenger):
    """Gives latents their values as a model runs: from coordinates x, or from u, whose x are then found.

    :param sites: the latents, by name.
    :param given: x, or u, of the latents; for :meth:`run_alone` other values and indices of plates too.
    :param is_inverse: whether it is u that is given.
    """

    def __init__(
        self,
        sites: Mapping[str, SiteCoordinates],
        given: Mapping[str, Tensor],
        is_inverse: bool = False,
    ) -> None:
        super().__init__()
        self.sites, self._given, self._is_inverse = sites, given, is_inverse
        self._is_alone = False
        self.found: dict[str, Tensor] = {}  #: what was not given, u or x, by site
        self.values: dict[str, Tensor] = {}
        #: the log-determinants of the map from x to u, of the batch shape of a site, and from u to the value
        self.ladjs: dict[str, Tensor] = {}
        self.bijection_ladjs: dict[str, Tensor] = {}

    def run_alone(self, model: Callable[[], object]) -> "PriorMap":
        """Runs a model, unseen by handlers around it but for its parameters, up to the last latent."""
        self._is_alone = True
        # not in a plate of draws: in a guide another one, of particles, may have its dimension
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
        message["value"] = self.values[name] = value = bijection(u)
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
    prior = PriorMap(sites, plate.place(values, latents.event_dims), is_inverse).run_alone(run)
    parts = latents.split(z)
    for name, part in prior.found.items():
        parts[name] = part.reshape(parts[name].shape)
    found = torch.cat([part.reshape((*z.shape[:-1], -1)) for part in parts.values()], -1)
    return {"z": found, "total": plate.total(prior.ladjs, z.new_zeros(z.shape[:-1]))}
