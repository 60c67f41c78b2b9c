# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Partial non-centring of the elements of plates, with one lambda for all elements."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from torch import Tensor

from ..._base.comparison import agree
from ...model import LogJoint
from ...model.coordinates.centering import centered_by_curvature
from ...model.coordinates.coordinates import Coordinates, repeated
from ...model.coordinates.latent_mapper import LatentMapper, SiteMap
from ...model.draw_plate import DrawPlate
from ...model.vectorization import Draws, Terms, evaluate_many
from ..prototype import one_more_run, refuse_missing, sites_by_name
from .plates import GivenIndices, LatentLayout, PlateSizes, Vectors, mean_element, plate_sizes


class ElementMap(NamedTuple):
    """Maps between coordinates and the unconstrained space, for all elements.

    A model with smaller plates than there are elements runs once for each part.
    """

    log_joint: LogJoint  # bound to the model's arguments
    layout: LatentLayout
    sites: Mapping[str, SiteMap]
    plates: PlateSizes  # as in a run of this model
    given: set[str]  # plates whose indices the model sets itself
    is_inverse: bool  # whether u is mapped to x

    @classmethod
    def of(
        cls, log_joint: LogJoint, layout: LatentLayout, *, is_inverse: bool = False
    ) -> "ElementMap":
        """The map for all elements, of a density in coordinates of one element of each plate."""
        given, sites = GivenIndices(), cast(Coordinates, log_joint.coordinates).sites
        now = sites_by_name(one_more_run(given(log_joint.run)))
        refuse_missing(sites, now)
        # without plates of predictions
        plates = plate_sizes(now[name] for name in layout.latents.sites if name in now)
        return cls(log_joint, layout, sites, plates, given.names, is_inverse)

    def __call__(self, vectors: Vectors) -> tuple[Vectors, Tensor]:
        """Maps vectors by group; returns also the log-determinant of the map from x to u, ``(n,)``.

        :param vectors: vectors by group, shape ``(n, 1, ...) + batch shape + (D,)``.
        :raises ValueError: if the prior of an element depends on its position in a mini-batch.
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
        """Maps all rows ``(n,) + batch shape + (D,)``, in parts of each plate in ``names``.

        :param indices: indices of elements in the other plates, if the model draws these.
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

        # parts have equal sizes: the last one repeats its last element
        ends = torch.arange(total + -total % plate.size, device=device).clamp_max(total - 1)
        chosen = ends.split(plate.size)
        parts = [part(indices_of_part) for indices_of_part in chosen]
        if total != plate.size:
            turned = part(chosen[0].roll(1))
            for key, dim in dims.items():
                one, other = parts[0][key], turned[key].roll(-1, dim)
                if not agree(one, other):
                    raise ValueError(
                        f"plate '{name}': expected priors that are known for all {total} elements, got some "
                        f"that depend on the data of one mini-batch of {plate.size}. Pass the model's "
                        "arguments for all elements, or make the guide with coordinates='model'"
                    )
        found = dict(parts[0])
        for key, dim in dims.items():
            found[key] = torch.cat([part[key] for part in parts], dim).narrow(dim, 0, total)
        return found

    def _evaluate(self, indices: Mapping[str, Tensor], draws: Draws, size: int | None) -> Terms:
        """Runs the model for many draws, or for one, in the form of ``evaluate_many``.

        :return: vectors by group, with each element's log-determinant in an additional column.
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
        prior = LatentMapper(self.sites, {**placed, **indices}, self.is_inverse).run_alone(model)
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


def center_elements(
    given: Coordinates, u: Tensor | None, log_joint: LogJoint, share: float
) -> float:
    """See ``MinibatchGuide.center_at``: sets lambda by the mean curvature over a mini-batch's elements."""
    latents, now = log_joint.latents, torch.ones_like(given.centered)
    if u is None:
        unit = given.unit
    else:
        density = log_joint.with_coordinates(given.for_elements(latents).non_centered())
        labels = repeated(given.latents, now.cumsum(0), latents)
        weights = torch.ones_like(labels)
        for name, part in latents.views(weights).items():
            part.fill_(share if given.latents.sites[name].plates else 1.0)
        x, _ = density.from_unconstrained(u)
        now = mean_element(latents, centered_by_curvature(density, x, labels, weights)).to(now)
        unit = _mean_scales(log_joint, u.mean(0))
    change = (now - given.centered).abs().max().item()
    given.set_(now, unit)
    return change


def center_elements_at_start(
    given: Coordinates, requested: Any, log_joint: LogJoint, share: float
) -> None:
    """Sets lambda to the user's values, or by the curvature at the elements' initial values."""
    with torch.random.fork_rng(devices=[]), poutine.block(), torch.no_grad():
        if isinstance(requested, Mapping):
            given.set_requested(requested, _mean_scales(log_joint, log_joint.start))
        else:
            center_elements(given, log_joint.start[None], log_joint, share)


def mean_start(given: Coordinates, log_joint: LogJoint) -> Tensor:
    """The mean of the elements' initial values, in coordinates."""
    latents = log_joint.latents
    return mean_element(latents, log_joint.with_coordinates(given.for_elements(latents)).start)


def _mean_scales(log_joint: LogJoint, u: Tensor) -> Tensor:
    return mean_element(log_joint.latents, log_joint.prior_scales(u).log()).exp()
