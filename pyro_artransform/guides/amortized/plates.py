# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The plates of a model: their latents, sizes and indices."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...model.density import Args, Kwargs
from ...model.sites import Latents, Site, map_bounds
from ..prototype import sites_by_name

Plates = dict[str, pyro.plate]
# vectors of elements by name of the group, shape ``batch + (latent_dim,)``
Vectors = dict[str, Tensor]
#: name of the group of global latents, which are in no plate
GLOBAL = ""


class PlateSize(NamedTuple):
    """The dimension of a plate, and its mini-batch and full sizes."""

    dim: int
    size: int
    full_size: int


PlateSizes = dict[str, PlateSize]


def plate_sizes(sites: Iterable[Site]) -> PlateSizes:
    """Sizes by name of the plates around sites, for each site the outermost first."""
    return {
        frame.name: PlateSize(frame.dim or -1, frame.size, frame.full_size or frame.size)
        for site in sites
        for frame in site.plates
    }


@dataclass(frozen=True, eq=False)
class Group:
    """Latent sites in the same plates: each element of the plates has one vector of them.

    The name is that of the innermost plate, or of all plates joined by "/" if groups share that. The global
    latents, :data:`GLOBAL`, are a group of one element.
    """

    name: str
    dims: dict[str, int]  # dimension by plate, the outermost first
    full_sizes: dict[str, int]  # number of elements by plate
    latents: Latents  # latents of one element, without plate dimensions
    parents: tuple[str, ...]  # groups in a subset of these plates, global latents included

    @property
    def num_elements(self) -> int:
        """The number of elements in all data."""
        return prod(self.full_sizes.values())

    @property
    def batch_dims(self) -> int:
        return -min(self.dims.values(), default=0)

    @property
    def plates(self) -> list[str]:
        """Plate names in the order of their dimensions, from the left."""
        return sorted(self.dims, key=self.dims.__getitem__)

    def batch_shape(self, sizes: Mapping[str, int]) -> torch.Size:
        """The batch shape of elements for these plate sizes."""
        by_dim = {dim: sizes[name] for name, dim in self.dims.items()}
        return torch.Size([by_dim.get(dim, 1) for dim in range(-self.batch_dims, 0)])

    def sizes_of(self, rows: Tensor) -> dict[str, int]:
        """The size of each plate in rows ``batch + (width,)``."""
        return {name: rows.shape[dim - 1] for name, dim in self.dims.items()}

    def select(self, rows: Tensor, indices: Mapping[str, Tensor]) -> Tensor:
        """Selects rows of elements by indices in plates."""
        for name, dim in self.dims.items():
            if name in indices:
                rows = rows.index_select(dim - 1, indices[name])
        return rows

    def check_sizes(self, expected: Mapping[str, int], got: Mapping[str, int], remedy: str) -> None:
        """Rejects plates of other sizes than expected."""
        for name in self.dims:
            if name in expected and expected[name] != got[name]:
                raise ValueError(
                    f"plate '{name}' around the sites {sorted(self.latents.sites)} has another size: "
                    f"expected {expected[name]} elements, got {got[name]}. {remedy}"
                )


