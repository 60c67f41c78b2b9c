# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which latents of a model are global, and which are local to the elements of its plates."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from .legacy.sites.packing import unconstrained_shape
from .legacy.sites.records import Site, change_tensors, describe_support, latent_site, latent_sites

Frame = Any  # the frame of a plate, as Pyro's traces hold it


class Group(NamedTuple):
    """The latent sites that are in the same plates: each element of these has one vector of them.

    :param name: that of the innermost plate, or of all plates joined by "/" where another group has
        that name already.
    :param dims: the dimension of each plate, by its name; the outermost plate first.
    :param sites: the sites, each of a single element: their batch dimensions have size 1.
    :param parents: the names of the groups in a part of these plates, whose elements these
        elements belong to.
    """

    name: str
    dims: dict[str, int]
    sites: dict[str, Site]
    parents: tuple[str, ...]

    @property
    def latent_dim(self) -> int:
        """The number of unconstrained numbers of one element."""
        return sum(unconstrained_shape(site).numel() for site in self.sites.values())

    @property
    def num_elements(self) -> int:
        """How many elements there are, those outside of the mini-batch included."""
        return prod(f.full_size for f in next(iter(self.sites.values()))["cond_indep_stack"])

    @property
    def batch_dims(self) -> int:
        """The number of batch dimensions, with those of size 1."""
        return -min(self.dims.values())

    @property
    def plates(self) -> list[str]:
        """The names of the plates, as their dimensions follow each other from the left."""
        return sorted(self.dims, key=self.dims.__getitem__)

    def batch_shape(self, sizes: Mapping[str, int]) -> torch.Size:
        """The batch shape of the sites, given the size of each plate.

        :param sizes: sizes by the names of plates.
        """
        by_dim = {dim: sizes[name] for name, dim in self.dims.items()}
        return torch.Size([by_dim.get(dim, 1) for dim in range(-self.batch_dims, 0)])

    def split(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """Each site with its unconstrained part.

        :param latent: shape ``batch + (latent_dim,)``.
        :return: pairs of a site and a tensor of shape ``batch + unconstrained event shape``.
        """
        start = 0
        for site in self.sites.values():
            shape = unconstrained_shape(site)[self.batch_dims :]
            part = latent[..., start : start + prod(shape)]
            start += prod(shape)
            yield site, part.reshape(latent.shape[:-1] + shape).to(site["value"].dtype)


class Layout(NamedTuple):
    """The latents of a model, sorted.

    :param globals: a trace of those in no plate.
    :param groups: those in plates; a group comes after its parents.
    """

    globals: poutine.Trace
    groups: list[Group]

    @property
    def batch_dims(self) -> int:
        """The largest number of batch dimensions of a group."""
        return max(group.batch_dims for group in self.groups)


def layout(prototype: poutine.Trace) -> Layout:
    """Sorts the latent sites of a prototype trace.

    :param prototype: what :func:`one_element` made of a trace.
    """
    together: dict[frozenset[str], dict[str, Site]] = {}
    globals_ = poutine.Trace()
    for name, site in latent_sites(prototype).items():
        if site["cond_indep_stack"]:
            together.setdefault(plates_of(site), {})[name] = site
        else:
            globals_.add_node(name, **site)
    together = dict(sorted(together.items(), key=lambda item: len(item[0])))
    names = _names(together)
    groups = []
    for plates, sites in together.items():
        dims = {f.name: f.dim for f in next(iter(sites.values()))["cond_indep_stack"]}
        parents = tuple(names[other] for other in together if other < plates)
        groups.append(Group(names[plates], dims, sites, parents))
    return Layout(globals_, groups)


def plates_of(site: Site) -> frozenset[str]:
    """The names of the plates that a site is in."""
    return frozenset(frame.name for frame in site["cond_indep_stack"])


def frames_of(trace: poutine.Trace, names: Collection[str]) -> dict[str, Frame]:
    """The frames of the plates around some sites, by the names of the plates.

    :param trace: a trace.
    :param names: the names of the sites that count.
    """
    sites = (site for name, site in latent_sites(trace).items() if name in names)
    return {frame.name: frame for site in sites for frame in site["cond_indep_stack"]}


def _names(together: dict[frozenset[str], dict[str, Site]]) -> dict[frozenset[str], str]:
    """What to call the groups, by their plates."""
    stacks = {
        plates: [frame.name for frame in next(iter(sites.values()))["cond_indep_stack"]]
        for plates, sites in together.items()
    }
    count = Counter(stack[-1] for stack in stacks.values())
    return {
        plates: stack[-1] if count[stack[-1]] == 1 or len(stack) == 1 else "/".join(stack)
        for plates, stack in stacks.items()
    }


def one_element(trace: poutine.Trace) -> poutine.Trace:
    """The latent sites of a trace with no more than a guide needs, of a single element of each plate.

    :param trace: a trace of a model.
    :raises ValueError: if a site in a plate has batch dimensions that are no plates, or its support
        is not the same for every element.
    """
    slim = poutine.Trace()
    for name, site in latent_sites(trace).items():
        value, support, stack = site["value"].detach(), site["fn"].support, site["cond_indep_stack"]
        if stack:
            _check_batch(site)
            value = value[(slice(0, 1),) * -min(frame.dim for frame in stack)]
        support = change_tensors(support, _common_bound(site) if stack else _copied)
        slim.add_node(
            name, **latent_site(name, value.clone(), site["fn"].event_dim, support, stack)
        )
    return slim


def starting_points(trace: poutine.Trace, groups: list[Group]) -> dict[str, Tensor]:
    """The mean over all elements of the unconstrained values of each group.

    :param trace: a trace of a model at its starting values.
    :param groups: its groups.
    :return: by the names of the groups, shape ``(latent_dim,)``.
    """
    return {
        group.name: torch.cat([_mean_start(trace.nodes[name]) for name in group.sites])
        for group in groups
    }


def _mean_start(site: Site) -> Tensor:
    value: Tensor = site["value"].detach()
    latent = biject_to(site["fn"].support).inv(value)
    if not latent.isfinite().all():
        raise ValueError(
            f"site '{site['name']}': expected starting values inside its support, got "
            f"{value.tolist()}"
        )
    batch = latent.shape[: value.dim() - site["fn"].event_dim]
    return latent.reshape((batch.numel(), -1)).mean(0)


def _check_batch(site: Site) -> None:
    batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"]}
    expected = tuple(sizes.get(dim, 1) for dim in range(min(sizes), 0))
    if tuple(batch) != expected:
        raise ValueError(
            f"site '{site['name']}': expected the batch shape {expected} of its plates "
            f"{sorted(plates_of(site))}, got {tuple(batch)}. Draw the other dimensions in plates "
            "of their own, or make them event dimensions by .to_event"
        )


def _copied(bound: Tensor) -> Tensor:
    return bound.detach().clone()


def _common_bound(site: Site) -> Callable[[Tensor], Tensor]:
    """Takes the batch dimensions from a bound of a support, along which it may not change."""

    def change(bound: Tensor) -> Tensor:
        event_shape = bound.shape[max(bound.dim() - site["fn"].event_dim, 0) :]
        rows = bound.detach().reshape((-1, *event_shape))
        if (rows != rows[:1]).any():
            raise ValueError(
                f"the support of site '{site['name']}' differs between the elements of its plates "
                f"{sorted(plates_of(site))}: expected the same for all, got "
                f"{describe_support(site['fn'].support)}. Draw it on a fixed scale and transform it"
            )
        return rows[0].clone()

    return change
