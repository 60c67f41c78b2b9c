# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Between one vector of all latents and the constrained value of each site, for draws in a batch.

Pyro's own unpacking serves a guide's call, where batch dimensions are plates. Here a batch is
draws: its shape goes in front of the whole shape of the site.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform, biject_to

from ...univariate.base import values_can_be_read
from ..flow_factory import to_tensor
from .records import Site, describe_support, latent_sites

Values = dict[str, Tensor]

# torch.quantile takes no more than 2**24 numbers at a time
_QUANTILE_NUMBERS = 2**23


def unconstrained_shape(site: Site) -> torch.Size:
    """The shape of a site's value on the unconstrained space."""
    shape: torch.Size = _bijection(site).inverse_shape(site["value"].shape)
    return shape


def split(prototype: poutine.Trace, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
    """Each site with its part of the latent vector, in the site's dtype.

    :param prototype: a guide's prototype trace.
    :param latent: shape ``batch + (latent_dim,)``.
    :return: pairs of a site and a tensor of shape ``batch + unconstrained shape``.
    """
    start = 0
    for site in latent_sites(prototype).values():
        shape = unconstrained_shape(site)
        part = latent[..., start : start + prod(shape)]
        start += prod(shape)
        yield site, part.reshape(latent.shape[:-1] + shape).to(site["value"].dtype)


def constrain(prototype: poutine.Trace, latent: Tensor) -> Values:
    """The values of all sites, each of shape ``batch + site shape``.

    :param prototype: a guide's prototype trace.
    :param latent: shape ``batch + (latent_dim,)``.
    """
    return {site["name"]: _bijection(site)(z) for site, z in split(prototype, latent)}


def unconstrain(prototype: poutine.Trace, values: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The latent vector, and the log-determinant of :func:`constrain` at it.

    :param prototype: a guide's prototype trace.
    :param values: the values of all sites, each of shape ``batch + site shape``; arrays and lists
        become tensors of the site's dtype and device.
    :return: shapes ``batch + (latent_dim,)`` and ``batch``.
    :raises ValueError: if a site is missing or unknown, or a value has another shape or (where
        Pyro's validation is on) is outside its support.
    """
    sites = latent_sites(prototype)
    if values.keys() != sites.keys():
        raise ValueError(f"values: expected the sites {sorted(sites)}, got {sorted(values)}")
    given = {k: to_tensor(f"values['{k}']", values[k], s["value"]) for k, s in sites.items()}
    batch = _batch_shape(sites, given)
    if not batch.numel():
        return _of_no_draws(sites, given, batch)
    _check_supports(sites, given)
    latents, ladjs = [], []
    for name, site in sites.items():
        bijection = _bijection(site)
        z = bijection.inv(given[name])
        ladj = bijection.log_abs_det_jacobian(z, given[name])
        latents.append(z.reshape((*batch, -1)))
        ladjs.append(ladj.reshape((*batch, -1)))
    return torch.cat(latents, -1), torch.cat(ladjs, -1).sum(-1)


def _of_no_draws(
    sites: Mapping[str, Site], values: Values, batch: torch.Size
) -> tuple[Tensor, Tensor]:
    # torch's bijections and supports fail where there is nothing to sum
    latent_dim = sum(unconstrained_shape(site).numel() for site in sites.values())
    like = next(iter(values.values()))
    return like.new_zeros((*batch, latent_dim)), like.new_zeros(batch)


def _batch_shape(sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> torch.Size:
    first = next(iter(sites))
    batch = values[first].shape[: max(values[first].dim() - sites[first]["value"].dim(), 0)]
    for name, site in sites.items():
        expected, got = batch + site["value"].shape, values[name].shape
        if got != expected:
            raise ValueError(
                f"values: expected '{name}' of shape {tuple(expected)}, got {tuple(got)}"
            )
    return batch


def _check_supports(sites: Mapping[str, Site], values: Mapping[str, Tensor]) -> None:
    if not dist.is_validation_enabled():
        return
    for name, site in sites.items():
        if not values_can_be_read(values[name]):
            continue
        inside = site["fn"].support.check(values[name])
        if not inside.all():
            raise ValueError(
                f"values: expected '{name}' inside its support "
                f"{describe_support(site['fn'].support)}, got {values[name][~inside][0].tolist()}"
            )


def _bijection(site: Site) -> Transform:
    bijection: Transform = biject_to(site["fn"].support)
    return bijection


def check_levels(quantiles: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Quantile levels as a vector.

    :param quantiles: numbers between 0 and 1.
    :param like: a tensor of the dtype (float32 in place of a shorter one) and device wanted.
    :raises ValueError: if one of them is not between 0 and 1, or there is none.
    """
    levels = torch.as_tensor(quantiles, dtype=_full(like.dtype), device=like.device).reshape(-1)
    if not len(levels) or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"quantiles: expected numbers between 0 and 1, got {levels.tolist()}")
    return levels


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """The quantiles of each coordinate over draws.

    :param draws: shape ``(n, *)``.
    :param levels: shape ``(q,)``.
    :return: shape ``(q, *)``.
    """
    columns = draws.reshape(len(draws), -1).split(max(1, _QUANTILE_NUMBERS // len(draws)), dim=1)
    dtype = _full(draws.dtype)
    levels = levels.to(dtype)
    found = torch.cat([torch.quantile(part.to(dtype), levels, dim=0) for part in columns], dim=1)
    return found.reshape(levels.shape + draws.shape[1:]).to(draws.dtype)


def _full(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 for one of half precision, in which torch has no quantiles."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