class LatentLayout:
    """The latents of one element of each plate, in groups ordered after their parents, global first."""

    def __init__(self, latents: Latents) -> None:
        self.latents = latents
        members: dict[frozenset[str], list[Site]] = {}
        for site in latents.sites.values():
            members.setdefault(frozenset(plate_sizes([site])), []).append(site)
        innermost = Counter(sites[0].plates[-1].name for key, sites in members.items() if key)
        names: dict[frozenset[str], str] = {}
        self.groups: list[Group] = []
        for key in sorted(members, key=len):
            sizes = plate_sizes(members[key][:1])
            stack, start = list(sizes), -min((plate.dim for plate in sizes.values()), default=0)
            is_unique = len(stack) < 2 or innermost[stack[-1]] == 1
            names[key] = "/".join(stack[-1:] if is_unique else stack)
            group = Group(
                name=names[key],
                dims={name: plate.dim for name, plate in sizes.items()},
                full_sizes={name: plate.full_size for name, plate in sizes.items()},
                latents=Latents(replace(s, shape=s.shape[start:], plates=()) for s in members[key]),
                parents=tuple(names[other] for other in names if other < key),
            )
            self.groups.append(group)
        self.local_groups = [group for group in self.groups if group.name != GLOBAL]
        self.batch_dims = max(group.batch_dims for group in self.groups)

    def constrain(self, vectors: Vectors) -> dict[str, Tensor]:
        """Maps vectors to values of all sites, ``(n,) + site shape``.

        :param vectors: vectors by group, shape ``(n, 1, ...) + batch shape + (latent_dim,)``.
        """
        values = {}
        for group in self.groups:
            z = vectors[group.name]
            batch = z.shape[:1] + z.shape[-1 - group.batch_dims : -1]
            values.update(group.latents.constrain(z.reshape(batch + z.shape[-1:])))
        return {name: values[name] for name in self.latents.sites}

    def unconstrain_with_ladj(
        self, values: Mapping[str, object], batch_shapes: Mapping[str, torch.Size], like: Tensor
    ) -> tuple[Vectors, Tensor]:
        """Inverts :meth:`constrain`; returns vectors and the log-determinant of that, ``(n,)``.

        :param batch_shapes: the batch shape of elements by group.
        """
        whole = Latents(
            replace(site, shape=batch_shapes[group.name] + site.shape)
            for group in self.groups
            for site in group.latents.sites.values()
        )
        flat, ladj = whole.unconstrain_with_ladj(values, like.device)
        if flat.dim() != 2:
            name, site = next(iter(whole.sites.items()))
            wanted, got = tuple(site.shape), tuple(flat.shape[:-1] + site.shape)
            raise ValueError(
                f"values: expected '{name}' of shape (n,) + site shape {wanted}, got {got}"
            )
        parts, vectors = whole.split(flat), {}
        for group in self.groups:
            ones = (1,) * (self.batch_dims - group.batch_dims)
            lead = (len(flat), *ones, *batch_shapes[group.name])
            sites = group.latents.sites.values()
            z = torch.cat([parts[site.name].reshape((*lead, site.size)) for site in sites], -1)
            vectors[group.name] = z.to(like.dtype)
        return vectors, ladj


def latents_of_one_element(trace: Any) -> tuple[Latents, Tensor]:
    """The latents with plates reduced to one element, and the mean of all elements' initial values."""
    sites = sites_by_name(trace)
    for name, site in sites.items():
        for frame in site.plates:
            if frame.full_size is None or frame.full_size < 1:
                where = f"site '{name}' is in plate '{frame.name}'"
                raise ValueError(f"{where}, which has no size: expected pyro.plate(name, size)")
    if not any(site.plates for site in sites.values()):
        raise ValueError(f"got no latents in a plate, only {sorted(sites)}. Use AutoIAF")
    latents = Latents(sites.values())
    start = latents.unconstrain({name: trace.nodes[name]["value"].detach() for name in sites})
    return Latents(map(_one_element, sites.values())), mean_element(latents, start)


def mean_element(latents: Latents, z: Tensor) -> Tensor:
    """Averages a vector ``(latent_dim,)`` of all latents over plate elements."""
    parts = []
    for name, part in latents.split(z).items():
        site = latents.sites[name]
        if site.plates:
            part = part.reshape(site.batch_shape.numel(), -1).mean(0)
        parts.append(part.flatten())
    return torch.cat(parts)


def _one_element(site: Site) -> Site:
    """Reduces a site's plates to a single element, and copies the bounds of its support."""
    if not site.plates:
        return site.to(Tensor.clone)
    plates = plate_sizes([site])
    sizes = {plate.dim: plate.size for plate in plates.values()}
    expected = tuple(sizes.get(dim, 1) for dim in range(min(sizes), 0))
    if tuple(site.batch_shape) != expected:
        raise ValueError(
            f"site '{site.name}': expected the batch shape {expected} of its plates {sorted(plates)}, got "
            f"{tuple(site.batch_shape)}: other dimensions go into plates or .to_event"
        )

    def first_row(bound: Tensor) -> Tensor:
        event_shape = bound.shape[max(bound.dim() - site.event_dim, 0) :]
        rows = bound.reshape((-1, *event_shape))
        if (rows != rows[:1]).any():
            raise ValueError(
                f"the support of site '{site.name}' differs between the elements of its plates "
                f"{sorted(plates)}: draw it on a fixed scale and transform it"
            )
        return rows[0].clone()

    shape = torch.Size([1] * len(expected)) + site.shape[len(expected) :]
    return replace(site, shape=shape, support=map_bounds(site.support, first_row))


