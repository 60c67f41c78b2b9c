# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Between the values of all sites and the latent vectors of globals and elements."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from .layout import Group, Layout
from .legacy.flow_factory import to_tensor
from .legacy.sites.packing import constrain, unconstrain, unconstrained_shape
from .legacy.sites.records import Site, latent_site, latent_sites

Values = dict[str, Tensor]
Plates = dict[str, pyro.plate]


def delta(site: Site, latent: Tensor) -> dist.Delta:
    """The distribution of a site's value, given its unconstrained value: a point.

    :param site: a site.
    :param latent: shape ``batch + unconstrained event shape``.
    """
    bijection, event_dim = biject_to(site["fn"].support), site["fn"].event_dim
    value = bijection(latent)
    if poutine.get_mask() is False:
        return dist.Delta(value, event_dim=event_dim)
    ladj = bijection.log_abs_det_jacobian(latent, value)
    batch = value.shape[: value.dim() - event_dim]
    log_density = -ladj.reshape(batch + (-1,)).sum(-1)
    return dist.Delta(value, log_density=log_density, event_dim=event_dim)


def inside(plates: Plates, names: Iterable[str]) -> ExitStack:
    """Some of the plates, to be entered together."""
    stack = ExitStack()
    for name in names:
        stack.enter_context(plates[name])
    return stack


def sample_sites(parts: Iterable[tuple[Site, Tensor]], plates: Plates) -> dict[str, Tensor]:
    """The sample statements of sites at their unconstrained values."""
    values = {}
    for site, latent in parts:
        with inside(plates, [frame.name for frame in site["cond_indep_stack"]]):
            values[site["name"]] = pyro.sample(site["name"], delta(site, latent))
    return values


def batch_shape_of(group: Group, values: Mapping[str, Tensor]) -> torch.Size:
    """The batch shape of the elements that there are values of.

    :param group: a group of local latents.
    :param values: for each site a tensor of shape ``(n,) + site shape``.
    """
    name, site = next(iter(group.sites.items()))
    shape = values[name].shape
    return shape[1 : len(shape) - site["fn"].event_dim]


def split_globals(layout: Layout, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
    """Each global site with its unconstrained part, in the batch of a guide's call.

    :param layout: the layout of the latents.
    :param latent: shape ``batch + (D,)``; the batch is that of plates around the guide.
    """
    start = 0
    for site in latent_sites(layout.globals).values():
        shape = unconstrained_shape(site)
        event_dim = len(shape) - len(site["fn"].batch_shape)
        part = latent[..., start : start + prod(shape)]
        start += prod(shape)
        shape = torch.broadcast_shapes(shape, latent.shape[:-1] + (1,) * event_dim)
        yield site, part.reshape(shape).to(site["value"].dtype)


def to_values(layout: Layout, latent: Tensor | None, drawn: Mapping[str, Tensor]) -> Values:
    """The values of all sites.

    :param layout: the layout of the latents.
    :param latent: the globals, shape ``(n, 1, ..., D)``.
    :param drawn: the locals of each group, shape ``(n, 1, ...) + batch shape + (D,)``.
    :return: for each site a tensor of shape ``(n,) + site shape``.
    """
    values = Values()
    if latent is not None:
        values.update(constrain(layout.globals, latent.reshape(len(latent), latent.shape[-1])))
    for group in layout.groups:
        z = drawn[group.name]
        batch = z.shape[:1] + z.shape[-1 - group.batch_dims : -1]
        for site, part in group.split(z.reshape(batch + z.shape[-1:])):
            values[site["name"]] = biject_to(site["fn"].support)(part)
    return values


def from_values(
    layout: Layout, values: Mapping[str, Any], batch_shapes: Mapping[str, torch.Size]
) -> tuple[Tensor | None, dict[str, Tensor], Tensor]:
    """The latents of the values of all sites, and the log-determinant of :func:`to_values` there.

    :param layout: the layout of the latents.
    :param values: for each site a tensor, array or list of shape ``(n,) + site shape``.
    :param batch_shapes: the batch shape of the elements of each group.
    :return: the globals and the locals, as :func:`to_values` takes them, and a tensor of shape
        ``(n,)``.
    :raises ValueError: if a site is missing or unknown, or a value has another shape.
    """
    sites = {**latent_sites(layout.globals)}
    for group in layout.groups:
        sites.update(group.sites)
    if values.keys() != sites.keys():
        raise ValueError(f"values: expected the sites {sorted(sites)}, got {sorted(values)}")
    latent, drawn, ladjs, lead = None, {}, [], (1,) * layout.batch_dims
    given = {k: to_tensor(f"values['{k}']", values[k], s["value"]) for k, s in sites.items()}
    if globals_ := latent_sites(layout.globals):
        flat, ladj = unconstrain(layout.globals, {name: given[name] for name in globals_})
        latent = _one_batch(next(iter(globals_)), flat).reshape(-1, *lead, flat.shape[-1])
        ladjs.append(ladj)
    for group in layout.groups:
        batch, parts = batch_shapes[group.name], []
        for name, site in group.sites.items():
            flat, ladj = unconstrain(_trace_of(site, batch), {name: given[name]})
            flat = _one_batch(name, flat)
            ones = lead[: layout.batch_dims - group.batch_dims]
            parts.append(flat.reshape(len(flat), *ones, *batch, -1))
            ladjs.append(ladj)
        drawn[group.name] = torch.cat(parts, -1)
    return latent, drawn, _sum(ladjs, values)


def _one_batch(name: str, flat: Tensor) -> Tensor:
    if flat.dim() != 2:
        raise ValueError(
            f"values: expected '{name}' of shape (n,) + site shape, got {flat.dim() - 1} dimensions "
            "before those of the site"
        )
    return flat


def _sum(ladjs: list[Tensor], values: Mapping[str, Any]) -> Tensor:
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"values: expected as many draws of each site, got {lengths}")
    return torch.stack([ladj.to(ladjs[0].dtype) for ladj in ladjs]).sum(0)


def _trace_of(site: Site, batch_shape: torch.Size) -> poutine.Trace:
    """A trace of one site, of all elements."""
    trace, event_dim = poutine.Trace(), site["fn"].event_dim
    value = site["value"].expand(batch_shape + site["fn"].event_shape)
    stack = site["cond_indep_stack"]
    trace.add_node(
        site["name"], **latent_site(site["name"], value, event_dim, site["fn"].support, stack)
    )
    return trace
