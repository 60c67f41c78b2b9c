# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates from the model's prior for the elements of plates: lambda is the same for all elements."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from pyro import poutine
from torch import Tensor

from ...joint import LogJoint
from ...joint.coordinates import Coordinates, SiteCoordinates, centered_by_curvature, map_sites
from ...joint.density import Args, Kwargs
from ...joint.sites import Latents
from ...joint.vectorization import DrawPlate, Draws, Terms, evaluate_many
from ..prior_coordinates import GuideInCoordinates
from ..prototype import compare_names, one_more_run, sites_by_name
from .plates import (
    GivenIndices,
    LatentLayout,
    Plates,
    PlateSizes,
    Vectors,
    mean_element,
    plate_sizes,
)
from .variational_posterior import AmortizedPosterior

# in which the map of an element in two places of a mini-batch may differ
_TOLERANCE = 1e-4


def every_element(element: Latents, z: Tensor, latents: Latents) -> Tensor:
    """The vector of all latents that is z, shape ``(latent_dim,)``, for each element of the plates."""
    parts = element.split(z)
    shapes = {name: site.unconstrained_shape for name, site in latents.sites.items()}
    return torch.cat([parts[name].expand(shape).flatten() for name, shape in shapes.items()])


class ElementMap(NamedTuple):
    """The map between coordinates of the prior and the unconstrained space, for all elements.

    A model whose plates hold other numbers of elements than there are runs for one part after the other.
    """

    log_joint: LogJoint  # of the model with its arguments
    layout: LatentLayout
    sites: Mapping[str, SiteCoordinates]
    plates: PlateSizes  # in a run of this model
    given: set[str]  # the plates whose indices it gives itself
    is_inverse: bool  # whether it is u that is mapped

    def __call__(self, vectors: Vectors) -> tuple[Vectors, Tensor]:
        """The vectors of each group, and the log-determinant of the map from x to u, shape ``(n,)``.

        :param vectors: of each group, shape ``(n, 1, ...) + batch shape + (D,)``.
        :raises ValueError: if the prior of an element depends on its place in a mini-batch.
        """
        rows = {}
        for group in self.layout.groups:
            z = vectors[group.name]
            rows[group.name] = z.reshape(z.shape[:1] + z.shape[-1 - group.batch_dims :])
        found = self._over(list(self.plates), rows, {})
        ladjs = [row[..., -1].reshape(len(row), -1).sum(-1) for row in found.values()]
        mapped = {name: row[..., :-1].reshape(vectors[name].shape) for name, row in found.items()}
        return mapped, torch.stack(ladjs).sum(0)

    def _over(self, names: Sequence[str], rows: Terms, indices: Mapping[str, Tensor]) -> Terms:
        """The map of all rows ``(n,) + batch shape + (D,)``, in parts of each of these plates.

        :param indices: of the elements in the other plates, where the model draws these.
        """
        if not names:
            evaluate = partial(self._evaluate, indices)
            return evaluate_many(evaluate, rows, self.log_joint.strategy)
        name, groups, plate = names[0], self.layout.groups, self.plates[names[0]]
        dims = {group.name: group.dims[name] - 1 for group in groups if name in group.dims}
        key, dim = next(iter(dims.items()))
        total, device = rows[key].shape[dim], rows[key].device
        is_drawn = total == plate.full_size and name not in self.given

        def part(chosen: Tensor) -> Terms:
            of_plate = {name: chosen}
            given = {**indices, **of_plate} if is_drawn else indices
            selected = {group.name: group.select(rows[group.name], of_plate) for group in groups}
            return self._over(names[1:], selected, given)

        # all parts are of one size: the last one has its last element several times
        ends = torch.arange(total + -total % plate.size, device=device).clamp_max(total - 1)
        chosen = ends.split(plate.size)
        parts = [part(indices_of_part) for indices_of_part in chosen]
        if total != plate.size:
            turned = part(chosen[0].roll(1))
            for key, dim in dims.items():
                one, other = parts[0][key], turned[key].roll(-1, dim)
                if not torch.allclose(one, other, _TOLERANCE, _TOLERANCE, equal_nan=True):
                    raise ValueError(
                        f"plate '{name}': expected priors that are known for all {total} elements, got "
                        f"some that depend on the data of a mini-batch of {plate.size}. Give the model's "
                        "arguments for all elements, or make the guide with coordinates='model'"
                    )
        found = dict(parts[0])
        for key, dim in dims.items():
            found[key] = torch.cat([part[key] for part in parts], dim).narrow(dim, 0, total)
        return found

    def _evaluate(self, indices: Mapping[str, Tensor], draws: Draws, size: int | None) -> Terms:
        """One run for many draws, or a single one, as ``evaluate_many`` takes it.

        :return: the vectors of each group, and in one more column the log-determinant of each element.
        """
        latents, parts = self.layout.latents, dict[str, Tensor]()
        for group in self.layout.groups:
            parts.update(group.latents.split(draws[group.name]))
        values = {
            name: part if name in self.sites else latents.sites[name].bijection(part)
            for name, part in parts.items()
        }
        placed = DrawPlate(size, self.log_joint.num_plates).place(values, latents.event_dims)
        model = self.log_joint.enumerated(self.log_joint.run)
        prior = map_sites(model, self.sites, {**placed, **indices}, self.is_inverse)
        found = {}
        for group in self.layout.groups:
            z = draws[group.name]
            lead, ladj = (*z.shape[:-1], -1), z.new_zeros((*z.shape[:-1], 1))
            columns = []
            for name in group.latents.sites:
                columns.append(prior.found.get(name, parts[name]).reshape(lead))
                if name in self.sites:
                    ladj = ladj + prior.ladjs[name].reshape(lead).sum(-1, keepdim=True)
            found[group.name] = torch.cat([*columns, ladj], -1)
        return found