class GivenIndices(Messenger):
    """Collects the names of plates whose indices the model sets itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, message: Any) -> None:
        if site_is_subsample(message) and message["value"] is not None and not message["done"]:
            self.names.add(message["name"])

    def refuse(self, sizes: PlateSizes, guide: AutoGuide, args: Args, kwargs: Kwargs) -> None:
        """Rejects such plates, unless ``create_plates`` of the guide makes them, too."""
        names = self.names & sizes.keys()
        if names:
            with poutine.block():
                names -= plates_of_user(guide, args, kwargs).keys()
        for name in sorted(names):
            dim, size, full_size = sizes[name]
            raise ValueError(
                f"the model sets the indices of plate '{name}' itself ({size} of {full_size}): expected "
                f"create_plates=lambda ...: pyro.plate('{name}', {full_size}, subsample=..., dim={dim}), of "
                "the model's arguments, with these indices"
            )


def compare_elements(expected: Site, got: Site) -> None:
    """Rejects a site in other plates than at set-up, or with elements of another shape."""
    if not (expected.plates or got.plates) and expected.shape != got.shape:
        raise ValueError(
            f"site '{got.name}' is in no plate, and its shape changes with the data: expected "
            f"{tuple(expected.shape)}, got {tuple(got.shape)}. Draw it in a pyro.plate over the data"
        )
    plates = [sorted(plate_sizes([site])) for site in (expected, got)]
    shapes = [tuple(site.shape[len(site.batch_shape) :]) for site in (expected, got)]
    if plates[0] != plates[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"site '{got.name}': expected elements of shape {shapes[0]} in the plates {plates[0]}, got "
            f"{shapes[1]} in {plates[1]}"
        )


def plates_were_dropped(*args: object, **kwargs: object) -> Plates:
    """Replaces ``create_plates`` in a pickled guide; raises an error."""
    raise RuntimeError("this guide has no create_plates, which pickle drops: set it anew")


def plates_of_user(guide: AutoGuide, args: Args, kwargs: Kwargs) -> Plates:
    """The plates that ``create_plates`` of a guide, or of its list, returns, by name."""
    maker = guide if guide.master is None else guide.master()
    made = [] if maker.create_plates is None else maker.create_plates(*args, **kwargs)
    plates = [made] if isinstance(made, pyro.plate) else list(made)
    for plate in plates:
        if not isinstance(plate, pyro.plate):
            wanted, got = "it to return a pyro.plate or several", type(plate).__name__
            raise TypeError(f"create_plates: expected {wanted}, got {got}")
    return {plate.name: plate for plate in plates}


@contextmanager
def entered(plates: Iterable[pyro.plate]) -> Iterator[None]:
    """A context in which all of these plates are entered."""
    with ExitStack() as stack:
        for plate in plates:
            stack.enter_context(plate)
        yield


def complete_plates(of_user: Plates, sizes: PlateSizes, device: torch.device) -> Plates:
    """Sets dimensions of the user's plates, and makes the missing plates on the device."""
    plates = dict(of_user)
    for name, (dim, size, full_size) in sorted(sizes.items()):
        if name not in plates:
            plates[name] = pyro.plate(name, full_size, size, dim=dim, device=str(device))
        plate = plates[name]
        if plate.dim is None:
            plate.dim = dim
        got, expected = (plate.size, plate.subsample_size, plate.dim), (full_size, size, dim)
        if got != expected:
            raise ValueError(
                f"create_plates: expected plate '{name}' of (size, subsample size, dim) {expected}, "
                f"as the model has it for these arguments, got {got}"
            )
    return plates
