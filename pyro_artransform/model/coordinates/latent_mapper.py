# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The handler that maps latents while their model runs."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import validation_enabled
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform

from .factors import OtherUseError, Products
from .families import PriorScale
from .gaussian_sites import GaussianSites, LocScale


class SiteMap(NamedTuple):
    """The map of one latent, see ``Coordinates``; tensors broadcast to the unconstrained latent.

    ``centered`` is None if it is zero. Gaussian sites, with the number of factors of the latent, need that.
    """

    centered: Tensor | None
    unit: Tensor
    with_location: bool
    bijection: Transform
    gaussian_sites: GaussianSites | None = None
    num_factors: int = 0


class AllMapped(Exception):
    """Ends a run of a model after its last mapped latent, before data and predictions."""


class LatentMapper(Messenger):
    """Sets latents as a model runs, from coordinates x, or from u, computing their x.

    :param sites: the maps of latents, by site.
    :param given: x, or u, by latent; for :meth:`run_alone` also values of other sites and plate indices.
    :param is_inverse: whether ``given`` holds u.
    """

    def __init__(
        self, sites: Mapping[str, SiteMap], given: Mapping[str, Tensor], is_inverse: bool = False
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
        self.priors: dict[str, LocScale] = {}  #: of latents with Gaussian sites, factors included

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

    def run_alone(self, model: Callable[[], object]) -> "LatentMapper":
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
            (found, ladj), u = prior.from_unconstrained(given, lambda_, site.unit), given
            if gaussian_sites is not None:
                found, of_residual = gaussian_sites.inverse(found, self.priors[name])
        else:
            if gaussian_sites is not None:
                given, of_residual = gaussian_sites.residual(given, self.priors[name])
            u, ladj, log_prob = prior.to_unconstrained(given, site.centered, site.unit)
            found = u
        if gaussian_sites is not None:
            ladj = ladj + of_residual
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
