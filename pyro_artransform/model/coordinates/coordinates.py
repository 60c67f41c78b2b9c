# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""How the latents of a model are expressed as one vector x: partial non-centring, element by element.

The geometry of a hierarchical posterior is hard mostly due to its prior, in which tau is the scale of theta.
In

.. math::

    u = \mathrm{loc} + (\mathrm{scale} / \mathrm{unit})^{1 - \lambda} (x - \lambda \, \mathrm{loc})

u is a latent on the unconstrained space (``biject_to``), and loc and scale are those of its prior given its
parents. The degree of centring, :math:`\lambda`, makes x equal to u, as the model is written, at 1, and
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

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..draw_plate import DrawPlate
from ..sites import Latents
from ..vectorization import Draws, Terms, evaluate_many
from .gaussian_sites import GaussianSites
from .latent_mapper import LatentMapper, SiteMap


class Coordinates(nn.Module):
    """How each latent of a model is expressed; the same for guides, chains and amortized guides.

    Tensors are buffers: in state dicts, files and copies of a guide, but not in optimizers and Pyro's param
    store, which hold parameters.

    :param latents: the latents of the model.
    :param with_location: for each site that is partially non-centred, whether its map includes the location
        of the prior; if not, x is only scaled, and latents depend on each other through locations as in the
        model.
    :param centered: lambda, shape ``(latent_dim,)``, between 0 and 1; set to 1 for all other sites.
    :param unit: the approximate scale of each prior, positive, same shape; by default 1.
    :param factors: by how many factors the model multiplies a latent before any other use, by site.
    :raises ValueError: if a site is not a latent.
    """

    centered: Tensor
    unit: Tensor

    def __init__(
        self,
        latents: Latents,
        with_location: Mapping[str, bool],
        centered: Tensor,
        unit: Tensor | None = None,
        factors: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if unknown := sorted(with_location.keys() - latents.sites.keys()):
            expected = f"expected sites of {list(latents.sites)}"
            raise ValueError(f"coordinates: {expected}, got {unknown}")
        self.latents, self.with_location = latents, dict(with_location)
        self.factors = dict(factors or {})
        #: normal approximations of the likelihood for lambda of zero, of chains only
        self.gaussian_sites: GaussianSites | None = None
        found = torch.ones_like(centered)
        for name, part in latents.views(found).items():
            if name in with_location:
                part.copy_(latents.views(centered)[name])
        is_saved = bool(with_location)
        self.register_buffer("centered", found, persistent=is_saved)
        unit = torch.ones_like(found) if unit is None else unit.detach().clone()
        self.register_buffer("unit", unit, persistent=is_saved)
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

    @property
    def sites(self) -> dict[str, SiteMap]:
        """The maps of the sites that need a run of the model."""
        if self.is_identity:
            return {}
        found, split, given = {}, self.latents.split, self.gaussian_sites
        lambdas, units = split(self.centered), split(self.unit)
        parts = None if given is None else [*map(split, given)]
        if not self._non_centered:
            self._non_centered = [bool((part == 0).all()) for part in lambdas.values()]
        for (name, site), is_zero in zip(self.latents.sites.items(), self._non_centered):
            if name in self.with_location:
                lambda_ = None if is_zero else lambdas[name]
                own = SiteMap(lambda_, units[name], self.with_location[name], site.bijection)
                if parts is not None and is_zero:
                    sites, count = (
                        GaussianSites(*(p[name] for p in parts)),
                        self.factors.get(name, 0),
                    )
                    own = own._replace(gaussian_sites=sites, num_factors=count)
                found[name] = own
        return found

    def non_centered(self) -> "Coordinates":
        """The same with lambda 0 and unit 1."""
        zeros = torch.zeros_like(self.centered)
        return Coordinates(self.latents, self.with_location, zeros, None, self.factors)

    def with_gaussian_sites(self, gaussian_sites: GaussianSites | None) -> "Coordinates":
        """The same, of the same tensors, given another approximation of the likelihood, or none."""
        other = copy.copy(self)
        other.gaussian_sites = gaussian_sites
        return other

    def for_elements(self, latents: Latents) -> "Coordinates":
        """Coordinates of one element of each plate, repeated for all elements of other latents."""
        centered, unit = (repeated(self.latents, z, latents) for z in (self.centered, self.unit))
        return Coordinates(latents, self.with_location, centered, unit)

    @torch.no_grad()
    def set_(self, centered: Tensor, unit: Tensor) -> None:
        """Sets lambda and the unit in place."""
        self.centered.copy_(centered)
        self.unit.copy_(unit)

    def set_requested(self, requested: Mapping[str, Tensor], unit: Tensor) -> None:
        """Sets lambda to the user's numbers, by site, and the unit.

        :raises ValueError: if numbers do not broadcast to the shape of their site.
        """
        centered = torch.ones_like(self.centered)
        parts = self.latents.views(centered)
        for name, value in requested.items():
            try:
                parts[name].copy_(value)
            except RuntimeError as error:
                raise ValueError(
                    f"coordinates['{name}']: expected a number, or some that broadcast to shape "
                    f"{tuple(parts[name].shape)}, got shape {tuple(value.shape)}"
                ) from error
        self.set_(centered, unit)

    def centered_by_site(self) -> dict[str, Tensor]:
        """lambda by site, in its unconstrained shape."""
        parts = self.latents.split(self.centered)
        return {name: parts[name].clone() for name in parts if name in self.with_location}

    # The map

    def mapped(self, z: Tensor, log_joint: Any, is_inverse: bool = False) -> Terms:
        """Maps draws ``(n, latent_dim)`` to the unconstrained space or from it, by runs of the model.

        :param log_joint: the model's :class:`~pyro_artransform.model.LogJoint`.
        :return: "z", the draws there; "total", the log-determinant of the map from x to u, shape ``(n,)``;
            "loc" and "scale" of priors, zero for latents without Gaussian sites. NaN where the model fails.
        """
        if not (sites := self.sites):
            return {"z": z, "total": z.new_zeros(len(z))}
        run, strategy, size = log_joint.enumerated(log_joint.run), "plate", None
        if len(z) > 1:
            strategy, size = log_joint.strategy, log_joint.chunk_size

        def evaluate(draws: Draws, number: int | None) -> Terms:
            z, plate = draws["z"], DrawPlate(number, log_joint.num_plates)
            values, _ = self.latents.constrain_with_ladj(z, sites)
            given = plate.place(values, self.latents.event_dims)
            found = LatentMapper(sites, given, is_inverse).run_alone(run)

            def joined(parts: Mapping[str, Tensor], rest: Tensor) -> Tensor:
                views = self.latents.split(rest)
                for name, part in parts.items():
                    views[name] = part.expand_as(found.found[name]).reshape(views[name].shape)
                flat = [part.reshape((*z.shape[:-1], -1)) for part in views.values()]
                return torch.cat(flat, -1)

            zeros = torch.zeros_like(z)
            return {
                "z": joined(found.found, z),
                "total": plate.total(found.ladjs, z.new_zeros(z.shape[:-1])),
                "loc": joined({name: prior.loc for name, prior in found.priors.items()}, zeros),
                "scale": joined({name: prior.scale for name, prior in found.priors.items()}, zeros),
            }

        with pyro.validation_enabled(False):
            return evaluate_many(evaluate, {"z": z}, strategy, nan_terms, size)

    def to_sites(
        self, parts: Mapping[str, Tensor], run: Callable[[], object] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The value of each site, and the log-determinant of the map to it, of its batch shape.

        :param parts: the part of each site, as ``Latents.place`` returns them, and known plate indices.
        :param run: the model; None if lambda is 1 everywhere.
        """
        if run is None:
            return self.latents.to_sites(parts)
        mapped = self.sites
        values, ladjs = self.latents.to_sites(parts, mapped)
        found = LatentMapper(mapped, values).run_alone(run)
        for name in mapped:
            if name in found.values:
                values[name] = found.values[name]
                ladjs[name] = found.ladjs[name] + found.bijection_ladjs[name]
            else:  # the site has data now
                site = self.latents.sites[name]
                values[name], ladjs[name] = site.constrain_with_ladj(parts[name])
        return values, ladjs


def repeated(element: Latents, z: Tensor, latents: Latents) -> Tensor:
    """Repeats a vector z ``(latent_dim,)`` of one element for all elements of the plates."""
    parts = element.split(z)
    shapes = {name: site.unconstrained_shape for name, site in latents.sites.items()}
    return torch.cat([parts[name].expand(shape).flatten() for name, shape in shapes.items()])


def nan_terms(draws: Draws) -> Terms:
    """NaN terms, with a gradient, for a draw at which the model fails."""
    z = draws["z"] * torch.nan
    return {"z": z, "total": z.sum(), "loc": z, "scale": z}