class AmortizedInCoordinates(GuideInCoordinates):
    """The part of an amortized guide that has to do with coordinates from the prior."""

    @property
    def _posterior(self) -> AmortizedPosterior:
        """The posterior, without the param statements that reading ``transform`` makes."""
        self._checked_spec()
        return cast(AmortizedPosterior, self._modules["transform"])

    def coordinates_of(self, latents: Latents) -> Coordinates | None:
        """The coordinates of all these latents, of any number of elements."""
        coordinates = self.prior_coordinates
        if coordinates is None:
            return None
        own = self._checked_spec().latents
        centered, unit = (every_element(own, part.detach(), latents) for part in coordinates[:2])
        return coordinates._replace(centered=centered, unit=unit)

    @torch.no_grad()
    def center_at(self, u: Tensor | None, log_joint: LogJoint, share: float) -> float:
        """Sets lambda by the curvature of a mini-batch's density, the mean of all its elements.

        The location is that of the starting values in these coordinates. See ``MinibatchGuide``.
        """
        own, latents, prior = self._checked_spec().latents, log_joint.latents, self._prior[0]
        before, now = prior.centered, torch.ones_like(prior.centered)
        if u is not None:
            coordinates = cast(Coordinates, self.coordinates_of(latents))
            unit = log_joint.with_coordinates(coordinates.non_centered(latents))
            labels = every_element(own, now.cumsum(0), latents)
            weights = torch.ones_like(labels)
            for name, part in latents.views(weights).items():
                part.fill_(share if own.sites[name].plates else 1.0)
            x, _ = unit.from_unconstrained(u)
            now = mean_element(latents, centered_by_curvature(unit, x, labels, weights)).to(now)
            self._set_unit(log_joint, u.mean(0))
        change = (now - before).abs().max().item()
        before.copy_(now)
        self._locate(log_joint)
        return change

    def _set_unit(self, log_joint: LogJoint, u: Tensor) -> None:
        scales = log_joint.prior_scales(u)
        self._prior[0].unit.copy_(mean_element(log_joint.latents, scales.log()).exp())

    def _locate(self, log_joint: LogJoint) -> None:
        """Moves the location to the starting values of one element."""
        mapped = log_joint.with_coordinates(self.coordinates_of(log_joint.latents))
        self._posterior.locate_at(mean_element(log_joint.latents, mapped.start))

    @torch.no_grad()
    def _center_at_start(self, args: Args, kwargs: Kwargs) -> None:
        """Sets lambda as asked for, or by the curvature at the starting values, and the location there."""
        log_joint = cast(LogJoint, self._bound)
        with torch.random.fork_rng(devices=[]), poutine.block():
            if isinstance(self.asked, Mapping):
                self._set_unit(log_joint, log_joint.start)
                self._center_as_asked(self._checked_spec().latents)
            else:
                share = 1 / log_joint.structure(args, kwargs).scale
                self.center_at(log_joint.start[None], log_joint, share)
            self._locate(log_joint)

    def _values_and_ladjs(
        self, vectors: Vectors, plates: Plates, args: Args, kwargs: Kwargs
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The value of each site at the vectors of a call, and its log-determinant, of its batch shape."""
        mapped, placed, found = self._mapped(), dict[str, Tensor](), {}
        for group in self._posterior.layout.groups:
            z = vectors[group.name]
            for name, part in group.latents.split(z).items():
                site = group.latents.sites[name]
                # batch dimensions of a site outside all plates lie where those of plates lie
                event_dim = len(site.unconstrained_shape) - len(site.batch_shape)
                ones = z.shape[:-1] + (1,) * event_dim
                part = part.reshape(torch.broadcast_shapes(site.unconstrained_shape, ones))
                placed[name] = part
                if name not in mapped:
                    batch = part.shape[: part.dim() - event_dim]
                    found[name] = site.constrain_with_ladj(part, batch)
                    placed[name] = found[name][0]
        if mapped:
            indices = {name: plate.indices for name, plate in plates.items()}
            prior = map_sites(self._bind(args, kwargs).run, mapped, {**placed, **indices})
            for name, u in prior.found.items():
                ladj = prior.ladjs[name] + prior.bijection_ladjs[name]
                found[name] = mapped[name].bijection(u), ladj
        return found

    def _element_map(self, args: Args, kwargs: Kwargs, *, is_inverse: bool = False) -> ElementMap:
        """The map for all elements, by the model with these arguments, by default the last ones."""
        log_joint, given, sites = self._bind(args, kwargs), GivenIndices(), self._mapped()
        now = sites_by_name(one_more_run(given(log_joint.run)))
        compare_names(sites, sites.keys() & now.keys())
        # not those around what is predicted
        layout = self._posterior.layout
        plates = plate_sizes(now[name] for name in layout.latents.sites if name in now)
        return ElementMap(log_joint, layout, sites, plates, given.names, is_inverse)

    def _mapped(self) -> dict[str, SiteCoordinates]:
        """The sites with coordinates from the prior."""
        coordinates = self.prior_coordinates
        if coordinates is None or coordinates.is_identity:
            return {}
        return coordinates.of_sites(self._posterior.layout.latents)
